//! Pages of private memory that can be given away: filled like a buffer, then moved into a region.
//!
//! ```
//! use pagestitch_kernel::pages::Pages;
//!
//! let mut pages = Pages::new(10_000)?;        // whole pages, aligned; all zeros
//! pages[9_999] = 7;
//! # Ok::<(), pagestitch_kernel::pages::PagesError>(())
//! ```

use crate::atomic_table::AtomicTable;
use crate::errno::Errno;
use crate::mapping::{OwnedMapping, unlock};
use crate::page::{AddressRange, HUGE, Page, PageSize, Span};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::uffd::Outcome;
use nix::sys::mman::{MmapAdvise, ProtFlags};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::slice;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::{fmt, io};

/// Private, page-aligned memory of this process, zeros at first. A forked child does not inherit
/// it.
pub struct Pages {
    mapping: OwnedMapping,
    len: usize,
    /// Made here, so that the conversion into [`Donated`] cannot fail.
    states: AtomicTable,
}

impl Pages {
    /// Memory of `bytes` zeros. From 2 MiB on it is aligned to 2 MiB and advised to be in huge
    /// pages, each of which moves as a whole.
    ///
    /// # Errors
    ///
    /// [`PagesError`]: `EINVAL` for 0 bytes; the errno of `mmap(2)`: `ENOMEM`.
    pub fn new(bytes: usize) -> Result<Self, PagesError> {
        // On a kernel without huge pages the advice fails (EINVAL), and the pages are small.
        let advice = (bytes >= HUGE).then_some(MmapAdvise::MADV_HUGEPAGE);
        Self::advised(bytes, advice).map_err(|errno| PagesError { bytes, errno })
    }

    /// As [`new`](Self::new), but never in huge pages.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn without_huge_pages(bytes: usize) -> Result<Self, PagesError> {
        Self::advised(bytes, Some(MmapAdvise::MADV_NOHUGEPAGE)).map_err(|errno| PagesError { bytes, errno })
    }

    fn advised(bytes: usize, advice: Option<MmapAdvise>) -> Result<Self, Errno> {
        let whole = PageSize::system().round_up(bytes as u64).and_then(|whole| usize::try_from(whole).ok());
        let whole = NonZeroUsize::new(whole.ok_or(Errno::ENOMEM)?).ok_or(Errno::EINVAL)?;
        let mut mapping = OwnedMapping::aligned(whole, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        // A page that a child shares cannot move.
        mapping.do_not_fork()?;
        let _ = advice.map(|advice| mapping.advise(advice));
        let words = whole.get().div_ceil(PageSize::system().bytes() * PAGES_PER_WORD);
        let states = AtomicTable::new(NonZeroUsize::new(words).expect("has a page"))?;
        Ok(Self { mapping, len: bytes, states })
    }
}

/// The kernel gives no such pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagesError {
    /// The number of bytes.
    pub bytes: usize,
    /// The kernel's answer.
    pub errno: Errno,
}

impl fmt::Display for PagesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno {
            Errno::EINVAL => f.write_str("pages need at least one byte: ask for 1 or more"),
            errno => write!(f, "cannot map {} bytes of pages: {errno}", self.bytes),
        }
    }
}

impl std::error::Error for PagesError {}

/// Keeps the number.
impl From<PagesError> for io::Error {
    fn from(error: PagesError) -> Self {
        error.errno.into()
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are readable as long as `self` lives. Writes go through `deref_mut`,
        // which excludes this borrow.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.mapping.start().as_ptr().cast(), self.len)
        }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the bytes are writable as long as `self` lives, and `self` is borrowed mutably.
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

/// Pages that were given away: no slice of them exists any more, and the kernel may move each of
/// them.
#[derive(Debug)]
pub struct Donated {
    pub(crate) mapping: OwnedMapping,
    len: usize,
    page: PageSize,
    /// The start and the end of each claimed range.
    claimed: Mutex<BTreeMap<u64, u64>>,
    /// Two bits a page: [`TAKEN`] while a thread moves or copies it into a region, [`MOVED`] once
    /// it has moved. A moved page leaves zeros behind, which are not its bytes.
    states: AtomicTable,
}

impl From<Pages> for Donated {
    fn from(pages: Pages) -> Self {
        let Pages { mapping, len, states } = pages;
        Self { mapping, len, page: PageSize::system(), claimed: Mutex::default(), states }
    }
}

impl Donated {
    /// The number of bytes that were given away.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Always false, because pages without bytes cannot be made.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Claims a range for one chunk, because a page can move to one place only. An empty range
    /// claims nothing.
    ///
    /// # Errors
    ///
    /// A range that was claimed before and overlaps this one.
    pub fn claim(&self, range: Range<u64>) -> Result<(), Range<u64>> {
        if range.is_empty() {
            return Ok(());
        }
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        // Only the last range that begins before the end of this one can overlap it.
        match claimed.range(..range.end).next_back() {
            Some((&start, &end)) if end > range.start => Err(start..end),
            _ => {
                claimed.insert(range.start, range.end);
                Ok(())
            }
        }
    }

    /// Unlocks pages that were locked (`mlock(2)`), because the kernel moves a page only between
    /// mappings that are both locked or both not.
    ///
    /// # Errors
    ///
    /// The errno of `munlock(2)`; none is known to occur.
    pub fn unlock(&self) -> Result<(), Errno> {
        unlock(self.mapping.start(), self.mapping.bytes())
    }

    /// Copies bytes out of pages that have not moved.
    ///
    /// # Errors
    ///
    /// `ENODATA` if one of the pages has moved.
    ///
    /// # Panics
    ///
    /// If the bytes are not inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        let span = self.page.covering(&(offset..offset + into.len() as u64));
        loop {
            match self.settled(span) {
                Some(true) => return Err(Errno::ENODATA),
                // Another thread has taken a page and either moves or returns it soon.
                None => {
                    thread::yield_now();
                    continue;
                }
                Some(false) => {}
            }
            crate::copy::read(&self.mapping, offset, into)?;
            // A page that another thread has taken meanwhile may have read as zeros.
            if self.settled(span) == Some(false) {
                return Ok(());
            }
        }
    }

    /// True if a page has moved away.
    #[must_use]
    pub fn has_moved(&self, page: Page) -> bool {
        self.words(page.span()).any(|(word, pages)| word.load(Ordering::SeqCst) & pages.moved() != 0)
    }

    /// Takes the first pages of a span, to move or to copy them: up to the first that has moved or
    /// that another thread has taken. Until the guard is dropped, no other thread takes them and
    /// readers wait. `None` if the first page is not free.
    pub(crate) fn take(&self, span: Span) -> Option<Taken<'_>> {
        let mut taken = Taken { donated: self, span: span.prefix(0) };
        for (word, pages) in self.words(span) {
            let mut free = pages;
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |bits| {
                free = pages.before((bits | bits >> 1) & pages.units);
                (free.units != 0).then_some(bits | free.taken())
            });
            taken.span.pages += free.count();
            if free.units != pages.units {
                break;
            }
        }
        (!taken.span.is_empty()).then_some(taken)
    }

    /// True if a page of a span has moved; `None` if a thread has taken one and not decided yet.
    fn settled(&self, span: Span) -> Option<bool> {
        let mut taken = false;
        for (word, pages) in self.words(span) {
            let bits = word.load(Ordering::SeqCst);
            if bits & pages.moved() != 0 {
                return Some(true);
            }
            taken |= bits & pages.taken() != 0;
        }
        (!taken).then_some(false)
    }

    /// The words with the states of a span, each with the pages of the span that it holds.
    fn words(&self, span: Span) -> impl Iterator<Item = (&AtomicU64, Units)> {
        let mut rest = span;
        std::iter::from_fn(move || {
            let (word, first) = (rest.first.0 / PAGES_PER_WORD, rest.first.0 % PAGES_PER_WORD);
            let now = rest.prefix(PAGES_PER_WORD - first);
            rest = rest.without_prefix(now.pages);
            (!now.is_empty()).then(|| (&self.states[word], Units::of(first, now.pages)))
        })
    }

    /// The addresses of a span of the pages.
    pub(crate) fn range(&self, span: Span) -> AddressRange {
        let start = self.mapping.at(self.page.offset_of(span.first) as usize).addr().get();
        AddressRange::new(start, self.page.bytes_of(span), self.page)
            .expect("whole pages of an aligned mapping")
    }

    /// The span of `bytes` from `offset` on. Both are multiples of the page size.
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

/// Pages of a donation that one thread moves or copies. The drop returns the pages that have not
/// moved.
#[derive(Debug)]
pub(crate) struct Taken<'d> {
    donated: &'d Donated,
    span: Span,
}

impl Taken<'_> {
    pub(crate) const fn span(&self) -> Span {
        self.span
    }

    /// Records the pages that a move has moved away.
    #[inline(never)] // a signal handler has a small stack
    pub(crate) fn note(&self, outcome: Outcome) {
        match outcome {
            Outcome::Done => self.moved(self.span.pages),
            Outcome::Partial { bytes } => self.moved(bytes / PageSize::system().bytes()),
            _ => {}
        }
    }

    /// Records that the first `pages` of them have moved away.
    pub(crate) fn moved(&self, pages: usize) {
        for (word, pages) in self.donated.words(self.span.prefix(pages)) {
            word.fetch_or(pages.moved(), Ordering::SeqCst);
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for (word, pages) in self.donated.words(self.span) {
            word.fetch_and(!pages.taken(), Ordering::SeqCst);
        }
    }
}

/// Adjacent pages of one word, by the lower bit of each.
#[derive(Debug, Clone, Copy)]
struct Units {
    units: u64,
}

impl Units {
    const ALL: u64 = u64::MAX / (TAKEN | MOVED);

    /// `pages` pages from `first` on; at least one.
    const fn of(first: usize, pages: usize) -> Self {
        Self { units: Self::ALL >> ((PAGES_PER_WORD - pages) * BITS) << (first * BITS) }
    }

    /// The pages before the first of `busy`.
    const fn before(self, busy: u64) -> Self {
        Self { units: self.units & (busy & busy.wrapping_neg()).wrapping_sub(1) }
    }

    const fn taken(self) -> u64 {
        self.units * TAKEN
    }

    const fn moved(self) -> u64 {
        self.units * MOVED
    }

    const fn count(self) -> usize {
        self.units.count_ones() as usize
    }
}

const BITS: usize = 2;
const TAKEN: u64 = 1;
const MOVED: u64 = 2;
const PAGES_PER_WORD: usize = u64::BITS as usize / BITS;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claimed_range_cannot_be_claimed_again() {
        let donated = Donated::from(Pages::new(100_000).unwrap());
        assert_eq!(donated.claim(100..200), Ok(()));
        assert_eq!(donated.claim(200..300), Ok(()));
        assert_eq!(donated.claim(0..101), Err(100..200));
        assert_eq!(donated.claim(250..251), Err(200..300));
        assert_eq!(donated.claim(0..1000), Err(200..300));
        assert_eq!(donated.claim(0..100), Ok(()));
    }

    #[test]
    fn an_empty_range_erases_no_claim() {
        let donated = Donated::from(Pages::new(100_000).unwrap());
        assert_eq!(donated.claim(100..200), Ok(()));
        assert_eq!(donated.claim(100..100), Ok(()));
        assert_eq!(donated.claim(150..150), Ok(()));
        assert_eq!(donated.claim(150..160), Err(100..200));
    }

    #[test]
    fn a_donated_page_is_taken_by_one_thread_at_a_time_and_moves_once() {
        let donated = Donated::from(Pages::new(100 * 4096).unwrap());
        let span = |first, pages| Span { first: Page(first), pages };
        let taken = donated.take(span(10, 60)).unwrap();
        assert_eq!(taken.span(), span(10, 60));
        assert!(donated.take(span(60, 20)).is_none());
        assert_eq!(donated.take(span(0, 100)).unwrap().span(), span(0, 10), "up to what is taken");
        assert_eq!(donated.take(span(70, 20)).unwrap().span(), span(70, 20));
        taken.moved(5);
        drop(taken);
        assert!(donated.has_moved(Page(14)) && !donated.has_moved(Page(15)));
        assert_eq!(donated.take(span(5, 20)).unwrap().span(), span(5, 5), "page 10 has moved");
        assert_eq!(donated.take(span(15, 85)).unwrap().span(), span(15, 85));
    }

    #[test]
    fn pages_without_bytes_are_refused() {
        assert_eq!(Pages::new(0).unwrap_err().errno, Errno::EINVAL);
        assert_eq!(Pages::new(usize::MAX).unwrap_err().errno, Errno::ENOMEM);
    }
}
