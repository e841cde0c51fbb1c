//! The set of discarded pages of adopted memory, with a bit for each page. A bit is never cleared,
//! so groups whose bits are all set can be skipped.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::cache::prefetch;
use pagestitch_kernel::sync::atomic::Ordering;
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;

/// A set of pages that only grows. Adding a span for a second time takes one step for 262,144 of
/// its pages.
#[derive(Debug)]
pub(super) struct DiscardedPages {
    /// A bit a page.
    pages: AtomicTable,
    /// A bit for each [`GROUP`] of pages that are all set.
    full: AtomicTable,
}

impl DiscardedPages {
    /// An empty set for `pages` pages.
    pub(super) fn new(pages: usize) -> Result<Self, Errno> {
        let words = |bits: usize| {
            AtomicTable::new(NonZeroUsize::new(bits.div_ceil(WORD)).expect("at least one page"))
        };
        Ok(Self { pages: words(pages.div_ceil(GROUP) * GROUP)?, full: words(pages.div_ceil(GROUP))? })
    }

    pub(super) fn add(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let at = rest.first.0;
            let full = self.full_at(at);
            let pages = if full > 0 {
                full
            } else if at % GROUP == 0 && rest.pages >= GROUP {
                self.pages[at / WORD..(at + GROUP) / WORD]
                    .iter()
                    .for_each(|word| word.store(u64::MAX, Ordering::SeqCst));
                let group = at / GROUP;
                self.full[group / WORD].fetch_or(1 << (group % WORD), Ordering::SeqCst);
                GROUP
            } else {
                let pages = rest.pages.min(WORD - at % WORD);
                let bits = (u64::MAX >> (WORD - pages)) << (at % WORD);
                self.pages[at / WORD].fetch_or(bits, Ordering::SeqCst);
                pages
            };
            rest = rest.without_prefix(pages.min(rest.pages));
        }
    }

    /// Prefetches the bit of a page.
    #[inline]
    pub(super) fn prefetch(&self, page: Page) {
        prefetch(&self.pages[page.0 / WORD]);
    }

    /// True if the first page of a span, which has one, is in the set, with the number of leading
    /// pages for which the same holds: at least one. For pages outside the set, that number is at most [`LOOK`].
    pub(super) fn prefix(&self, span: Span) -> (usize, bool) {
        let (first, end) = (span.first.0, span.end().0);
        let set = self.pages[first / WORD].load(Ordering::SeqCst) >> (first % WORD) & 1 == 1;
        let end = if set { end } else { end.min(first + LOOK) };
        let mut at = first;
        while at < end {
            if set && self.full_at(at) > 0 {
                at += self.full_at(at);
                continue;
            }
            let word = self.pages[at / WORD].load(Ordering::SeqCst);
            let others = if set { !word } else { word } >> (at % WORD);
            let same = (others.trailing_zeros() as usize).min(WORD - at % WORD);
            at += same;
            if same == 0 || at % WORD != 0 {
                break;
            }
        }
        // Another thread may have added the first page since the look at it.
        ((at.min(end) - first).max(1), set)
    }

    /// The number of pages from `at` to the end of its group, or of 64 groups, if all of these are
    /// in the set; else 0.
    fn full_at(&self, at: usize) -> usize {
        let group = at / GROUP;
        let groups = self.full[group / WORD].load(Ordering::SeqCst);
        if groups == u64::MAX {
            GROUP * WORD - at % (GROUP * WORD)
        } else if groups >> (group % WORD) & 1 == 1 {
            GROUP - at % GROUP
        } else {
            0
        }
    }
}

const WORD: usize = u64::BITS as usize;
const GROUP: usize = 64 * WORD;
/// The most pages outside the set that one call examines: as many as are ever filled at once.
const LOOK: usize = 1 << 15;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: usize = 1 << 20;

    proptest! {
        #[test]
        fn a_set_of_spans_is_as_page_by_page(
            spans in prop::collection::vec((0..PAGES, 1..PAGES), 1..5), small in prop::collection::vec((0..PAGES, 1usize..200), 0..20),
            looks in prop::collection::vec(0..PAGES, 20),
        ) {
            let removed = DiscardedPages::new(PAGES).unwrap();
            let spans: Vec<_> = spans.iter().chain(&small).chain(&spans)
                .map(|&(first, pages)| Span { first: Page(first), pages: pages.min(PAGES - first) }).collect();
            let mut naive = vec![false; PAGES];
            for span in &spans {
                removed.add(*span);
                naive[span.first.0..span.end().0].fill(true);
            }
            for look in looks {
                prop_assert_eq!(removed.prefix(Page(look).span()).1, naive[look]);
                let (pages, set) = removed.prefix(Span { first: Page(look), pages: PAGES - look });
                prop_assert!(naive[look..look + pages].iter().all(|&is| is == set));
                let ends = look + pages == PAGES || naive[look + pages] != set || !set && pages == LOOK;
                prop_assert!(pages > 0 && ends, "{} pages from {}, {}", pages, look, set);
            }
        }
    }
}
