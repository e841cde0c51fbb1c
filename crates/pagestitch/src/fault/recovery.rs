//! The reaction to a page that is not installed: a pause, zeros, or the end of the page.

use crate::error::{Failure, FailureReason};
use crate::fault::error::{InstallError, Unfilled, failure_at, refusal};
use crate::fault::fill::{Buffers, Filled, fill, fill_zeroing, in_region};
use crate::fault::poison::fail;
use crate::metrics::FaultPart;
use crate::policy::OnFailure;
use crate::source::{Backing, gone, released};
use crate::space::Mapping;
use crate::space::page_table::Claim;
use pagestitch_kernel::{Errno, Span};
use std::thread;
use std::time::{Duration, Instant};

/// The failed attempts to fill a page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attempts {
    /// The number of times that the kernel had no memory for the page, or its budget no room.
    pub(crate) memory: usize,
    /// The pages that the budget had written back when it had no room last.
    pub(crate) written_back: u64,
    /// The number of times that its source has failed.
    pub(crate) source: u32,
}

/// The time to wait before the next attempt.
#[derive(Debug)]
pub(crate) enum Pause {
    /// The kernel may have memory then.
    Memory(Duration),
    /// The source is read again, as the policy of its chunk says. With its last failure.
    Source(Duration, Box<Failure>),
}

impl Pause {
    pub(crate) const fn length(&self) -> Duration {
        match self {
            Self::Memory(pause) | Self::Source(pause, _) => *pause,
        }
    }
}

/// The state of the first page of a claim, while attempts to fill it fail.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    pub(crate) attempts: Attempts,
    /// The failure for which the policy says that the page is filled with zeros.
    zeros: Option<Failure>,
}

impl Recovery {
    pub(crate) const fn after(attempts: Attempts) -> Self {
        Self { attempts, zeros: None }
    }

    /// Whether bytes that cannot be read are zeros.
    pub(crate) const fn gives_zeros(&self) -> bool {
        self.zeros.is_some()
    }

    /// Called when pages are installed.
    #[inline]
    pub(crate) fn installed(&mut self, region: &Mapping) {
        self.attempts = Attempts::default();
        if let Some(failure) = self.zeros.take() {
            region.counters.local().pages_zeroed_on_failure.add(1);
            log!(warn, region = region.name, %failure, "page filled with zeros, because its policy is OnFailure::Zeros");
        }
    }

    /// Continues with the claim's first page, as `wait` decides for a pause, or ends the journey. A
    /// page without another attempt is poisoned.
    #[cold]
    pub(crate) fn react(
        &mut self,
        region: &Mapping,
        claim: &mut Claim<'_>,
        error: InstallError,
        wait: impl FnOnce(&mut Claim<'_>, Pause, Attempts) -> Result<(), Unfilled>,
    ) -> Result<(), Unfilled> {
        match self.next(region, claim.span(), error) {
            Next::Now => Ok(()),
            Next::After(pause) => wait(claim, pause, self.attempts),
            Next::Changing => Err(Unfilled::Changing),
            Next::Fail(failure) => Err(fail(region, claim, failure)),
        }
    }

    /// The next step for the first page of a span.
    pub(crate) fn next(&mut self, region: &Mapping, span: Span, error: InstallError) -> Next {
        match error {
            InstallError::Changing => Next::Changing,
            InstallError::NoMemory => {
                let pause = SHORT_OF_MEMORY.get(self.attempts.memory);
                self.attempts.memory += 1;
                pause.map_or_else(
                    || Next::Fail(without_memory(region, span)),
                    |pause| Next::After(Pause::Memory(*pause)),
                )
            }
            InstallError::NoRoom => {
                let written_back =
                    region.residence.as_ref().map_or(0, |residence| residence.written_back_pages());
                // A write has succeeded since, and the room that it made went to another fault.
                if std::mem::replace(&mut self.attempts.written_back, written_back) != written_back {
                    self.attempts.memory = 0;
                }
                let pause = SHORT_OF_ROOM.get(self.attempts.memory);
                self.attempts.memory += 1;
                pause.map_or_else(
                    || Next::Fail(without_room(region, span)),
                    |pause| Next::After(Pause::Memory(*pause)),
                )
            }
            InstallError::Source(failure) => self.policy(region, span, *failure),
            // The caller fills the page alone.
            InstallError::Several(_) => Next::Now,
            InstallError::Gone => Next::Fail(lost(region, span)),
            InstallError::Refused(outcome) => {
                Next::Fail(failure_at(region, span, refusal(outcome)).of_kernel())
            }
        }
    }

    /// The pause before the unit that begins a span is read again as a whole, if the policy of its
    /// chunk is to retry. `None`: its pages are read one by one, because one of them may be bad. A
    /// source in blocks of its own reads a block for each of them.
    fn together(&mut self, region: &Mapping, span: Span) -> Option<Duration> {
        let chunk = region.layout.locate(region.page_size().offsets(span).start);
        let OnFailure::Retry(retry) = region.layout.on_failure(chunk) else { return None };
        if region.read_unit(span.first).pages == 1 {
            return None;
        }
        self.attempts.source += 1;
        let pause = retry.after(self.attempts.source, random(span));
        if pause.is_some() {
            region.counters.local().source_errors.add(1);
            region.counters.local().source_retries.add(1);
        } else {
            // Each page alone has all of its attempts.
            self.attempts.source = 0;
        }
        pause
    }

    /// Applies the failure policy of a chunk to a failed read.
    fn policy(&mut self, region: &Mapping, span: Span, failure: Failure) -> Next {
        self.attempts.source += 1;
        let failure = Failure { attempts: self.attempts.source, ..failure };
        match region.layout.on_failure(failure.chunk) {
            OnFailure::Retry(retry) => {
                let Some(pause) = retry.after(self.attempts.source, random(span)) else {
                    return Next::Fail(failure);
                };
                region.counters.local().source_retries.add(1);
                Next::After(Pause::Source(pause, Box::new(failure)))
            }
            OnFailure::Zeros => {
                self.zeros = Some(failure);
                Next::Now
            }
            OnFailure::Poison => Next::Fail(failure),
        }
    }
}

/// The next step for a page that is not installed.
pub(crate) enum Next {
    /// Fill it again: its bytes are zeros now, or it is read alone.
    Now,
    /// Fill it again after a pause.
    After(Pause),
    /// Read events first.
    Changing,
    /// Poison it.
    Fail(Failure),
}

/// The failure of a page that was discarded, and whose bytes are nowhere else.
fn lost(region: &Mapping, span: Span) -> Failure {
    let is_released = |backing: &Backing| matches!(backing, Backing::Memory(memory) if memory.is_released());
    let mut pieces = region.layout.pieces(region.page_size().offsets(span.prefix(1)));
    match pieces.find(|piece| is_released(piece.backing)) {
        Some(piece) => piece.failed(released()),
        None => failure_at(region, span, gone()).of_kernel(),
    }
}

/// The failure of a page for which the kernel had no memory at each attempt.
pub(crate) fn without_memory(region: &Mapping, span: Span) -> Failure {
    failure_at(region, span, Errno::ENOMEM.into()).of_kernel()
}

/// The failure of a page for which the budget had no room at each attempt.
fn without_room(region: &Mapping, span: Span) -> Failure {
    let what =
        "the budget is full of written pages that their sources do not take back: see the error of flush()";
    failure_at(region, span, FailureReason::NoRoom.error(what))
}

/// A number that differs between pages and between attempts.
fn random(span: Span) -> u64 {
    Instant::now().elapsed().as_nanos() as u64 ^ (span.first.0 as u64).wrapping_mul(GOLDEN)
}

/// The filler of a thread that reads sources into its buffers.
pub(crate) struct Sources<'a> {
    region: &'a Mapping,
    buffers: &'a mut Buffers,
    pub(crate) recovery: Recovery,
    /// The number of next pages that are read one by one, after a read of all of them has failed.
    one_by_one: usize,
}

impl<'a> Sources<'a> {
    pub(crate) const fn new(region: &'a Mapping, buffers: &'a mut Buffers, attempts: Attempts) -> Self {
        Self { region, buffers, recovery: Recovery::after(attempts), one_by_one: 0 }
    }

    /// Finds the bytes of the leading pages of a span.
    #[inline]
    pub(crate) fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        let began = self.region.counters.clock();
        let span = if self.one_by_one > 0 { span.prefix(1) } else { span };
        let filled = match self.recovery.gives_zeros() {
            false => fill(self.region, span, self.buffers),
            true => fill_zeroing(self.region, span.first, self.buffers).map_err(InstallError::from),
        };
        self.region.counters.record_time(FaultPart::Fill, began);
        filled.or_else(in_region)
    }

    #[inline]
    pub(crate) fn installed(&mut self, pages: usize) {
        self.one_by_one = self.one_by_one.saturating_sub(pages);
        self.recovery.installed(self.region);
    }

    /// The next step for the first pages of a span that are not filled.
    pub(crate) fn next(&mut self, span: Span, error: InstallError) -> Next {
        if let InstallError::Several(pages) = error {
            self.repeat(span, pages);
            return Next::Now;
        }
        self.recovery.next(self.region, span, error)
    }

    /// After a read of several pages at once has failed: has them read together again, after a
    /// pause, or one by one.
    #[cold]
    fn repeat(&mut self, span: Span, pages: usize) {
        match self.recovery.together(self.region, span) {
            Some(pause) => thread::sleep(pause),
            None => self.one_by_one = pages,
        }
    }

    /// [Reacts](Recovery::react) on a caller's thread, which sleeps through each pause.
    pub(crate) fn wait_or_fail(
        &mut self,
        claim: &mut Claim<'_>,
        error: InstallError,
    ) -> Result<(), Unfilled> {
        if let InstallError::Several(pages) = error {
            self.repeat(claim.span(), pages);
            return Ok(());
        }
        self.recovery.react(self.region, claim, error, |_, pause, _| {
            thread::sleep(pause.length());
            Ok(())
        })
    }
}

/// The pauses between attempts to install a page for which the kernel has no memory. After the last
/// one the page fails.
const SHORT_OF_MEMORY: [Duration; 3] =
    [Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(100)];
/// The pauses between attempts to find room in a budget whose written pages cannot go back. The source
/// of such pages has pauses of up to a second, so a few of them pass before the page fails.
const SHORT_OF_ROOM: [Duration; 6] = [
    Duration::from_millis(1),
    Duration::from_millis(10),
    Duration::from_millis(100),
    Duration::from_millis(1000),
    Duration::from_millis(1000),
    Duration::from_millis(1000),
];
/// Multiplier that spreads close numbers (2^64 divided by the golden ratio).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
