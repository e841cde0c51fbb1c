//! Pages of private memory that can be given away: filled like a buffer, then moved where they are wanted.
//!
//! ```
//! use pagestitch_kernel::pages::Pages;
//!
//! let mut pages = Pages::new(10_000)?;        // whole pages, aligned; all zeros
//! pages[9_999] = 7;
//! # Ok::<(), nix::errno::Errno>(())
//! ```

use crate::mapping::Mapping;
use crate::page::{AddressRange, HUGE, Page, PageSize, Span};
use crate::words::Words;
use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, ProtFlags};
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::slice;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

/// Private, page-aligned memory of this process, zeros at first. A forked child does not have it.
pub struct Pages {
    mapping: Mapping,
    len: usize,
    /// For when they are given up: that cannot fail, then.
    moved: Words,
}

impl Pages {
    /// `bytes` zeros. From 2 MiB on they are aligned to 2 MiB and advised to be huge pages, which move as one.
    ///
    /// # Errors
    ///
    /// `EINVAL` for no bytes; the errno of `mmap(2)`: `ENOMEM`.
    pub fn new(bytes: usize) -> Result<Self, Errno> {
        // Where there are no huge pages (EINVAL), they are small.
        Self::advised(bytes, (bytes >= HUGE).then_some(MmapAdvise::MADV_HUGEPAGE))
    }

    /// The same, never in huge pages.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn small(bytes: usize) -> Result<Self, Errno> {
        Self::advised(bytes, Some(MmapAdvise::MADV_NOHUGEPAGE))
    }

    fn advised(bytes: usize, advice: Option<MmapAdvise>) -> Result<Self, Errno> {
        let whole = PageSize::system().round_up(bytes as u64).and_then(|whole| usize::try_from(whole).ok());
        let whole = NonZeroUsize::new(whole.ok_or(Errno::ENOMEM)?).ok_or(Errno::EINVAL)?;
        let mapping = Mapping::aligned(whole, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        // A page that a child shares cannot be moved.
        mapping.advise(MmapAdvise::MADV_DONTFORK)?;
        let _ = advice.map(|advice| mapping.advise(advice));
        let words = whole.get().div_ceil(PageSize::system().bytes() * 64);
        let moved = Words::new(NonZeroUsize::new(words).expect("has a page"))?;
        Ok(Self { mapping, len: bytes, moved })
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: readable as long as `self` lives; writes go through `deref_mut`, which excludes this borrow.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.mapping.start().as_ptr().cast(), self.len)
        }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: writable as long as `self` lives, and borrowed mutably.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts_mut(self.mapping.start().as_ptr().cast(), self.len)
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("bytes", &self.len).finish_non_exhaustive()
    }
}

/// Pages that were given up: nobody has a slice of them any more, and the kernel may take them away one by one.
#[derive(Debug)]
pub struct Donated {
    pub(crate) mapping: Mapping,
    len: usize,
    page: PageSize,
    /// Start and end of what has been spoken for.
    claimed: Mutex<BTreeMap<u64, u64>>,
    /// A bit for each page that has moved away: what is left in its place are zeros, which are not its bytes.
    moved: Words,
}

impl From<Pages> for Donated {
    fn from(pages: Pages) -> Self {
        let Pages { mapping, len, moved } = pages;
        Self { mapping, len, page: PageSize::system(), claimed: Mutex::default(), moved }
    }
}

impl Donated {
    /// How many bytes were given up.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether they are none: such pages cannot be made.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Speaks for a range of them, once: what has moved cannot be in two places.
    ///
    /// # Errors
    ///
    /// A range that was spoken for before, and meets this one.
    pub fn claim(&self, range: Range<u64>) -> Result<(), Range<u64>> {
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one that begins before this one's end is the only one that can meet it.
        match claimed.range(..range.end).next_back() {
            Some((&start, &end)) if end > range.start => Err(start..end),
            _ => {
                claimed.insert(range.start, range.end);
                Ok(())
            }
        }
    }

    /// Copies bytes out of pages that have not moved.
    ///
    /// # Errors
    ///
    /// `ENODATA` if one of them has: its bytes are elsewhere.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        let span = self.page.covering(&(offset..offset + into.len() as u64));
        if span.iter().any(|page| self.has_moved(page)) {
            return Err(Errno::ENODATA);
        }
        crate::copy::read(&self.mapping, offset, into)
    }

    /// Whether a page has moved away.
    #[must_use]
    pub fn has_moved(&self, page: Page) -> bool {
        self.moved[page.0 / 64].load(Ordering::Acquire) & 1 << (page.0 % 64) != 0
    }

    pub(crate) fn mark_moved(&self, span: Span) {
        for page in span.iter() {
            self.moved[page.0 / 64].fetch_or(1 << (page.0 % 64), Ordering::AcqRel);
        }
    }

    /// The addresses of some of the pages.
    pub(crate) fn range(&self, span: Span) -> AddressRange {
        let start = self.mapping.at(self.page.offset_of(span.first) as usize).addr().get();
        AddressRange::new(start, self.page.bytes_of(span), self.page)
            .expect("whole pages of an aligned mapping")
    }

    /// The pages from `offset` on, which is a multiple of the page size.
    pub(crate) fn span(&self, offset: u64, bytes: usize) -> Span {
        let span = self.page.inside(&(offset..offset + bytes as u64));
        assert!(
            self.page.bytes_of(span) == bytes
                && self.page.offset_of(span.end()) <= self.mapping.bytes() as u64,
            "{bytes} bytes from {offset} are not whole pages of {self:?}"
        );
        span
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_spoken_for_is_not_to_be_had_again() {
        let donated = Donated::from(Pages::new(100_000).unwrap());
        assert_eq!(donated.claim(100..200), Ok(()));
        assert_eq!(donated.claim(200..300), Ok(()));
        assert_eq!(donated.claim(0..101), Err(100..200));
        assert_eq!(donated.claim(250..251), Err(200..300));
        assert_eq!(donated.claim(0..1000), Err(200..300));
        assert_eq!(donated.claim(0..100), Ok(()));
    }

    #[test]
    fn donated_bytes_can_be_read_until_they_move() {
        let mut pages = Pages::new(10_000).unwrap();
        pages[8191..8193].copy_from_slice(&[1, 2]);
        let donated = Donated::from(pages);
        let mut bytes = [0; 2];
        donated.read_at(8191, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2]);
        donated.mark_moved(Page(2).span());
        assert_eq!(donated.read_at(8191, &mut bytes), Err(Errno::ENODATA));
        assert_eq!(donated.read_at(8190, &mut bytes), Ok(()));
    }

    #[test]
    fn no_bytes_are_no_pages() {
        assert_eq!(Pages::new(0).unwrap_err(), Errno::EINVAL);
        assert_eq!(Pages::new(usize::MAX).unwrap_err(), Errno::ENOMEM);
    }
}
