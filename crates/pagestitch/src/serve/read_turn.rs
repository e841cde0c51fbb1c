//! The turn to read the events of foreign memory: one worker reads at a time.
//!
//! An installed page must hold the bytes that its owner expects, so no worker installs a page while
//! another worker reads events, and workers that read the same memory wait for each other. With a
//! fast source, one worker that reads and fills is faster than two. With a slow source, the worker
//! that has read ends its turn before it fills.
//!
//! While the region is fast, an event that wakes another worker is a wake in vain. So that worker's
//! post stops watching the region, until a timed task looks at the region [`TURN_MAX`] later, or a
//! worker begins work that may take long. A worker that hangs holds up the region for no longer.
//!
//! No event stays unread, though a worker that finds the turn taken goes away:
//!
//! ```text
//!   worker A:  acquire ─▶ read a batch ───────▶ fill ──▶ release: contended, so read again ──▶ release: free
//!   worker B:                 acquire: taken, so mark the turn contended, and serve other regions
//! ```

use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The turn of a region, which one worker at a time can acquire.
#[derive(Debug, Default)]
pub(crate) struct TurnLock {
    /// [`FREE`], or twice the number of the turn that is taken, plus [`CONTENDED`] if another
    /// worker has tried to acquire it since: then there is more to read.
    state: AtomicU64,
    /// The number of turns so far.
    turns: AtomicU64,
    /// The time, in nanoseconds, at which the worker that holds the turn acquired it or last read.
    /// A worker that has lost its turn may store a time here too, which leaves the turn to the
    /// other worker a little longer.
    last_read: AtomicU64,
    /// True if a timed task will look at the region in a moment.
    look_pending: AtomicBool,
    /// A bit for each post that does not watch the region, until the next look.
    unwatched: AtomicU64,
}

impl TurnLock {
    /// Acquires the turn if it is free, or if the worker that holds it is late and may never return
    /// from a source. Otherwise `None`, and the worker that holds the turn reads once more.
    pub(crate) fn try_acquire(&self) -> Option<ReadTurn<'_>> {
        let mine = (self.turns.fetch_add(1, Ordering::Relaxed) + 1) << 1;
        let now = nanoseconds(Instant::now());
        let (mut taken, mut late) = (false, false);
        let next = |state| {
            late = state != FREE && self.is_late(now);
            taken = state == FREE || late;
            Some(if taken { mine } else { state | CONTENDED })
        };
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        taken.then(|| {
            // Each turn starts with a time, because the worker may enter a source with the turn.
            self.last_read.store(now, Ordering::Relaxed);
            ReadTurn { lock: Some(self), in_shard: false, held: Some(mine), late }
        })
    }

    /// True if the worker that holds the turn read so long ago that it may never return. If it does
    /// return, it finds that it has lost the turn.
    fn is_late(&self, now: u64) -> bool {
        // A model must not depend on the clock: each of its runs has to take the same path.
        !cfg!(shuttle) && now.saturating_sub(self.last_read.load(Ordering::Relaxed)) > LATE
    }

    /// Requests a look at the region in a moment. True if no such request was pending.
    pub(crate) fn request_look(&self) -> bool {
        !self.look_pending.swap(true, Ordering::SeqCst)
    }

    /// Called before a worker looks at the region: ends the request.
    pub(crate) fn look_begins(&self) {
        self.look_pending.store(false, Ordering::SeqCst);
    }

    /// Lets a post of `posts` stop watching the region. The caller has to request a look afterwards.
    /// False if no other post watches it, or the post does not watch it already.
    pub(super) fn try_unwatch(&self, post: usize, posts: usize) -> bool {
        let Some(bit) = bit_of(post) else { return false };
        let all = bit_of(posts).map_or(u64::MAX, |beyond| beyond - 1);
        let unwatch = |posts| Some(posts | bit).filter(|&after| posts & bit == 0 && after != all);
        self.unwatched.fetch_update(Ordering::SeqCst, Ordering::SeqCst, unwatch).is_ok()
    }

    /// The posts that do not watch the region.
    pub(super) fn unwatched(&self) -> impl Iterator<Item = usize> + use<> {
        let posts = self.unwatched.load(Ordering::SeqCst);
        (0..u64::BITS as usize).filter(move |post| posts >> post & 1 == 1)
    }

    /// Called when a post watches the region again.
    pub(super) fn watched_again(&self, post: usize) {
        self.unwatched.fetch_and(!bit_of(post).unwrap_or(0), Ordering::SeqCst);
    }
}

/// The bit of a post in a word. `None` if the word has no bit for it.
fn bit_of(post: usize) -> Option<u64> {
    1u64.checked_shl(u32::try_from(post).ok()?)
}

/// Nanoseconds from the first call in this process to `moment`.
fn nanoseconds(moment: Instant) -> u64 {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let since = moment.saturating_duration_since(*BEGAN.get_or_init(|| moment));
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The turn to read the events of a region. The worker has to [release](ReadTurn::try_release) it,
/// because otherwise other workers can acquire it only when it is late.
#[derive(Debug)]
pub(crate) struct ReadTurn<'l> {
    /// `None` for an owned region, of which any number of workers read at the same time.
    lock: Option<&'l TurnLock>,
    /// True if the worker keeps faults of a shard, whose other readers have shards of their own.
    in_shard: bool,
    /// The uncontended state of the lock while this worker holds it. `None` if it does not.
    held: Option<u64>,
    /// True if the turn was taken from a late worker.
    late: bool,
}

impl ReadTurn<'_> {
    /// The turn of an owned region, which every worker has at the same time. `in_shard`: the region has
    /// several shards, and its faults are fast.
    pub(super) const fn shared(in_shard: bool) -> Self {
        Self { lock: None, in_shard, held: None, late: false }
    }

    /// True if the worker may wait until events can be read. After a late worker it may not,
    /// because that worker may be waiting already, and one waiting worker is enough.
    pub(crate) const fn may_wait(&self) -> bool {
        !self.late
    }

    /// The number of faults of a batch that this worker keeps, because waking another worker takes
    /// longer.
    pub(crate) fn local_share(&self) -> usize {
        if self.is_held() || self.in_shard { KEPT } else { 0 }
    }

    /// True if this worker holds the turn of foreign memory.
    pub(crate) const fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Called when a batch has been read. Releases the turn if the region is not `fast`, because
    /// serving the batch then takes long. True if the turn was contended: this worker has acquired
    /// it again, and must read again before it enters a source.
    pub(crate) fn after_read(&mut self, now: Instant, fast: bool) -> bool {
        let (Some(lock), Some(_)) = (self.lock, self.held) else { return false };
        if fast {
            lock.last_read.store(nanoseconds(now), Ordering::Relaxed);
            return false;
        }
        let contended = self.release() && self.reacquire();
        if let (true, Some(mine)) = (contended, self.held) {
            // The turn stays contended until this worker has read again.
            let _ = lock.state.compare_exchange(mine, mine | CONTENDED, Ordering::AcqRel, Ordering::Acquire);
        }
        contended
    }

    /// Called when a batch has been served; `full` if there may be more to read. False if this
    /// worker must read again.
    pub(crate) fn try_release(&mut self, full: bool) -> bool {
        let Some(lock) = self.lock else { return !full };
        let Some(mine) = self.held else { return !full || !self.reacquire() };
        let exchange = |from, to| lock.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        if full {
            let kept = exchange(mine, mine).or_else(|_| exchange(mine | CONTENDED, mine)).is_ok();
            self.held = self.held.filter(|_| kept);
            return !kept;
        }
        if exchange(mine, FREE).is_ok() {
            self.held = None;
            return true;
        }
        // The turn is contended, or another worker has taken it. In the second case that worker
        // reads.
        let kept = exchange(mine | CONTENDED, mine).is_ok();
        self.held = self.held.filter(|_| kept);
        !kept
    }

    /// Releases the turn though there may be more to read: the caller has to request another look
    /// at the region.
    pub(crate) fn release_unread(&mut self) {
        self.release();
    }

    /// Releases the turn, if this worker still holds it. True if the turn was contended.
    fn release(&mut self) -> bool {
        let (Some(lock), Some(mine)) = (self.lock, self.held.take()) else { return false };
        let free = |state: u64| (state & !CONTENDED == mine).then_some(FREE);
        lock.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, free) == Ok(mine | CONTENDED)
    }

    /// Acquires the turn once more. False if another worker holds it: that worker then reads once
    /// more.
    fn reacquire(&mut self) -> bool {
        let turn = self.lock.and_then(TurnLock::try_acquire);
        (self.held, self.late) = turn.map_or((None, false), |turn| (turn.held, turn.late));
        self.held.is_some()
    }
}

const FREE: u64 = 0;
/// Another worker has tried to acquire the turn: there is more to read.
const CONTENDED: u64 = 1;
/// A worker whose last read is longer ago may hang.
const LATE: u64 = TURN_MAX.as_nanos() as u64;
/// The time that a worker has to serve a batch before another worker may take its turn.
pub(crate) const TURN_MAX: Duration = Duration::from_millis(10);
/// The number of faults that a worker serves in the time that waking another worker takes.
const KEPT: usize = 8;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    /// Reads, as a worker does: `fast` as the region is.
    fn reads(turn: &mut ReadTurn<'_>, fast: bool) -> bool {
        turn.after_read(Instant::now(), fast)
    }

    #[test]
    fn the_holder_of_a_contended_turn_reads_again() {
        let lock = TurnLock::default();
        let mut turn = lock.try_acquire().unwrap();
        assert!(!reads(&mut turn, true), "fast: the turn is kept");
        assert!(lock.try_acquire().is_none());
        assert!(!turn.try_release(false), "contended");
        assert!(!reads(&mut turn, true) && turn.try_release(false));
        assert!(lock.try_acquire().is_some());
    }

    /// A worker that meets the turn between a read and its release is answered by another read,
    /// before the holder enters a slow source.
    #[test]
    fn a_worker_of_a_slow_region_releases_its_turn_before_it_fills() {
        let lock = TurnLock::default();
        let mut turn = lock.try_acquire().unwrap();
        assert!(!reads(&mut turn, false));
        let mut other = lock.try_acquire().expect("it was released");
        assert!(turn.try_release(false));
        assert!(lock.try_acquire().is_none());
        assert!(reads(&mut other, false), "contended");
        assert!(!other.try_release(false), "contended still, until it has read again");
        assert!(!reads(&mut other, false) && other.try_release(false));
        assert!(lock.try_acquire().is_some());
    }

    #[test]
    fn the_last_post_that_watches_a_region_goes_on_watching() {
        for posts in [1, 2, 3, 63, 64, 100] {
            let lock = TurnLock::default();
            let unwatched = (0..posts).filter(|&post| lock.try_unwatch(post, posts)).count();
            assert_eq!(unwatched, posts.min(64) - 1, "{posts} posts");
            assert_eq!(lock.unwatched().count(), unwatched);
            assert!(!lock.try_unwatch(0, posts), "it does not watch already");
            lock.unwatched().for_each(|post| lock.watched_again(post));
            assert_eq!(lock.unwatched().count(), 0);
        }
    }

    #[test]
    fn the_holder_of_the_turn_reads_on_after_a_full_batch() {
        let lock = TurnLock::default();
        let mut turn = lock.try_acquire().unwrap();
        assert!(!reads(&mut turn, false) && !turn.try_release(true), "acquired again");
        assert!(!reads(&mut turn, false));
        let mut other = lock.try_acquire().unwrap();
        assert!(turn.try_release(true), "the other worker reads, and its turn is contended");
        assert!(reads(&mut other, false));
    }

    #[test]
    fn a_turn_is_taken_from_a_worker_that_hangs() {
        let lock = TurnLock::default();
        let mut hanging = lock.try_acquire().unwrap();
        assert!(!reads(&mut hanging, true), "fast: the turn is kept");
        assert!(lock.try_acquire().is_none());
        let mut other = loop {
            match lock.try_acquire() {
                Some(turn) => break turn,
                None => std::thread::yield_now(),
            }
        };
        assert!(lock.try_acquire().is_none(), "it was taken just now");
        assert!(hanging.try_release(false) && hanging.local_share() == 0, "another worker holds it");
        assert!(!reads(&mut other, true) && !other.try_release(false), "contended");
        assert!(!reads(&mut other, true) && other.try_release(false));
        assert!(lock.try_acquire().is_some());
    }

    /// The worker holds the turn while it reads again, and a source may hang in it all the same.
    #[test]
    fn a_contended_turn_is_taken_from_a_worker_that_hangs() {
        let lock = TurnLock::default();
        let mut turn = lock.try_acquire().unwrap();
        assert!(lock.try_acquire().is_none());
        assert!(reads(&mut turn, false), "contended");
        // The longest time of a turn is the subject, so a clock measures it.
        std::thread::sleep(2 * TURN_MAX);
        assert!(lock.try_acquire().is_some());
        assert!(turn.try_release(false), "another worker holds it");
    }

    /// Some worker reads every event that has woken a worker: threads in a random order.
    #[test]
    fn no_event_is_left_unread() {
        for fast in [true, false] {
            let (lock, events, read) = (TurnLock::default(), AtomicU64::new(0), AtomicU64::new(0));
            let work = || {
                let Some(mut turn) = lock.try_acquire() else { return };
                loop {
                    read.fetch_max(events.load(Ordering::SeqCst), Ordering::SeqCst);
                    reads(&mut turn, fast);
                    if turn.try_release(false) {
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
