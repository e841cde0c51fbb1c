//! Pages of regions with a budget and write-back that an io_uring has pinned: they stay, and no byte that
//! arrives there is lost. Bytes arrive in the frames themselves, so no fault tells of them.

use crate::application::FixedBuffer;
use crate::bounded_writes::{BUDGET, PAGES, builder, mix, moves_no_pages, pool, word, write_beside_flushes};
use crate::inline_writes::{file, word_of};
use crate::waits::until;
use crate::{PAGE, SetOnDrop, pattern};
use nix::libc;
use pagestitch::{Budget, Inline, Server, SharedRegion};
use pagestitch_testkit::memory;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::this_test;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

fn bytes(pages: &Range<usize>) -> Range<u64> {
    (pages.start * PAGE) as u64..(pages.end * PAGE) as u64
}

/// Pins pages of a region; each of them is written before, because an ordinary user's region serves no faults of
/// the kernel. Prints a line and returns `None` where an io_uring pins nothing.
fn pin(test: &str, region: &SharedRegion, pages: &Range<usize>) -> Option<FixedBuffer> {
    let start = word(region, pages.start).as_ptr().expose_provenance();
    let pin = || {
        for page in pages.clone() {
            let word = memory::word_of(region, page * PAGE + HALF);
            // A store, because a compiler makes a load of `fetch_or(0)`.
            word.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        FixedBuffer::pin(start, pages.len() * PAGE)
    };
    let is_fault = |error: &io::Error| error.raw_os_error() == Some(libc::EFAULT);
    // One of the pages may have left again.
    let pinned = (0..100).map(|_| pin()).find(|pinned| !pinned.as_ref().is_err_and(is_fault));
    let pinned = pinned.unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EFAULT)));
    let refused = |error| println!("SKIPPED {test}: no io_uring pins memory here ({error})");
    pinned.map_err(refused).ok()
}

/// A file that is read past the page cache, where its file system can do so, with its bytes.
fn direct_file(pages: usize) -> (File, Vec<u8>) {
    let contents = pattern(3, pages * PAGE);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, &contents).unwrap();
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
    let has_halves = |file: &File| file.read_exact_at(&mut Aligned([0; PAGE]).0[..HALF], HALF as u64).is_ok();
    (direct.ok().filter(has_halves).unwrap_or_else(|| File::open(&path).unwrap()), contents)
}

#[repr(align(4096))]
struct Aligned([u8; PAGE]);

/// Bytes arrive in the second half of a page while threads write to its first half.
const HALF: usize = PAGE / 2;

const PINNED: Range<usize> = 8..24;

#[test]
fn pinned_pages_stay_dirty_and_bytes_that_arrive_after_a_flush_are_not_lost() {
    if moves_no_pages() {
        return;
    }
    for ends_by_flush in [true, false] {
        for server in [Server::from(&pool(2)), Server::from(Inline)] {
            if pinned_pages_stay(this_test!(), server, ends_by_flush).is_none() {
                return;
            }
        }
    }
}

fn pinned_pages_stay(test: &str, server: Server, ends_by_flush: bool) -> Option<()> {
    const ROUNDS: usize = 4;
    let (from, contents) = direct_file(ROUNDS * PINNED.len());
    let (budget, (to, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
    let region = builder(&budget, chunk).build_shared(server).unwrap();
    let others = || (PINNED.end..PAGES).chain(0..PINNED.start);
    let mut pinned = pin(test, &region, &PINNED)?;
    let mut arrive = |round: usize| {
        for page in 0..PINNED.len() {
            let offset = ((round * PINNED.len() + page) * PAGE) as u64;
            assert_eq!(pinned.read(&from, offset, page * PAGE..(page + 1) * PAGE).unwrap(), PAGE);
        }
    };
    let has_bytes = |round: usize| {
        let mut written = vec![0; PINNED.len() * PAGE];
        to.read_exact_at(&mut written, bytes(&PINNED).start).unwrap();
        written == contents[round * written.len()..][..written.len()]
    };
    for round in 0..ROUNDS - 1 {
        arrive(round);
        others().for_each(|page| word(&region, page).store((page + round) as u64, Ordering::Relaxed));
        let before = budget.metrics();
        assert_eq!(region.evict(bytes(&PINNED)).unwrap(), 0);
        assert!(budget.metrics().kept > before.kept && before.evictions > 0, "{before:?}");
        region.flush(..).unwrap();
        assert!(has_bytes(round), "round {round}");
        assert_eq!(budget.metrics().dirty_bytes, (PINNED.len() * PAGE) as u64);
    }
    arrive(ROUNDS - 1);
    assert!(!has_bytes(ROUNDS - 1));
    others().for_each(|page| _ = word(&region, page).load(Ordering::Relaxed));
    pinned.unpin();
    if ends_by_flush {
        region.flush(..).unwrap();
    } else {
        until(|| {
            region.evict(bytes(&PINNED)).unwrap();
            budget.metrics().dirty_bytes == 0
        });
    }
    assert!(has_bytes(ROUNDS - 1));
    assert_eq!(budget.metrics().dirty_bytes, 0);
    others().for_each(|page| assert_eq!(word_of(&to, page), (page + ROUNDS - 2) as u64));
    Some(())
}

#[test]
fn bytes_that_arrive_in_pinned_pages_beside_writers_flushes_and_evictions_are_not_lost() {
    if moves_no_pages() {
        return;
    }
    for server in [Server::from(&pool(2)), Server::from(Inline)] {
        let (budget, (to, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
        let region = builder(&budget, chunk).build_shared(server).unwrap();
        let (from, contents) = direct_file(64);
        if pin(this_test!(), &region, &PINNED).is_none() {
            return;
        }
        let is_over = AtomicBool::new(false);
        let (arrived, written) = scope(|scope| {
            let pins = scope.spawn(|| pin_again_and_again(this_test!(), &region, &from, &contents, &is_over));
            let _is_over = SetOnDrop(&is_over);
            let written = write_beside_flushes(&region, &budget, 3);
            is_over.store(true, Ordering::Relaxed);
            (pins.join().unwrap(), written)
        });
        let metrics = budget.metrics();
        assert!(metrics.kept > 0 && metrics.evictions > 1_000 && metrics.write_failures == 0, "{metrics:?}");
        region.finish().unwrap();
        let mut half = vec![0; HALF];
        for (page, (expected, arrived)) in written.iter().zip(&arrived).enumerate() {
            assert_eq!(word_of(&to, page), *expected, "page {page}");
            to.read_exact_at(&mut half, (page * PAGE + HALF) as u64).unwrap();
            assert!(half == *arrived, "page {page}");
        }
    }
}

/// Pins some pages, has bytes arrive in their second halves, and ends the pin. Returns the second half of each page.
fn pin_again_and_again(
    test: &str,
    region: &SharedRegion,
    from: &File,
    contents: &[u8],
    is_over: &AtomicBool,
) -> Vec<Vec<u8>> {
    let mut expected = vec![vec![0; HALF]; PAGES];
    let check = |expected: &[Vec<u8>], pages: &Range<usize>| {
        let mut half = vec![0; HALF];
        for page in pages.clone() {
            region.read_at((page * PAGE + HALF) as u64, &mut half).unwrap();
            assert!(half == expected[page], "page {page}");
        }
    };
    for round in 0.. {
        if round >= 3 && is_over.load(Ordering::Relaxed) {
            break;
        }
        let first = mix(round + 1) as usize % (PAGES - PINNED.len());
        let pages = first..first + PINNED.len();
        let mut pinned = pin(test, region, &pages).expect("as before");
        for step in 0..4 * PINNED.len() {
            let random = mix(round << 8 | step as u64) as usize;
            let (page, at) = (random % PINNED.len(), random / PAGE % (contents.len() / HALF) * HALF);
            let half = page * PAGE + HALF..(page + 1) * PAGE;
            assert_eq!(pinned.read(from, at as u64, half).unwrap(), HALF);
            expected[first + page].copy_from_slice(&contents[at..at + HALF]);
            if step % 16 == 0 {
                assert_eq!(region.evict(bytes(&pages)).unwrap(), 0);
                check(&expected, &pages);
            }
        }
        pinned.unpin();
        check(&expected, &pages);
    }
    expected
}
