//! Hashes of the pages whose source may change: a page that comes back has the bytes of its first reading.
//!
//! ```text
//!   fill ─▶ a worker's buffer ─▶ hash ─▶ first time: kept ─▶ install
//!                                 └────▶ later: equal ─────▶ install
//!                                        other ────────────▶ an error of the page
//! ```

use crate::space::Layout;
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::atomic::{AtomicU64, Ordering};
use pagestitch_kernel::{Errno, Page, PageSize, Span};
use siphasher::sip128::SipHasher24;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroUsize;

/// The hashes of a region's pages, 16 bytes a page. Memory is taken only where the table is touched.
pub(super) struct Fingerprints {
    /// Two words a page, which are 0 before its first reading.
    ///
    /// Invariant: a word that is not 0 does not change, unless the page gets other bytes.
    words: AtomicTable,
    /// The pages whose source may change, in order.
    spans: Vec<Span>,
    page: PageSize,
    /// SipHash-2-4 with a random key and 128 bits of output: a source that does not know the key cannot
    /// give two pages of one hash.
    hasher: SipHasher24,
}

impl Fingerprints {
    /// A table for the pages of `spans`, which has one at least.
    pub(super) fn new(spans: Vec<Span>, page: PageSize) -> Result<Self, Errno> {
        let end = spans.last().map_or(0, |last| last.end().0);
        let words = NonZeroUsize::new(end * WORDS).expect("a table has pages");
        Ok(Self {
            words: AtomicTable::new(words)?,
            spans,
            page,
            hasher: SipHasher24::new_with_key(&random_key()),
        })
    }

    /// True if the source of a page may change.
    pub(super) fn has(&self, page: Page) -> bool {
        let next = self.spans.partition_point(|span| span.end() <= page);
        self.spans.get(next).is_some_and(|span| span.first <= page)
    }

    /// Compares pages with their first reading, which is kept if this is it. Returns the number of
    /// leading pages that do not differ.
    pub(super) fn unchanged(&self, span: Span, bytes: &[u8]) -> usize {
        let pages = span.iter().zip(bytes.chunks_exact(self.page.bytes()));
        pages.take_while(|(page, bytes)| !self.has(*page) || self.is_first(*page, bytes)).count()
    }

    /// Forgets the first readings of pages that get other bytes. The caller has claimed them.
    pub(super) fn forget(&self, span: Span) {
        let hashed = span.iter().filter(|page| self.has(*page));
        hashed.for_each(|page| {
            self.words[page.0 * WORDS..][..WORDS].iter().for_each(|word| word.store(0, Ordering::SeqCst));
        });
    }

    /// Two threads may fill a page at once: one beside the claim of the other. The first word decides
    /// whose bytes are the first reading.
    fn is_first(&self, page: Page, bytes: &[u8]) -> bool {
        let hash = self.hasher.hash(bytes);
        let words = &self.words[page.0 * WORDS..][..WORDS];
        // A hash has no half of 0, because 0 is no hash yet.
        let halves = [hash.h1, hash.h2].map(|half| half.max(1));
        halves.iter().zip(words).all(|(half, word)| is_kept(word, *half))
    }
}

/// Keeps a value where there is none yet. False if there is another one.
fn is_kept(word: &AtomicU64, value: u64) -> bool {
    match word.compare_exchange(0, value, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => true,
        Err(before) => before == value,
    }
}

/// A key from the random numbers of the standard library, which come from the kernel.
fn random_key() -> [u8; KEY] {
    let mut key = [0; KEY];
    for part in key.chunks_exact_mut(size_of::<u64>()) {
        part.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
    }
    key
}

/// The pages of a layout with bytes of a source that may change, in order.
pub(super) fn unstable_pages(layout: &Layout, page: PageSize) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for chunk in (0..layout.chunks()).filter(|&chunk| !layout.backing_of(chunk).is_stable()) {
        let span = page.covering(&layout.offsets_of(chunk));
        match spans.last_mut() {
            Some(last) if span.first <= last.end() => last.pages = span.end().0 - last.first.0,
            _ => spans.push(span),
        }
    }
    spans
}

/// The pages of memory that the hashes of some pages take, at most.
pub(super) fn table_pages(spans: &[Span], page: PageSize) -> usize {
    let of = |span: &Span| {
        let offsets = span.first.0 * BYTES..span.end().0 * BYTES;
        offsets.end.div_ceil(page.bytes()) - offsets.start / page.bytes()
    };
    spans.iter().map(of).sum()
}

impl fmt::Debug for Fingerprints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fingerprints").field("spans", &self.spans).finish_non_exhaustive()
    }
}

/// The words of a hash.
const WORDS: usize = 2;
const BYTES: usize = WORDS * size_of::<u64>();
/// The bytes of a key.
const KEY: usize = 16;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn span(first: usize, pages: usize) -> Span {
        Span { first: Page(first), pages }
    }

    #[test]
    fn a_page_keeps_the_hash_of_its_first_reading() {
        let page = PageSize::new(PAGE).unwrap();
        let hashes = Fingerprints::new(vec![span(1, 2), span(5, 1)], page).unwrap();
        let mut bytes = vec![7; 3 * PAGE];
        assert_eq!(hashes.unchanged(span(0, 3), &bytes), 3);
        assert_eq!(hashes.unchanged(span(0, 3), &bytes), 3);
        bytes[0] = 8;
        assert_eq!(hashes.unchanged(span(0, 3), &bytes), 3, "a stable page is not hashed");
        bytes[2 * PAGE + 1] = 8;
        assert_eq!(hashes.unchanged(span(0, 3), &bytes), 2);
        assert_eq!(hashes.unchanged(span(2, 1), &bytes[2 * PAGE..]), 0);
        assert_eq!(hashes.unchanged(span(5, 1), &bytes[2 * PAGE..]), 1);
        let pages = [0, 1, 2, 3, 4, 5, 6].map(|page| hashes.has(Page(page)));
        assert_eq!(pages, [false, true, true, false, false, true, false]);
    }

    #[test]
    fn a_table_takes_16_bytes_a_page() {
        let page = PageSize::new(PAGE).unwrap();
        assert_eq!(table_pages(&[span(0, 256)], page), 1);
        assert_eq!(table_pages(&[span(255, 2), span(512, 257)], page), 4);
    }
}
