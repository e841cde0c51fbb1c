//! The journey of a fault: locate, claim, fill, install, settle, record. Read this page first.

pub(crate) mod callers;
mod fetch_semaphore;
pub(crate) mod fill;
pub(crate) mod install;
mod pending;
mod prefetch;
mod request;

pub(crate) use fetch_semaphore::{FetchSemaphore, Permit};
pub(crate) use prefetch::{fill_ahead, replay};
pub(crate) use request::{FaultRequest, Host};

use crate::error::{Failure, FailureReason};
use crate::guard::Entered;
use crate::metrics::{FaultPart, InFlightFault};
use crate::policy::{OnFailure, Prefetch};
use crate::space::Mapping;
use crate::space::page_table::{Claim, Wake};
use fill::{Buffers, fill, fill_zeroing};
use install::{FillError, InstallError, Short, fail, given_up, install, install_beside, poison};
use pagestitch_kernel::{Page, Span};
use pending::{FetchReason, fetch};
use request::{claim, serve_later};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Serves a fault. Returns the pages to prefetch, if the faulting thread seems to need more.
///
/// Afterwards the faulting thread has its bytes or a signal, or was woken to fault again, or sleeps
/// until a queued retry or a fetch serves it.
pub(crate) fn serve<H: Host>(
    region: &Arc<H>,
    mut asked: FaultRequest,
    buffers: &mut Buffers,
) -> [Option<Span>; 2] {
    loop {
        match serve_once(region, asked, buffers) {
            Ok(prefetch) => return prefetch,
            // The queue is full. The worker must not wait for room in it, because it may be the
            // only worker that empties it.
            Err(Repeat { again, pause }) => {
                thread::sleep(pause);
                asked = again;
            }
        }
    }
}

/// The source has failed, its policy asks for a retry after a pause, and the queue of retries is
/// full.
struct Repeat {
    again: FaultRequest,
    pause: Duration,
}

fn serve_once<H: Host>(
    region: &Arc<H>,
    asked: FaultRequest,
    buffers: &mut Buffers,
) -> Result<[Option<Span>; 2], Repeat> {
    let FaultRequest { page, read, .. } = asked;
    let begin = || region.counters.begin(page, asked.thread, read);
    let flight = match asked.is_first() {
        true => region.counters.take_up(asked.slot.or_else(begin), read),
        false => region.counters.take_up_again(asked.slot),
    };
    let _entered = Entered::new(|| tracing::trace_span!("fault", region = region.name, page = page.0));
    let started = Instant::now();
    let Some(mut claim) = claim(region, page) else {
        // Only thread numbers of this process can match a mark of a caller.
        let own = region.target.foreign().is_none();
        if own && region.pages.state(page).is_claimed() && callers::fills(asked.thread, region, page) {
            fill_beside(region, page, buffers);
        }
        return Ok([None; 2]);
    };
    let prefetch = if asked.is_first() { on_fault(region, page) } else { Prefetch::default() };
    if let Some((_, source, offset)) = region.fetched_pages(page.span())
        && let Some(permit) = region.may_fetch()
    {
        let asked = FaultRequest { slot: flight.map(InFlightFault::keep), ..asked };
        fetch(region, claim, (source, offset), FetchReason::Now(asked), permit);
        // Only the worker's own time counts: it does not wait for the bytes.
        region.record_latency(nanoseconds(started));
        return Ok([prefetch.with_fault, prefetch.after_fault]);
    }
    // A repeated request fills its page alone.
    let block = region.movable_block(page).or(prefetch.with_fault).filter(|_| asked.is_first());
    if let Some(block) = block {
        claim.grow(block);
    }
    match fill_claim(region, claim, page.span(), buffers, (asked.short(), asked.failures)) {
        // The memory map is changing: let that thread finish. The dropped claim has woken the
        // faulting thread, which faults again.
        Err(FillError::Changing) => thread::yield_now(),
        Err(FillError::NoMemory) => {
            serve_later(region, FaultRequest { slot: flight.map(InFlightFault::keep), ..asked })
        }
        Err(FillError::Again { pause, failures }) => {
            let again = FaultRequest { slot: flight.map(InFlightFault::keep), failures, ..asked };
            if !region.handle_later(again, pause) {
                return Err(Repeat { again, pause });
            }
        }
        Ok(()) | Err(FillError::Failed(_)) => {}
    }
    let spent = nanoseconds(started);
    region.record_latency(spent);
    // The cost of a whole block says nothing about the cost of a fault.
    let dense = block.is_none().then(|| region.policy.spent(page, spent)).flatten();
    Ok([dense, prefetch.after_fault])
}

/// Fills a page beside its claim. A signal handler has touched a page that the interrupted thread
/// is filling, so the claim cannot be settled before the handler returns. If the page cannot be
/// filled beside the claim, the handler gets SIGBUS.
#[cold]
fn fill_beside(region: &Mapping, page: Page, buffers: &mut Buffers) {
    let filled = fill(region, page.span(), buffers);
    if filled.is_ok_and(|filled| install_beside(region, page.span(), filled.content)) {
        region.wake(page.span());
    } else {
        let what = "a signal handler touches a page that its thread is filling: it gets SIGBUS";
        log!(error, region = region.name, page = page.0, what);
        let offsets = region.page_size().offsets(page.span());
        let failure = region.layout.piece_at(offsets.start, offsets.end);
        let failure = failure.failed(FailureReason::Nested.error(what));
        // The failure is kept before the page is poisoned: the claim's holder then finds the poison
        // marker and the reason.
        region.record_failure(page, Arc::new(failure));
        let _ = poison(region, page.span());
    }
}

/// Records a first touch; returns the pages to prefetch.
fn on_fault(region: &Mapping, page: Page) -> Prefetch {
    if let Some(recorder) = &region.recorder {
        recorder.note(page);
    }
    let prefetch = region.policy.on_fault(page);
    region.counters.local().pages_ahead_used.add(prefetch.consumed as u64);
    prefetch
}

/// Fills and installs every page of a claim. `asked` is the faulting page, and `failures` the
/// number of times that its source has failed. On an early return, and when a source fails for
/// another page, the dropped claim gives back its unsettled pages and wakes their waiters.
pub(crate) fn fill_claim(
    region: &Mapping,
    mut claim: Claim<'_>,
    asked: Span,
    buffers: &mut Buffers,
    (short, mut failures): (Short, u32),
) -> Result<(), FillError> {
    while !claim.span().is_empty() {
        let wanted = asked.contains(claim.span().first);
        match fill_and_install(region, &mut claim, buffers, short) {
            Ok(()) => failures = 0,
            Err(StepError::Changing) => return Err(FillError::Changing),
            Err(StepError::NoMemory) => return without_memory(claim, asked),
            Err(StepError::Source(failure)) if wanted => {
                failures += 1;
                let failure = Failure { attempts: failures, ..failure };
                match apply_failure_policy(region, &mut claim, failure, buffers, short) {
                    Err(FillError::NoMemory) => return without_memory(claim, asked),
                    Err(again @ FillError::Again { .. }) => {
                        claim.release_without_wake();
                        return Err(again);
                    }
                    applied => applied?,
                }
            }
            Err(StepError::Kernel(failure)) if wanted => return Err(fail(region, &mut claim, failure)),
            Err(_) => return Ok(()),
        }
    }
    Ok(())
}

/// Ends a claim whose first page the kernel has no memory for. If the faulting page is not
/// installed yet, the pages are given back without waking the faulting thread, which would only
/// fault again.
fn without_memory(claim: Claim<'_>, asked: Span) -> Result<(), FillError> {
    if !claim.span().contains(asked.first) {
        return Ok(());
    }
    claim.release_without_wake();
    Err(FillError::NoMemory)
}

/// The reason why the first page of a claim was not installed.
enum StepError {
    Changing,
    NoMemory,
    /// Its source has failed.
    Source(Failure),
    /// The kernel refuses the page.
    Kernel(Failure),
}

impl From<InstallError> for StepError {
    fn from(not: InstallError) -> Self {
        match not {
            InstallError::Changing => Self::Changing,
            InstallError::NoMemory => Self::NoMemory,
            InstallError::Refused(failure) => Self::Kernel(failure),
        }
    }
}

/// Fills and installs the leading pages of the claim that one method can install.
fn fill_and_install(
    region: &Mapping,
    claim: &mut Claim<'_>,
    buffers: &mut Buffers,
    short: Short,
) -> Result<(), StepError> {
    let began = region.counters.clock();
    let filled = fill(region, claim.span(), buffers);
    region.counters.record_time(FaultPart::Fill, began);
    let filled = filled.map_err(StepError::Source)?;
    let began = region.counters.clock();
    let installed = install(region, claim, filled, short);
    region.counters.record_time(FaultPart::Resolve, began);
    Ok(installed?)
}

/// Applies the chunk's failure policy to the claim's first page. `Ok`: continue, with the same page
/// or the next one.
fn apply_failure_policy(
    region: &Mapping,
    claim: &mut Claim<'_>,
    mut failure: Failure,
    buffers: &mut Buffers,
    short: Short,
) -> Result<(), FillError> {
    match region.layout.on_failure(failure.chunk) {
        OnFailure::Poison => {}
        OnFailure::Retry(retry) => {
            let random = Instant::now().elapsed().as_nanos() as u64
                ^ (claim.span().first.0 as u64).wrapping_mul(GOLDEN);
            if let Some(pause) = retry.after(failure.attempts, random) {
                region.counters.local().source_retries.add(1);
                if short != Short::Wait {
                    return Err(FillError::Again { pause, failures: failure.attempts });
                }
                thread::sleep(pause);
                return Ok(());
            }
        }
        OnFailure::Zeros => {
            match fill_zeroing(region, claim.span().first, buffers) {
                Ok(filled) => {
                    install(region, claim, filled, short).map_err(|not| given_up(region, claim, not))?;
                    region.counters.local().pages_given_up.add(1);
                    log!(warn, region = region.name, %failure, "page filled with zeros, because its policy is OnFailure::Zeros");
                    return Ok(());
                }
                // Another chunk of the same page has failed, and its policy is not zeros.
                Err(worse) => failure = worse,
            }
        }
    }
    Err(fail(region, claim, failure))
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The most pages filled at once: those of a huge page, at which the cost of a system call is
/// negligible.
pub(crate) const BLOCK_PAGES: usize = 512;
/// Multiplier that spreads close numbers (2^64 divided by the golden ratio).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
