//! `/dev/mem` without restriction: this process's own memory is shown a second time, at another
//! address, without a copy.

use crate::{PAGE, bytes_at};
use pagestitch::source::{Pages, Physical};
use pagestitch::{Access, Pool, Region, SharedRegion};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

const PAGES: usize = 256;

/// Memory whose bytes tell their page.
fn numbered() -> Pages {
    let mut pages = Pages::new(PAGES * PAGE as usize).unwrap();
    pages.chunks_mut(PAGE as usize).zip(0..).for_each(|(page, number)| page.fill(number as u8 | 1));
    pages
}

/// A region of the same pages in reverse order.
#[expect(unsafe_code, reason = "memory is shown a second time")]
fn backwards(pages: &mut Pages, pool: &Pool) -> SharedRegion {
    let start = NonNull::from(&mut pages[0]);
    let each = (0..PAGES).rev().flat_map(|page| {
        // SAFETY: the pages outlive the region, and the tests read them through pointers only.
        let start = unsafe { start.byte_add(page * PAGE as usize) };
        // SAFETY: as above.
        unsafe { Physical::own_memory(start, PAGE as usize, Access::Writable) }.unwrap()
    });
    Region::builder().chunks(each).writable().require_zero_copy().build_shared(pool).unwrap()
}

/// The page frames of these pages.
fn frames(pages: &Pages) -> Vec<u64> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let first = pages.as_ptr().addr() as u64 / PAGE;
    let mut entry = [0; 8];
    (first..first + PAGES as u64)
        .map(|page| {
            pagemap.read_exact_at(&mut entry, page * 8).unwrap();
            u64::from_ne_bytes(entry) & ((1 << 55) - 1)
        })
        .collect()
}

#[test]
#[ignore = "needs the guest's module"]
fn own_private_memory_is_shown_backwards_without_a_copy() {
    let (mut pages, pool) = (numbered(), Pool::new().unwrap());
    let region = backwards(&mut pages, &pool);
    let byte = |page: usize| bytes_at(&region, (PAGES - 1 - page) as u64 * PAGE + 5, 1)[0];
    assert!((0..PAGES).all(|page| byte(page) == page as u8 | 1));
    region.write_at(100, b"seen in the memory").unwrap();
    assert_eq!(&pages[(PAGES - 1) * PAGE as usize + 100..][..18], b"seen in the memory");
    let seen = region.close();
    assert_eq!((seen.pages_in_place, seen.faults, seen.bytes_copied), (PAGES as u64, 0, 0));
}

#[test]
#[ignore = "needs the guest's module"]
#[expect(unsafe_code, reason = "memory is shown a second time")]
fn frames_that_follow_each_other_are_one_chunk() {
    let (mut pages, pool) = (numbered(), Pool::new().unwrap());
    let start = NonNull::from(&mut pages[0]);
    // SAFETY: the memory outlives the region and is only read.
    let ranges = unsafe { Physical::own_memory(start, PAGES * PAGE as usize, Access::ReadOnly) }.unwrap();
    let follows = frames(&pages).windows(2).filter(|pair| pair[0] + 1 == pair[1]).count();
    assert_eq!(ranges.len(), PAGES - follows);
    let region = Region::builder().chunks(ranges).require_zero_copy().build_shared(&pool).unwrap();
    assert!(bytes_at(&region, 0, region.len()) == *pages);
}

#[test]
#[ignore = "needs the guest's module"]
fn compaction_moves_no_frame_that_is_shown() {
    let pool = Pool::new().unwrap();
    // Without huge pages, because a huge page is contiguous.
    fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "never").unwrap();
    let (mut shown, mut beside) = (0, 0);
    // Compaction starts elsewhere in memory, so rounds go on until it reaches these pages.
    for round in 1..=20 {
        let moved = compact(&pool);
        (shown, beside) = (shown + moved.0, beside + moved.1);
        println!("compaction moved {shown} pages that are shown and {beside} beside them, in {round} rounds");
        if beside > 4 * PAGES {
            break;
        }
    }
    assert!(beside > 0, "nothing was compacted, so the test proves nothing");
    assert_eq!(shown, 0, "pinned pages");
}

/// Compacts memory in which every second page is free. Returns the numbers of moved pages that are
/// shown and of moved pages beside them.
fn compact(pool: &Pool) -> (usize, usize) {
    // One page of each allocation in turn, so that neighbouring frames belong to many allocations.
    let mut all: Vec<_> = (0..200).map(|_| Some(Pages::new(PAGES * PAGE as usize).unwrap())).collect();
    for byte in (0..PAGES).map(|page| page * PAGE as usize) {
        all.iter_mut().flatten().for_each(|pages| pages[byte] = 1);
    }
    let mut shown = all[99].take().unwrap();
    let region = backwards(&mut shown, pool);
    all.iter_mut().step_by(2).for_each(|pages| *pages = None);
    let beside: Vec<_> = all.into_iter().flatten().collect();
    let frames_now = || (frames(&shown), beside.iter().flat_map(frames).collect::<Vec<_>>());
    let before = frames_now();
    fs::write("/proc/sys/vm/compact_memory", "1").unwrap();
    let after = frames_now();
    let moved = |before: &[u64], after: &[u64]| before.iter().zip(after).filter(|(a, b)| a != b).count();
    region.write_at(0, b"still the same").unwrap();
    assert_eq!(&shown[(PAGES - 1) * PAGE as usize..][..14], b"still the same");
    (moved(&before.0, &after.0), moved(&before.1, &after.1))
}
