//! A pool keeps the userfaultfds of dropped regions for the next ones, unless a thread waits there, an
//! event is unread, or a part of the region was moved.

use crate::application::free;
use crate::lazy::chunk_of;
use crate::machine::rounds;
use crate::{
    PAGE, SIGSEGV, become_ordinary_user, cannot_inherit, discard, lacks_poison, pattern, spawn_asleep, touch,
    until,
};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::{Chunk, ErrorKind, Manual, Pool, Readahead, Region};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::io::Write;
use std::iter;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// The number of open userfaultfds of this process.
pub(crate) fn userfaultfds() -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let is_uffd = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("[userfaultfd]"))
    };
    open.filter(is_uffd).count()
}

fn region(bytes: &[u8], pool: &Pool) -> Region {
    let builder = Region::builder().chunk(bytes.to_vec()).readahead(Readahead::None);
    builder.report_discards(true).build(pool).unwrap()
}

/// The number of userfaultfds that are open after a region is built, used by `body` and dropped.
fn left_after(body: impl FnOnce(Region)) -> usize {
    let pool = Pool::builder().workers(2).start().unwrap();
    body(region(&pattern(1, 10 * PAGE), &pool));
    let left = userfaultfds();
    let bytes = pattern(2, 10 * PAGE);
    // The next regions of the pool are served in any case.
    for _ in 0..3 {
        assert_eq!(region(&bytes, &pool).as_slice(), bytes);
    }
    left
}

#[test]
fn the_next_region_has_the_userfaultfd_of_a_dropped_one() {
    let end = child::run(this_test!(), || {
        let pool = Pool::new().unwrap();
        for seed in 0..50 {
            let bytes = pattern(seed, 10 * PAGE);
            let region = region(&bytes, &pool);
            assert_eq!(region.as_slice()[5 * PAGE], bytes[5 * PAGE]);
            discard(region.as_ptr().addr().get() + 5 * PAGE, PAGE);
            assert_eq!(region.as_slice(), bytes);
            drop(region);
            assert_eq!(userfaultfds(), 1);
        }
        drop(pool);
        assert_eq!(userfaultfds(), 0, "the pool closes them");
    });
    end.expect_pass();
}

#[test]
fn a_region_that_needs_other_features_has_another_userfaultfd() {
    let end = child::run(this_test!(), || {
        let pool = Pool::new().unwrap();
        let bytes = pattern(1, 10 * PAGE);
        for _ in 0..3 {
            assert_eq!(region(&bytes, &pool).as_slice(), bytes);
            let lazy = Region::builder().chunk(chunk_of(&bytes, true)).build_shared(&pool).unwrap();
            let mut seen = vec![0; bytes.len()];
            lazy.read_at(0, &mut seen).unwrap();
            assert_eq!(seen, bytes);
        }
        assert!(userfaultfds() <= 2);
    });
    end.expect_pass();
}

#[test]
fn at_most_64_userfaultfds_are_kept() {
    let end = child::run(this_test!(), || {
        let pool = Pool::new().unwrap();
        let regions: Vec<_> = (0..100).map(|_| region(&[7; 10], &pool)).collect();
        assert_eq!(userfaultfds(), 100);
        drop(regions);
        assert_eq!(userfaultfds(), 64);
        let shards = Region::builder().chunk(Chunk::hole(64 << 20)).shards(20).build(&pool).unwrap();
        assert_eq!((shards.as_slice()[40 << 20], userfaultfds()), (0, 64));
        drop(shards);
        assert_eq!(userfaultfds(), 64);
    });
    end.expect_pass();
}

#[test]
fn a_region_that_was_moved_leaves_no_userfaultfd() {
    if lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        let left = left_after(|region| {
            let start = region.as_ptr().expose_provenance().get();
            region.populate(..).unwrap();
            moved(start + 3 * PAGE, 4 * PAGE);
        });
        assert_eq!(left, 0);
    });
    end.expect_pass();
}

#[expect(unsafe_code, reason = "mremap(2) by the application is part of the test")]
fn moved(start: usize, bytes: usize) {
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: pages of a region, of which no slice is used any more.
    let to =
        unsafe { libc::mremap(start, bytes, bytes, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, free(bytes)) };
    assert_ne!(to, libc::MAP_FAILED);
}

/// Threads discard pages at the moment of the drop: their events are read, or the userfaultfd is closed.
#[test]
fn discards_during_a_drop_neither_hang_nor_meet_the_next_region() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(2).start().unwrap();
        let bytes = pattern(3, 10 * PAGE);
        for _ in 0..rounds(200) {
            let region = region(&bytes, &pool);
            assert_eq!(region.as_slice(), bytes);
            let (start, ends) = (region.as_ptr().expose_provenance().get(), AtomicBool::new(false));
            scope(|scope| {
                scope.spawn(|| {
                    // Ends with ENOMEM when the range is unmapped. No other mapping is made meanwhile.
                    while !ends.load(Ordering::SeqCst) && try_discard(start, 10 * PAGE) {
                        thread::yield_now();
                    }
                });
                until(|| region.metrics().faults > 0);
                drop(region);
                ends.store(true, Ordering::SeqCst);
            });
        }
    });
    end.expect_pass();
}

#[expect(unsafe_code, reason = "madvise(2) by the application is part of the test")]
fn try_discard(start: usize, bytes: usize) -> bool {
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: pages of a region whose source gives the same bytes again, or no pages any more.
    unsafe { libc::madvise(start, bytes, libc::MADV_DONTNEED) == 0 }
}

/// A thread waits in the region at its drop: the userfaultfd is closed, because the thread may run late.
#[test]
fn a_userfaultfd_where_a_thread_waits_is_closed() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
        let slow = Arc::new(Scripted::new(10).holding(0..1));
        let other = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).build(&pool).unwrap();
        let region = region(&pattern(1, 10 * PAGE), &pool);
        let start = region.as_ptr().expose_provenance().get();
        scope(|scope| {
            scope.spawn(|| other.as_slice()[0]);
            slow.wait_until_held(1);
            spawn_asleep(scope, move || println!("read a byte: {}", touch(start + 5000)));
            drop(region);
            println!("{} are left", userfaultfds());
            slow.release();
        });
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    let output = end.output();
    assert!(!output.contains("read a byte") && !output.contains("2 are left"), "{output}");
}

#[test]
fn a_manual_keeps_userfaultfds_too() {
    let end = child::run(this_test!(), || {
        let manual = Manual::new().unwrap();
        for _ in 0..3 {
            let region = Region::builder().chunk(pattern(1, PAGE)).build(&manual).unwrap();
            region.populate(..).unwrap();
            drop(region);
            assert_eq!(userfaultfds(), 1);
        }
        let region = Region::builder().chunk(pattern(1, PAGE)).build(&manual).unwrap();
        drop(manual);
        drop(region);
        assert_eq!(userfaultfds(), 0);
    });
    end.expect_pass();
}

/// A userfaultfd belongs to the addresses of the process that has opened it, so one of the parent would
/// register the parent's memory at the address of the child's region.
#[test]
fn a_forked_child_builds_no_region_with_a_kept_userfaultfd() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(2).start().unwrap();
        drop(region(&pattern(1, 10 * PAGE), &pool));
        assert_eq!(userfaultfds(), 1);
        let refused = || {
            let built = Region::builder().chunk(vec![1u8; 10 * PAGE]).readahead(Readahead::None).build(&pool);
            i32::from(built.unwrap_err().kind() != ErrorKind::ForkedChild)
        };
        assert!(ForkedChild::start(refused).succeeds());
        let bytes = pattern(2, 10 * PAGE);
        assert_eq!(region(&bytes, &pool).as_slice(), bytes);
    });
    end.expect_pass();
}

#[test]
fn kept_userfaultfds_are_closed_where_a_region_needs_their_descriptors() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(2).start().unwrap();
        let regions: Vec<_> = (0..20).map(|_| region(&[7; 10], &pool)).collect();
        drop(regions);
        assert_eq!(userfaultfds(), 20);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let _others: Vec<_> = iter::from_fn(|| fs::File::open("/").ok()).collect();
        // It needs other features, so none of the kept ones suits it.
        let builder = Region::builder().chunk(vec![5u8; 10 * PAGE]).inherit_on_fork();
        match builder.build(&pool) {
            Ok(region) => assert_eq!(region.as_slice(), [5; 10 * PAGE]),
            Err(error) => assert!(cannot_inherit(&error), "{error}"),
        }
    });
    end.expect_pass();
}

/// A process that gives up its privileges opens userfaultfds for user code only from then on.
#[test]
fn a_region_with_a_kept_userfaultfd_tells_whether_each_page_is_served_to_system_calls() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(2).start().unwrap();
        drop(region(&[7; 10], &pool));
        become_ordinary_user();
        let region = Region::builder()
            .chunk(Chunk::hole(8 << 20))
            .readahead(Readahead::None)
            .shards(2)
            .build(&pool)
            .unwrap();
        let mut null = fs::File::from(nix::unistd::pipe().unwrap().1);
        let served = region.as_slice().chunks(4 << 20).all(|half| null.write_all(&half[..10]).is_ok());
        assert_eq!(region.serves_system_calls(), served);
    });
    end.expect_pass();
}
