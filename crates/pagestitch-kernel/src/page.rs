//! Pages, spans and address ranges: the only arithmetic on them.
//!
//! ```text
//!   byte offset in a region (u64) ──page_at──▶ Page ──┐
//!   range of byte offsets ──────────covering─▶ Span ──┴─Reservation::addresses─▶ AddressRange
//! ```
//!
//! A [`Page`] and a [`Span`] count pages from a region's start. An [`AddressRange`] goes to the
//! kernel. It is page-aligned, because no function makes one that is not.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// The size of a huge page in bytes. One entry of a page table's second level covers as much where
/// pages are 4 KiB.
pub const HUGE: usize = 2 << 20;

/// The size of a page: a power of two, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSize {
    shift: u32,
}

/// The system's page size as a power of two; 0 until the first question.
static SYSTEM: AtomicU32 = AtomicU32::new(0);

impl PageSize {
    /// The size of this system's base pages, from `sysconf(_SC_PAGESIZE)`.
    #[must_use]
    #[inline]
    pub fn system() -> Self {
        match SYSTEM.load(Ordering::Relaxed) {
            0 => Self::ask_system(),
            shift => Self { shift },
        }
    }

    #[cold]
    fn ask_system() -> Self {
        use nix::unistd::{SysconfVar, sysconf};
        let bytes =
            sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| usize::try_from(bytes).ok());
        let size = bytes.and_then(Self::new).expect("Linux answers _SC_PAGESIZE with a power of two");
        SYSTEM.store(size.shift, Ordering::Relaxed);
        size
    }

    /// A page size of `bytes`; `None` if that is not a power of two.
    #[must_use]
    pub const fn new(bytes: usize) -> Option<Self> {
        if bytes.is_power_of_two() { Some(Self { shift: bytes.trailing_zeros() }) } else { None }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        1 << self.shift
    }

    /// The page that holds the byte at `offset` in a region.
    #[must_use]
    pub const fn page_at(self, offset: u64) -> Page {
        Page((offset >> self.shift) as usize)
    }

    /// The offset in a region of a page's first byte.
    #[must_use]
    pub const fn offset_of(self, page: Page) -> u64 {
        (page.0 as u64) << self.shift
    }

    /// The offsets in a region that a span covers.
    #[must_use]
    pub const fn offsets(self, span: Span) -> Range<u64> {
        self.offset_of(span.first)..self.offset_of(span.end())
    }

    /// The smallest span that covers `offsets`. Empty offsets give an empty span.
    #[must_use]
    pub const fn covering(self, offsets: &Range<u64>) -> Span {
        let first = self.page_at(offsets.start);
        if offsets.end <= offsets.start {
            return Span { first, pages: 0 };
        }
        let last = self.page_at(offsets.end - 1);
        Span { first, pages: last.0 - first.0 + 1 }
    }

    /// The span of whole pages inside `offsets`; an empty span if no page is.
    #[must_use]
    pub const fn inside(self, offsets: &Range<u64>) -> Span {
        let end = self.page_at(offsets.end);
        let first = match self.round_up(offsets.start) {
            Some(aligned) => self.page_at(aligned),
            None => end,
        };
        Span { first, pages: end.0.saturating_sub(first.0) }
    }

    /// The number of bytes in a span.
    #[must_use]
    pub const fn bytes_of(self, span: Span) -> usize {
        span.pages << self.shift
    }

    /// `bytes` rounded up to whole pages; `None` if that does not fit in a `u64`.
    #[must_use]
    pub const fn round_up(self, bytes: u64) -> Option<u64> {
        let mask = (1 << self.shift) - 1;
        match bytes.checked_add(mask) {
            Some(sum) => Some(sum & !mask),
            None => None,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes() {
            bytes if bytes >= 1 << 20 => write!(f, "{} MiB", bytes >> 20),
            bytes => write!(f, "{} KiB", bytes >> 10),
        }
    }
}

/// A page of a region, counted from the region's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page(pub usize);

impl Page {
    /// This page alone, as a span.
    #[must_use]
    pub const fn span(self) -> Span {
        Span { first: self, pages: 1 }
    }
}

/// A run of pages of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first page.
    pub first: Page,
    /// The number of pages; 0 for an empty span.
    pub pages: usize,
}

impl Span {
    /// The page after the last one.
    #[must_use]
    pub const fn end(self) -> Page {
        Page(self.first.0 + self.pages)
    }

    /// True if it holds no page.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.pages == 0
    }

    /// True if it holds `page`.
    #[must_use]
    pub const fn contains(self, page: Page) -> bool {
        self.first.0 <= page.0 && page.0 < self.end().0
    }

    /// Its pages, in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Page> + ExactSizeIterator {
        (self.first.0..self.end().0).map(Page)
    }

    /// The first `pages` pages, or all of them if it has fewer.
    #[must_use]
    pub const fn prefix(self, pages: usize) -> Self {
        Self { first: self.first, pages: if pages < self.pages { pages } else { self.pages } }
    }

    /// The last `pages` pages, or all of them if it has fewer.
    #[must_use]
    pub const fn suffix(self, pages: usize) -> Self {
        self.without_prefix(self.pages.saturating_sub(pages))
    }

    /// The rest without the first `pages` pages.
    #[must_use]
    pub const fn without_prefix(self, pages: usize) -> Self {
        let dropped = if pages < self.pages { pages } else { self.pages };
        Self { first: Page(self.first.0 + dropped), pages: self.pages - dropped }
    }
}

/// A page-aligned range of addresses of a process.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    start: usize,
    bytes: usize,
    page: PageSize,
}

impl AddressRange {
    /// The range of `bytes` at `start`; `None` if one of them is no multiple of `page`, or the end
    /// does not fit in a `usize`.
    #[must_use]
    pub const fn new(start: usize, bytes: usize, page: PageSize) -> Option<Self> {
        let mask = page.bytes() - 1;
        if start & mask != 0 || bytes & mask != 0 || start.checked_add(bytes).is_none() {
            return None;
        }
        Some(Self { start, bytes, page })
    }

    /// The first address.
    #[must_use]
    pub const fn start(self) -> usize {
        self.start
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.bytes
    }

    /// The first address after it.
    #[must_use]
    pub const fn end(self) -> usize {
        self.start + self.bytes
    }

    /// Its first `bytes` bytes, a multiple of the page size, or all of it.
    ///
    /// # Panics
    ///
    /// If `bytes` is no multiple of the page size.
    #[must_use]
    pub const fn prefix(self, bytes: usize) -> Self {
        assert!(bytes & (self.page.bytes() - 1) == 0, "whole pages");
        Self { bytes: if bytes < self.bytes { bytes } else { self.bytes }, ..self }
    }

    /// Its rest after the first `bytes` bytes, a multiple of the page size.
    ///
    /// # Panics
    ///
    /// If `bytes` is no multiple of the page size.
    #[must_use]
    pub const fn without_prefix(self, bytes: usize) -> Self {
        let dropped = self.prefix(bytes).bytes;
        Self { start: self.start + dropped, bytes: self.bytes - dropped, ..self }
    }

    /// At most `pages` pages from the byte `offset` on. The offset is a multiple of the page size
    /// and not past the end.
    pub(crate) const fn part(self, offset: usize, pages: usize) -> Self {
        let (left, wanted) = (self.bytes - offset, pages.saturating_mul(self.page.bytes()));
        let bytes = if wanted < left { wanted } else { left };
        Self { start: self.start + offset, bytes, page: self.page }
    }

    /// True if it has at most one page.
    pub(crate) const fn is_one_page(self) -> bool {
        self.bytes <= self.page.bytes()
    }
}

impl fmt::Debug for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: PageSize = PageSize::new(4096).unwrap();

    #[test]
    fn only_powers_of_two_are_page_sizes() {
        assert_eq!(PageSize::new(4096).map(PageSize::bytes), Some(4096));
        assert_eq!(PageSize::new(4095), None);
        assert_eq!(PageSize::new(0), None);
    }

    #[test]
    fn an_unaligned_or_endless_address_range_is_none() {
        assert!(AddressRange::new(4096, 8192, PAGE).is_some());
        assert_eq!(AddressRange::new(4097, 8192, PAGE), None);
        assert_eq!(AddressRange::new(4096, 100, PAGE), None);
        assert_eq!(AddressRange::new(usize::MAX & !4095, 8192, PAGE), None);
    }

    #[test]
    fn rounding_up_past_the_end_is_none() {
        assert_eq!(PAGE.round_up(1), Some(4096));
        assert_eq!(PAGE.round_up(4096), Some(4096));
        assert_eq!(PAGE.round_up(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn a_covering_span_is_the_smallest(start in 0u64..1 << 40, bytes in 1u64..1 << 24) {
            let span = PAGE.covering(&(start..start + bytes));
            let offsets = PAGE.offsets(span);
            prop_assert!(offsets.start <= start && start < offsets.start + 4096);
            prop_assert!(offsets.end >= start + bytes && offsets.end - 4096 < start + bytes);
        }

        #[test]
        fn the_span_inside_is_the_largest(start in 0u64..1 << 20, bytes in 0u64..1 << 16) {
            let span = PAGE.inside(&(start..start + bytes));
            let expected = (start.div_ceil(4096)..(start + bytes) / 4096).count();
            prop_assert_eq!(span.pages, expected);
            prop_assert!(span.is_empty() || PAGE.offset_of(span.first) >= start);
        }

        #[test]
        fn prefix_and_rest_make_the_whole(first in 0usize..1000, pages in 0usize..1000, cut in 0usize..2000) {
            let span = Span { first: Page(first), pages };
            let (head, tail) = (span.prefix(cut), span.without_prefix(cut));
            prop_assert_eq!(head.pages + tail.pages, pages);
            prop_assert_eq!(head.end(), tail.first);
            prop_assert_eq!(span.suffix(pages.saturating_sub(cut)), tail);
        }
    }
}
