//! The threads that fill pages in a call: the caller alone, or as many as the builder asks for.

use crate::guests::{adopt, lacks_poison};
use pagestitch::{Builder, Chunk, Eager, Manual, Pool, Region, Server, SharedRegion, Source};
use pagestitch_testkit::guest::Guest;
use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, ThreadId};
use std::{fs, io};

/// Enough for helper threads in each call.
const BYTES: usize = 36 << 20;

/// A source that notes its readers. Each read waits until so many different threads have read.
struct Witness {
    readers: Mutex<HashSet<ThreadId>>,
    came: Condvar,
    awaited: usize,
}

impl Witness {
    fn awaiting(awaited: usize) -> Arc<Self> {
        Arc::new(Self { readers: Mutex::default(), came: Condvar::new(), awaited })
    }

    fn readers(&self) -> HashSet<ThreadId> {
        self.readers.lock().unwrap().clone()
    }
}

impl Source for Witness {
    fn size(&self) -> u64 {
        BYTES as u64
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut readers = self.readers.lock().unwrap();
        readers.insert(thread::current().id());
        self.came.notify_all();
        drop(self.came.wait_while(readers, |readers| readers.len() < self.awaited).unwrap());
        into.fill(7);
        Ok(())
    }
}

fn builder(source: &Arc<Witness>, threads: usize) -> Builder {
    Region::builder().chunk(Chunk::source(Arc::clone(source) as Arc<dyn Source>)).populate_threads(threads)
}

fn only_caller() -> HashSet<ThreadId> {
    HashSet::from([thread::current().id()])
}

/// Has a region of one thread filled, and checks which thread read.
fn fills_alone<R>(build: impl Fn(Builder) -> R, fill: impl Fn(&R)) {
    let source = Witness::awaiting(1);
    fill(&build(builder(&source, 1)));
    assert_eq!(source.readers(), only_caller());
}

fn servers() -> (Pool, Manual) {
    (Pool::new().unwrap(), Manual::new().unwrap())
}

#[test]
fn a_populate_in_one_thread_reads_in_the_calling_thread_only() {
    let (pool, manual) = servers();
    for server in [Server::from(&pool), Server::from(&manual)] {
        fills_alone(
            |builder| builder.build(server.clone()).unwrap(),
            |region| {
                region.populate(..).unwrap();
                assert_eq!(region.as_slice()[BYTES - 1], 7);
            },
        );
    }
}

#[test]
fn a_read_in_one_thread_reads_in_the_calling_thread_only() {
    let (pool, manual) = servers();
    let bytes = || vec![0; BYTES];
    for server in [Server::from(&pool), Server::from(&manual)] {
        fills_alone(
            |builder| builder.build(server.clone()).unwrap(),
            |region| region.read_at(0, &mut bytes()).unwrap(),
        );
        fills_alone(
            |builder| builder.build_shared(server.clone()).unwrap(),
            |region: &SharedRegion| region.read_at(0, &mut bytes()).unwrap(),
        );
    }
}

#[test]
fn a_populate_of_adopted_memory_in_one_thread_reads_in_the_calling_thread_only() {
    if lacks_poison("a_populate_of_adopted_memory_in_one_thread_reads_in_the_calling_thread_only") {
        return;
    }
    let (pool, guest) = (Pool::new().unwrap(), Guest::new(&[BYTES], false).unwrap());
    fills_alone(
        |builder| builder.build_adopted(adopt(&guest), &pool).unwrap(),
        |region| region.populate(..).unwrap(),
    );
}

#[test]
fn an_eager_build_in_one_thread_reads_in_the_calling_thread_only() {
    fills_alone(
        |builder| builder.build(Eager).unwrap(),
        |region| assert_eq!(region.as_slice()[BYTES - 1], 7),
    );
}

#[test]
fn a_populate_has_as_many_threads_as_the_builder_asks_for() {
    let (source, pool) = (Witness::awaiting(6), Pool::new().unwrap());
    let region = builder(&source, 6).build(&pool).unwrap();
    region.populate(..).unwrap();
    assert_eq!(source.readers().len(), 6);
    assert!(source.readers().is_superset(&only_caller()));
}

#[test]
fn an_eager_build_has_as_many_threads_as_the_builder_asks_for_below_its_limit() {
    let source = Witness::awaiting(6);
    builder(&source, 6).build(Eager).unwrap();
    assert_eq!(source.readers().len(), 6);
    let source = Witness::awaiting(2);
    builder(&source, 6).max_in_flight(2).build(Eager).unwrap();
    assert_eq!(source.readers().len(), 2);
}

/// The number of reads of files by this thread so far; `None` if the kernel does not count them.
fn reads_of_files() -> Option<u64> {
    let counts = fs::read_to_string("/proc/thread-self/io").ok()?;
    counts.lines().find_map(|line| line.strip_prefix("syscr: "))?.parse().ok()
}

#[test]
fn a_small_populate_does_not_ask_for_the_number_of_cpus() {
    let pool = Pool::new().unwrap();
    let region = Region::builder().chunk(vec![7u8; 100_000]).build(&pool).unwrap();
    region.populate(..).unwrap();
    let Some(before) = reads_of_files() else {
        println!("SKIPPED a_small_populate_does_not_ask_for_the_number_of_cpus: no /proc/thread-self/io");
        return;
    };
    for _ in 0..100 {
        region.populate(..4096).unwrap();
    }
    // The standard library reads files of cgroups for it.
    let reads = reads_of_files().unwrap() - before;
    assert!(reads < 100, "{reads} reads of files in 100 calls");
}
