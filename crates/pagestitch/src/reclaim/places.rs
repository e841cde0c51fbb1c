//! The place of each page of a region: resident, in a slot, or elsewhere.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::atomic::Ordering;
use pagestitch_kernel::{Errno, Page};
use std::num::NonZeroUsize;

/// The place of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// It takes no memory that the budget counts, and has not left.
    Nowhere,
    /// As `Nowhere`, and the policy has it still, because it was discarded.
    Listed,
    /// It has left, and is not in a slot.
    Gone,
    /// It is in its region, and the policy has it.
    Resident,
    /// It was moved to this slot. It may be gone since: the slot tells.
    Slot(u32),
}

/// The places of a region's pages, 32 bits a page. Memory is taken only where the table is touched.
///
/// Invariant: only the thread with the claim of a page changes its place, or the thread that fills the page
/// for a signal handler which has interrupted that one.
#[derive(Debug)]
pub(super) struct Places(AtomicTable);

impl Places {
    pub(super) fn new(pages: usize) -> Result<Self, Errno> {
        let words = NonZeroUsize::new(pages.div_ceil(2)).expect("a region has pages");
        AtomicTable::new(words).map(Self)
    }

    pub(super) fn get(&self, page: Page) -> Place {
        let word = self.0[page.0 / 2].load(Ordering::SeqCst);
        Place::from_bits((word >> shift(page)) as u32)
    }

    /// Changes the place of a page, and returns the place before.
    pub(super) fn set(&self, page: Page, place: Place) -> Place {
        let (shift, word) = (shift(page), &self.0[page.0 / 2]);
        let (mask, bits) = (u64::from(u32::MAX) << shift, u64::from(place.bits()) << shift);
        let changed = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| Some(word & !mask | bits));
        let (Ok(before) | Err(before)) = changed;
        Place::from_bits((before >> shift) as u32)
    }
}

/// The position of a page in its word.
const fn shift(page: Page) -> u32 {
    (page.0 % 2) as u32 * u32::BITS
}

impl Place {
    const fn bits(self) -> u32 {
        match self {
            Self::Nowhere => 0,
            Self::Resident => 1,
            Self::Gone => 2,
            Self::Listed => 3,
            Self::Slot(slot) => slot + 4,
        }
    }

    const fn from_bits(bits: u32) -> Self {
        match bits {
            0 => Self::Nowhere,
            1 => Self::Resident,
            2 => Self::Gone,
            3 => Self::Listed,
            slot => Self::Slot(slot - 4),
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_places_of_their_own() {
        let places = Places::new(3).unwrap();
        assert_eq!(places.set(Page(1), Place::Slot(u32::MAX - 4)), Place::Nowhere);
        assert_eq!(places.set(Page(0), Place::Resident), Place::Nowhere);
        assert_eq!(places.set(Page(2), Place::Listed), Place::Nowhere);
        assert_eq!(places.set(Page(2), Place::Slot(0)), Place::Listed);
        assert_eq!(places.set(Page(0), Place::Nowhere), Place::Resident);
        let all = [Page(0), Page(1), Page(2)].map(|page| places.get(page));
        assert_eq!(all, [Place::Nowhere, Place::Slot(u32::MAX - 4), Place::Slot(0)]);
    }
}
