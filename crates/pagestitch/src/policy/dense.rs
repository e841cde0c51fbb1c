//! Dense blocks: a block whose faults have cost as much as filling it would have is filled,
//! whatever their order.
//!
//! That is the ski-rental rule: a skier that rents until the rent has reached the price, and then
//! buys, never pays more than twice what the best decision in hindsight would have cost. Here the
//! rent is what the faults of a block have cost, and the price what filling a block has cost
//! lately; both are measured, so that slow sources and fast memory each find their own threshold.
//! Where there is more than one CPU the price is half of that: a worker fills while the touching
//! thread runs.
//!
//! A region learns from its blocks: the larger the share of touched blocks that came to be filled,
//! the sooner the others are. The bound of twice is the plain rule's; halving the price and
//! learning give some of it up for what was measured to be quicker.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// What the blocks of a region have cost so far.
#[derive(Debug)]
pub(crate) struct Dense {
    /// For each block: nanoseconds spent on faults in it.
    rents: AtomicTable,
    /// What filling a block costs, in nanoseconds: an average that forgets; 0 until one has been
    /// filled.
    price: AtomicU64,
    /// How many faults there were, and what they have cost together.
    faults: AtomicU64,
    spent: AtomicU64,
    /// How many blocks have been touched, and how many of them were filled for it.
    touched: AtomicU64,
    filled: AtomicU64,
    /// Pages in a block, and in the region.
    block: usize,
    pages: usize,
    /// The part of the cost of a fill that the touching threads pay.
    share: u64,
}

impl Dense {
    pub(crate) fn new(pages: usize, block: usize) -> Result<Self, Errno> {
        let blocks = NonZeroUsize::new(pages.div_ceil(block)).expect("a region has pages");
        Ok(Self {
            rents: AtomicTable::new(blocks)?,
            price: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            touched: AtomicU64::new(0),
            filled: AtomicU64::new(0),
            block,
            pages,
            share: if thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) { 2 } else { 1 },
        })
    }

    /// Takes note of a fault; says whether to fill its block now.
    pub(crate) fn spent(&self, page: Page, ns: u64) -> Option<Span> {
        let block = page.0 / self.block;
        let rent = ns + WAKE_UP;
        let before = self.rents.deref()[block].fetch_add(rent, Ordering::Relaxed);
        if before == 0 {
            self.touched.fetch_add(1, Ordering::Relaxed);
        }
        let faults = self.faults.fetch_add(1, Ordering::Relaxed) + 1;
        // Not this one's rent: a single fault may cost many times as much as most, or as little.
        let typical = (self.spent.fetch_add(rent, Ordering::Relaxed) + rent) / faults;
        let threshold = self.threshold(typical);
        // A single fault says nothing of others: it may have waited for a CPU. The fault that
        // exceeds the threshold has it filled; a block that was filled stays there.
        if before == 0 || before >= FILLED || before + rent < threshold {
            return None;
        }
        if self.rents.deref()[block].fetch_or(FILLED, Ordering::Relaxed) & FILLED != 0 {
            return None;
        }
        self.filled.fetch_add(1, Ordering::Relaxed);
        let first = block * self.block;
        Some(Span { first: Page(first), pages: self.block.min(self.pages - first) })
    }

    /// Takes note of what it has cost to fill so many pages of a block.
    pub(crate) fn filled(&self, pages: usize, ns: u64) {
        // Of a few pages, most is not the pages' cost.
        if pages < self.block / 2 {
            return;
        }
        let whole = (u128::from(ns) * self.block as u128 / pages as u128) as u64;
        let before = self.price.load(Ordering::Relaxed);
        let price = if before == 0 { whole } else { before - before / 8 + whole / 8 };
        self.price.store(price.max(1), Ordering::Relaxed);
    }

    /// The cost of a block's faults at which the whole block is filled, if most faults cost
    /// `typical`.
    fn threshold(&self, typical: u64) -> u64 {
        let price = match self.price.load(Ordering::Relaxed) {
            0 => FIRST_PRICE * typical,
            price => price / self.share,
        };
        let touched = self.touched.load(Ordering::Relaxed);
        let filled = self.filled.load(Ordering::Relaxed).min(touched);
        // With few blocks seen, nothing is known.
        let sparse = u128::from(touched - filled + UNKNOWN);
        let threshold = u128::from(price) * sparse / u128::from(touched + UNKNOWN);
        (threshold as u64).max(2 * typical)
    }
}

/// What a fault costs beside our own work: the trap, the wake-up of a worker, and back. As measured
/// where the worker is at home on the CPU of the fault.
const WAKE_UP: u64 = 5_000;
/// What filling a block of memory costs, in faults, as measured on one machine: until it is known
/// here.
const FIRST_PRICE: u64 = 24;
/// Blocks that count as sparse before any was touched.
const UNKNOWN: u64 = 8;
/// Set in the rent of a block that was filled.
const FILLED: u64 = 1 << 63;

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 512;

    fn dense() -> Dense {
        Dense { share: 1, ..Dense::new(100 * BLOCK + 7, BLOCK).unwrap() }
    }

    /// How many faults of `ns` each it takes until a block is filled.
    fn faults_until_filled(dense: &Dense, block: usize, ns: u64) -> usize {
        1 + (0..BLOCK)
            .position(|page| dense.spent(Page(block * BLOCK + page), ns).is_some())
            .expect("it is filled")
    }

    #[test]
    fn a_block_is_filled_once_when_its_faults_have_cost_as_much() {
        let dense = dense();
        dense.filled(BLOCK, 300_000);
        assert_eq!(faults_until_filled(&dense, 3, 5_000), 30, "of 10 us each, with the wake-up");
        assert!((0..BLOCK).all(|page| dense.spent(Page(3 * BLOCK + page), 5_000).is_none()));
    }

    #[test]
    fn slow_sources_find_their_own_threshold() {
        let dense = dense();
        assert_eq!(faults_until_filled(&dense, 0, 10_000_000), FIRST_PRICE as usize, "nothing is known yet");
        dense.filled(BLOCK / 2, 10_000_000);
        assert_eq!(faults_until_filled(&dense, 1, 10_000_000), 2, "a block costs two reads");
    }

    #[test]
    fn one_slow_fault_does_not_make_a_block_dense() {
        let dense = dense();
        assert_eq!(dense.spent(Page(0), 10_000_000), None);
        assert!((1..20).all(|page| dense.spent(Page(page), 1_000).is_none()));
        let blocks = (1..100).map(|block| Page(block * BLOCK));
        assert!(blocks.clone().take(60).all(|page| dense.spent(page, 1_000).is_none()));
        assert!(
            blocks.skip(60).all(|page| dense.spent(page, 10_000_000).is_none()),
            "each is its block's only one"
        );
    }

    #[test]
    fn the_others_are_filled_sooner_when_many_were() {
        let dense = dense();
        dense.filled(BLOCK, 300_000);
        let faults: Vec<_> = (0..50).map(|block| faults_until_filled(&dense, block, 5_000)).collect();
        assert!(faults.is_sorted_by(|earlier, later| later <= earlier), "{faults:?}");
        assert!(faults[49] < faults[0] / 3, "{faults:?}");
    }

    #[test]
    fn sparse_blocks_stay_sparse_and_the_last_one_ends_with_the_region() {
        let dense = dense();
        dense.filled(BLOCK, 300_000);
        for block in 0..100 {
            assert!((0..10).all(|page| dense.spent(Page(block * BLOCK + 40 * page), 5_000).is_none()));
        }
        let last = (0..500).find_map(|_| dense.spent(Page(100 * BLOCK + 3), 5_000)).unwrap();
        assert_eq!(last, Span { first: Page(100 * BLOCK), pages: 7 });
    }
}
