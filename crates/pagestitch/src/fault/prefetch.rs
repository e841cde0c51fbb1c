//! Pages filled ahead of their first touch: for a sequential reader, in a dense block, from a
//! recording, or because the application requests it.

use super::error::{InstallError, Unfilled};
use super::fetch::{FetchReason, fetch};
use super::fill::{Buffers, Filled, fill};
use super::prefetch_job::PrefetchJob;
use super::request::Host;
use super::{Filler, Mode, Wanted, journey};
use crate::guard::discard;
use crate::space::page_table::{Claim, Unclaimed};
use nix::time::{ClockId, clock_gettime};
use pagestitch_kernel::{Page, Span, staging};
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// Fills absent pages of a block for a job, and reads those of files in place, for a moment, so that faults come
/// before the rest of the block. The pages of a read that fails stay absent. Then tells the server how to go on.
pub(crate) fn fill_requested<H: Host>(
    region: &Arc<H>,
    job: &Arc<PrefetchJob>,
    block: Span,
    buffers: &mut Buffers,
) {
    if region.owner_has_ended() {
        job.cancel();
    }
    let (step, most) =
        if job.is_background() { (BACKGROUND_STEP, BACKGROUND_PAGES) } else { (STEP_MAX, READ_PAGES) };
    let mut ahead = Ahead { job: Some(job), most, ..Ahead::new(region, buffers) };
    let (mut rest, began, mut is_limited) = (block, Instant::now(), false);
    region.look_for_discards(block);
    while !rest.is_empty() && !is_limited && !job.is_cancelled() && began.elapsed() < step {
        let gap = region.next_gap(rest);
        let present = if gap.is_empty() { rest } else { rest.prefix(gap.first.0 - rest.first.0) };
        if present.is_empty() {
            is_limited = ahead.fill_first(&mut rest, gap);
        } else {
            // A background fill ends with all pages present, and these are.
            let read = !job.is_background();
            rest = rest.without_prefix(if read {
                region.populate_first_files(present, most)
            } else {
                present.pages
            });
        }
    }
    if job.is_background() {
        job.note_faults(region.counters.faults());
    }
    region.go_on_with(job, job.step_ended(rest, is_limited));
}

/// Fills the absent pages of a span; returns their number, or `None` if a source fails.
fn fill_absent<H: Host>(region: &Arc<H>, span: Span, buffers: &mut Buffers) -> Option<usize> {
    let mut ahead = Ahead::new(region, buffers);
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

/// The pages of one read, `most` from the start of a gap, or a block that moves as a whole. A longer
/// claim would hold pages that a fault may need before.
fn one_read<H: Host>(region: &Arc<H>, gap: Span, most: usize) -> Span {
    let stages = || region.stageable_block(gap).is_some() && !staging::pauses();
    if stages() || region.movable_block(gap.first) == Some(gap) {
        return gap;
    }
    let last = Page(gap.first.0 + gap.pages.min(most) - 1);
    gap.prefix(region.read_unit(last).end().0 - gap.first.0)
}

struct Ahead<'a, H> {
    region: &'a Arc<H>,
    buffers: &'a mut Buffers,
    /// The prefetch that the application has requested, if it is one.
    job: Option<&'a Arc<PrefetchJob>>,
    /// The most pages of a read for it.
    most: usize,
    /// The pages of the last claim that are filled, fetched or failed.
    claimed: usize,
    /// The pages of all claims that are installed.
    installed: usize,
    /// True if a fetch had no permit.
    is_limited: bool,
}

impl<'a, H: Host> Ahead<'a, H> {
    const fn new(region: &'a Arc<H>, buffers: &'a mut Buffers) -> Self {
        Self { region, buffers, job: None, most: READ_PAGES, claimed: 0, installed: 0, is_limited: false }
    }

    /// Fills the first pages of a gap, with which `rest` begins, and takes them off `rest`. True if
    /// the pages can only be filled after a pause.
    fn fill_first(&mut self, rest: &mut Span, gap: Span) -> bool {
        let end = journey(self.region, Wanted::Absent(one_read(self.region, gap, self.most)), self);
        let is_changing = matches!(end, Err(Unfilled::Changing));
        let pages = match end {
            // It is filled, or another thread fills it, or it is poisoned.
            Err(Unfilled::Unclaimed(reason)) => {
                match (self.job, reason) {
                    (Some(job), Unclaimed::Filling) => job.leave_to_other(gap.prefix(1)),
                    (Some(job), Unclaimed::Poisoned) => job.add_skipped(1),
                    (None, _) | (_, Unclaimed::Resident) => {}
                }
                1
            }
            _ => self.claimed,
        };
        *rest = rest.without_prefix(pages);
        is_changing || self.is_limited
    }

    /// Counts the pages of a claim out, because a later step fills them; returns their number.
    const fn leave(&mut self, claim: &Claim<'_>) -> usize {
        let pages = claim.span().pages;
        self.claimed -= pages;
        pages
    }

    /// Gives the first pages of a claim back, because they cannot be filled.
    fn give_back(&self, claim: &mut Claim<'_>, error: &InstallError, job: &PrefetchJob) {
        let span = claim.span();
        let pages = match error {
            InstallError::Several(pages) => *pages,
            InstallError::Source(_) => self.region.lazy_pages(span).map_or(1, |(pages, ..)| pages),
            InstallError::NoMemory | InstallError::NoRoom => span.pages,
            InstallError::Changing | InstallError::Gone | InstallError::Refused(_) => 1,
        };
        job.add_failed(pages);
        drop(claim.split_off(pages));
    }
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
        let Some(permit) = self.region.permit_prefetch() else {
            // At a limit the pages stay absent. Their touch asks for them, and waits for a permit.
            self.is_limited = true;
            let left = if self.job.is_some() { self.leave(claim) } else { pages };
            drop(claim.split_off(left));
            return true;
        };
        let reason = self.job.map_or(FetchReason::Ahead, |job| FetchReason::Requested(Arc::clone(job)));
        fetch(self.region, claim.split_off(pages), (source, offset), reason, permit);
        true
    }

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        fill(self.region, span, self.buffers)
    }

    fn installed(&mut self, pages: usize) {
        self.region.counters.local().pages_ahead.add(pages as u64);
        self.installed += pages;
        if let Some(job) = self.job {
            job.add_filled(pages);
        }
    }

    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        let end = match (self.job, &error) {
            (Some(_), InstallError::Changing) => {
                self.leave(claim);
                Err(Unfilled::Changing)
            }
            (Some(job), _) => {
                self.give_back(claim, &error, job);
                Ok(())
            }
            (None, _) => Err(Unfilled::GivenBack),
        };
        discard(error);
        end
    }
}

/// The processor time that this thread has used so far.
fn processor_time() -> Duration {
    // The call cannot fail, because every thread has this clock.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// The time after which a worker looks for faults before it goes on with a requested prefetch.
const STEP_MAX: Duration = Duration::from_millis(1);
/// The most pages that a requested prefetch claims at once, if no block is staged and the source
/// prefers no larger reads.
const READ_PAGES: usize = 64;
/// As [`STEP_MAX`], for a background fill, for which no thread waits.
const BACKGROUND_STEP: Duration = Duration::from_micros(50);
/// As [`READ_PAGES`], for a background fill. A thread that reads faults of adopted memory waits for an
/// install in progress.
const BACKGROUND_PAGES: usize = 16;
