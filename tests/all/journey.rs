//! The journey of a fault, step by step, as ARCHITECTURE.md describes it.

use crate::{discard, pattern, until};
use pagestitch::{Chunk, Method, Pool, Readahead, Region};
use pagestitch_kernel::PageSize;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use std::sync::Arc;

fn page() -> usize {
    PageSize::system().bytes()
}

#[test]
fn a_source_is_read_at_the_first_touch_and_not_before() {
    let source = Arc::new(Scripted::new(100 * page() as u64));
    let region =
        Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
    assert_eq!((source.reads(), region.metrics()), (0, Default::default()));
    assert_eq!(region.as_slice()[5 * page() + 7], byte_at(5 * page() as u64 + 7));
    assert_eq!(source.reads(), 1);
    until(|| region.metrics().pages_installed() == 1);
}

#[test]
fn each_page_is_filled_by_its_cheapest_method() {
    let pool = Pool::new().unwrap();
    let size = page();
    let region = Region::builder()
        .readahead(Readahead::None)
        .chunk(pattern(1, 2 * size)) //                           pages 0, 1: copied from where they lie
        .chunk(Chunk::hole(2 * size as u64)) //                   pages 2, 3: zero pages
        .chunk(Chunk::source(Arc::new(Scripted::new(2 * size as u64)))) // pages 4, 5: read, then copied
        .chunk(pattern(2, 10)) //                                 page 6: gathered
        .chunk(pattern(3, 10))
        .build(&pool)
        .unwrap();
    for page in 0..7 {
        assert!(
            region.as_slice().get(page * size).is_some_and(|&byte| (byte == 0) == (page == 2 || page == 3))
        );
    }
    until(|| region.metrics().pages_installed() == 7);
    let seen = region.metrics();
    assert_eq!(
        (seen.pages_copied, seen.pages_zeroed, seen.pages_buffered, seen.pages_gathered),
        (2, 2, 2, 1)
    );
    assert_eq!(seen.bytes_copied, 5 * size as u64);
    assert_eq!(seen.faults, 7);
}

#[test]
fn the_plan_lists_runs_with_their_method() {
    let region = Region::builder()
        .name("planned")
        .chunks((0..100).map(|_| vec![1u8; 50]))
        .chunk(Chunk::hole(1 << 20))
        .chunk(Chunk::source(Arc::new(Scripted::new(77))))
        .build(&Pool::new().unwrap())
        .unwrap();
    let plan = region.plan();
    let runs: Vec<_> = plan.runs().iter().map(|run| (run.chunks.clone(), run.method)).collect();
    assert_eq!(runs, [(0..100, Method::Copy), (100..101, Method::Zero), (101..102, Method::Buffered)]);
    let printed = plan.to_string();
    for part in ["region planned", "102 chunks", "0-99", "memory", "hole", "scripted", "0x0..0x1388"] {
        assert!(printed.contains(part), "{part:?} is not in\n{printed}");
    }
}

#[test]
fn a_discarded_page_is_filled_again() {
    for reports in crate::REPORTS {
        let bytes = pattern(7, 8 * page());
        let region = Region::builder()
            .chunk(bytes.clone())
            .keep_sources()
            .report_discards(reports)
            .build(&Pool::new().unwrap())
            .unwrap();
        assert!(region.as_slice() == bytes);
        let start = region.as_ptr().expose_provenance().get();
        for round in 1..=50 {
            discard(start + 2 * page(), 3 * page());
            assert!(region.as_slice() == bytes);
            until(|| region.metrics().pages_copied == 8 + 3 * round);
        }
    }
}

#[test]
fn pages_discarded_during_faults_show_their_bytes() {
    for reports in crate::REPORTS {
        let bytes = pattern(8, 64 * page());
        let region = Region::builder()
            .chunk(bytes.clone())
            .keep_sources()
            .report_discards(reports)
            .build(&Pool::builder().workers(2).start().unwrap())
            .unwrap();
        let start = region.as_ptr().expose_provenance().get();
        scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..40).for_each(|_| assert!(region.as_slice() == bytes)));
            }
            scope.spawn(|| (0..300).for_each(|i| discard(start + i % 60 * page(), 4 * page())));
            scope.spawn(|| (0..40).for_each(|_| region.populate(..).unwrap()));
        });
    }
}

#[test]
fn a_slow_source_occupies_one_worker_and_not_the_region() {
    let slow = Arc::new(Scripted::new(page() as u64).holding(0..1));
    let bytes = pattern(9, 20 * page());
    let region = Region::builder()
        .chunk(Chunk::source(Arc::clone(&slow)))
        .chunk(bytes.clone())
        .build(&Pool::builder().workers(2).start().unwrap())
        .unwrap();
    scope(|scope| {
        let waiter = scope.spawn(|| region.as_slice()[0]);
        slow.wait_until_held(1);
        assert!(region.as_slice()[page()..] == bytes, "served by the other worker");
        assert!(!waiter.is_finished());
        slow.release();
        assert_eq!(waiter.join().unwrap(), byte_at(0));
    });
}

#[test]
fn other_workers_serve_a_batch_whose_first_fault_is_slow() {
    // Both workers hang in a first page while eight threads touch other pages. The first free
    // worker reads the eight faults in one batch and is held again by the first of them: the other
    // seven must be served.
    let blockers = [0, 1].map(|_| Arc::new(Scripted::new(page() as u64).holding(0..1)));
    let slow = Arc::new(Scripted::new(page() as u64).holding(0..1));
    let region = Region::builder()
        .chunks(blockers.iter().map(|source| Chunk::source(Arc::clone(source))))
        .chunk(Chunk::source(Arc::clone(&slow)))
        .chunk(pattern(1, 7 * page()))
        .build(&Pool::builder().workers(2).start().unwrap())
        .unwrap();
    let at = |index: usize| region.as_slice()[index * page()];
    scope(|scope| {
        let held = [0, 1].map(|index| scope.spawn(move || at(index)));
        blockers.iter().for_each(|blocker| blocker.wait_until_held(1));
        let last = scope.spawn(|| at(2));
        let others: Vec<_> = (3..10).map(|index| scope.spawn(move || at(index))).collect();
        blockers.iter().for_each(|blocker| blocker.release());
        slow.wait_until_held(1);
        for other in others {
            assert_ne!(other.join().unwrap(), 0);
        }
        assert!(!last.is_finished());
        slow.release();
        assert_eq!(last.join().unwrap(), byte_at(0));
        held.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), byte_at(0)));
    });
}

#[test]
fn one_pool_serves_many_regions() {
    let pool = Pool::builder().workers(2).start().unwrap();
    scope(|scope| {
        for thread in 0..4u64 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..30 {
                    let bytes = pattern(thread * 100 + round, 5 * page() + 77);
                    let region = Region::builder().chunk(bytes.clone()).build(pool).unwrap();
                    assert!(region.as_slice() == bytes);
                }
            });
        }
    });
    let regions: Vec<_> =
        (0..200).map(|seed| Region::builder().chunk(pattern(seed, page())).build(&pool).unwrap()).collect();
    for (seed, region) in regions.iter().enumerate() {
        assert!(region.as_slice() == pattern(seed as u64, page()));
    }
}

#[test]
fn an_idle_pool_sleeps() {
    let pool = Pool::builder().workers(2).name("idle-pool").start().unwrap();
    let region = Region::builder().chunk(vec![1u8; 10 * page()]).build(&pool).unwrap();
    assert_eq!(region.as_slice()[0], 1);
    // Both workers go to sleep: 'S' in the third field of their stat.
    until(|| {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let workers: Vec<_> = stats.filter(|stat| stat.contains("(idle-pool/")).collect();
        workers.len() >= 2 && workers.iter().all(|stat| stat.contains(") S "))
    });
}

#[test]
fn workers_block_signals_and_the_starting_thread_keeps_its_mask() {
    let blocked = |task: &std::path::Path| {
        let status = std::fs::read_to_string(task.join("status")).ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    let own = std::path::Path::new("/proc/thread-self");
    let before = blocked(own);
    let pool = Pool::builder().workers(1).name("no-signals").start().unwrap();
    assert_eq!(blocked(own), before);
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_worker = |task: &std::path::PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("no-signals/"))
    };
    // The new thread sets its name itself, a moment after its start.
    let mut worker = None;
    let tasks: Vec<_> = tasks.collect();
    until(|| {
        worker = tasks.iter().find(|task| is_worker(task)).cloned();
        worker.is_some()
    });
    let mask = blocked(&worker.unwrap()).unwrap();
    let bit = |signal: nix::sys::signal::Signal| 1u64 << (signal as i32 - 1);
    assert_ne!(mask & bit(nix::sys::signal::Signal::SIGALRM), 0);
    assert_ne!(mask & bit(nix::sys::signal::Signal::SIGTERM), 0);
    assert_eq!(mask & bit(nix::sys::signal::Signal::SIGSEGV), 0);
    drop(pool);
}
