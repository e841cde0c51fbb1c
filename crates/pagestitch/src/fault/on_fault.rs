//! A fault that a worker has read.

use crate::error::FailureReason;
use crate::fault::callers;
use crate::fault::error::{InstallError, Unfilled, failure_at};
use crate::fault::fetch::{FetchReason, fetch};
use crate::fault::fill::{Buffers, Filled};
use crate::fault::page_reads::PageReads;
use crate::fault::poison::{fail, poison_again};
use crate::fault::recovery::{Attempts, Pause, Sources, without_memory};
use crate::fault::request::{FaultRequest, Host, serve_later};
use crate::fault::write_protect::{let_write, let_write_beside};
use crate::fault::{Filler, Wanted, fill_beside, journey};
use crate::guard::{Entered, discard};
use crate::metrics::InFlightFault;
use crate::policy::Prefetch;
use crate::space::page_table::{Claim, PageState, Unclaimed, Wake};
use pagestitch_kernel::event::Touch;
use pagestitch_kernel::{Page, Span};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// The work that is left after a fault.
#[derive(Debug, Default)]
pub(crate) struct AfterFault {
    /// The pages to prefetch, if the faulting thread seems to need more.
    pub(crate) prefetch: [Option<Span>; 2],
    /// Whether the fault goes on as an asynchronous fetch, which keeps the fault's admission.
    pub(crate) is_fetched: bool,
}

/// Serves a fault, with a permit if it has waited for one.
///
/// Afterwards the faulting thread has its bytes or a signal, or was woken to fault again, or sleeps
/// until a queued retry or a fetch serves it.
pub(crate) fn serve<H: Host>(
    region: &Arc<H>,
    asked: FaultRequest,
    permit: Option<H::Permit>,
    buffers: &mut Buffers,
    reads: &mut PageReads<H>,
) -> AfterFault {
    let mut fault = Fault::take_up(region, asked, permit, (buffers, reads));
    let _entered = Entered::new(|| tracing::trace_span!("fault", region = region.name, page = asked.page.0));
    // The page has left meanwhile otherwise, or is leaving.
    if asked.touch == Touch::Denied {
        region.residence.iter().for_each(|residence| residence.throttle());
        if let_write(region, asked.page.span()).is_ok() {
            return AfterFault::default();
        }
    }
    let started = Instant::now();
    match journey(region, Wanted::Touched(asked.page, fault.unit), &mut fault) {
        Err(Unfilled::Unclaimed(reason)) => {
            fault.answer_without_claim(reason);
            return AfterFault::default();
        }
        // Let the thread that changes the map finish. The faulting thread was woken, and faults
        // again.
        Err(Unfilled::Changing) => thread::yield_now(),
        Ok(()) | Err(Unfilled::Later | Unfilled::Failed(_) | Unfilled::GivenBack) => {}
    }
    let spent = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    region.record_latency(spent);
    AfterFault { prefetch: fault.pages_to_prefetch(spent), is_fetched: fault.is_fetched }
}

struct Fault<'a, H: Host> {
    region: &'a Arc<H>,
    asked: FaultRequest,
    permit: Option<H::Permit>,
    flight: Option<InFlightFault<'a>>,
    sources: Sources<'a>,
    reads: &'a mut PageReads<H>,
    prefetch: Prefetch,
    /// The pages that are read with the page, because its source prefers to read them at once.
    unit: Span,
    /// The block that is filled with the page.
    block: Option<Span>,
    /// Whether the source of the page, or the disk, answers later.
    is_fetched: bool,
    /// Whether it is the disk.
    is_read: bool,
}

impl<'a, H: Host> Fault<'a, H> {
    fn take_up(
        region: &'a Arc<H>,
        asked: FaultRequest,
        permit: Option<H::Permit>,
        (buffers, reads): (&'a mut Buffers, &'a mut PageReads<H>),
    ) -> Self {
        let FaultRequest { page, read, thread, slot, attempts, is_repeated, touch: _ } = asked;
        let begin = || region.counters.begin(page, thread, read);
        let flight = match is_repeated {
            false => region.counters.take_up(slot.or_else(begin), read),
            true => region.counters.take_up_again(slot),
        };
        let sources = Sources::new(region, buffers, attempts);
        // After a failure the page is filled alone.
        let has_failed = attempts != Attempts::default();
        let unit = if has_failed { page.span() } else { region.read_unit(page) };
        let prefetch = Prefetch::default();
        Self {
            region,
            asked,
            permit,
            flight,
            sources,
            reads,
            prefetch,
            unit,
            block: None,
            is_fetched: false,
            is_read: false,
        }
    }

    /// Records a first touch that fills `filled`, and asks the policy for pages to prefetch.
    fn note_first_touch(&mut self, filled: Span) {
        let region = self.region;
        if let Some(recorder) = &region.recorder {
            recorder.note(self.asked.page);
        }
        let is_present = |page| region.pages.state(page) == PageState::Present;
        self.prefetch = region.policy.on_fault(filled, is_present);
        region.counters.local().pages_ahead_used.add(self.prefetch.consumed as u64);
    }

    /// Whether the page has a source that answers later, and it may be asked.
    fn may_fetch(&self) -> bool {
        let page = self.asked.page.span();
        self.region.fetched_pages(page).is_some() && (self.permit.is_some() || self.region.may_fetch())
    }

    /// Requests the page, and the pages that are read with it, from a source that answers later. At
    /// the limit the fault waits for a permit.
    fn fetch(&mut self, claim: &mut Claim<'_>) -> bool {
        let region = self.region;
        if !self.may_fetch() {
            return false;
        }
        let Some(permit) = self.permit.take().or_else(|| region.permit_fetch()) else {
            // The claim ends first, because the worker that takes the fault claims the page.
            claim.release_without_wake();
            region.wait_for_permit(self.again());
            return true;
        };
        // A page before the touched one may be discarded by now, and the fetch then ends before the
        // touched page: the worker reads it.
        let Some((pages, source, offset)) = region.fetched_pages(claim.span()) else { return false };
        if !claim.span().prefix(pages).contains(self.asked.page) {
            return false;
        }
        fetch(region, claim.split_off(pages), (source, offset), FetchReason::Now(self.again()), permit);
        true
    }

    /// Begins the read of the page, if the worker has other faults to serve meanwhile.
    fn begin_read(&mut self, claim: &mut Claim<'_>) -> bool {
        let (region, page) = (self.region, self.asked.page);
        if !self.reads.are_useful() || claim.span() != page.span() {
            return false;
        }
        let Some(place) = region.direct_page(page) else { return false };
        let Some(permit) = self.permit.take().or_else(|| region.permit_fetch()) else { return false };
        let (asked, flight) = (self.asked, &mut self.flight);
        let again = || asked.again(flight.take().map(InFlightFault::keep), asked.attempts);
        self.is_read = self.reads.begin(region, claim, place, again, permit);
        self.is_read
    }

    /// The request to go on with the fault elsewhere.
    fn again(&mut self) -> FaultRequest {
        self.asked.again(self.flight.take().map(InFlightFault::keep), self.asked.attempts)
    }

    /// Another thread fills the page, or it is present or poisoned.
    #[cold]
    fn answer_without_claim(&mut self, reason: Unclaimed) {
        let (region, span) = (self.region, self.asked.page.span());
        match reason {
            // That thread wakes the faulting thread. Only thread numbers of this process can match
            // a filling caller.
            Unclaimed::Filling => {
                if region.target.foreign().is_none() && callers::fills(self.asked.thread, region, span.first)
                {
                    self.answer_signal_handler();
                }
            }
            Unclaimed::Resident => {
                region.counters.local().faults_spurious.add(1);
                if self.asked.touch == Touch::Read || let_write(region, span).is_err() {
                    region.wake(span);
                }
            }
            // The page is absent by now, and the thread faults again.
            Unclaimed::Poisoned if region.lacks_marker(span.first) => region.wake(span),
            // The thread faulted before the page was poisoned. Poisoning again wakes it into its
            // signal, also if the poison marker was discarded since.
            Unclaimed::Poisoned => poison_again(region, span),
        }
    }

    /// The page is claimed by the thread that the faulting signal handler has interrupted.
    fn answer_signal_handler(&mut self) {
        let (region, page) = (self.region, self.asked.page);
        if fill_beside(region, page, self) {
            if self.asked.touch != Touch::Read {
                let_write_beside(region, page.span());
            }
            region.wake(page.span());
            // The thread with the claim may have looked while this one was inside the sources.
            return region.release_sources(page.span());
        }
        let what = "a signal handler touches a page that its thread is filling: it gets SIGBUS";
        log!(error, region = region.name, page = page.0, what);
        let failure = failure_at(region, page.span(), FailureReason::Nested.error(what));
        // The failure is kept before the page is poisoned: the claim's holder then finds the poison
        // marker and the reason.
        region.record_failure(page, Arc::new(failure));
        poison_again(region, page.span());
        region.release_sources(page.span());
    }

    fn pages_to_prefetch(&self, spent: u64) -> [Option<Span>; 2] {
        let with_fault = match (self.is_fetched, self.block) {
            (true, None) if self.is_read => self.region.policy.spent(self.asked.page, self.reads.cost()),
            (true, None) => self.prefetch.with_fault,
            (false, None) => self.region.policy.spent(self.asked.page, spent),
            // The cost of a whole block says nothing about the cost of a fault.
            (_, Some(_)) => None,
        };
        [with_fault, self.prefetch.after_fault]
    }
}

impl<H: Host> Filler for Fault<'_, H> {
    #[inline]
    fn writes(&self, _: Span) -> Option<Page> {
        (self.asked.touch != Touch::Read).then_some(self.asked.page)
    }

    fn claimed(&mut self, claim: &mut Claim<'_>) {
        let is_first = !self.asked.is_repeated;
        if is_first {
            self.note_first_touch(self.unit);
        }
        if is_first && !self.may_fetch() {
            self.block = self.region.movable_block(self.asked.page).or(self.prefetch.with_fault);
            self.block.iter().for_each(|block| claim.grow(*block));
        }
    }

    #[inline]
    fn fetches(&mut self, claim: &mut Claim<'_>) -> bool {
        if self.is_fetched {
            return false;
        }
        self.is_fetched = self.fetch(claim) || self.begin_read(claim);
        self.is_fetched
    }

    #[inline]
    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        self.sources.fill(span)
    }

    #[inline]
    fn installed(&mut self, pages: usize) {
        self.sources.installed(pages);
    }

    #[cold]
    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        let Self { region, asked, flight, sources, .. } = self;
        let (span, page) = (claim.span(), asked.page);
        match error {
            // The page is installed, and the others of its block can wait.
            InstallError::NoMemory | InstallError::NoRoom if !span.contains(page) => {
                return Err(Unfilled::GivenBack);
            }
            InstallError::NoMemory | InstallError::NoRoom => claim.shrink_to(page),
            InstallError::Changing => {}
            // Another page of its block has failed, or may have: the page is filled alone.
            InstallError::Several(_) if span.contains(page) => {
                claim.shrink_to(page);
                return Ok(());
            }
            _ if span.first < page && span.contains(page) => {
                discard(error);
                claim.shrink_to(page);
                return Ok(());
            }
            _ if span.first != page => {
                discard(error);
                return Err(Unfilled::GivenBack);
            }
            _ => {}
        }
        sources.recovery.react(region, claim, error, |claim, pause, attempts| {
            let mut keep = || flight.take().map(InFlightFault::keep);
            if serve_later(region, claim, || asked.again(keep(), attempts), pause.length()) {
                return Err(Unfilled::Later);
            }
            match pause {
                // The worker must not wait for room in the queue, because it may be the only worker
                // that empties it.
                Pause::Source(pause, _) => {
                    thread::sleep(pause);
                    Ok(())
                }
                // Only a hostile owner queues so many faults, and a pause would serve it.
                Pause::Memory(_) => Err(fail(region, claim, without_memory(region, claim.span()))),
            }
        })
    }
}
