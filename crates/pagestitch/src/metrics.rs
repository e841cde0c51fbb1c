//! Tell: what has happened in a region, as numbers with one meaning each.
//!
//! Threads that count at the same time do so in different cache lines: which, their stacks decide.

use pagestitch_kernel::lanes::Lanes;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A region's numbers at one moment. They only grow, and may lag: a thread runs on as soon as the kernel has
        /// its page, which is a moment before the page is counted.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics { $($(#[$doc])* pub $name: u64,)* }

        /// The numbers as one thread counts them.
        #[derive(Debug, Default)]
        pub(crate) struct Counted { $(pub(crate) $name: Counter,)* }

        impl Counters {
            pub(crate) fn read(&self) -> Metrics {
                Metrics { $($name: self.lanes.iter().map(|counted| counted.$name.0.load(Ordering::Relaxed)).sum(),)* }
            }
        }
    };
}

/// The numbers as they are counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    lanes: Lanes<Counted>,
}

impl Counters {
    /// Where the calling thread counts.
    pub(crate) fn here(&self) -> &Counted {
        self.lanes.here()
    }
}

metrics! {
    /// Faults taken from the kernel, one for each page and batch. More than pages, where threads meet in a page.
    faults,
    /// Faults on a page that was there by the time they were looked at.
    late,
    /// Pages shown in place when the region was built: no copy, no fault.
    pages_in_place,
    /// Pages copied straight from a source's own memory.
    pages_copied,
    /// Pages read into staging from one source, and copied from there.
    pages_read,
    /// Pages gathered in staging from several chunks, and copied from there.
    pages_gathered,
    /// Pages of whole blocks, filled in a huge page of staging that was then moved in: copied once.
    pages_staged,
    /// Donated pages that were moved in: not copied.
    pages_moved,
    /// Pages of a memfd that is filled later, shown when it had them: not copied.
    pages_cached,
    /// Pages of zeros.
    pages_zeroed,
    /// Pages that a source could not fill: poisoned.
    pages_poisoned,
    /// Poisoned pages that were filled after all, by `heal`.
    pages_healed,
    /// Of the pages above, those that were filled ahead of a sequential reader.
    pages_ahead,
    /// Bytes copied into the region.
    bytes_copied,
    /// Fills that met a change of the memory map and were given back to be tried again.
    retries,
}

impl Metrics {
    /// Pages installed on a fault or by populating, in whichever way.
    #[must_use]
    pub const fn pages_installed(&self) -> u64 {
        self.pages_copied
            + self.pages_read
            + self.pages_gathered
            + self.pages_staged
            + self.pages_moved
            + self.pages_cached
            + self.pages_zeroed
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
}
