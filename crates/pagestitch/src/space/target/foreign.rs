//! Foreign memory as it is served: the address of each page, the discarded pages, and the lock for
//! installs.

use super::discarded::DiscardedPages;
use super::owner::{OnDiscard, OnUnavailable};
use pagestitch_kernel::process::Process;
use pagestitch_kernel::sync::atomic::{AtomicBool, Ordering};
use pagestitch_kernel::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, yield_now};
use pagestitch_kernel::{AddressRange, Errno, Page, PageSize, Span};
use std::sync::{Arc, PoisonError, TryLockError, TryLockResult};
use std::time::{Duration, Instant};

/// Foreign memory as it is served.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) page: PageSize,
    pages: usize,
    /// The ranges, in the order of the pages.
    pub(crate) parts: Vec<ForeignRange>,
    /// The pages that the owner has discarded: their bytes are zeros from then on.
    discarded: DiscardedPages,
    /// An installing thread holds the lock shared, and a reader of events holds it alone. The owner
    /// continues after a discard as soon as its event is read, so no bytes from before the discard
    /// may be installed after that.
    map: RwLock<()>,
    /// The process to kill, if it is known.
    owner: Option<Arc<Process>>,
    /// True once the kernel has reported that the process has ended.
    ended: AtomicBool,
    pub(crate) on_unavailable: OnUnavailable,
    on_discard: OnDiscard,
}

/// Another thread holds the lock of the memory map, perhaps for long: the kernel may wait for
/// memory of a source while it copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Busy;

fn unless_busy<G>(lock: TryLockResult<G>) -> Result<G, Busy> {
    match lock {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err(Busy),
    }
}

/// A range of addresses and the pages that it holds.
#[derive(Debug)]
pub(crate) struct ForeignRange {
    pub(crate) span: Span,
    pub(crate) start: usize,
}

impl Foreign {
    pub(super) fn new(
        page: PageSize,
        parts: Vec<ForeignRange>,
        owner: Option<Arc<Process>>,
        on_unavailable: OnUnavailable,
        on_discard: OnDiscard,
    ) -> Result<Self, Errno> {
        let pages = parts.last().map_or(0, |part| part.span.end().0);
        let discarded = DiscardedPages::new(pages)?;
        let ended = AtomicBool::new(false);
        Ok(Self {
            page,
            pages,
            parts,
            discarded,
            map: RwLock::new(()),
            owner,
            ended,
            on_unavailable,
            on_discard,
        })
    }

    /// The memory of a forked child, at these addresses. Its discarded pages are filled again.
    pub(crate) fn inherited(page: PageSize, ranges: Vec<(Span, usize)>) -> Result<Self, Errno> {
        let parts = ranges.into_iter().map(|(span, start)| ForeignRange { span, start }).collect();
        Self::new(page, parts, None, OnUnavailable::Poison, OnDiscard::Refill)
    }

    /// A few pages, for a model.
    #[cfg(all(test, shuttle))]
    pub(crate) fn of_pages(pages: usize) -> Self {
        let part = ForeignRange { span: Span { first: Page(0), pages }, start: 0 };
        Self::new(PageSize::system(), vec![part], None, OnUnavailable::Poison, OnDiscard::Zeros).unwrap()
    }

    pub(crate) const fn page_size(&self) -> PageSize {
        self.page
    }

    pub(crate) const fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn addresses(&self, span: Span) -> AddressRange {
        let part = self.part_of(span.first);
        assert!(span.end() <= part.span.end(), "{span:?} is not inside {part:?}");
        let start = part.start + (span.first.0 - part.span.first.0) * self.page.bytes();
        AddressRange::new(start, self.page.bytes_of(span), self.page)
            .expect("whole pages of an aligned range")
    }

    pub(crate) fn contiguous(&self, span: Span) -> Span {
        span.prefix(self.part_of(span.first).span.end().0 - span.first.0)
    }

    pub(crate) fn page_at(&self, address: usize) -> Option<Page> {
        // A linear search, because guests have one or two ranges.
        self.parts.iter().find_map(|part| {
            let offset = address.checked_sub(part.start)?;
            let page = Page(part.span.first.0 + offset / self.page.bytes());
            (page < part.span.end()).then_some(page)
        })
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Span, usize)> {
        self.parts.iter().map(|part| (part.span, part.start))
    }

    /// Excludes readers of events until the guard is dropped. `None` if discarded pages are filled
    /// again, because then the order does not matter.
    pub(crate) fn hold(&self) -> Option<RwLockReadGuard<'_, ()>> {
        (self.on_discard == OnDiscard::Zeros).then(|| self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// As [`hold`](Self::hold), for a thread that must not wait.
    pub(crate) fn try_hold(&self) -> Result<Option<RwLockReadGuard<'_, ()>>, Busy> {
        if self.on_discard != OnDiscard::Zeros {
            return Ok(None);
        }
        unless_busy(self.map.try_read()).map(Some)
    }

    /// Excludes installs until the guard is dropped. `None` as for [`hold`](Self::hold).
    pub(crate) fn change(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        (self.on_discard == OnDiscard::Zeros)
            .then(|| self.map.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// As [`change`](Self::change), for a thread that must not wait long.
    pub(crate) fn try_change(&self) -> Result<Option<RwLockWriteGuard<'_, ()>>, Busy> {
        if self.on_discard != OnDiscard::Zeros {
            return Ok(None);
        }
        let mut began = None;
        loop {
            match unless_busy(self.map.try_write()) {
                Ok(guard) => return Ok(Some(guard)),
                Err(Busy) if began.get_or_insert_with(Instant::now).elapsed() > INSTALLING => {
                    return Err(Busy);
                }
                Err(Busy) => yield_now(),
            }
        }
    }

    /// Records that the owner has discarded a span.
    pub(crate) fn note_discard(&self, span: Span) {
        if self.on_discard == OnDiscard::Zeros {
            self.discarded.add(span);
        }
    }

    /// True if the first page of a span is discarded, with the number of leading pages for which
    /// the same holds. That number is limited, so a long run may go on after it.
    pub(crate) fn discarded_prefix(&self, span: Span) -> (usize, bool) {
        self.discarded.prefix(span)
    }

    /// Prefetches the word that tells whether a page is discarded.
    #[inline]
    pub(crate) fn prefetch_page(&self, page: Page) {
        self.discarded.prefetch(page);
    }

    /// The first run of a span's pages that are not discarded.
    pub(crate) fn next_kept(&self, span: Span) -> Span {
        let mut rest = span;
        while !rest.is_empty() {
            match self.discarded_prefix(rest) {
                (pages, false) => return rest.prefix(pages),
                (pages, true) => rest = rest.without_prefix(pages),
            }
        }
        rest
    }

    /// Called when the bytes of a page are unavailable: kills the owner if that is chosen.
    pub(crate) fn note_unavailable(&self, region: &str) {
        if self.on_unavailable != OnUnavailable::Kill {
            return;
        }
        if let Err(errno) = self.kill_owner() {
            log!(error, region, %errno, "cannot kill the owner");
        }
    }

    /// Records that the process has ended, so that it needs no page any more.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Kills the owner of the memory. `EAGAIN` if the owner is unknown.
    pub(crate) fn kill_owner(&self) -> Result<(), Errno> {
        self.owner.as_ref().ok_or(Errno::EAGAIN)?.kill()
    }

    fn part_of(&self, page: Page) -> &ForeignRange {
        let part = self.parts.iter().find(|part| part.span.contains(page));
        part.expect("a page of the region")
    }
}

/// Longer than the installation of a block takes.
const INSTALLING: Duration = Duration::from_millis(1);
