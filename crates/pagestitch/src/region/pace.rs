//! How long the faults of a region take, and who reads them.
//!
//! Two workers that read from the same adopted memory wait for each other: what is installed must be what the page holds, so
//! nobody installs while events are read. Where sources are quick, one who does both is quicker than two; where they are
//! slow, whoever has read gives the next one its turn before it fills.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What a fault of the region has taken lately.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Nanoseconds: an average that forgets; 0 before the first.
    average: AtomicU64,
    turn: AtomicU8,
}

impl Pace {
    /// Takes note of a fault.
    pub(crate) fn took(&self, ns: u64) {
        let before = self.average.load(Ordering::Relaxed);
        let after = if before == 0 { ns.max(1) } else { before - before / 8 + ns / 8 };
        // Of two at once, one is enough.
        self.average.store(after, Ordering::Relaxed);
    }

    /// Whether a worker that serves it is away for long.
    pub(crate) fn is_slow(&self) -> bool {
        self.average.load(Ordering::Relaxed) > SLOW
    }

    /// The turn to read, if nobody has it; whoever has it looks once more then.
    pub(super) fn turn(&self) -> Option<Reading<'_>> {
        let next = |state| Some(if state == FREE { TAKEN } else { CALLED });
        let before = self.turn.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        (before == Ok(FREE)).then_some(Reading { pace: Some(self), held: true })
    }
}

/// The turn to read the faults of a region. It has to be [ended](Reading::ends), or is not there to be taken again.
#[derive(Debug)]
pub(crate) struct Reading<'p> {
    /// None where workers need not take turns.
    pace: Option<&'p Pace>,
    held: bool,
}

impl Reading<'_> {
    /// Anybody's.
    pub(super) const fn free() -> Self {
        Self { pace: None, held: false }
    }

    /// How many faults of a batch are not worth another worker.
    pub(crate) fn keeps(&self) -> usize {
        if self.held { KEPT } else { 0 }
    }

    /// Called when a batch has been read: gives the turn on, where serving it takes long. True if somebody has called meanwhile,
    /// so that there is to be read again first.
    pub(crate) fn has_read(&mut self) -> bool {
        let Some(pace) = self.pace else { return false };
        let quick = pace.average.load(Ordering::Relaxed) > 0 && !pace.is_slow();
        if quick || !self.held {
            return false;
        }
        self.held = false;
        pace.turn.swap(FREE, Ordering::AcqRel) == CALLED && self.again()
    }

    /// Called when a batch has been served. False: read again; `full` if there may be more.
    pub(crate) fn ends(&mut self, full: bool) -> bool {
        let Some(pace) = self.pace else { return !full };
        match self.held {
            true if !full
                && pace.turn.compare_exchange(TAKEN, FREE, Ordering::AcqRel, Ordering::Acquire).is_ok() =>
            {
                true
            }
            true => {
                pace.turn.store(TAKEN, Ordering::Release);
                false
            }
            false => !full || !self.again(),
        }
    }

    /// Takes the turn once more, unless somebody else has it, who will look then.
    fn again(&mut self) -> bool {
        self.held = self.pace.and_then(Pace::turn).is_some();
        self.held
    }
}

const FREE: u8 = 0;
const TAKEN: u8 = 1;
/// Somebody else came: there is more to read.
const CALLED: u8 = 2;
/// Past it, a worker is better not held up by a region.
const SLOW: u64 = Duration::from_millis(1).as_nanos() as u64;
/// As many are served in the time that it takes to wake another worker.
const KEPT: usize = 8;
