//! Direct reads of a file, of which one worker has many in flight (`io_uring(7)`).

use crate::direct::direct;
use crate::nesting::{named, over};
use crate::{PAGE, SetOnDrop, pattern};
use pagestitch::source::FileSource;
use pagestitch::{Chunk, OnFailure, Pool, Readahead, Region};
use pagestitch_kernel::Errno;
use pagestitch_kernel::direct_read::DirectFile;
use pagestitch_kernel::read_ring::{ReadBuffers, ReadRing};
use pagestitch_testkit::deny::{deny_io_uring, deny_io_uring_to_all_threads};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test, wait};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

const PAGES: usize = 1500;
const THREADS: usize = 8;

/// False, with a line that says so, where the kernel has no rings.
fn has_rings(test: &str) -> bool {
    match ReadRing::start(ReadBuffers::new().unwrap()) {
        Ok(_) => true,
        Err(errno) => {
            println!("SKIPPED {test}: no io_uring: {errno}");
            false
        }
    }
}

/// A file with these bytes on a disk, without a name; `None`, with a line that says so, where files are elsewhere.
pub(crate) fn on_disk(test: &str, bytes: &[u8]) -> Option<Arc<FileSource>> {
    let (file, path) = direct(test, bytes)?;
    let is_on_disk = DirectFile::reopen(&File::open(&path).unwrap()).unwrap().is_on_disk();
    fs::remove_file(path).unwrap();
    if !is_on_disk {
        println!("SKIPPED {test}: the folder for temporary files is not on a disk");
    }
    is_on_disk.then_some(file)
}

/// The rings of this process.
fn rings() -> usize {
    let descriptors =
        fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    descriptors.filter(|link| *link == Path::new("anon_inode:[io_uring]")).count()
}

pub(crate) fn one_worker(most: usize) -> Pool {
    Pool::builder().workers(1).max_workers(most).start().unwrap()
}

fn build(file: &Arc<FileSource>, pool: &Pool) -> Region {
    let chunk = Chunk::from(Arc::clone(file));
    Region::builder().chunk(chunk).readahead(Readahead::None).build(pool).unwrap()
}

/// Each thread touches pages of its own, so that as many faults wait at once.
fn touch_all(region: &Region, bytes: &[u8]) {
    scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for page in (thread..PAGES).step_by(THREADS) {
                    let at = page * PAGE + page % PAGE;
                    assert_eq!(region.as_slice()[at], bytes[at], "page {page}");
                }
            });
        }
    });
    assert!(region.as_slice() == bytes);
}

/// Touches the pages of new regions until a worker has a ring. It starts one when it finds two faults.
fn touch_until_a_ring(file: &Arc<FileSource>, bytes: &[u8], pool: &Pool) {
    let has_ring = (0..100).any(|_| {
        touch_all(&build(file, pool), bytes);
        rings() > 0
    });
    assert!(has_ring, "the worker waits for each read");
}

#[test]
fn one_worker_has_many_reads_in_flight() {
    // In a process of its own, which has no other ring.
    let end = child::run(this_test!(), || {
        let bytes = pattern(1, PAGES * PAGE);
        let Some(file) = on_disk(this_test!(), &bytes) else { return };
        if !has_rings(this_test!()) {
            return;
        }
        let pool = one_worker(1);
        touch_until_a_ring(&file, &bytes, &pool);
        (0..5).for_each(|_| touch_all(&build(&file, &pool), &bytes));
        assert_eq!(rings(), 1);
        drop(pool);
        assert_eq!(rings(), 0);
    });
    end.expect_pass();
}

#[test]
fn without_io_uring_a_worker_waits_for_each_read() {
    let end = child::run(this_test!(), || {
        deny_io_uring(Errno::EPERM);
        let bytes = pattern(2, PAGES * PAGE);
        let Some((file, path)) = direct(this_test!(), &bytes) else { return };
        fs::remove_file(path).unwrap();
        let pool = one_worker(1);
        (0..3).for_each(|_| touch_all(&build(&file, &pool), &bytes));
        assert_eq!(rings(), 0);
    });
    end.expect_pass();
}

/// As in a process that confines itself after its start.
#[test]
fn a_ring_that_is_forbidden_later_is_not_used_any_more() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(7, PAGES * PAGE);
        let Some(file) = on_disk(this_test!(), &bytes) else { return };
        if !has_rings(this_test!()) {
            return;
        }
        let pool = one_worker(1);
        touch_until_a_ring(&file, &bytes, &pool);
        let region = build(&file, &pool);
        scope(|scope| {
            scope.spawn(|| deny_io_uring_to_all_threads(Errno::EPERM));
            touch_all(&region, &bytes);
        });
        touch_all(&build(&file, &pool), &bytes);
        assert_eq!(rings(), 0);
    });
    end.expect_pass();
}

#[test]
fn without_io_uring_more_workers_wait_for_the_disk() {
    let end = child::run(this_test!(), || {
        deny_io_uring(Errno::EPERM);
        let bytes = pattern(6, PAGES * PAGE);
        let Some(file) = on_disk(this_test!(), &bytes) else { return };
        let pool = Pool::builder().workers(1).start().unwrap();
        wait::until("more workers", || {
            touch_all(&build(&file, &pool), &bytes);
            pool.metrics().working > 2
        });
        assert_eq!(pool.metrics().shortages, 0);
    });
    end.expect_pass();
}

/// The worker that hangs has no read in flight, because no other worker could install its page.
#[test]
fn a_source_that_hangs_holds_up_no_read_in_flight() {
    let bytes = pattern(3, PAGES * PAGE);
    let Some((file, path)) = direct(this_test!(), &bytes) else { return };
    fs::remove_file(path).unwrap();
    for round in 0..6 {
        let (pool, held) = (one_worker(3), Arc::new(Scripted::new(PAGE as u64).holding(0..1)));
        let (region, source) = (build(&file, &pool), Chunk::source(Arc::clone(&held)));
        // Every other time a region of another pool hangs, whose bytes are memory of this one's.
        let other = one_worker(2);
        let hanging = match round % 2 {
            0 => named("hanging", source, &pool),
            _ => {
                let lower = named("lower", source, &other).unwrap();
                if !lower.serves_system_calls() {
                    // For an ordinary user the kernel does not wait for an absent page of `lower`.
                    continue;
                }
                named("upper", over(&lower), &pool)
            }
        };
        let hanging = hanging.unwrap();
        let touched = AtomicUsize::new(0);
        scope(|scope| {
            let readers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (region, bytes, touched) = (&region, &bytes, &touched);
                    scope.spawn(move || {
                        for page in (thread..PAGES).step_by(THREADS) {
                            assert_eq!(region.as_slice()[page * PAGE], bytes[page * PAGE], "page {page}");
                            touched.fetch_add(1, Ordering::SeqCst);
                        }
                    })
                })
                .collect();
            let hangs = scope.spawn(|| {
                wait::until("half of the pages", || touched.load(Ordering::SeqCst) > PAGES / 2);
                assert_eq!(hanging.as_slice()[0], byte_at(0));
            });
            held.wait_until_held(1);
            let is_read = wait::comes_true(Duration::from_secs(30), || {
                readers.iter().all(|reader| reader.is_finished())
            });
            held.release();
            assert!(is_read, "a page waits for the source of another region");
            hangs.join().unwrap();
        });
    }
}

#[test]
fn a_page_past_the_end_of_a_truncated_file_fails_among_reads_in_flight() {
    const LEFT: usize = PAGES / 2;
    let bytes = pattern(4, PAGES * PAGE);
    let Some((file, path)) = direct(this_test!(), &bytes) else { return };
    let pool = one_worker(1);
    let builder = Region::builder().chunk(Chunk::from(file).on_failure(OnFailure::Zeros));
    let region = builder.readahead(Readahead::None).build(&pool).unwrap();
    File::options().write(true).open(&path).unwrap().set_len((LEFT * PAGE + 1) as u64).unwrap();
    fs::remove_file(path).unwrap();
    scope(|scope| {
        for thread in 0..THREADS {
            let (region, bytes) = (&region, &bytes);
            scope.spawn(move || {
                for page in (0..PAGES).rev().skip(thread).step_by(THREADS) {
                    let expected = if page < LEFT { bytes[page * PAGE + 1] } else { 0 };
                    assert_eq!(region.as_slice()[page * PAGE + 1], expected, "page {page}");
                }
            });
        }
    });
    assert_eq!(region.close().pages_zeroed_on_failure, (PAGES - LEFT) as u64);
}

#[test]
fn a_process_forks_while_reads_are_in_flight() {
    let bytes = pattern(5, PAGES * PAGE);
    let Some((file, path)) = direct(this_test!(), &bytes) else { return };
    fs::remove_file(path).unwrap();
    let (pool, is_over) = (one_worker(1), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                assert!(ForkedChild::start(|| 7).wait().code() == Some(7));
            }
        });
        let _is_over = SetOnDrop(&is_over);
        (0..5).for_each(|_| touch_all(&build(&file, &pool), &bytes));
    });
}
