//! Dense blocks: when the faults of a block have cost as much as filling the block would, in any
//! order, the rest of the block is filled.
//!
//! This is the ski-rental rule. A skier rents skis until the rent has reached the price, and then
//! buys: the cost is at most twice that of the best decision in hindsight. Here the *rent* is the
//! cost of a block's faults, and the *price* the recent cost of filling a block. Both are measured,
//! so slow sources and fast memory each find their own threshold. With more than one CPU the price
//! is halved, because a worker fills while the touching thread runs.
//!
//! A fault pays at most a few times the typical rent, because the worker of a loaded machine may wait
//! for a CPU in the middle of a fault. That wait says nothing about the block.
//!
//! A region learns from its blocks: the larger the share of touched blocks that were filled, the
//! lower the threshold of the others. Halving the price and learning give up the bound of twice,
//! because they were measured to be faster.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::striped::{self, Striped};
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The costs of a region's blocks so far.
#[derive(Debug)]
pub(crate) struct Dense {
    /// For each block, the nanoseconds spent on its faults, and the bit [`FILLED`].
    rents: AtomicTable,
    /// The cost of filling a block in nanoseconds, a moving average; 0 before the first one.
    price: AtomicU64,
    /// The typical rent of a fault, in nanoseconds: a moving average of bounded rents; 0 before the
    /// first fault.
    typical: AtomicU64,
    /// The number of faults in `typical`.
    counted: AtomicU64,
    /// The last few faults of each stripe of threads, so that threads that serve faults at the same
    /// time seldom write to the same line.
    recent: Striped<Faults>,
    /// The number of blocks with a fault.
    touched: AtomicU64,
    /// Of these, the blocks that reached the threshold and were filled.
    filled: AtomicU64,
    /// The pages of a block.
    block: usize,
    /// The pages of the region so far.
    pages: AtomicUsize,
    /// The price is divided by this: 2 if a worker can fill while the touching thread runs, else 1.
    share: u64,
}

#[derive(Debug, Default)]
struct Faults {
    count: AtomicU64,
    /// The bounded rent of all of them together, in nanoseconds.
    spent: AtomicU64,
}

impl Dense {
    pub(crate) fn new(pages: usize, block: usize) -> Result<Self, Errno> {
        let blocks = NonZeroUsize::new(pages.div_ceil(block)).expect("a region has pages");
        Ok(Self {
            rents: AtomicTable::new(blocks)?,
            price: AtomicU64::new(0),
            typical: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            recent: Striped::new(blocks.get()),
            touched: AtomicU64::new(0),
            filled: AtomicU64::new(0),
            block,
            pages: AtomicUsize::new(pages),
            share: share(),
        })
    }

    /// Records the cost of a fault. Returns its block if that must be filled now.
    pub(crate) fn spent(&self, page: Page, ns: u64) -> Option<Span> {
        let block = page.0 / self.block;
        let rent = self.bounded(ns.saturating_add(WAKE_UP));
        let before = self.rents.deref()[block].fetch_add(rent, Ordering::Relaxed);
        if before == 0 {
            self.touched.fetch_add(1, Ordering::Relaxed);
        }
        let threshold = self.threshold(self.typical_with(rent));
        // The first fault of a block does not count alone, because it may have waited for a CPU. A
        // block is filled once.
        if before == 0 || before >= FILLED || before + rent < threshold {
            return None;
        }
        if self.rents.deref()[block].fetch_or(FILLED, Ordering::Relaxed) & FILLED != 0 {
            return None;
        }
        self.filled.fetch_add(1, Ordering::Relaxed);
        let first = block * self.block;
        let pages = self.pages.load(Ordering::Relaxed).max(page.0 + 1);
        Some(Span { first: Page(first), pages: self.block.min(pages - first) })
    }

    /// Notes the number of pages of a region that grows.
    pub(crate) fn set_pages(&self, pages: usize) {
        self.pages.store(pages, Ordering::Relaxed);
    }

    /// The rent that a fault pays.
    fn bounded(&self, rent: u64) -> u64 {
        match self.typical.load(Ordering::Relaxed) {
            0 => rent,
            typical => rent.min(typical.saturating_mul(BOUND)),
        }
    }

    /// Counts a fault. Returns the typical rent.
    fn typical_with(&self, rent: u64) -> u64 {
        let Faults { count, spent } = self.recent.local();
        spent.fetch_add(rent, Ordering::Relaxed);
        let few = self.counted.load(Ordering::Relaxed) < FEW;
        if count.fetch_add(1, Ordering::Relaxed) + 1 >= FEW || few {
            self.average(count.swap(0, Ordering::Relaxed), spent.swap(0, Ordering::Relaxed));
        }
        self.typical.load(Ordering::Relaxed)
    }

    /// Adds faults to the moving average. Of two threads that do so at once, one may be ignored.
    fn average(&self, count: u64, spent: u64) {
        let Some(mean) = spent.checked_div(count) else { return };
        let counted = self.counted.fetch_add(count, Ordering::Relaxed) + count;
        let before = u128::from(self.typical.load(Ordering::Relaxed));
        // All faults count alike until the average has as many as its window.
        let window = u128::from(counted.min(WINDOW));
        let weight = u128::from(count).min(window);
        let typical = (before * (window - weight) + u128::from(mean) * weight) / window;
        self.typical.store((typical as u64).max(1), Ordering::Relaxed);
    }

    /// Records the cost of filling `pages` pages of a block.
    pub(crate) fn filled(&self, pages: usize, ns: u64) {
        // For a few pages, most of the cost does not depend on their number.
        if pages < self.block / 2 {
            return;
        }
        let whole = (u128::from(ns) * self.block as u128 / pages as u128) as u64;
        let before = self.price.load(Ordering::Relaxed);
        let price = if before == 0 { whole } else { before - before / 8 + whole / 8 };
        self.price.store(price.max(1), Ordering::Relaxed);
    }

    /// The rent of a block's faults at which the block is filled.
    fn threshold(&self, typical: u64) -> u64 {
        let price = match self.price.load(Ordering::Relaxed) {
            0 => FIRST_PRICE * typical,
            price => price / self.share,
        };
        let touched = self.touched.load(Ordering::Relaxed);
        let filled = self.filled.load(Ordering::Relaxed).min(touched);
        // While few blocks are touched, most count as sparse.
        let sparse = u128::from(touched - filled + UNKNOWN);
        let threshold = u128::from(price) * sparse / u128::from(touched + UNKNOWN);
        (threshold as u64).max(2 * typical)
    }
}

/// The share of the price at which a block is filled.
fn share() -> u64 {
    if striped::cpus() > 1 { 2 } else { 1 }
}

/// The cost of a fault outside our code, in nanoseconds: the trap, and two switches of threads.
/// Measured with a worker pinned to the CPU of the fault.
const WAKE_UP: u64 = 5_000;
/// The cost of filling a block, in faults, until it is measured; a figure from one machine.
const FIRST_PRICE: u64 = 24;
/// The number of imaginary sparse blocks with which a region starts.
const UNKNOWN: u64 = 8;
/// The number of faults that a stripe counts before it adds them to all others.
const FEW: u64 = 16;
/// The number of faults in the moving average of rents.
const WINDOW: u64 = 32;
/// A fault pays at most this many typical rents.
const BOUND: u64 = 4;
/// This bit of a block's rent is set once the block was filled.
const FILLED: u64 = 1 << 63;

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 512;

    fn dense() -> Dense {
        Dense { share: 1, ..Dense::new(100 * BLOCK + 7, BLOCK).unwrap() }
    }

    /// The number of faults, of `ns` each, until a block is filled.
    fn faults_until_filled(dense: &Dense, block: usize, ns: u64) -> usize {
        1 + (0..BLOCK)
            .position(|page| dense.spent(Page(block * BLOCK + page), ns).is_some())
            .expect("it is filled")
    }

    #[test]
    fn a_block_is_filled_once_when_its_faults_have_cost_the_price() {
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
        assert!(blocks.skip(60).all(|page| dense.spent(page, 10_000_000).is_none()), "one fault a block");
    }

    /// A loaded machine: one fault in ten waits for a CPU, in blocks with one or two faults each.
    #[test]
    fn preempted_faults_make_no_block_dense() {
        let dense = dense();
        for fault in 0..200 {
            let page = Page(fault * 7_919 % 100 * BLOCK + fault % BLOCK);
            let ns = if fault % 10 == 3 { 10_000_000 } else { 20_000 };
            assert_eq!(dense.spent(page, ns), None, "fault {fault}");
        }
        assert!(dense.typical.load(Ordering::Relaxed) < 100_000, "{dense:?}");
        dense.filled(BLOCK, 800_000);
        assert!(faults_until_filled(&dense, 3, 20_000) > 5);
    }

    #[test]
    fn a_source_that_becomes_slow_is_known_to_be_slow_after_some_faults() {
        let dense = dense();
        dense.filled(BLOCK, 300_000);
        let faults =
            |count, ns| (0..count).filter_map(|fault| dense.spent(Page(fault % 100 * BLOCK), ns)).count();
        faults(1_000, 1_000);
        assert!(dense.typical.load(Ordering::Relaxed) < 10_000, "{dense:?}");
        faults(200, 10_000_000);
        assert!(dense.typical.load(Ordering::Relaxed) > 5_000_000, "{dense:?}");
    }

    #[test]
    fn blocks_are_filled_sooner_after_many_others() {
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
