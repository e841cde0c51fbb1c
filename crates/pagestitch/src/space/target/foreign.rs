//! Foreign memory as it is served: the address of each page, the discarded pages, and the lock for
//! installs.

use super::discarded::DiscardedPages;
use super::listed::Listed;
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
    /// In the order of the pages.
    pub(crate) parts: Vec<ForeignRange>,
    /// The pages that the owner has discarded: their bytes are zeros from then on.
    discarded: DiscardedPages,
    /// An installing thread holds it shared, a reader of events alone, so that an installed page
    /// has its bytes of *now*. The owner continues after a discard as soon as its event is read,
    /// and old bytes must not follow.
    map: RwLock<()>,
    owner: Option<Arc<Process>>,
    /// The kernel has said that the process is not there any more.
    ended: AtomicBool,
    pub(crate) on_unavailable: OnUnavailable,
    on_discard: OnDiscard,
    /// None of a forked child's, which nothing else can adopt.
    pub(super) listed: Option<Listed>,
}

/// The lock of the map is held, maybe for as long as a source's memory cannot be read: the kernel
/// waits in it while it copies.
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
            listed: None,
        })
    }

    /// The memory of a forked child, at these addresses. What it lets go of is filled again.
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
        // A few, as a rule: guests have one or two.
        self.parts.iter().find_map(|part| {
            let offset = address.checked_sub(part.start)?;
            let page = Page(part.span.first.0 + offset / self.page.bytes());
            (page < part.span.end()).then_some(page)
        })
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Span, usize)> {
        self.parts.iter().map(|part| (part.span, part.start))
    }

    /// Until it is dropped, no event is read. None where pages that are let go of hold what they
    /// held before: then it does not matter.
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

    /// Until it is dropped, nothing is installed. None as above.
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

    /// Takes note that the owner has let go of a span.
    pub(crate) fn note_discard(&self, span: Span) {
        if self.on_discard == OnDiscard::Zeros {
            self.discarded.add(span);
        }
    }

    /// How many pages of a span, from its first on, were let go alike, or not; and which of the
    /// two. Not all of a run that is long.
    pub(crate) fn discarded_prefix(&self, span: Span) -> (usize, bool) {
        self.discarded.prefix(span)
    }

    /// The first pages of a span that are to have bytes: not what a balloon has taken.
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

    /// Bytes of a page were lost: whether its owner was to be ended for it.
    pub(crate) fn note_unavailable(&self, region: &str) {
        if self.on_unavailable == OnUnavailable::Kill
            && let Err(errno) = self.kill_owner()
        {
            log!(error, region, %errno, "cannot end the owner");
        }
    }

    /// Takes note that the process is not there any more: no page of it is needed.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Ends the owner of the memory. `EAGAIN` if the owner is unknown.
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
