//! Retries pages whose source has failed. A poison marker has no bytes, so filling it changes no
//! byte that a reader has seen: a thread that touched the page before got a signal, and nothing
//! else.

use crate::error::{Failure, FailureReason};
use crate::fault::callers::FillingCaller;
use crate::fault::fill::{Buffers, Filled};
use crate::fault::poison::fail;
use crate::fault::recovery::{Attempts, Next, Sources};
use crate::fault::{Filler, InstallError, Unfilled, Wanted, journey};
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState};
use pagestitch_kernel::Features;
use pagestitch_kernel::{Errno, Page, Span};
use std::io;
use std::sync::Arc;
use std::thread;

/// Fills the poisoned pages of a span. Stops at the first whose source fails again.
pub(crate) fn retry_failed(region: &Mapping, span: Span) -> Result<(), Arc<Failure>> {
    let mut bad = region.failed_pages(span).peekable();
    let Some((_, first)) = bad.peek() else { return Ok(()) };
    if !region.uffd.features().contains(Features::POISON) {
        let reason = "the page was taken away for good, because Linux before 6.6 has no poison markers: build the region anew";
        return Err(Arc::new(first.again(FailureReason::Irrecoverable.error(reason))));
    }
    let mut buffers =
        Buffers::new().map_err(|errno: Errno| Arc::new(first.again(io::Error::from(errno)).of_kernel()))?;
    let retried = bad.try_for_each(|(page, _)| retry_page(region, page, &mut buffers));
    region.free_released();
    retried
}

fn retry_page(region: &Mapping, page: Page, buffers: &mut Buffers) -> Result<(), Arc<Failure>> {
    let _filling = FillingCaller::new(region, page.span());
    let mut retry = RetryPage { region, sources: Sources::new(region, buffers, Attempts::default()) };
    loop {
        match journey(region, Wanted::Poisoned(page), &mut retry) {
            Ok(()) => {
                region.counters.local().pages_recovered.add(1);
                return Ok(());
            }
            // Another thread has filled the page or is filling it.
            Err(Unfilled::Unclaimed(_)) => return Ok(()),
            Err(Unfilled::Failed(failure)) => {
                region.settle_failure(page, &failure);
                return Err(failure);
            }
            Err(Unfilled::Changing | Unfilled::Later | Unfilled::GivenBack) => thread::yield_now(),
        }
    }
}

struct RetryPage<'a> {
    region: &'a Mapping,
    sources: Sources<'a>,
}

impl Filler for RetryPage<'_> {
    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        self.sources.fill(span)
    }

    fn installed(&mut self, pages: usize) {
        self.sources.installed(pages);
    }

    /// The poison marker is still there. The page goes back as poisoned: as absent, it could be
    /// touched without an event.
    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        let (region, span) = (self.region, claim.span());
        let next = match error {
            InstallError::Source(failure) => {
                let failure = Arc::new(*failure);
                region.record_failure(span.first, Arc::clone(&failure));
                claim.settle(1, PageState::Poisoned);
                return Err(Unfilled::Failed(failure));
            }
            error => self.sources.recovery.next(region, span, error),
        };
        let end = match next {
            Next::Now => return Ok(()),
            Next::After(pause) => {
                thread::sleep(pause.length());
                return Ok(());
            }
            Next::Changing => Unfilled::Changing,
            Next::Fail(failure) => fail(region, claim, failure),
        };
        if !claim.span().is_empty() {
            claim.settle(1, PageState::Poisoned);
        }
        Err(end)
    }
}
