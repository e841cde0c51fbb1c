//! Asynchronous fetches: a claim that is held until the source replies. The reply then takes the
//! same journey as any fault.

use crate::fault::error::{InstallError, Unfilled, failure_at};
use crate::fault::fill::{Content, Filled};
use crate::fault::poison::fail;
use crate::fault::prefetch_job::PrefetchJob;
use crate::fault::recovery::{Attempts, Pause, Recovery, without_memory};
use crate::fault::request::{FaultRequest, Host, serve_later};
use crate::fault::{Filler, Wanted, journey};
use crate::guard::{AbortOnPanic, discard, quietly};
use crate::metrics::FaultPart;
use crate::source::{Complete, Fetched, Reply};
use crate::space::Mapping;
use crate::space::page_table::Claim;
use pagestitch_kernel::Span;
use pagestitch_kernel::gate::OwnedGateGuard;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Claimed pages whose bytes a source is fetching.
#[derive(Debug)]
pub(crate) struct Pending<H: Host> {
    region: Arc<H>,
    /// Makes the region's drop wait for the reply.
    _guard: OwnedGateGuard,
    span: Span,
    wanted: FetchReason,
    began: Option<Instant>,
    _permit: H::Permit,
}

/// The reason why pages are fetched.
#[derive(Debug)]
pub(crate) enum FetchReason {
    /// The fault of a thread that waits for the page.
    Now(FaultRequest),
    /// A prefetch.
    Ahead,
    /// A prefetch that the application has requested.
    Requested(Arc<PrefetchJob>),
}

impl FetchReason {
    fn finish(&self, region: &Mapping) {
        if let Self::Now(asked) = self {
            region.counters.finish(asked.slot);
        }
    }

    fn attempts(&self) -> Attempts {
        match self {
            Self::Now(asked) => asked.attempts,
            Self::Ahead | Self::Requested(_) => Attempts::default(),
        }
    }
}

/// Requests the bytes of a claim's pages from their source. All of them lie in one chunk.
pub(crate) fn fetch<H: Host>(
    region: &Arc<H>,
    claim: Claim<'_>,
    (source, offset): (&Fetched, u64),
    wanted: FetchReason,
    permit: H::Permit,
) {
    let failures = wanted.attempts().source;
    let Some(pending) = Pending::new(region, claim, wanted, permit) else { return };
    let bytes = region.page_size().bytes_of(pending.span);
    let reply = Reply::to_pages(Box::new(pending), bytes).after(failures);
    // If the source panics, the reply is dropped, which fails the request.
    quietly(|| source.fetch(offset, reply));
}

impl<H: Host> Complete for Pending<H> {
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>) {
        self.answer(answer);
    }

    fn retry(self: Box<Self>, pause: Duration, error: io::Error) {
        self.deliver(Err(error), Some(pause));
        self.leave();
    }
}

impl<H: Host> Pending<H> {
    /// Keeps the pages of a claim until their bytes are delivered. `None` if the region is being dropped and needs
    /// no page any more: they are given back.
    pub(super) fn new(
        region: &Arc<H>,
        claim: Claim<'_>,
        wanted: FetchReason,
        permit: H::Permit,
    ) -> Option<Self> {
        let Some(guard) = region.enter_owned() else {
            drop(claim);
            wanted.finish(region);
            region.fetch_ended();
            return None;
        };
        let began = region.counters.clock();
        let span = claim.keep();
        if let FetchReason::Requested(job) = &wanted {
            job.fetch_begins();
        }
        Some(Self { region: Arc::clone(region), _guard: guard, span, wanted, began, _permit: permit })
    }

    pub(super) const fn region(&self) -> &Arc<H> {
        &self.region
    }

    pub(super) const fn span(&self) -> Span {
        self.span
    }

    /// Installs the bytes, or fails the pages.
    pub(super) fn answer(self, answer: io::Result<&[u8]>) {
        self.deliver(answer, None);
        self.leave();
    }

    /// Leaves the region, and then wakes the task that polls a requested prefetch.
    fn leave(self) {
        let job = match &self.wanted {
            FetchReason::Requested(job) => Some(Arc::clone(job)),
            FetchReason::Now(_) | FetchReason::Ahead => None,
        };
        drop(self);
        if let Some(job) = job {
            job.wake();
        }
    }

    /// `pause`: the time to wait before the request is sent again, if its source asks for that.
    fn deliver(&self, answer: io::Result<&[u8]>, pause: Option<Duration>) {
        let _abort = AbortOnPanic::armed();
        let Self { region, span, wanted, began, .. } = self;
        region.counters.record_time(FaultPart::Fill, *began);
        let recovery = Recovery::after(wanted.attempts());
        let mut delivered = Delivered { region, wanted, answer: Some(answer), pause, recovery };
        match journey(region, Wanted::Fetched(*span), &mut delivered) {
            Err(Unfilled::Later) => {}
            _ => wanted.finish(region),
        }
        region.fetch_ended();
        if let FetchReason::Requested(job) = wanted {
            region.go_on_with(job, job.fetch_ended());
        }
    }
}

/// The answer of a source, on its way into the pages.
struct Delivered<'a, H> {
    region: &'a Arc<H>,
    wanted: &'a FetchReason,
    answer: Option<io::Result<&'a [u8]>>,
    pause: Option<Duration>,
    recovery: Recovery,
}

impl<H: Host> Delivered<'_, H> {
    /// Has the page of the fault fetched again: after the pause that its source asks for, or at
    /// once, if it was fetched with others, of which one may have failed. False: the page has failed,
    /// or its region has no room for another retry.
    fn fetch_again(&self, claim: &mut Claim<'_>, asked: FaultRequest) -> bool {
        let is_alone = claim.span().pages == 1;
        claim.shrink_to(asked.page);
        let pause = match self.pause {
            Some(pause) => {
                self.region.counters.local().source_retries.add(1);
                pause
            }
            None if is_alone => return false,
            None => Duration::ZERO,
        };
        let attempts = Attempts { source: asked.attempts.source.saturating_add(1), ..asked.attempts };
        let again = || asked.again(asked.slot, attempts);
        serve_later(self.region, claim, again, pause)
    }
}

impl<H: Host> Filler for Delivered<'_, H> {
    const HAS_NO_BYTES: bool = false;

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        let content = match self.answer.take() {
            Some(Ok(bytes)) => Content::Buffered(bytes),
            Some(Err(error)) => {
                self.region.counters.local().source_errors.add(1);
                return Err(InstallError::Source(Box::new(failure_at(self.region, span, error))));
            }
            // The answer was an error, and the policy of the chunk turns it into zeros.
            None => Content::Zero,
        };
        Ok(Filled { pages: span.pages, content })
    }

    fn installed(&mut self, pages: usize) {
        self.recovery.installed(self.region);
        if let FetchReason::Requested(job) = self.wanted {
            job.add_filled(pages);
        }
        if !matches!(self.wanted, FetchReason::Now(_)) {
            self.region.counters.local().pages_ahead.add(pages as u64);
        }
    }

    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        let (&FetchReason::Now(asked), region) = (self.wanted, self.region) else {
            if let FetchReason::Requested(job) = self.wanted {
                job.add_failed(claim.span().pages);
            }
            discard(error);
            return Err(Unfilled::GivenBack);
        };
        // The page is installed, and the pages that were fetched with it can wait.
        if !claim.span().contains(asked.page) {
            discard(error);
            return Err(Unfilled::GivenBack);
        }
        if matches!(error, InstallError::NoMemory) {
            claim.shrink_to(asked.page);
        } else if !matches!(error, InstallError::Changing) && self.fetch_again(claim, asked) {
            discard(error);
            return Err(Unfilled::Later);
        }
        self.recovery.react(region, claim, error, |claim, pause, attempts| {
            if serve_later(region, claim, || asked.again(asked.slot, attempts), pause.length()) {
                return Err(Unfilled::Later);
            }
            // The thread that answers must not sleep. The page fails, because a thread that faults
            // again would ask the source at once, and count its attempts from the start.
            let failure = match pause {
                Pause::Source(_, failure) => *failure,
                Pause::Memory(_) => without_memory(region, claim.span()),
            };
            Err(fail(region, claim, failure))
        })
    }
}
