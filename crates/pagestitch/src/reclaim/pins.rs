//! Pages that the application has pinned: they do not leave.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::Mutex;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;

/// A bit for each page of a region. Memory is taken only where the table is touched.
///
/// A page is pinned before it is filled, and a thread that evicts looks at the bit while it has the claim
/// of the page. So a page that is filled after its pin stays.
#[derive(Debug)]
pub(super) struct Pins {
    bits: AtomicTable,
    pages: AtomicUsize,
    /// Held by a thread that pins or unpins pages, while it counts them.
    pub(super) counting: Mutex<()>,
}

impl Pins {
    pub(super) fn new(pages: usize) -> Result<Self, Errno> {
        let words = NonZeroUsize::new(pages.div_ceil(WORD)).expect("a region has pages");
        Ok(Self { bits: AtomicTable::new(words)?, pages: AtomicUsize::new(0), counting: Mutex::new(()) })
    }

    /// The number of pinned pages.
    pub(super) fn count(&self) -> usize {
        self.pages.load(Ordering::SeqCst)
    }

    pub(super) fn has(&self, page: Page) -> bool {
        self.bits[page.0 / WORD].load(Ordering::SeqCst) & bit(page) != 0
    }

    /// The leading pages of a span that are not pinned.
    pub(super) fn free_prefix(&self, span: Span) -> Span {
        if self.count() == 0 {
            return span;
        }
        span.prefix(span.iter().take_while(|page| !self.has(*page)).count())
    }

    /// Pins pages. Returns the number of those that were not pinned before.
    pub(super) fn add(&self, span: Span) -> usize {
        // The count comes first: a thread that finds no pin does not look at the bits.
        self.pages.fetch_add(span.pages, Ordering::SeqCst);
        let is_new =
            |page: &Page| self.bits[page.0 / WORD].fetch_or(bit(*page), Ordering::SeqCst) & bit(*page) == 0;
        let new = span.iter().filter(is_new).count();
        self.pages.fetch_sub(span.pages - new, Ordering::SeqCst);
        new
    }

    /// Ends the pins of pages. Returns the number of those that were pinned.
    pub(super) fn remove(&self, span: Span) -> usize {
        let was_pinned =
            |page: &Page| self.bits[page.0 / WORD].fetch_and(!bit(*page), Ordering::SeqCst) & bit(*page) != 0;
        let removed = if self.count() > 0 { span.iter().filter(was_pinned).count() } else { 0 };
        self.pages.fetch_sub(removed, Ordering::SeqCst);
        removed
    }
}

const fn bit(page: Page) -> u64 {
    1 << (page.0 % WORD)
}

const WORD: usize = u64::BITS as usize;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_pinned_once_and_unpinned_once() {
        let pins = Pins::new(130).unwrap();
        let span = |first, pages| Span { first: Page(first), pages };
        assert_eq!((pins.add(span(60, 10)), pins.add(span(65, 10)), pins.count()), (10, 5, 15));
        assert_eq!(pins.free_prefix(span(50, 20)), span(50, 10));
        assert!(pins.has(Page(74)) && !pins.has(Page(75)));
        assert_eq!((pins.remove(span(0, 130)), pins.remove(span(0, 130)), pins.count()), (15, 0, 0));
        assert_eq!(pins.free_prefix(span(60, 20)), span(60, 20));
    }
}
