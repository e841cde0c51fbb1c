//! Asynchronous fetches: a claim that is held until the source replies. The reply then takes the
//! same steps as any fault.

use crate::error::Failure;
use crate::fault::fetch_semaphore::Permit;
use crate::fault::fill::{Content, Filled};
use crate::fault::install::{InstallError, Short, fail, given_up, install};
use crate::fault::{FaultRequest, Host, serve_later};
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
pub(crate) struct Pending<H> {
    region: Arc<H>,
    /// Makes the region's drop wait for the reply.
    _guard: OwnedGateGuard,
    span: Span,
    wanted: FetchReason,
    began: Option<Instant>,
    _permit: Option<Permit>,
}

/// The reason why pages are fetched.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FetchReason {
    /// The fault of a thread that waits for the page.
    Now(FaultRequest),
    /// A prefetch.
    Ahead,
}

impl FetchReason {
    fn finish(self, region: &Mapping) {
        if let Self::Now(asked) = self {
            region.counters.finish(asked.slot);
        }
    }
}

/// Requests the bytes of a claim's pages from their source. All of them lie in one chunk.
pub(crate) fn fetch<H: Host>(
    region: &Arc<H>,
    claim: Claim<'_>,
    (source, offset): (&Fetched, u64),
    wanted: FetchReason,
    permit: Option<Permit>,
) {
    // A region that is being dropped needs no page any more: dropping the claim gives its pages
    // back.
    let Some(guard) = region.enter_owned() else { return wanted.finish(region) };
    let began = region.counters.clock();
    let span = claim.keep();
    let pending = Pending { region: Arc::clone(region), _guard: guard, span, wanted, began, _permit: permit };
    let reply = Reply::to_pages(Box::new(pending), region.page_size().bytes_of(span));
    // If the source panics, the reply is dropped, which fails the request.
    quietly(|| source.0.fetch(offset, reply));
}

impl<H: Host> Complete for Pending<H> {
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>) {
        let _abort = AbortOnPanic::armed();
        let Self { region, span, wanted, began, .. } = self.as_ref();
        region.counters.record_time(FaultPart::Fill, *began);
        let mut claim = region.pages.resume(*span, &***region);
        // If the claim is not settled to its end, its drop gives the pages back, and the waiting
        // threads fault again.
        let began = region.counters.clock();
        match answer {
            Ok(bytes) => {
                let filled = Filled { pages: span.pages, content: Content::Buffered(bytes) };
                let short = if let FetchReason::Now(asked) = wanted { asked.short() } else { Short::Tell };
                match (install(region, &mut claim, filled, short), wanted) {
                    (Ok(()), FetchReason::Ahead) => {
                        region.counters.local().pages_ahead.add(span.pages as u64)
                    }
                    (Err(InstallError::NoMemory), FetchReason::Now(asked)) => {
                        claim.release_without_wake();
                        region.counters.record_time(FaultPart::Resolve, began);
                        return serve_later(region, *asked);
                    }
                    (Err(not), FetchReason::Now(_)) => drop(given_up(region, &mut claim, not)),
                    _ => {}
                }
            }
            Err(error) => {
                region.counters.local().source_errors.add(1);
                match wanted {
                    FetchReason::Now(_) => drop(fail(region, &mut claim, self.failure(error))),
                    FetchReason::Ahead => discard(error),
                }
            }
        }
        region.counters.record_time(FaultPart::Resolve, began);
        wanted.finish(region);
    }

    fn retry(self: Box<Self>, _: Duration, error: io::Error) {
        self.complete(Err(error));
    }
}

impl<H: Host> Pending<H> {
    fn failure(&self, error: io::Error) -> Failure {
        let offsets = self.region.page_size().offsets(self.span);
        self.region.layout.piece_at(offsets.start, offsets.end).failed(error)
    }
}
