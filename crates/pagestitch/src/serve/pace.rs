//! How long the faults of a region take, and which worker reads them.
//!
//! Workers that read events of the same adopted memory wait for each other: an installed page must
//! hold the bytes that its owner expects, so no worker installs while another reads events. With
//! fast sources, one worker that reads and fills is faster than two. With slow sources, the worker
//! that has read passes the turn on before it fills.

use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The recent duration of the region's faults, and the turn to read them.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// A moving average in nanoseconds; 0 before the first fault.
    average: AtomicU64,
    /// [`FREE`], or twice the number of the turn that is taken, plus 1 if another worker has called
    /// since: then there is more to read.
    turn: AtomicU64,
    /// The number of turns so far.
    turns: AtomicU64,
    /// The time, in nanoseconds, at which the worker that holds the turn took it or last read. A
    /// worker that has lost its turn may store a time here too, which leaves the turn to the other
    /// worker a little longer.
    read: AtomicU64,
    /// True if a worker will look at the region in a moment.
    look: AtomicBool,
}

impl Pace {
    /// Adds the duration of a fault to the average.
    pub(crate) fn took(&self, ns: u64) {
        let before = self.average.load(Ordering::Relaxed);
        let after = if before == 0 { ns.max(1) } else { before - before / 8 + ns / 8 };
        // Two stores at once may lose one: the average stays good enough.
        self.average.store(after, Ordering::Relaxed);
    }

    /// True if the average says that a worker which serves a fault is soon free again. False before
    /// the first fault.
    pub(crate) fn is_quick(&self) -> bool {
        (1..=SLOW).contains(&self.average.load(Ordering::Relaxed))
    }

    /// The turn to read, if it is free, or if the worker that holds it is late and may never return
    /// from a source. Otherwise `None`, and the worker that holds the turn reads once more.
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
            // Each turn starts with a time, because the worker may enter a source with the turn.
            self.read.store(now, Ordering::Relaxed);
            Reading { pace: Some(self), held: Some(mine), late }
        })
    }

    /// True if the worker that holds the turn read so long ago that it may never return. If it does
    /// return, it finds that it has lost the turn.
    fn is_late(&self, now: u64) -> bool {
        // A model must not depend on the clock: each of its runs has to take the same path.
        !cfg!(shuttle) && now.saturating_sub(self.read.load(Ordering::Relaxed)) > LATE
    }

    /// Requests a look at the region in a moment. True if no such request was pending.
    pub(crate) fn asks_for_look(&self) -> bool {
        !self.look.swap(true, Ordering::Relaxed)
    }

    /// Called before a worker looks at the region: ends the request.
    pub(crate) fn is_looked_at(&self) {
        self.look.store(false, Ordering::Relaxed);
    }
}

/// Nanoseconds from the first call in this process to `moment`.
fn nanoseconds(moment: Instant) -> u64 {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let since = moment.saturating_duration_since(*BEGAN.get_or_init(|| moment));
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The turn to read the faults of a region. The worker has to [end](Reading::ends) it, or no other
/// worker can take it.
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
    /// A turn that every worker has at the same time.
    pub(super) const fn free() -> Self {
        Self { pace: None, held: None, late: false }
    }

    /// Whether the worker may wait until events can be read. The late worker may be waiting for that already, and one is enough.
    pub(crate) const fn may_wait(&self) -> bool {
        !self.late
    }

    /// The number of faults of a batch that this worker keeps, because waking another worker takes
    /// longer.
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
            // The call is not answered yet: the turn does not end before it is.
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
        // Another worker has called, or has taken the turn. In the second case that worker reads.
        let kept = exchange(mine | CALLED, mine).is_ok();
        self.held = self.held.filter(|_| kept);
        !kept
    }

    /// Passes the turn on though there may be more to read: the caller has to request another look
    /// at the region.
    pub(crate) fn give_on(&mut self) {
        self.lets_go();
    }

    /// Ends the turn, if this worker still holds it. True if another worker has called meanwhile.
    fn lets_go(&mut self) -> bool {
        let (Some(pace), Some(mine)) = (self.pace, self.held.take()) else { return false };
        let free = |state: u64| (state & !CALLED == mine).then_some(FREE);
        pace.turn.fetch_update(Ordering::AcqRel, Ordering::Acquire, free) == Ok(mine | CALLED)
    }

    /// Takes the turn once more. False if another worker holds it: that worker then reads once
    /// more.
    fn again(&mut self) -> bool {
        let turn = self.pace.and_then(Pace::turn);
        (self.held, self.late) = turn.map_or((None, false), |turn| (turn.held, turn.late));
        self.held.is_some()
    }
}

const FREE: u64 = 0;
/// Another worker has called: there is more to read.
const CALLED: u64 = 1;
/// A worker whose last read is longer ago may hang.
const LATE: u64 = TURN_MAX.as_nanos() as u64;
/// The time that a worker has to serve a batch before another worker may take its turn.
pub(crate) const TURN_MAX: Duration = Duration::from_millis(10);
/// A longer average makes a region slow: its faults may occupy only some of the workers.
const SLOW: u64 = Duration::from_millis(1).as_nanos() as u64;
/// The number of faults that a worker serves in the time that waking another worker takes.
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
    fn a_call_during_a_turn_makes_its_holder_read_again() {
        let pace = pace(1_000);
        let mut turn = pace.turn().unwrap();
        assert!(!turn.has_read(Instant::now()), "quick: it is kept");
        assert!(pace.turn().is_none());
        assert!(!turn.ends(false), "another worker has called");
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
    fn a_full_batch_is_read_on_by_the_holder_of_the_turn() {
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
        assert!(!other.has_read(Instant::now()) && !other.ends(false), "another worker has called");
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

    /// Every event that has woken a worker is read, by whichever worker: threads at random, as
    /// workers do it.
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
