//! The crew: which workers there are, which of them get on, and which posts have none that does.
//!
//! A post is an epoll that workers wait in; each region is watched at each post. A worker that a source holds up is no loss to its
//! post: the watchdog starts another worker there, which takes over what is ready. A worker counts its steps in a cache line of its
//! own; the watchdog compares.

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// All workers of a pool, or of several [`Manual`](crate::Manual)s.
#[derive(Debug)]
pub(super) struct WorkerTable {
    slots: Box<[Slot]>,
    posts: usize,
    working: AtomicUsize,
    /// One joins or leaves at a time.
    change: Mutex<()>,
    /// The watchdog waits to be [called](Self::wake_watchdog).
    watchdog_sleeps: AtomicBool,
    pub(super) watchdog_fd: EventFd,
    /// No further worker may be started, and all but one are held up.
    pub(super) last_resort: AtomicBool,
    pub(super) held_up: AtomicUsize,
    pub(super) replacements: AtomicU64,
    pub(super) shortages: AtomicU64,
}

/// A worker, if there is one. Apart from others, so that to count costs no other processor anything.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Slot {
    /// [`VACANT`], or how many steps the worker has done: odd at work, even while it waits.
    steps: AtomicU64,
    post: AtomicUsize,
}

/// What the watchdog remembers of the worker at a slot.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SeenWorker {
    steps: u64,
    /// For how long it has been in the same step of its work.
    still: Duration,
}

/// What the watchdog sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Observation {
    /// Workers that are held up.
    pub(super) held_up: usize,
    /// Workers that wait for something to do.
    pub(super) waiting: usize,
    /// Whether anything was done since the last look, or is being done.
    pub(super) busy: bool,
}

impl WorkerTable {
    /// For so many posts, and `most` workers.
    pub(super) fn new(posts: usize, most: usize) -> Result<Self, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            slots: (0..most.min(MOST).max(posts)).map(|_| Slot::default()).collect(),
            posts,
            working: AtomicUsize::new(0),
            change: Mutex::default(),
            watchdog_sleeps: AtomicBool::new(false),
            watchdog_fd: EventFd::from_flags(flags)?,
            last_resort: AtomicBool::new(false),
            held_up: AtomicUsize::new(0),
            replacements: AtomicU64::new(0),
            shortages: AtomicU64::new(0),
        })
    }

    /// How many workers there are, also those that are held up.
    pub(super) fn working(&self) -> usize {
        self.working.load(Ordering::Relaxed)
    }

    /// How many there may be.
    pub(super) fn most(&self) -> usize {
        self.slots.len()
    }

    /// One more worker at a post; `None` where there are as many as there may be.
    pub(super) fn add(&self, post: usize) -> Option<usize> {
        let _one = self.change.lock();
        let slot = self.slots.iter().position(|slot| slot.steps.load(Ordering::Relaxed) == VACANT)?;
        self.slots[slot].post.store(post, Ordering::Relaxed);
        self.slots[slot].steps.store(FIRST, Ordering::SeqCst);
        self.working.fetch_add(1, Ordering::Relaxed);
        Some(slot)
    }

    /// A worker that has just looked for work leaves, if another one waits at its post. False if it is to stay.
    pub(super) fn try_remove(&self, slot: usize) -> bool {
        let _one = self.change.lock();
        let post = self.slots[slot].post.load(Ordering::Relaxed);
        let other = |(index, other): (usize, &Slot)| {
            let steps = other.steps.load(Ordering::SeqCst);
            index != slot
                && other.post.load(Ordering::Relaxed) == post
                && steps != VACANT
                && steps.is_multiple_of(2)
        };
        let others = self.slots.iter().enumerate().any(other);
        if others {
            self.remove(slot);
        }
        others
    }

    /// A worker could not be started after all.
    pub(super) fn cancel(&self, slot: usize) {
        let _one = self.change.lock();
        self.remove(slot);
    }

    fn remove(&self, slot: usize) {
        self.slots[slot].steps.store(VACANT, Ordering::SeqCst);
        self.working.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether there are more workers than posts: one that finds nothing to do for a while is to [leave](Self::try_remove).
    pub(super) fn has_replacements(&self) -> bool {
        self.working() > self.posts
    }

    /// The worker waits from now on.
    pub(super) fn mark_waiting(&self, slot: usize) {
        self.slots[slot].steps.fetch_add(1, Ordering::SeqCst);
    }

    /// The worker is at work from now on; the watchdog looks.
    pub(super) fn mark_working(&self, slot: usize) {
        self.slots[slot].steps.fetch_add(1, Ordering::SeqCst);
        // Either this is seen, or the watchdog sees the step: it looks once more before it dozes.
        if self.watchdog_sleeps.load(Ordering::SeqCst) {
            self.wake_watchdog();
        }
    }

    /// The worker gets on.
    pub(super) fn step(&self, slot: usize) {
        let steps = &self.slots[slot].steps;
        // No other thread writes it.
        steps.store(steps.load(Ordering::Relaxed).wrapping_add(2), Ordering::Relaxed);
    }

    #[cold]
    fn wake_watchdog(&self) {
        if self.watchdog_sleeps.swap(false, Ordering::SeqCst) {
            let _ = self.watchdog_fd.write(1);
        }
    }

    /// The watchdog looks no more until it is called. False if a worker is at work.
    pub(super) fn try_sleep(&self) -> bool {
        self.watchdog_sleeps.store(true, Ordering::SeqCst);
        let at_work = |slot: &Slot| !slot.steps.load(Ordering::SeqCst).is_multiple_of(2);
        if self.slots.iter().any(at_work) {
            self.watchdog_sleeps.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub(super) fn watchdog_is_asleep(&self) -> bool {
        self.watchdog_sleeps.load(Ordering::SeqCst)
    }

    /// Looks at all workers, `passed` after the last look.
    pub(super) fn observe(&self, seen: &mut Vec<SeenWorker>, passed: Duration) -> Observation {
        seen.resize(self.slots.len(), SeenWorker::default());
        let mut look = Observation { held_up: 0, waiting: 0, busy: false };
        for (slot, seen) in self.slots.iter().zip(seen) {
            let steps = slot.steps.load(Ordering::SeqCst);
            let at_work = !steps.is_multiple_of(2);
            look.busy |= at_work || steps != seen.steps;
            let still = if at_work && steps == seen.steps { seen.still + passed } else { Duration::ZERO };
            *seen = SeenWorker { steps, still };
            look.held_up += usize::from(seen.is_held_up());
            look.waiting += usize::from(steps != VACANT && !at_work);
        }
        self.held_up.store(look.held_up, Ordering::Relaxed);
        look
    }

    /// The posts at which no worker gets on.
    pub(super) fn abandoned<'a>(&'a self, seen: &'a [SeenWorker]) -> impl Iterator<Item = usize> + 'a {
        let gets_on = move |post: usize| {
            self.slots.iter().zip(seen).any(|(slot, seen)| {
                slot.post.load(Ordering::Relaxed) == post && seen.steps != VACANT && !seen.is_held_up()
            })
        };
        (0..self.posts).filter(move |&post| !gets_on(post))
    }
}

impl SeenWorker {
    /// Whether a source holds the worker up, or other code that is not ours.
    fn is_held_up(self) -> bool {
        self.still >= HELD_UP_AFTER
    }
}

const VACANT: u64 = 0;
/// The step count of a worker that joins. It is even, so the worker waits.
const FIRST: u64 = 2;
/// A worker in the same step for so long is replaced.
pub(super) const HELD_UP_AFTER: Duration = Duration::from_millis(10);
/// Workers that a pool may have by default.
pub(super) const MOST_BY_DEFAULT: usize = 64;
/// And at all.
const MOST: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_post_is_abandoned_when_its_worker_is_held_up() {
        let (workers, mut seen) = (WorkerTable::new(2, 3).unwrap(), Vec::new());
        let [first, second] = [0, 1].map(|post| workers.add(post).unwrap());
        workers.mark_working(first);
        workers.mark_working(second);
        assert_eq!(
            workers.observe(&mut seen, HELD_UP_AFTER),
            Observation { held_up: 0, waiting: 0, busy: true }
        );
        workers.step(second);
        assert_eq!(
            workers.observe(&mut seen, HELD_UP_AFTER),
            Observation { held_up: 1, waiting: 0, busy: true }
        );
        assert_eq!(workers.abandoned(&seen).collect::<Vec<_>>(), [0]);
        let third = workers.add(0).unwrap();
        assert_eq!((workers.add(0), workers.working(), workers.has_replacements()), (None, 3, true));
        workers.mark_waiting(second);
        assert_eq!(
            workers.observe(&mut seen, HELD_UP_AFTER),
            Observation { held_up: 1, waiting: 2, busy: true }
        );
        assert_eq!(workers.abandoned(&seen).count(), 0);
        workers.mark_working(third);
        assert!(!workers.try_remove(third), "no other worker waits at the post");
        workers.mark_waiting(first);
        assert!(workers.try_remove(third) && !workers.has_replacements());
    }

    #[test]
    fn the_watchdog_dozes_while_no_worker_works_and_is_called_once() {
        let (workers, mut seen) = (WorkerTable::new(1, 1).unwrap(), Vec::new());
        let slot = workers.add(0).unwrap();
        assert!(workers.observe(&mut seen, HELD_UP_AFTER).busy, "it is new");
        assert!(!workers.observe(&mut seen, HELD_UP_AFTER).busy);
        assert!(workers.try_sleep() && workers.watchdog_is_asleep());
        assert_eq!(workers.watchdog_fd.read(), Err(Errno::EAGAIN));
        workers.mark_working(slot);
        assert_eq!((workers.watchdog_fd.read(), workers.watchdog_is_asleep()), (Ok(1), false));
        assert!(!workers.try_sleep());
        workers.step(slot);
        workers.mark_waiting(slot);
        assert!(workers.try_sleep());
    }
}
