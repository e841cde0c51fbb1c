//! Dense blocks: a block whose faults have cost as much as filling it would have is filled, whatever their order.
//!
//! That is the ski-rental rule: who rents until the rent has reached the price, and then buys, never pays more than
//! twice what the best decision in hindsight would have cost. Here the rent is what the faults of a block have cost, and
//! the price what filling a block has cost lately; both are measured, so that slow sources and fast memory each find
//! their own threshold.
//!
//! A region learns from its blocks: the larger the share of touched blocks that came to be filled, the sooner the others
//! are.

use pagestitch_kernel::words::Words;
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the blocks of a region have cost so far.
#[derive(Debug)]
pub(crate) struct Dense {
    /// For each block: nanoseconds spent on faults in it.
    rents: Words,
    /// What filling a block costs, in nanoseconds: an average that forgets.
    price: AtomicU64,
    /// How many blocks have been touched, and how many of them were filled for it.
    touched: AtomicU64,
    filled: AtomicU64,
    /// Pages in a block, and in the region.
    block: usize,
    pages: usize,
}

impl Dense {
    pub(crate) fn new(pages: usize, block: usize) -> Result<Self, Errno> {
        let blocks = NonZeroUsize::new(pages.div_ceil(block)).expect("a region has pages");
        Ok(Self {
            rents: Words::new(blocks)?,
            price: AtomicU64::new(FIRST_PRICE),
            touched: AtomicU64::new(0),
            filled: AtomicU64::new(0),
            block,
            pages,
        })
    }

    /// Takes note of a fault; says whether its block is to be filled now.
    pub(crate) fn spent(&self, page: Page, ns: u64) -> Option<Span> {
        let block = page.0 / self.block;
        let rent = ns + WAKE_UP;
        let before = self.rents.deref()[block].fetch_add(rent, Ordering::Relaxed);
        if before == 0 {
            self.touched.fetch_add(1, Ordering::Relaxed);
        }
        let threshold = self.threshold();
        // Whoever takes it past the threshold has it filled; a block that was filled stays there.
        if before >= FILLED || before + rent < threshold {
            return None;
        }
        if self.rents.deref()[block].fetch_or(FILLED, Ordering::Relaxed) & FILLED != 0 {
            return None;
        }
        self.filled.fetch_add(1, Ordering::Relaxed);
        let first = block * self.block;
        Some(Span { first: Page(first), pages: self.block.min(self.pages - first) })
    }

    /// Takes note of what it has cost to fill a block.
    pub(crate) fn filled_block(&self, ns: u64) {
        let price = self.price.load(Ordering::Relaxed);
        self.price.store(price - price / 8 + ns / 8, Ordering::Relaxed);
    }

    /// The rent at which a block is bought.
    fn threshold(&self) -> u64 {
        let price = self.price.load(Ordering::Relaxed);
        let touched = self.touched.load(Ordering::Relaxed);
        let filled = self.filled.load(Ordering::Relaxed).min(touched);
        let sparse = touched - filled;
        // With few blocks seen, nothing is known.
        (price as u128 * u128::from(sparse + UNKNOWN) / u128::from(touched + UNKNOWN)) as u64
    }
}

/// What a fault costs beside our own work: the trap, the wake-up of a worker, and back. As measured where the worker is at
/// home on the CPU of the fault.
const WAKE_UP: u64 = 5_000;
/// 512 pages of memory, until one has been measured.
const FIRST_PRICE: u64 = 200_000;
/// Blocks that count as sparse before any was touched.
const UNKNOWN: u64 = 8;
/// Set in the rent of a block that was filled.
const FILLED: u64 = 1 << 63;
