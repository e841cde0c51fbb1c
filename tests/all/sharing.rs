//! Small regions share the userfaultfds of their pool, unless they ask for reports of discards.

use crate::application::moved;
use crate::machine::rounds;
use crate::spare_uffds::userfaultfds;
use crate::{PAGE, SIGBUS, SIGSEGV, discard, lacks_poison, pattern, spawn_asleep, touch};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::source::Memory;
use pagestitch::{Chunk, Manual, Pool, Readahead, Region};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

const PAGES: usize = 10;

fn pool(workers: usize) -> Pool {
    Pool::builder().workers(workers).start().unwrap()
}

fn region(bytes: &[u8], pool: &Pool) -> Region {
    Region::builder().chunk(bytes.to_vec()).keep_sources().readahead(Readahead::None).build(pool).unwrap()
}

#[test]
fn small_regions_share_a_few_userfaultfds() {
    let end = child::run(this_test!(), || {
        let pool = pool(2);
        let regions: Vec<_> = (0..300).map(|seed| region(&pattern(seed, PAGES * PAGE), &pool)).collect();
        assert_eq!(userfaultfds(), 3);
        for (seed, region) in (0..).zip(&regions) {
            assert!(region.as_slice() == pattern(seed, PAGES * PAGE), "region {seed}");
        }
        let large = region(&vec![7; (256 << 10) + 1], &pool);
        assert_eq!((large.as_slice()[5], userfaultfds()), (7, 4));
        let own = Region::builder().chunk(vec![7; 10]).report_discards(true).build(&pool).unwrap();
        let shard = Region::builder().chunk(vec![7; 10]).shards(1).build(&pool).unwrap();
        assert_eq!((own.as_slice()[5], shard.as_slice()[5], userfaultfds()), (7, 7, 6));
        let manual = Manual::new().unwrap();
        let of_a_manual: Vec<_> = (0..3).map(|_| Region::builder().chunk("7").build(&manual)).collect();
        assert_eq!(userfaultfds(), 9, "each region of a manual has its own");
        drop((of_a_manual, manual));
        drop((regions, large, own, shard));
        pool.stop().unwrap();
        assert_eq!(userfaultfds(), 0, "the pool closes them");
    });
    end.expect_pass();
}

#[test]
fn a_thousand_small_regions_need_few_descriptors() {
    let end = child::run(this_test!(), || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let pool = pool(2);
        let bytes = pattern(1, PAGES * PAGE);
        let regions: Vec<_> = (0..1000).map(|_| region(&bytes, &pool)).collect();
        assert!(regions.iter().all(|region| region.as_slice()[5 * PAGE] == bytes[5 * PAGE]));
    });
    end.expect_pass();
}

/// Each thread builds, reads, discards and drops regions whose addresses the others have next.
#[test]
fn regions_are_built_and_dropped_by_four_threads_during_faults_in_all() {
    let pool = pool(2);
    let (kept, done) = (pattern(1, PAGES * PAGE), AtomicBool::new(false));
    let standing = region(&kept, &pool);
    scope(|scope| {
        scope.spawn(|| {
            let start = standing.as_ptr().addr().get();
            while !done.load(Ordering::SeqCst) {
                assert!(standing.as_slice() == kept);
                discard(start, PAGES * PAGE);
            }
        });
        let builders: Vec<_> = (2..6)
            .map(|seed| {
                let pool = &pool;
                scope.spawn(move || {
                    let bytes = pattern(seed, PAGES * PAGE);
                    for _ in 0..rounds(150) {
                        let regions: Vec<_> = (0..5).map(|_| region(&bytes, pool)).collect();
                        assert!(regions.iter().all(|region| region.as_slice() == bytes));
                    }
                })
            })
            .collect();
        builders.into_iter().for_each(|builder| builder.join().unwrap());
        done.store(true, Ordering::SeqCst);
    });
}

#[test]
fn four_threads_read_a_thousand_regions_that_are_built_and_dropped() {
    crowd(1000);
}

#[test]
#[ignore = "takes seconds, and many mappings"]
fn four_threads_read_sixteen_thousand_regions_that_are_built_and_dropped() {
    crowd(16_000);
}

/// Each thread reads all bytes of one region after the other, and replaces each fourth region.
fn crowd(regions: usize) {
    const LENGTH: usize = PAGE + 100;
    let (pool, bytes) = (pool(2), pattern(3, 1 << 20));
    let memory = Memory::from(bytes.clone());
    // Each region has other bytes than the ones before at its addresses.
    let build = |number: usize| {
        let start = number * 7919 % (bytes.len() - LENGTH);
        let chunk = Chunk::from(memory.clone()).range(start as u64..(start + LENGTH) as u64);
        (start, Region::builder().chunk(chunk).build(&pool).unwrap())
    };
    let slots: Vec<_> = (0..regions).map(|number| RwLock::new(Arc::new(build(number)))).collect();
    scope(|scope| {
        for thread in 0..4 {
            let (slots, build, bytes) = (&slots, &build, &bytes);
            scope.spawn(move || {
                for step in 0..rounds(regions as u64) as usize {
                    let slot = &slots[(step * [1, 3, 7, 9][thread] + thread * regions / 4) % regions];
                    let seen = Arc::clone(&slot.read().unwrap());
                    let (start, region) = &*seen;
                    assert!(region.as_slice() == &bytes[*start..start + LENGTH], "{thread} {step}");
                    if step % 4 == thread {
                        *slot.write().unwrap() = Arc::new(build(regions + step * 4 + thread));
                    }
                }
            });
        }
    });
}

/// The only worker is inside a source while a thread waits in a region that is dropped.
#[test]
fn a_thread_that_waits_in_a_dropped_region_gets_a_signal() {
    let body = child::body(this_test!(), |_| {
        let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
        let slow = Arc::new(Scripted::new(10).holding(0..1));
        let other = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).build(&pool).unwrap();
        let dropped = region(&pattern(1, PAGES * PAGE), &pool);
        let start = dropped.as_ptr().expose_provenance().get();
        scope(|scope| {
            scope.spawn(|| other.as_slice()[0]);
            slow.wait_until_held(1);
            spawn_asleep(scope, move || println!("read a byte: {}", touch(start + 5000)));
            drop(dropped);
            let _next: Vec<_> = (0..20).map(|_| region(&pattern(2, PAGES * PAGE), &pool)).collect();
            // The drop has woken the thread: the worker is still in its source.
            loop {
                thread::park();
            }
        });
    });
    let end = body.spawn("").wait_at_most(Duration::from_secs(60));
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
}

/// Regions whose sources hang leave the others of the same userfaultfds their worker.
#[test]
fn a_region_that_hangs_holds_up_no_other() {
    let pool = pool(2);
    let slow = Arc::new(Scripted::new(PAGE as u64).holding(0..1));
    let hanging = Region::builder().chunk(Chunk::source(Arc::clone(&slow)));
    let hanging = hanging.build(&pool).unwrap();
    let bytes = pattern(1, PAGES * PAGE);
    let others: Vec<_> = (0..20).map(|_| region(&bytes, &pool)).collect();
    scope(|scope| {
        let hangs = scope.spawn(|| hanging.as_slice()[0]);
        slow.wait_until_held(1);
        assert!(others.iter().all(|region| region.as_slice() == bytes));
        drop(others);
        slow.release();
        assert_eq!(hangs.join().unwrap(), byte_at(0));
    });
}

#[test]
fn a_limit_of_faults_is_of_one_region() {
    let pool = pool(4);
    let slow = Arc::new(Scripted::new(4 * PAGE as u64).holding(0..4 * PAGE as u64));
    let limited = Region::builder().chunk(Chunk::source(Arc::clone(&slow)));
    let limited = limited.readahead(Readahead::None).max_in_flight(1).build(&pool).unwrap();
    let other = region(&pattern(1, PAGES * PAGE), &pool);
    scope(|scope| {
        let touches: Vec<_> = (0..4)
            .map(|page| {
                let limited = &limited;
                scope.spawn(move || limited.as_slice()[page * PAGE])
            })
            .collect();
        slow.wait_until_held(1);
        assert!(other.as_slice() == pattern(1, PAGES * PAGE));
        assert_eq!(slow.reads(), 1);
        slow.release();
        for (page, touch) in touches.into_iter().enumerate() {
            assert_eq!(touch.join().unwrap(), byte_at((page * PAGE) as u64));
        }
    });
}

/// Unfilled pages that the application moves are a signal, also after the drop of their region and of
/// the pool.
#[test]
fn moved_pages_are_bytes_or_a_signal_and_other_regions_are_served() {
    if lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        for (drops_region, stops_pool) in [(false, false), (true, false), (true, true)] {
            let body = move || {
                let pool = pool(2);
                let bytes = pattern(1, PAGES * PAGE);
                let (region, other) = (region(&bytes, &pool), region(&pattern(2, PAGES * PAGE), &pool));
                let start = region.as_ptr().expose_provenance().get();
                assert_eq!(touch(start + 4 * PAGE), bytes[4 * PAGE]);
                let to = moved(start + 3 * PAGE, 4 * PAGE);
                assert_eq!(touch(to + PAGE), bytes[4 * PAGE], "a filled page");
                assert_eq!(touch(start), bytes[0], "the rest is served as before");
                assert!(other.as_slice() == pattern(2, PAGES * PAGE));
                if drops_region {
                    drop(region);
                }
                if stops_pool {
                    drop(other);
                    pool.stop().unwrap();
                }
                println!("read a byte: {}", touch(to));
                0
            };
            let status = ForkedChild::start(body).wait();
            assert_eq!(status.signal(), Some(SIGBUS), "dropped {drops_region}, stopped {stops_pool}");
        }
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn forks_and_programs_that_start_meanwhile_leave_the_regions_alone() {
    let end = child::run(this_test!(), || {
        let pool = pool(2);
        let bytes = pattern(1, PAGES * PAGE);
        let (kept, done) = (region(&bytes, &pool), AtomicBool::new(false));
        scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    assert!(region(&bytes, &pool).as_slice() == bytes);
                }
            });
            for _ in 0..10 {
                let start = kept.as_ptr().addr().get();
                let ends = ForkedChild::start(|| {
                    // The child has no region: its drop leaves the parent's alone.
                    i32::from(touch(start + 3 * PAGE))
                });
                assert_eq!(ends.wait().signal(), Some(SIGSEGV));
                assert!(Command::new("/proc/self/exe").arg("--list").output().unwrap().status.success());
                discard(start, PAGES * PAGE);
                assert!(kept.as_slice() == bytes);
            }
            done.store(true, Ordering::SeqCst);
        });
    });
    end.expect_pass();
}
