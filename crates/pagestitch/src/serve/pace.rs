//! How long the faults of a region take, and who reads them.
//!
//! Two workers that read from the same adopted memory wait for each other: what is installed must be what the page holds, so
//! nobody installs while events are read. Where sources are quick, one who does both is quicker than two; where they are
//! slow, whoever has read gives the next one its turn before it fills.

use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What a fault of the region has taken lately.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Nanoseconds: an average that forgets; 0 before the first.
    average: AtomicU64,
    /// [`FREE`], or the number of the turn that is taken, doubled, and 1 if somebody has called since: there is more to read.
    turn: AtomicU64,
    /// How many turns there were.
    turns: AtomicU64,
    /// When the worker that has the turn has taken it, or has read last, in nanoseconds. A worker that has lost its turn may store a time
    /// here, too, which leaves the turn to the other one a little longer.
    read: AtomicU64,
    /// Whether a worker looks at the region in a moment.
    look: AtomicBool,
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

    /// The turn to read, if nobody has it, or a worker that does not come back from a source; whoever has it looks once more then.
    pub(crate) fn turn(&self) -> Option<Reading<'_>> {
        let mine = (self.turns.fetch_add(1, Ordering::Relaxed) + 1) << 1;
        let now = nanoseconds(Instant::now());
        let (mut taken, mut late) = (false, false);
        let next = |state| {
            late = state != FREE && self.is_late(now);
            taken = state == FREE || late;
            Some(if taken { mine } else { state | CALLED })
        };
        let _ = self.turn.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        taken.then(|| {
            // Always a time: the worker may enter a source with the turn, whatever it does first.
            self.read.store(now, Ordering::Relaxed);
            Reading { pace: Some(self), held: Some(mine), late }
        })
    }

    /// Whether whoever has the turn has read so long ago that it may never come back. Where it does, it finds that out.
    fn is_late(&self, now: u64) -> bool {
        // A model goes the same way each time.
        !cfg!(shuttle) && now.saturating_sub(self.read.load(Ordering::Relaxed)) > LATE
    }

    /// Whether the region is to be looked at in a moment, and was not to be before.
    pub(crate) fn asks_for_look(&self) -> bool {
        !self.look.swap(true, Ordering::Relaxed)
    }

    /// Called before it is looked at.
    pub(crate) fn is_looked_at(&self) {
        self.look.store(false, Ordering::Relaxed);
    }
}

/// Since a moment before all others of this process.
fn nanoseconds(moment: Instant) -> u64 {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let since = moment.saturating_duration_since(*BEGAN.get_or_init(|| moment));
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The turn to read the faults of a region. It has to be [ended](Reading::ends), or is not there to be taken again.
#[derive(Debug)]
pub(crate) struct Reading<'p> {
    /// None where workers need not take turns.
    pace: Option<&'p Pace>,
    /// The value of the turn while this worker holds it and no other worker has called. None if this worker does not hold it.
    held: Option<u64>,
    /// It was taken from a late worker.
    late: bool,
}

impl Reading<'_> {
    /// Anybody's.
    pub(super) const fn free() -> Self {
        Self { pace: None, held: None, late: false }
    }

    /// Whether the worker may wait until events can be read. The late worker may be waiting for that already, and one is enough.
    pub(crate) const fn may_wait(&self) -> bool {
        !self.late
    }

    /// How many faults of a batch are not worth another worker.
    pub(crate) fn keeps(&self) -> usize {
        if self.held.is_some() { KEPT } else { 0 }
    }

    /// Called when a batch has been read: gives the turn on, where serving it takes long. True if another worker has called meanwhile:
    /// the turn is held still, and the caller must read again before it enters a source.
    pub(crate) fn has_read(&mut self, now: Instant) -> bool {
        let (Some(pace), Some(_)) = (self.pace, self.held) else { return false };
        if pace.is_quick() {
            pace.read.store(nanoseconds(now), Ordering::Relaxed);
            return false;
        }
        let called = self.lets_go() && self.again();
        if let (true, Some(mine)) = (called, self.held) {
            // Still to be answered: the turn does not end before.
            let _ = pace.turn.compare_exchange(mine, mine | CALLED, Ordering::AcqRel, Ordering::Acquire);
        }
        called
    }

    /// Called when a batch has been served. False: read again; `full` if there may be more.
    pub(crate) fn ends(&mut self, full: bool) -> bool {
        let Some(pace) = self.pace else { return !full };
        let Some(mine) = self.held else { return !full || !self.again() };
        let exchange = |from, to| pace.turn.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        if full {
            let kept = exchange(mine, mine).or_else(|_| exchange(mine | CALLED, mine)).is_ok();
            self.held = self.held.filter(|_| kept);
            return !kept;
        }
        if exchange(mine, FREE).is_ok() {
            self.held = None;
            return true;
        }
        // Somebody has called, or has taken the turn: that one reads then.
        let kept = exchange(mine | CALLED, mine).is_ok();
        self.held = self.held.filter(|_| kept);
        !kept
    }

    /// Gives the turn on though there may be more to read: whoever does so has the region looked at again.
    pub(crate) fn give_on(&mut self) {
        self.lets_go();
    }

    /// Ends the turn, if it is held still. Whether somebody has called.
    fn lets_go(&mut self) -> bool {
        let (Some(pace), Some(mine)) = (self.pace, self.held.take()) else { return false };
        let free = |state: u64| (state & !CALLED == mine).then_some(FREE);
        pace.turn.fetch_update(Ordering::AcqRel, Ordering::Acquire, free) == Ok(mine | CALLED)
    }

    /// Takes the turn once more, unless somebody else has it, who will look then.
    fn again(&mut self) -> bool {
        let turn = self.pace.and_then(Pace::turn);
        (self.held, self.late) = turn.map_or((None, false), |turn| (turn.held, turn.late));
        self.held.is_some()
    }
}

const FREE: u64 = 0;
/// Somebody else came: there is more to read.
const CALLED: u64 = 1;
/// A worker that has not come back since it has read so long ago may hang.
const LATE: u64 = TURN_MAX.as_nanos() as u64;
/// How long the turn is left to a worker that serves what it has read.
pub(crate) const TURN_MAX: Duration = Duration::from_millis(10);
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
        assert!(!turn.has_read(Instant::now()), "quick: it is kept");
        assert!(pace.turn().is_none());
        assert!(!turn.ends(false), "somebody has called");
        assert!(!turn.has_read(Instant::now()) && turn.ends(false));
        assert!(pace.turn().is_some());
    }

    /// A call between the reading and the giving on is answered by reading again, before anything slow is done.
    #[test]
    fn a_slow_one_gives_its_turn_on_and_forgets_no_call() {
        for pace in [pace(50_000_000), Pace::default()] {
            let mut turn = pace.turn().unwrap();
            assert!(!turn.has_read(Instant::now()));
            let mut other = pace.turn().expect("it was given on");
            assert!(turn.ends(false));
            assert!(pace.turn().is_none());
            assert!(other.has_read(Instant::now()), "called");
            assert!(!other.ends(false), "the call is still to be answered");
            assert!(!other.has_read(Instant::now()) && other.ends(false));
            assert!(pace.turn().is_some());
        }
    }

    #[test]
    fn a_full_batch_is_read_on_by_whoever_has_the_turn() {
        let pace = pace(50_000_000);
        let mut turn = pace.turn().unwrap();
        assert!(!turn.has_read(Instant::now()) && !turn.ends(true), "taken again");
        assert!(!turn.has_read(Instant::now()));
        let other = pace.turn().unwrap();
        assert!(turn.ends(true), "the other one reads, and was called");
        let mut other = other;
        assert!(other.has_read(Instant::now()));
    }

    #[test]
    fn a_turn_is_taken_from_a_worker_that_does_not_come_back() {
        let pace = pace(1_000);
        let mut hanging = pace.turn().unwrap();
        assert!(!hanging.has_read(Instant::now()), "quick: it is kept");
        assert!(pace.turn().is_none());
        let mut other = loop {
            match pace.turn() {
                Some(turn) => break turn,
                None => std::thread::yield_now(),
            }
        };
        assert!(pace.turn().is_none(), "it was taken just now");
        assert!(hanging.ends(false) && hanging.keeps() == 0, "it is another's");
        assert!(!other.has_read(Instant::now()) && !other.ends(false), "somebody has called");
        assert!(!other.has_read(Instant::now()) && other.ends(false));
        assert!(pace.turn().is_some());
    }

    /// The worker holds the turn while it reads again, and a source may hang in it all the same.
    #[test]
    fn a_turn_that_is_kept_for_a_call_is_taken_from_a_worker_that_does_not_come_back() {
        let pace = pace(50_000_000);
        let mut turn = pace.turn().unwrap();
        assert!(pace.turn().is_none());
        assert!(turn.has_read(Instant::now()), "called");
        std::thread::sleep(2 * TURN_MAX);
        assert!(pace.turn().is_some());
        assert!(turn.ends(false), "it is another's");
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
                    turn.has_read(Instant::now());
                    if turn.ends(false) {
                        return;
                    }
                }
            };
            for _ in 0..if cfg!(miri) { 3 } else { 2_000 } {
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
