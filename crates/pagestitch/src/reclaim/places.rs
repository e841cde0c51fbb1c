//! The place of each page of a region: resident, in a slot, or elsewhere.

use crate::space::LeftPages;
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

/// The places of a region's pages, 32 bits a page. Memory is taken only where the table is touched. The
/// highest bit tells that a page has left: it is set with a place outside of the region, stays while the
/// page is resident again, and ends when the page gets other bytes.
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
        let change = |word| Some(with_place(word, page, place));
        let changed = self.0[page.0 / 2].fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        let (Ok(before) | Err(before)) = changed;
        Place::from_bits((before >> shift(page)) as u32)
    }

    /// Changes the place of a page if it is `from`, a place outside of its region.
    pub(super) fn exchange(&self, page: Page, from: Place, to: Place) -> bool {
        let is_from = |word: &u64| (word >> shift(page)) as u32 == from.bits();
        let change = |word: u64| Some(word).filter(is_from).map(|word| with_place(word, page, to));
        self.0[page.0 / 2].fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok()
    }
}

/// A word of the table with another place of a page. A page that is resident again has left still.
const fn with_place(word: u64, page: Page, place: Place) -> u64 {
    let kept = if matches!(place, Place::Resident) { word & (LEFT as u64) << shift(page) } else { 0 };
    word & !((u32::MAX as u64) << shift(page)) | (place.bits() as u64) << shift(page) | kept
}

impl LeftPages for Places {
    fn has_left(&self, page: Page) -> bool {
        let word = self.0[page.0 / 2].load(Ordering::Relaxed);
        (word >> shift(page)) as u32 & LEFT != 0
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
            Self::Gone => 2 | LEFT,
            Self::Listed => 3,
            Self::Slot(slot) => (slot + 4) | LEFT,
        }
    }

    const fn from_bits(bits: u32) -> Self {
        match bits & !LEFT {
            0 => Self::Nowhere,
            1 => Self::Resident,
            2 => Self::Gone,
            3 => Self::Listed,
            slot => Self::Slot(slot - 4),
        }
    }
}

/// The bit of a page that has left.
const LEFT: u32 = 1 << 31;
/// The most slots that a place can name.
pub(super) const SLOTS_MAX: usize = LEFT as usize - 4;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const LAST: u32 = SLOTS_MAX as u32 - 1;

    #[test]
    fn a_page_has_left_until_it_gets_other_bytes() {
        let places = Places::new(2).unwrap();
        let steps = [
            (Place::Resident, false),
            (Place::Slot(LAST), true),
            (Place::Resident, true),
            (Place::Gone, true),
            (Place::Resident, true),
            (Place::Listed, false),
            (Place::Resident, false),
            (Place::Gone, true),
            (Place::Nowhere, false),
        ];
        for (place, has_left) in steps {
            places.set(Page(1), place);
            assert_eq!((places.get(Page(1)), places.has_left(Page(1))), (place, has_left));
            assert_eq!((places.get(Page(0)), places.has_left(Page(0))), (Place::Nowhere, false));
        }
    }

    #[test]
    fn neighbours_have_places_of_their_own() {
        let places = Places::new(3).unwrap();
        assert_eq!(places.set(Page(1), Place::Slot(LAST)), Place::Nowhere);
        assert_eq!(places.set(Page(0), Place::Resident), Place::Nowhere);
        assert_eq!(places.set(Page(2), Place::Listed), Place::Nowhere);
        assert_eq!(places.set(Page(2), Place::Slot(0)), Place::Listed);
        assert_eq!(places.set(Page(0), Place::Nowhere), Place::Resident);
        let all = [Page(0), Page(1), Page(2)].map(|page| places.get(page));
        assert_eq!(all, [Place::Nowhere, Place::Slot(LAST), Place::Slot(0)]);
        assert!(!places.exchange(Page(1), Place::Slot(0), Place::Gone));
        assert!(places.exchange(Page(2), Place::Slot(0), Place::Gone));
        assert!(places.exchange(Page(1), Place::Slot(LAST), Place::Resident));
        let all = [Page(1), Page(2)].map(|page| (places.get(page), places.has_left(page)));
        assert_eq!(all, [(Place::Resident, true), (Place::Gone, true)]);
    }
}
