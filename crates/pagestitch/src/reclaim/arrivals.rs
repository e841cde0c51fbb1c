//! Pages that have come, until the policy takes note of them.

use crate::policy::PageKey;
use pagestitch_kernel::Errno;
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use std::num::NonZeroUsize;

/// A queue to which any thread adds without a lock, also in a signal handler. The thread with the lock of
/// the policy empties it.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// An entry and one more, or 0: none yet.
    entries: AtomicTable,
    /// The number of entries that were ever added.
    added: AtomicUsize,
    /// The number of entries that were ever taken.
    taken: AtomicUsize,
}

impl Arrivals {
    pub(super) fn new(room: NonZeroUsize) -> Result<Self, Errno> {
        let (added, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Ok(Self { entries: AtomicTable::new(room)?, added, taken })
    }

    /// Adds a page. False if the queue is full, which takes more pages than the budget has room for.
    pub(super) fn add(&self, page: PageKey, returned: bool) -> bool {
        let next = |added: usize| {
            // Other threads may have added and taken more since `added` was read: it is read again then.
            let waiting = added.saturating_sub(self.taken.load(Ordering::SeqCst));
            (waiting < self.entries.len()).then_some(added + 1)
        };
        let Ok(at) = self.added.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next) else { return false };
        let entry = (page << 1 | u64::from(returned)) + 1;
        self.entries[at % self.entries.len()].store(entry, Ordering::SeqCst);
        true
    }

    /// Takes all entries, up to the first one that is still being added. One thread at a time.
    pub(super) fn take(&self, mut each: impl FnMut(PageKey, bool)) {
        loop {
            let at = self.taken.load(Ordering::SeqCst);
            match self.entries[at % self.entries.len()].swap(0, Ordering::SeqCst) {
                0 => return,
                entry => {
                    self.taken.store(at + 1, Ordering::SeqCst);
                    each((entry - 1) >> 1, (entry - 1) & 1 == 1);
                }
            }
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_in_their_order_and_a_full_queue_refuses() {
        let arrivals = Arrivals::new(NonZeroUsize::new(3).unwrap()).unwrap();
        for round in 0..5 {
            let added: Vec<_> = (0..4).map(|page| arrivals.add(round + page, page == 1)).collect();
            assert_eq!(added, [true, true, true, false]);
            let mut taken = Vec::new();
            arrivals.take(|page, returned| taken.push((page, returned)));
            assert_eq!(taken, [(round, false), (round + 1, true), (round + 2, false)]);
        }
    }
}
