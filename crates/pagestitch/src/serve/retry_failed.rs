//! Retries pages whose source has failed. A poison marker has no bytes, so filling it changes no
//! byte that a reader has seen: a thread that touched the page before got a signal, and nothing
//! else.

use crate::error::{Failure, FailureReason};
use crate::fault::callers::Mark;
use crate::fault::fill::{Buffers, fill};
use crate::fault::install::{FillError, Short, given_up, install};
use crate::space::Mapping;
use crate::space::page_table::PageState;
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
        let why = "it was taken away for good, as there are no poison marks before Linux 6.6: build the region anew";
        return Err(Arc::new(first.again(FailureReason::Irrecoverable.error(why))));
    }
    let mut buffers =
        Buffers::new().map_err(|errno: Errno| Arc::new(first.again(io::Error::from(errno)).of_kernel()))?;
    bad.try_for_each(|(page, _)| heal_page(region, page, &mut buffers))
}

fn heal_page(region: &Mapping, page: Page, buffers: &mut Buffers) -> Result<(), Arc<Failure>> {
    let _mark = Mark::new(region, page.span());
    loop {
        // A page that was discarded, and failed anew before that was noted, is absent here and has
        // its marker.
        let claim = region.pages.claim_from(page, PageState::Poisoned, region);
        let claim = claim.or_else(|_| region.pages.claim(page, region));
        // Without a claim, another thread has filled the page or is filling it.
        let Ok(mut claim) = claim else { return Ok(()) };
        let installed = match fill(region, page.span(), buffers) {
            Ok(filled) => install(region, &mut claim, filled, Short::Wait)
                .map_err(|not| given_up(region, &mut claim, not)),
            Err(failure) => {
                let failure = Arc::new(failure);
                region.record_failure(page, Arc::clone(&failure));
                Err(FillError::Failed(failure))
            }
        };
        // The marker is still there. The page goes back as poisoned: as absent, it could be touched
        // without an event.
        if !claim.span().is_empty() {
            claim.settle(1, PageState::Poisoned);
        }
        match installed {
            Ok(()) => {
                region.counters.local().pages_recovered.add(1);
                return Ok(());
            }
            Err(FillError::Changing | FillError::NoMemory | FillError::Again { .. }) => thread::yield_now(),
            Err(FillError::Failed(failure)) => {
                region.settle_failure(page, &failure);
                return Err(failure);
            }
        }
    }
}
