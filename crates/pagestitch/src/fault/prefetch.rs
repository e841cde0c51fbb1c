//! Pages filled ahead of their first touch: for a sequential reader, in a dense block, from a
//! recording.

use super::fill::{Buffers, fill};
use super::install::{Short, install};
use super::pending::{FetchReason, fetch};
use super::request::Host;
use nix::time::{ClockId, clock_gettime};
use pagestitch_kernel::Span;
use std::sync::Arc;
use std::time::Duration;

/// Fills absent pages of a span, a block at most, ahead of their first touch. Stops at a page whose
/// source fails: the page stays absent, and its first touch reads the source again.
pub(crate) fn fill_ahead<H: Host>(region: &Arc<H>, span: Span, buffers: &mut Buffers) {
    // Processor time instead of wall time, because the reading thread preempts this one now and
    // then.
    let before = processor_time();
    if let Some(pages) = fill_absent(region, span, buffers) {
        let spent = processor_time().saturating_sub(before);
        region.policy.filled(pages, u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Fills absent pages of a recording.
pub(crate) fn replay<H: Host>(region: &Arc<H>, span: Span, buffers: &mut Buffers) {
    // A page that fails, or is changing, stays absent: its first touch reads the source again.
    let _ = fill_absent(region, span, buffers);
}

/// Fills the absent pages of a span; returns their number, or `None` if a source fails.
fn fill_absent<H: Host>(region: &Arc<H>, span: Span, buffers: &mut Buffers) -> Option<usize> {
    let mut rest = span;
    let mut pages = 0;
    loop {
        let gap = region.next_gap(rest);
        if gap.is_empty() {
            return Some(pages);
        }
        rest = rest.without_prefix(gap.first.0 - rest.first.0);
        // Without a claim, the page is no longer absent: another thread has claimed or filled it.
        let Ok(mut claim) = region.pages.claim_run(gap, &***region) else {
            rest = rest.without_prefix(1);
            continue;
        };
        rest = rest.without_prefix(claim.span().pages);
        while !claim.span().is_empty() {
            if let Some((some, source, offset)) = region.fetched_pages(claim.span())
                && let Some(permit) = region.may_fetch()
            {
                fetch(region, claim.split_off(some), (source, offset), FetchReason::Ahead, permit);
                continue;
            }
            let filled = fill(region, claim.span(), buffers).ok()?;
            let ahead = filled.pages;
            install(region, &mut claim, filled, Short::Tell).ok()?;
            region.counters.local().pages_ahead.add(ahead as u64);
            pages += ahead;
        }
    }
}

/// The processor time that this thread has used so far.
fn processor_time() -> Duration {
    // The call cannot fail, because every thread has this clock.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}
