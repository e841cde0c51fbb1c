//! Pages filled ahead of their first touch: for a sequential reader, in a dense block, from a
//! recording.

use super::error::{InstallError, Unfilled};
use super::fetch::{FetchReason, fetch};
use super::fill::{Buffers, Filled, fill};
use super::request::Host;
use super::{Filler, Mode, Wanted, journey};
use crate::guard::discard;
use crate::space::page_table::Claim;
use nix::time::{ClockId, clock_gettime};
use pagestitch_kernel::Span;
use std::sync::Arc;
use std::time::Duration;

/// Fills absent pages of a span, a block at most, ahead of their first touch. Stops at a read that
/// fails: its pages stay absent, and their first touches read the source again.
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
    let mut ahead = Ahead { region, buffers, claimed: 0, installed: 0 };
    let mut rest = span;
    loop {
        let gap = region.next_gap(rest);
        if gap.is_empty() {
            return Some(ahead.installed);
        }
        rest = rest.without_prefix(gap.first.0 - rest.first.0);
        match journey(region, Wanted::Absent(gap), &mut ahead) {
            Ok(()) => rest = rest.without_prefix(ahead.claimed),
            // Another thread has claimed or filled the page.
            Err(Unfilled::Unclaimed(_)) => rest = rest.without_prefix(1),
            Err(_) => return None,
        }
    }
}

struct Ahead<'a, H> {
    region: &'a Arc<H>,
    buffers: &'a mut Buffers,
    /// The pages of the last claim.
    claimed: usize,
    /// The pages of all claims that are installed.
    installed: usize,
}

impl<H: Host> Filler for Ahead<'_, H> {
    const MODE: Mode = Mode::Untimed;

    fn claimed(&mut self, claim: &mut Claim<'_>) {
        self.claimed = claim.span().pages;
    }

    fn fetches(&mut self, claim: &mut Claim<'_>) -> bool {
        let Some((pages, source, offset)) = self.region.fetched_pages(claim.span()) else { return false };
        if !self.region.may_fetch() {
            return false;
        }
        let ahead = claim.split_off(pages);
        // At a limit the pages stay absent. Their touch asks for them, and waits for a permit.
        if let Some(permit) = self.region.permit_prefetch() {
            fetch(self.region, ahead, (source, offset), FetchReason::Ahead, permit);
        }
        true
    }

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        fill(self.region, span, self.buffers)
    }

    fn installed(&mut self, pages: usize) {
        self.region.counters.local().pages_ahead.add(pages as u64);
        self.installed += pages;
    }

    fn failed(&mut self, _: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        discard(error);
        Err(Unfilled::GivenBack)
    }
}

/// The processor time that this thread has used so far.
fn processor_time() -> Duration {
    // The call cannot fail, because every thread has this clock.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}
