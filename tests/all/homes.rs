//! The CPUs of workers: which a pool chooses, which it refuses, and which worker a fault of a shard wakes.

use crate::contention::is_idle;
use crate::machine::rounds;
use crate::{PAGE, comes_true, discard, serve_until, spawn_asleep, touch, until};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, geteuid};
use pagestitch::{BuildOption, Chunk, ErrorKind, Manual, Placement, Pool, Readahead, Region, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::{fs, io, process};

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

/// A cpuset of the kernel, without processes at first.
struct Cpuset(PathBuf);

impl Cpuset {
    /// A cpuset within that of this process. Prints a line where there can be none.
    fn or_skip(test: &str) -> Option<Self> {
        let made = geteuid().is_root().then(|| Self::make(test)).flatten();
        if made.is_none() {
            println!("SKIPPED {test}: no cpuset can be made here (root, and a controller that may be used)");
        }
        made
    }

    fn make(test: &str) -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mut group = groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
        // Version 1 has a hierarchy of its own for it. In version 2, the parent hands it down or does not.
        let v1 = group.clone().find(|(controllers, _)| controllers.split(',').any(|name| name == "cpuset"));
        let (root, parent) = match v1 {
            Some((_, parent)) => ("/sys/fs/cgroup/cpuset", parent),
            None => ("/sys/fs/cgroup", group.find(|(controllers, _)| controllers.is_empty())?.1),
        };
        let parent = Path::new(root).join(parent.trim_start_matches('/'));
        let made = Self(parent.join(format!("{}-{}", test.replace("::", "-"), process::id())));
        fs::create_dir(&made.0).ok()?;
        let mems = ["cpuset.mems.effective", "cpuset.effective_mems"];
        let mems = mems.iter().find_map(|name| fs::read_to_string(parent.join(name)).ok());
        fs::write(made.0.join("cpuset.mems"), mems?).ok()?;
        made.set(&own_cpus()).ok()?;
        Some(made)
    }

    fn set(&self, cpus: &[usize]) -> io::Result<()> {
        let list: Vec<_> = cpus.iter().map(usize::to_string).collect();
        fs::write(self.0.join("cpuset.cpus"), list.join(","))
    }

    /// Moves this process with all its threads into the cpuset.
    fn enter(&self) {
        fs::write(self.0.join("cgroup.procs"), process::id().to_string()).unwrap();
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        // Refused until the processes in it have ended.
        comes_true(|| fs::remove_dir(&self.0).is_ok() || !self.0.exists());
    }
}

/// Runs a test in a child with the path of a cpuset, which has all CPUs of this process.
fn in_cpuset(test: &'static str, body: impl FnOnce(&Cpuset)) {
    let body = child::body(test, |path| {
        let cpuset = ManuallyDrop::new(Cpuset(PathBuf::from(path)));
        body(&cpuset);
    });
    if several_cpus(test).is_none() {
        return;
    }
    let Some(cpuset) = Cpuset::or_skip(test) else { return };
    body.spawn(&cpuset.0).wait().expect_pass();
}

#[test]
fn a_cpu_outside_of_the_cpuset_is_refused() {
    in_cpuset(this_test!(), |cpuset| {
        let cpus = own_cpus();
        cpuset.set(&cpus[1..]).unwrap();
        cpuset.enter();
        assert_eq!(own_cpus(), cpus[1..]);
        let error = Pool::builder().placement(Placement::Cpus(cpus.clone())).start().unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Placement)));
        let pool = Pool::builder().placement(Placement::PerCpu).start().unwrap();
        assert_eq!(pool.workers(), cpus.len() - 1);
        assert!(cpus[1..].contains(&cpus_of_worker(&pool)[0]));
    });
}

/// The kernel moves the worker to another CPU, and refuses to pin its replacement.
#[test]
fn a_worker_whose_cpu_leaves_the_cpuset_serves_on_and_so_does_its_replacement() {
    in_cpuset(this_test!(), |cpuset| {
        cpuset.enter();
        let cpus = own_cpus()[..2].to_vec();
        // A page of each shard.
        let held = [BLOCK - PAGE, BLOCK];
        let holding = held[0] as u64..(BLOCK + PAGE) as u64;
        let source = Noting::new(Scripted::new(2 * BLOCK as u64).holding(holding));
        let pool = Pool::builder().placement(Placement::Cpus(cpus.clone())).start().unwrap();
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).keep_sources().shards(2);
        let region = builder.readahead(Readahead::None).build(&pool).unwrap();
        let start = region.as_ptr().expose_provenance().get();
        let read = |at: usize| assert_eq!(touch(start + at), byte_at(at as u64), "byte {at}");
        let read_both = |pages: Range<usize>| {
            pages.flat_map(|page| [page * PAGE, BLOCK + page * PAGE]).for_each(read);
        };
        let done = AtomicBool::new(false);
        scope(|scope| {
            let reader = scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    read_both(100..200);
                    discard(start + 100 * PAGE, 100 * PAGE);
                    discard(start + BLOCK + 100 * PAGE, 100 * PAGE);
                }
            });
            until(|| region.metrics().faults > 100);
            cpuset.set(&cpus[..1]).unwrap();
            until(|| own_cpus() == cpus[..1]);
            let before = region.metrics().faults;
            until(|| region.metrics().faults > before + 100);
            done.store(true, Ordering::SeqCst);
            reader.join().unwrap();
            let hangs = held.map(|at| scope.spawn(move || read(at)));
            source.source.wait_until_held(2);
            until(|| pool.metrics().replacements >= 2);
            read_both(1..20);
            source.source.release();
            hangs.into_iter().for_each(|thread| thread.join().unwrap());
        });
        assert_eq!(source.cpus_at(BLOCK + 10 * PAGE), cpus[..1]);
    });
}
