//! Donated pages move into a region: they are not copied, and the zeros that they leave behind are
//! never read.

use crate::application::FixedBuffer;
use crate::{PAGE, SIGBUS, cannot_inherit, discard, pattern, reason, touch, until};
use pagestitch::source::{Donated, FailureReason, Pages};
use pagestitch::{Chunk, ErrorKind, Inline, Method, Pool, Readahead, Region};
use pagestitch_kernel::Features;
use pagestitch_kernel::Support;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use proptest::prelude::*;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

pub(crate) fn pages_of(bytes: &[u8]) -> Pages {
    let mut pages = Pages::new(bytes.len()).unwrap();
    pages.copy_from_slice(bytes);
    pages
}

fn moves() -> bool {
    Support::current().has(Features::MOVE)
}

#[test]
fn donated_pages_are_not_copied() {
    let bytes = pattern(1, 5 * PAGE + 100);
    let region = Region::builder()
        .chunk(pages_of(&bytes))
        .readahead(Readahead::None)
        .require_zero_copy()
        .build(&Pool::new().unwrap())
        .unwrap();
    assert_eq!(region.plan().runs()[0].method, Method::Move);
    assert!(region.as_slice() == bytes);
    let seen = region.close();
    assert_eq!(seen.bytes_copied, 0);
    // At build, where the kernel cannot move a page at its fault.
    assert_eq!((seen.pages_moved, seen.pages_in_place), if moves() { (6, 0) } else { (0, 6) });
}

#[test]
fn a_donated_huge_page_moves_as_one() {
    let bytes = pattern(2, 4 << 20);
    let pages = pages_of(&bytes);
    let huge_before = huge_kib(&pages);
    let region = Region::builder().chunk(pages).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice()[3 << 20], bytes[3 << 20]);
    assert_eq!(region.as_slice()[(3 << 20) - 4096], bytes[(3 << 20) - 4096], "the huge page moved as one");
    if moves() {
        until(|| region.metrics().pages_moved == 512);
        assert_eq!(region.metrics().faults, 1);
    }
    assert!(region.as_slice() == bytes);
    // As many huge pages as before: a small guest may have none left. The kernel may have merged
    // the mapping with a neighbour, and then counts both.
    assert_eq!(huge_kib(region.as_slice()).min(4096), huge_before.min(4096));
    assert_eq!(region.close().bytes_copied, 0);
}

/// The KiB of huge pages in the mapping of these bytes.
pub(crate) fn huge_kib(bytes: &[u8]) -> u64 {
    let address = bytes.as_ptr().addr();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let range = range.and_then(|(start, end)| {
            Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
        });
        inside = range.map_or(inside, |range| range.contains(&address));
        if let Some(kib) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            return kib.trim().trim_end_matches(" kB").parse().unwrap();
        }
    }
    panic!("no mapping holds {address:#x}");
}

#[test]
fn a_shuffled_donation_takes_no_mappings() {
    const PAGES: usize = 1000;
    let bytes = pattern(3, PAGES * PAGE);
    let donated = Arc::new(Donated::from(pages_of(&bytes)));
    let order: Vec<usize> = (0..PAGES).map(|place| place * 389 % PAGES).collect();
    let page = |&page: &usize| {
        Chunk::from(Arc::clone(&donated)).range((page * PAGE) as u64..((page + 1) * PAGE) as u64)
    };
    let region =
        Region::builder().chunks(order.iter().map(page)).writable().build(&Pool::new().unwrap()).unwrap();
    let expected: Vec<u8> =
        order.iter().flat_map(|page| &bytes[page * PAGE..(page + 1) * PAGE]).copied().collect();
    assert!(region.as_slice() == expected);
    assert_eq!(region.close().bytes_copied, 0);
}

#[test]
fn untouched_donated_pages_are_zeros_and_unaligned_chunks_are_copied() {
    let mut pages = Pages::new(6 * PAGE).unwrap();
    pages[4 * PAGE..].fill(9);
    let donated = Arc::new(Donated::from(pages));
    let part = |start: usize, end: usize| Chunk::from(Arc::clone(&donated)).range(start as u64..end as u64);
    let region = Region::builder()
        .chunk(part(0, 2 * PAGE)) // moves as zeros
        .chunk(part(4 * PAGE + 10, 6 * PAGE)) // not page-aligned
        .build(&Pool::new().unwrap())
        .unwrap();
    assert!(region.as_slice() == [vec![0; 2 * PAGE], vec![9; 2 * PAGE - 10]].concat());
    assert_eq!(region.plan().runs()[1].method, Method::Buffered);
}

#[test]
fn a_byte_is_donated_to_one_chunk() {
    let donated = Arc::new(Donated::from(Pages::new(4 * PAGE).unwrap()));
    let part = |start: u64, end: u64| Chunk::from(Arc::clone(&donated)).range(start..end);
    let builder = Region::builder().chunk(part(0, 5000)).chunk(part(4999, 6000));
    let error = builder.build(&Pool::new().unwrap()).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::InvalidChunk, Some(1)), "{error}");
}

/// Where a donation is cut into parts, and whether the parts lie on page boundaries of the region.
fn rotations() -> impl Strategy<Value = (usize, Vec<usize>, bool)> {
    let cuts = prop::collection::vec(1usize..5 * PAGE, 1..6);
    (1usize..5 * PAGE, cuts, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Chunks that meet in a page of one donation, in any order: a page that moves brings only the
    /// bytes of its own chunk.
    #[test]
    fn chunks_that_share_a_page_of_a_donation_show_their_own_bytes(
        (len, cuts, aligned) in rotations(), seed in any::<u64>(), rotation in 0usize..6,
    ) {
        let bytes = pattern(seed, len);
        let donated = Arc::new(Donated::from(pages_of(&bytes)));
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % len).chain([0, len]).collect();
        ends.sort_unstable();
        ends.dedup();
        let mut parts: Vec<_> = ends.windows(2).map(|ends| ends[0]..ends[1]).collect();
        let turn = rotation % parts.len();
        parts.rotate_left(turn);
        let chunk = |part: &Range<usize>| {
            Chunk::from(Arc::clone(&donated)).range(part.start as u64..part.end as u64)
        };
        let builder = if aligned { Region::builder().page_aligned() } else { Region::builder() };
        let builder = builder.chunks(parts.iter().map(chunk));
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        // Two concurrent readers: a page of the donation is copied for one while it moves for the
        // other.
        scope(|scope| {
            for backwards in [false, true] {
                let (region, parts, bytes) = (&region, &parts, &bytes);
                scope.spawn(move || {
                    let mut order: Vec<usize> = (0..parts.len()).collect();
                    if backwards { order.reverse(); }
                    for chunk in order {
                        let at = region.offset_of(chunk).unwrap() as usize;
                        let part = parts[chunk].clone();
                        assert!(region.as_slice()[at..at + part.len()] == bytes[part.clone()], "{part:?} of {parts:?}");
                    }
                });
            }
        });
        prop_assert!(region.failures().is_empty());
    }
}

#[test]
fn a_chunk_behind_a_chunk_of_the_same_donated_page_keeps_its_bytes() {
    for round in 0..50 {
        let bytes = pattern(round, 13_192);
        let donated = Arc::new(Donated::from(pages_of(&bytes)));
        let part = |start: u64, end: u64| Chunk::from(Arc::clone(&donated)).range(start..end);
        let builder = Region::builder().chunk(part(5000, 13_192)).chunk(part(0, 5000));
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        let expected = [&bytes[5000..], &bytes[..5000]].concat();
        scope(|scope| {
            scope.spawn(|| assert!(region.as_slice()[8192..] == expected[8192..], "round {round}"));
            scope.spawn(|| assert!(region.as_slice()[..8192] == expected[..8192], "round {round}"));
        });
        assert!(region.failures().is_empty());
    }
}

#[test]
fn chunks_of_one_donated_page_are_inherited_by_forked_children() {
    let bytes = pattern(7, 3 * PAGE);
    let donated = Arc::new(Donated::from(pages_of(&bytes)));
    let part = |start: u64, end: u64| Chunk::from(Arc::clone(&donated)).range(start..end);
    let builder = Region::builder().page_aligned().chunk(part(5000, 3 * PAGE as u64)).chunk(part(0, 5000));
    match builder.inherit_on_fork().build(&Pool::new().unwrap()) {
        Ok(region) => {
            let at = |chunk| region.offset_of(chunk).unwrap() as usize;
            assert!(region.as_slice()[at(0)..][..3 * PAGE - 5000] == bytes[5000..]);
            assert!(region.as_slice()[at(1)..][..5000] == bytes[..5000]);
        }
        Err(error) => println!("SKIPPED: {error}"),
    }
}

/// A read of the donation itself fails after a page has moved, and never returns the zeros that the
/// page leaves behind.
#[test]
fn a_read_of_a_donation_whose_pages_move_is_an_error_and_not_zeros() {
    if !moves() {
        return;
    }
    for round in 0..20 {
        let bytes = pattern(round, 64 * PAGE);
        let donated = Arc::new(Donated::from(pages_of(&bytes)));
        let builder = Region::builder().chunk(Arc::clone(&donated)).readahead(Readahead::None);
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        let done = AtomicBool::new(false);
        scope(|scope| {
            scope.spawn(|| {
                let mut page = vec![0; PAGE];
                while !done.load(Ordering::SeqCst) {
                    for at in (0..bytes.len()).step_by(PAGE) {
                        if donated.read_at(at as u64, &mut page).is_ok() {
                            assert!(page == bytes[at..at + PAGE], "page at {at} reads as {}", page[0]);
                        }
                    }
                }
            });
            scope.spawn(|| {
                let read = region.as_slice() == bytes;
                done.store(true, Ordering::SeqCst);
                assert!(read);
            });
        });
    }
}

#[test]
fn a_discarded_moved_page_is_an_error_and_not_zeros() {
    // With children, pages move when the region is built.
    let kinds = [(moves(), false, true), (moves(), false, false), (true, true, true)];
    for (_, children, reports) in kinds.into_iter().filter(|(tests, ..)| *tests) {
        let (bytes, pages) = (pattern(4, 3 * PAGE), 3 * PAGE);
        let builder = Region::builder().chunk(pages_of(&bytes)).readahead(Readahead::None);
        let builder = builder.report_discards(reports);
        let builder = if children { builder.inherit_on_fork() } else { builder };
        let region = match builder.build(&Pool::new().unwrap()) {
            Err(error) if cannot_inherit(&error) => return,
            region => region.unwrap(),
        };
        assert!(region.as_slice() == bytes);
        discard(region.as_ptr().addr().get() + PAGE, PAGE);
        let error = region.read_at(0, &mut vec![0; pages]).unwrap_err();
        assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Discarded));
        // The poison marker is not taken for a moved page.
        let error = region.retry_failed(..).unwrap_err();
        assert_eq!(reason(&error), FailureReason::Discarded, "{error}");
        until(|| {
            // The discard event may be read only now. It makes the page absent until the next retry.
            region.retry_failed(..).is_err() && region.failures().len() == 1
        });
    }
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_touch_of_a_discarded_page_that_moved_at_the_build_is_sigbus() {
    let end = child::run(this_test!(), || {
        let pool = Pool::new().unwrap();
        let region = Region::builder().chunk(pages_of(&pattern(4, 3 * PAGE))).inherit_on_fork().build(&pool);
        let region = match region {
            Err(error) if cannot_inherit(&error) => return println!("SKIPPED: {error}"),
            region => region.unwrap(),
        };
        let address = region.as_ptr().addr().get() + PAGE;
        let look = || {
            discard(address, PAGE);
            i32::from(touch(address))
        };
        assert_eq!(ForkedChild::start(look).wait().signal(), Some(SIGBUS), "the child has read a byte");
        assert!(touch(address) > 0, "the page of the parent");
        println!("read a byte: {}", look());
    });
    let is_skipped = end.passed() && end.output().contains("SKIPPED");
    assert!(end.signal() == Some(SIGBUS) || is_skipped, "{}", end.output());
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn untouched_pages_that_moved_at_the_build_are_zeros_for_forked_children_too() {
    let mut pages = Pages::new(40 * PAGE).unwrap();
    pages[20 * PAGE] = 7;
    let whole = Pages::new(9 * PAGE).unwrap();
    let builder = Region::builder().chunk(pages).chunk(whole).readahead(Readahead::None).inherit_on_fork();
    let region = match builder.build(&Pool::new().unwrap()) {
        Err(error) if cannot_inherit(&error) => return,
        region => region.unwrap(),
    };
    let is_right = || {
        region.as_slice().iter().enumerate().all(|(at, &byte)| byte == if at == 20 * PAGE { 7 } else { 0 })
    };
    assert!(ForkedChild::start(|| i32::from(!is_right())).succeeds());
    region.populate(..).unwrap();
    assert!(is_right());
    assert_eq!((region.metrics().faults, region.failures().len()), (0, 0));
}

#[test]
fn mlocked_pages_move() {
    let bytes = pattern(8, 3 * PAGE);
    let pages = pages_of(&bytes);
    let start = std::ptr::NonNull::from(&pages[..]).cast();
    // SAFETY: a lock changes no byte.
    #[expect(unsafe_code, reason = "mlock(2) by the application is part of the test")]
    let locked = unsafe { nix::sys::mman::mlock(start, pages.len()) };
    if let Err(errno) = locked {
        return println!("SKIPPED: no memory can be locked here ({errno})");
    }
    let builder = Region::builder().chunk(pages).require_zero_copy().readahead(Readahead::None);
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == bytes);
    assert_eq!(region.close().bytes_copied, 0);
}

#[test]
fn pinned_pages_are_copied() {
    if !moves() {
        return;
    }
    let bytes = pattern(5, 3 * PAGE);
    let pages = pages_of(&bytes);
    let pinned = FixedBuffer::pin(pages.as_ptr().expose_provenance(), pages.len());
    let Ok(_pinned) = pinned else { return println!("SKIPPED {}: no io_uring", this_test!()) };
    let region =
        Region::builder().chunk(pages).readahead(Readahead::None).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == bytes);
    let seen = region.close();
    assert_eq!((seen.pages_moved, seen.pages_copied), (0, 3));
}

/// The signal handler of the library cannot keep a failure. It leaves the page as it is, so that
/// `populate` finds the reason.
#[test]
fn populate_tells_the_reason_of_a_signal_in_a_discarded_moved_page() {
    static IS_SIGNALLED: AtomicBool = AtomicBool::new(false);
    extern "C" fn keep_the_thread(_: i32) {
        IS_SIGNALLED.store(true, Ordering::SeqCst);
        nix::unistd::pause();
    }
    if !moves() {
        return;
    }
    child::run(this_test!(), || {
        crate::handle_bus_errors(keep_the_thread);
        let region = Region::builder().chunk(pages_of(&pattern(4, 3 * PAGE))).build(Inline).unwrap();
        region.populate(..).unwrap();
        let page = region.as_ptr().addr().get() + PAGE;
        discard(page, PAGE);
        thread::spawn(move || touch(page));
        until(|| IS_SIGNALLED.load(Ordering::SeqCst));
        for _ in 0..2 {
            assert_eq!(reason(&region.populate(..).unwrap_err()), FailureReason::Discarded);
        }
    })
    .expect_pass();
}
