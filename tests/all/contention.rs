//! Many threads touch one page: the page is read once, and all threads go on. Idle threads of a
//! pool sleep.

use crate::{pattern, until};
use pagestitch::{Chunk, Placement, Pool, Readahead, Region, Source};
use pagestitch_kernel::priority::{keep_from_children, nice, set_nice};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

#[test]
fn a_page_that_many_threads_touch_is_read_once() {
    let source = Arc::new(Scripted::new(4096).holding(0..1));
    let region = Region::builder()
        .chunk(Chunk::source(Arc::clone(&source)))
        .build(&Pool::builder().workers(4).start().unwrap())
        .unwrap();
    scope(|scope| {
        let touchers: Vec<_> = (0..6)
            .map(|i| {
                scope.spawn({
                    let region = &region;
                    move || region.as_slice()[i]
                })
            })
            .collect();
        let populating = scope.spawn(|| region.populate(..));
        source.wait_until_held(1);
        source.release();
        for (offset, toucher) in touchers.into_iter().enumerate() {
            assert_eq!(toucher.join().unwrap(), byte_at(offset as u64));
        }
        populating.join().unwrap().unwrap();
    });
    assert_eq!(source.reads(), 1);
}

#[test]
fn eight_threads_in_step_over_the_same_pages_all_go_on() {
    let bytes = pattern(5, 500 * 4096);
    let region =
        Region::builder().chunk(bytes.clone()).build(&Pool::builder().workers(3).start().unwrap()).unwrap();
    let barrier = Barrier::new(8);
    scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for offset in (0..bytes.len()).step_by(4096) {
                    if offset % (32 * 4096) == 0 {
                        barrier.wait();
                    }
                    assert_eq!(region.as_slice()[offset], bytes[offset]);
                }
            });
        }
    });
    until(|| region.metrics().pages_installed() == 500);
}

/// A source that starts a thread at each read, as a runtime does at its first use.
struct Starting {
    /// The nice values of the worker and of the thread at each read.
    seen: Mutex<Vec<(i32, i32)>>,
}

impl Source for Starting {
    fn size(&self) -> u64 {
        PAGES_IN_STEP * 4096
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        self.seen.lock().unwrap().push((nice(), thread::spawn(nice).join().unwrap()));
        into.fill(7);
        Ok(())
    }
}

const PAGES_IN_STEP: u64 = 64;

/// In a region with a userfaultfd of its own and in one that shares it.
#[test]
fn threads_that_a_source_starts_do_not_inherit_the_priority_of_a_worker() {
    let usual = nice();
    // An ordinary user may not raise a priority.
    let may_raise = thread::spawn(|| keep_from_children().and_then(|()| set_nice(-10)).is_ok());
    let raised = if may_raise.join().unwrap() && usual == 0 { -10 } else { usual };
    for own in [true, false] {
        // The worker may read of each waiting thread alone.
        until(|| {
            let seen = priorities(own);
            assert!(
                seen.iter().all(|&(_, of_thread)| of_thread == usual),
                "own userfaultfd: {own}: {seen:?}"
            );
            seen.iter().any(|&(of_worker, _)| of_worker == raised)
        });
    }
}

/// The priorities of a worker for which many threads wait in step, and of the threads that its source
/// starts.
fn priorities(own: bool) -> Vec<(i32, i32)> {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Starting { seen: Mutex::default() });
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
    let region = builder.report_discards(own).build(&pool).unwrap();
    let (together, wrong) = (Barrier::new(6), AtomicU64::new(0));
    scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                // Not asserted here, because the others would wait for a thread that panics.
                for page in region.as_slice().chunks(4096) {
                    together.wait();
                    wrong.fetch_add(u64::from(page[0] != 7), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0);
    source.seen.lock().unwrap().clone()
}

#[test]
fn a_fault_wakes_one_worker_with_placement_anywhere() {
    const PAGES: usize = 2000;
    let pool = Pool::builder().workers(4).placement(Placement::Anywhere).name("herd").start().unwrap();
    let builder = Region::builder().chunk(vec![1u8; PAGES * 4096]).readahead(Readahead::None);
    let region = builder.build(&pool).unwrap();
    assert!(region.as_slice().iter().step_by(4096).all(|&byte| byte == 1));
    // Each worker that is woken goes back to sleep once.
    let slept: usize = threads_named("herd").iter().map(|status| sleeps(status)).sum();
    assert!(slept < 2 * PAGES, "{slept} sleeps for {PAGES} faults");
}

/// `/proc/self/task/*/status` of threads of a pool.
fn threads_named(pool: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let statuses = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    statuses.filter(|status| status.starts_with(&format!("Name:\t{pool}/"))).collect()
}

fn sleeps(status: &str) -> usize {
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

#[test]
fn an_idle_pool_sleeps_without_a_timeout() {
    let pool = Pool::builder().placement(Placement::PerCpu).name("idle").start().unwrap();
    let region = Region::builder().chunk(vec![1u8; 4 << 20]).build(&pool).unwrap();
    assert!(region.as_slice().iter().all(|&byte| byte == 1));
    until(|| {
        let calls = system_calls_of("idle");
        calls.len() >= pool.workers() && calls.iter().all(|call| waits_for_ever(call))
    });
}

/// The watchdog has nothing to watch while no worker works, and the thread that frees 4 MiB and more of
/// sources waits for some.
#[test]
fn the_other_threads_of_an_idle_pool_sleep_without_a_timeout() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().name("idle").start().unwrap();
        let region = Region::builder().chunk(vec![1u8; 4 << 20]).release_sources().build(&pool).unwrap();
        assert!(region.as_slice().iter().all(|&byte| byte == 1));
        until(|| {
            let calls = system_calls_of("pagestitch");
            let [polling, parked] = [polls_for_ever, is_parked_for_ever]
                .map(|waits| calls.iter().filter(|call| waits(call)).count());
            (polling, parked, calls.len()) == (1, 1, 2)
        });
    });
    end.expect_pass();
}

/// True if the call is a `poll` whose timeout, the third argument, is -1.
fn polls_for_ever(call: &str) -> bool {
    let timeout = call
        .split_whitespace()
        .nth(3)
        .and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    number(call) == Some(nix::libc::SYS_poll) && timeout.is_some_and(|timeout| timeout as i32 == -1)
}

/// True if a thread waits for another one, without a timeout.
fn is_parked_for_ever(call: &str) -> bool {
    number(call) == Some(nix::libc::SYS_futex) && call.split_whitespace().nth(4) == Some("0x0")
}

/// `/proc/self/task/*/syscall` of the threads of a pool: a number and its arguments.
fn system_calls_of(pool: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let ours = tasks.filter(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.starts_with(&format!("{pool}/"))
    });
    ours.filter_map(|task| std::fs::read_to_string(task.path().join("syscall")).ok()).collect()
}

/// True if all workers of a pool with this name wait for events: the pool has nothing left to do.
pub(crate) fn is_idle(pool: &str) -> bool {
    let calls = system_calls_of(pool);
    !calls.is_empty() && calls.iter().all(|call| number(call) == Some(nix::libc::SYS_epoll_wait))
}

fn number(call: &str) -> Option<i64> {
    call.split_whitespace().next()?.parse().ok()
}

/// True if the call is an `epoll_wait` whose timeout, the fourth argument, is -1.
fn waits_for_ever(call: &str) -> bool {
    let timeout = call
        .split_whitespace()
        .nth(4)
        .and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    number(call) == Some(nix::libc::SYS_epoll_wait) && timeout.is_some_and(|timeout| timeout as i32 == -1)
}
