//! Whole blocks that sequential readers leave behind leave first, and the pages in use stay.

use crate::PAGE;
use pagestitch::source::StableSource;
use pagestitch::{Budget, Chunk, Pool, Region, Source};
use pagestitch_kernel::staging;
use std::io;
use std::sync::Arc;

/// A long source, each page of which begins with its number.
struct Numbered(usize);

impl Source for Numbered {
    fn size(&self) -> u64 {
        (self.0 * PAGE) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        for (page, bytes) in (offset / PAGE as u64..).zip(into.chunks_mut(PAGE)) {
            bytes[..8].copy_from_slice(&page.to_le_bytes());
        }
        Ok(())
    }
}

// SAFETY: each read gives the same numbers. The tests read nothing else.
#[expect(unsafe_code, reason = "the promise of a stable source")]
unsafe impl StableSource for Numbered {}

fn touch(region: &Region, page: usize) {
    assert_eq!(region.as_slice()[page * PAGE..][..8], (page as u64).to_le_bytes());
}

#[test]
fn a_long_sequential_read_comes_in_blocks_and_does_not_displace_the_pages_in_use() {
    staging::never_pause();
    let (pool, budget) = (Pool::builder().workers(1).start().unwrap(), Budget::bytes(BUDGET).unwrap());
    let build = |pages| {
        let chunk = Chunk::stable(Arc::new(Numbered(pages)));
        Region::builder().chunk(chunk).budget(&budget).build(&pool).unwrap()
    };
    let (used, long) = (build(16_000), build(BUDGET as usize / PAGE * 3 / 2));
    // Every eighth page, so that no block is filled.
    (0..16_000).step_by(8).for_each(|page| touch(&used, page));
    let before = used.metrics().pages_installed();
    (0..long.len() / PAGE).for_each(|page| touch(&long, page));
    if let Err(reason) = long.plan().staged() {
        println!("SKIPPED in part: {reason}");
        return;
    }
    let metrics = long.metrics();
    assert!(metrics.pages_staged >= 512, "{metrics:?}");
    (0..16_000).step_by(8).for_each(|page| touch(&used, page));
    let again = used.metrics().pages_installed() - before;
    // A loaded machine has fewer huge pages at hand, and small pages pass through the lists of all pages.
    let came_in_blocks = metrics.pages_staged * 10 > metrics.pages_installed() * 9;
    assert!(again < 100 || !came_in_blocks, "{again} of 2000 pages in use have left");
    assert_eq!(budget.overruns(), 0);
    assert!(budget.resident_bytes() <= BUDGET);
    // Back again, some blocks are still there, and others come once more.
    (0..long.len() / PAGE).rev().step_by(100).for_each(|page| touch(&long, page));
    long.evict(..).unwrap();
    (0..long.len() / PAGE).step_by(100).for_each(|page| touch(&long, page));
}

const BUDGET: u64 = 64 << 20;
