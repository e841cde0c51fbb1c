//! How long the faults of a region take, and who reads them.
//!
//! Two workers that read from the same adopted memory wait for each other: what is installed must be what the page holds, so
//! nobody installs while events are read. Where sources are quick, one who does both is quicker than two; where they are
//! slow, whoever has read gives the next one its turn before it fills.

use pagestitch_kernel::sync::atomic::{AtomicU8, AtomicU64, Ordering};
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

    /// Whether a worker that serves it is back soon, for all that is known.
    pub(crate) fn is_quick(&self) -> bool {
        (1..=SLOW).contains(&self.average.load(Ordering::Relaxed))
    }

    /// The turn to read, if nobody has it; whoever has it looks once more then.
    pub(crate) fn turn(&self) -> Option<Reading<'_>> {
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
        if pace.is_quick() || !self.held {
            return false;
        }
        self.held = false;
        let called = pace.turn.swap(FREE, Ordering::AcqRel) == CALLED && self.again();
        if called {
            // Still to be answered: the turn does not end before.
            pace.turn.store(CALLED, Ordering::Release);
        }
        called
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

    /// Gives the turn on though there may be more to read: whoever does so has the region looked at again.
    pub(crate) fn give_on(&mut self) {
        if let (Some(pace), true) = (self.pace, self.held) {
            self.held = false;
            pace.turn.store(FREE, Ordering::Release);
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn pace(ns: u64) -> Pace {
        let pace = Pace::default();
        pace.took(ns);
        pace
    }

    #[test]
    fn one_reads_and_whoever_calls_has_it_read_again() {
        let pace = pace(1_000);
        let mut turn = pace.turn().unwrap();
        assert!(!turn.has_read(), "quick: it is kept");
        assert!(pace.turn().is_none());
        assert!(!turn.ends(false), "somebody has called");
        assert!(!turn.has_read() && turn.ends(false));
        assert!(pace.turn().is_some());
    }

    /// A call between the reading and the giving on is answered by reading again, before anything slow is done.
    #[test]
    fn a_slow_one_gives_its_turn_on_and_forgets_no_call() {
        for pace in [pace(50_000_000), Pace::default()] {
            let mut turn = pace.turn().unwrap();
            assert!(!turn.has_read());
            let mut other = pace.turn().expect("it was given on");
            assert!(turn.ends(false));
            assert!(pace.turn().is_none());
            assert!(other.has_read(), "called");
            assert!(!other.ends(false), "the call is still to be answered");
            assert!(!other.has_read() && other.ends(false));
            assert!(pace.turn().is_some());
        }
    }

    #[test]
    fn a_full_batch_is_read_on_by_whoever_has_the_turn() {
        let pace = pace(50_000_000);
        let mut turn = pace.turn().unwrap();
        assert!(!turn.has_read() && !turn.ends(true), "taken again");
        assert!(!turn.has_read());
        let other = pace.turn().unwrap();
        assert!(turn.ends(true), "the other one reads, and was called");
        let mut other = other;
        assert!(other.has_read());
    }

    /// Every event that anybody was woken for is read, whoever reads: threads at random, as workers do it.
    #[test]
    fn no_event_is_left_unread() {
        for ns in [1_000, 50_000_000] {
            let (pace, events, read) = (pace(ns), AtomicU64::new(0), AtomicU64::new(0));
            let work = || {
                let Some(mut turn) = pace.turn() else { return };
                loop {
                    read.fetch_max(events.load(Ordering::SeqCst), Ordering::SeqCst);
                    turn.has_read();
                    if turn.ends(false) {
                        return;
                    }
                }
            };
            for _ in 0..if cfg!(miri) { 10 } else { 2_000 } {
                std::thread::scope(|scope| {
                    for _ in 0..3 {
                        scope.spawn(|| {
                            events.fetch_add(1, Ordering::SeqCst);
                            work();
                        });
                    }
                });
                assert_eq!(read.load(Ordering::SeqCst), events.load(Ordering::SeqCst));
            }
        }
    }
}
