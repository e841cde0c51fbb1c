//! The CPUs of workers: which a pool chooses, which it refuses, and which worker a fault of a shard wakes.

use crate::contention::is_idle;
use crate::machine::rounds;
use crate::{PAGE, serve_until, spawn_asleep, until};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use pagestitch::{BuildOption, Chunk, ErrorKind, Manual, Placement, Pool, Readahead, Region, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

const BLOCK: usize = 2 << 20;

/// The CPUs on which a thread may run, by default the calling one.
fn cpus_of(thread: Pid) -> Vec<usize> {
    let set = sched_getaffinity(thread).unwrap();
    (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)).collect()
}

fn own_cpus() -> Vec<usize> {
    cpus_of(Pid::from_raw(0))
}

fn pin_to(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// The CPUs of this process, if there are several.
fn several_cpus(test: &str) -> Option<Vec<usize>> {
    let cpus = own_cpus();
    if cpus.len() < 2 {
        println!("SKIPPED {test}: the process has a single CPU");
        return None;
    }
    Some(cpus)
}

/// A source that notes the CPUs of the thread that fills a page.
#[derive(Debug)]
struct Noting {
    source: Scripted,
    /// The offset of each page, and the CPUs.
    fills: Mutex<Vec<(u64, Vec<usize>)>>,
}

impl Noting {
    fn new(source: Scripted) -> Arc<Self> {
        Arc::new(Self { source, fills: Mutex::default() })
    }

    /// The CPUs of the thread that has filled a page.
    fn cpus_at(&self, offset: usize) -> Vec<usize> {
        let fills = self.fills.lock().unwrap();
        fills.iter().find(|fill| fill.0 == offset as u64).expect("the page is filled").1.clone()
    }
}

impl Source for Noting {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.fills.lock().unwrap().push((offset, own_cpus()));
        self.source.read_at(offset, into)
    }
}

/// A fault wakes one worker, the home of its shard where that is idle; also after the home has read as many events as
/// fit into a batch, and has left the rest to another look.
#[test]
fn a_fault_in_an_idle_pool_is_served_by_the_home_of_its_shard() {
    let Some(mut cpus) = several_cpus(this_test!()) else { return };
    cpus.truncate(4);
    let pool = Pool::builder().placement(Placement::Cpus(cpus.clone())).name("homes").start().unwrap();
    for _ in 0..rounds(5) {
        let border = BLOCK as u64;
        let held = border - PAGE as u64..border + PAGE as u64;
        let source = Noting::new(Scripted::new((cpus.len() * BLOCK) as u64).holding(held));
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).shards(cpus.len());
        let region = builder.readahead(Readahead::None).build(&pool).unwrap();
        let homes: Vec<_> = region.shards().iter().map(|shard| shard.cpu).collect();
        assert_eq!(homes, cpus.iter().copied().map(Some).collect::<Vec<_>>());
        assert_homes_serve(&region, &source, &cpus, 1);
        fill_batches(&region, &source.source);
        assert_homes_serve(&region, &source, &cpus, 100);
    }
}

/// Touches pages of each shard, from a page of the shard on, whenever no worker has work.
fn assert_homes_serve(region: &Region, source: &Noting, cpus: &[usize], first: usize) {
    const TOUCHES: usize = 8;
    for (shard, &cpu) in cpus.iter().enumerate() {
        let offsets = (first..first + TOUCHES).map(|page| shard * BLOCK + page * PAGE);
        let at_home = offsets.filter(|&at| {
            until(|| is_idle("homes"));
            assert_eq!(region.as_slice()[at], byte_at(at as u64), "byte {at}");
            source.cpus_at(at) == [cpu]
        });
        // The system may hold up a worker at any time.
        let at_home = at_home.count();
        assert!(at_home > TOUCHES / 2, "shard {shard}: its home has served {at_home} of {TOUCHES} faults");
    }
}

/// More threads than a batch has events touch pages of two shards while the source holds up their homes.
fn fill_batches(region: &Region, source: &Scripted) {
    const THREADS: usize = 100;
    let ready = &Barrier::new(2 * THREADS + 1);
    scope(|scope| {
        let mut threads = Vec::new();
        for thread in 0..2 * THREADS {
            let at = (thread % 2) * BLOCK + (200 + thread / 2) * PAGE;
            threads.push(scope.spawn(move || {
                ready.wait();
                assert_eq!(region.as_slice()[at], byte_at(at as u64), "byte {at}");
            }));
        }
        let held = [BLOCK - PAGE, BLOCK];
        for at in held {
            threads.push(scope.spawn(move || assert_eq!(region.as_slice()[at], byte_at(at as u64))));
        }
        source.wait_until_held(held.len());
        ready.wait();
        // Replacements of the workers serve these pages.
        for thread in threads.drain(..2 * THREADS) {
            thread.join().unwrap();
        }
        source.release();
    });
}

/// More events than a server reads of one shard before it serves others are left for another look, which needs no
/// further event.
#[test]
fn a_shard_with_many_waiting_threads_is_read_to_the_end() {
    const THREADS: usize = 8 * 64 + 8;
    let mut manual = Manual::new().unwrap();
    let builder = Region::builder().chunk(vec![7u8; 4 * BLOCK]).shards(2).readahead(Readahead::None);
    let region = builder.build(&manual).unwrap();
    assert_eq!(region.shards().len(), 2);
    let (bytes, ended) = (region.as_slice(), &AtomicUsize::new(0));
    scope(|scope| {
        for page in 0..THREADS {
            spawn_asleep(scope, move || {
                assert_eq!(bytes[page * PAGE], 7, "page {page}");
                ended.fetch_add(1, Ordering::SeqCst);
            });
        }
        serve_until(&mut manual, THREADS, || ended.load(Ordering::SeqCst) == THREADS);
    });
}

/// The CPUs of the worker that fills the only page of a region.
fn cpus_of_worker(pool: &Pool) -> Vec<usize> {
    let source = Noting::new(Scripted::new(PAGE as u64));
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(pool).unwrap();
    assert_eq!(region.as_slice()[7], byte_at(7));
    source.cpus_at(0)
}

#[test]
fn a_pinned_thread_starts_a_pool_for_all_cpus_of_the_process() {
    let Some(cpus) = several_cpus(this_test!()) else { return };
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    let workers = Pool::new().unwrap().workers();
    scope(|scope| {
        let pinned = scope.spawn(|| {
            pin_to(first);
            assert_eq!(Pool::new().unwrap().workers(), workers);
            let start = |placement| Pool::builder().placement(placement).start();
            assert_eq!(cpus_of_worker(&start(Placement::Cpus(vec![last])).unwrap()), [last]);
            assert_eq!(start(Placement::PerCpu).unwrap().workers(), cpus.len());
            assert_eq!(cpus_of_worker(&start(Placement::Anywhere).unwrap()), cpus);
            assert_eq!(own_cpus(), [first], "the thread itself stays where it is");
        });
        pinned.join().unwrap();
    });
}

/// A process inherits the CPUs of the thread that starts it, as it does from `taskset(1)`.
#[test]
fn a_process_that_starts_on_one_cpu_keeps_to_it() {
    let test = this_test!();
    let body = child::body(test, |cpus| {
        let cpus: Vec<_> = cpus.split(' ').map(|cpu| cpu.parse().unwrap()).collect();
        assert_eq!(own_cpus(), cpus[..1]);
        let pool = Pool::new().unwrap();
        assert_eq!((pool.workers(), &*cpus_of_worker(&pool)), (1, &cpus[..1]));
        for placement in [Placement::PerCpu, Placement::Anywhere] {
            let pool = Pool::builder().placement(placement).start().unwrap();
            assert_eq!((pool.workers(), &*cpus_of_worker(&pool)), (1, &cpus[..1]));
        }
        let error = Pool::builder().placement(Placement::Cpus(cpus)).start().unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Placement)));
    });
    let Some(cpus) = several_cpus(test) else { return };
    scope(|scope| {
        scope.spawn(|| {
            pin_to(cpus[0]);
            body.spawn(format!("{} {}", cpus[0], cpus[1])).wait().expect_pass();
        });
    });
}
