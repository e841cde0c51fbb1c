//! The CPUs of workers: which a pool chooses, and which it refuses.

use crate::PAGE;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use pagestitch::{BuildOption, Chunk, ErrorKind, Placement, Pool, Region, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::io;
use std::sync::{Arc, Mutex};

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
