//! The table of workers. The watchdog reads it to find workers that a source holds up.
//!
//! A *post* is an epoll in which workers wait; every post watches every region. Each worker counts
//! its steps in a cache line of its own, and the watchdog compares two looks at the counter. If no
//! worker of a post makes progress, the watchdog starts another worker there, which takes the
//! descriptors that are ready.

use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch_kernel::Errno;
use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use pagestitch_kernel::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// All workers of a pool, or of several [`Manual`](crate::Manual)s.
#[derive(Debug)]
pub(crate) struct WorkerTable {
    slots: Box<[Slot]>,
    posts: usize,
    working: AtomicUsize,
    /// Held while a worker is added or removed.
    change: Mutex<()>,
    /// True if the watchdog sleeps until a worker [wakes](Self::wake_watchdog) it.
    watchdog_sleeps: AtomicBool,
    /// Wakes the watchdog.
    pub(super) watchdog_fd: EventFd,
    /// True if no further worker may be started, and all workers but one are held up.
    pub(super) last_resort: AtomicBool,
    /// The number of workers that a source holds up, at the last look.
    pub(super) held_up: AtomicUsize,
    /// The number of workers started in place of one that was held up.
    pub(super) replacements: AtomicU64,
    /// True if a worker has waited for a disk, without a ring, since the last look.
    waits_for_disk: AtomicBool,
    /// True if one of the workers that there are beyond the posts may end.
    dismisses: AtomicBool,
    /// How often a worker was held up and none could be started in its place.
    pub(super) shortages: AtomicU64,
}

/// The slot of one worker, in cache lines of its own, so that counting steps does not slow down
/// other CPUs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Slot {
    /// [`VACANT`], or the worker's step count: odd while it works, and even while it waits.
    steps: AtomicU64,
    /// The index of the epoll in which the worker waits.
    post: AtomicUsize,
}

/// The watchdog's memory of the worker in one slot.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SeenWorker {
    steps: u64,
    /// How long the worker has been in the same step.
    still: Duration,
}

/// The result of one look at all workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Observation {
    /// The number of workers that a source holds up.
    pub(super) held_up: usize,
    /// The number of workers that wait for events.
    pub(super) waiting: usize,
    /// True if a worker works, or has worked since the last look.
    pub(super) busy: bool,
}

impl WorkerTable {
    /// A table for at most `most` workers at `posts` posts.
    pub(crate) fn new(posts: usize, most: usize) -> Result<Self, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            slots: (0..most.min(MOST).max(posts)).map(|_| Slot::default()).collect(),
            posts,
            working: AtomicUsize::new(0),
            change: Mutex::default(),
            watchdog_sleeps: AtomicBool::new(false),
            watchdog_fd: EventFd::from_flags(flags).map_err(Errno::of)?,
            last_resort: AtomicBool::new(false),
            held_up: AtomicUsize::new(0),
            replacements: AtomicU64::new(0),
            waits_for_disk: AtomicBool::new(false),
            dismisses: AtomicBool::new(false),
            shortages: AtomicU64::new(0),
        })
    }

    /// The number of workers, including those that are held up.
    pub(crate) fn working(&self) -> usize {
        self.working.load(Ordering::Relaxed)
    }

    /// The number of workers that the table can hold.
    pub(super) fn most(&self) -> usize {
        self.slots.len()
    }

    /// Adds a worker at a post and returns its slot. `None` if the table is full.
    pub(crate) fn add(&self, post: usize) -> Option<usize> {
        let _one = self.one_at_a_time();
        let slot = self.slots.iter().position(|slot| slot.steps.load(Ordering::Relaxed) == VACANT)?;
        self.slots[slot].post.store(post, Ordering::Relaxed);
        self.slots[slot].steps.store(FIRST, Ordering::SeqCst);
        self.working.fetch_add(1, Ordering::Relaxed);
        Some(slot)
    }

    /// Removes a worker that has just found no work, if another worker waits at its post. False if
    /// the worker must stay.
    pub(crate) fn try_remove(&self, slot: usize) -> bool {
        let _one = self.one_at_a_time();
        let post = self.slots[slot].post.load(Ordering::Relaxed);
        let other = |(index, other): (usize, &Slot)| {
            let steps = other.steps.load(Ordering::SeqCst);
            index != slot && other.post.load(Ordering::Relaxed) == post && steps != VACANT && steps % 2 == 0
        };
        let others = self.slots.iter().enumerate().any(other);
        if others {
            self.remove(slot);
        }
        others
    }

    /// Removes a worker whose thread could not be started.
    pub(super) fn cancel(&self, slot: usize) {
        let _one = self.one_at_a_time();
        self.remove(slot);
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, slot: usize) {
        self.slots[slot].steps.store(VACANT, Ordering::SeqCst);
        self.working.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that a worker waits for a disk, and serves no other fault meanwhile.
    pub(super) fn note_disk(&self) {
        if !self.waits_for_disk.load(Ordering::Relaxed) {
            self.waits_for_disk.store(true, Ordering::Relaxed);
        }
    }

    /// True if a worker has waited for a disk since the last call.
    pub(super) fn take_waits_for_disk(&self) -> bool {
        self.waits_for_disk.swap(false, Ordering::Relaxed)
    }

    /// Lets one of the workers end that there are beyond the posts.
    pub(super) fn dismiss_one(&self) {
        self.dismisses.store(self.has_replacements(), Ordering::Relaxed);
    }

    /// True if the calling worker may end. Only one is told so.
    pub(super) fn take_dismissal(&self) -> bool {
        self.dismisses.load(Ordering::Relaxed) && self.dismisses.swap(false, Ordering::Relaxed)
    }

    /// The post for a worker beyond those of the posts.
    pub(super) fn next_post(&self) -> usize {
        self.working() % self.posts
    }

    /// True if there are more workers than posts: a worker that finds no work for a while then
    /// [ends](Self::try_remove).
    pub(crate) fn has_replacements(&self) -> bool {
        self.working() > self.posts
    }

    /// Records that the worker waits from now on.
    pub(crate) fn mark_waiting(&self, slot: usize) {
        self.slots[slot].steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Records that the worker works from now on, and wakes the watchdog if it sleeps.
    pub(crate) fn mark_working(&self, slot: usize) {
        self.slots[slot].steps.fetch_add(1, Ordering::SeqCst);
        // Either this load sees that the watchdog sleeps, or the watchdog sees the step, because it
        // looks once more before it sleeps.
        if self.watchdog_sleeps.load(Ordering::SeqCst) {
            self.wake_watchdog();
        }
    }

    /// Records that the worker has made progress.
    pub(crate) fn step(&self, slot: usize) {
        let steps = &self.slots[slot].steps;
        // No other thread writes this counter.
        steps.store(steps.load(Ordering::Relaxed).wrapping_add(2), Ordering::Relaxed);
    }

    #[cold]
    fn wake_watchdog(&self) {
        if self.watchdog_sleeps.swap(false, Ordering::SeqCst) {
            let _ = self.watchdog_fd.write(1);
        }
    }

    /// Lets the watchdog sleep until a worker wakes it. False if a worker works.
    pub(super) fn try_sleep(&self) -> bool {
        self.watchdog_sleeps.store(true, Ordering::SeqCst);
        let at_work = |slot: &Slot| slot.steps.load(Ordering::SeqCst) % 2 != 0;
        if self.slots.iter().any(at_work) {
            self.watchdog_sleeps.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub(super) fn watchdog_is_asleep(&self) -> bool {
        self.watchdog_sleeps.load(Ordering::SeqCst)
    }

    /// Looks at all workers. `passed` is the time since the last look.
    pub(crate) fn observe(&self, seen: &mut Vec<SeenWorker>, passed: Duration) -> Observation {
        seen.resize(self.slots.len(), SeenWorker::default());
        let mut look = Observation { held_up: 0, waiting: 0, busy: false };
        for (slot, seen) in self.slots.iter().zip(seen) {
            let steps = slot.steps.load(Ordering::SeqCst);
            let at_work = steps % 2 != 0;
            look.busy |= at_work || steps != seen.steps;
            let still = if at_work && steps == seen.steps { seen.still + passed } else { Duration::ZERO };
            *seen = SeenWorker { steps, still };
            look.held_up += usize::from(seen.is_held_up());
            look.waiting += usize::from(steps != VACANT && !at_work);
        }
        self.held_up.store(look.held_up, Ordering::Relaxed);
        look
    }

    /// The posts at which no worker makes progress.
    pub(crate) fn abandoned<'a>(&'a self, seen: &'a [SeenWorker]) -> impl Iterator<Item = usize> + 'a {
        let has_progress = move |post: usize| {
            self.slots.iter().zip(seen).any(|(slot, seen)| {
                slot.post.load(Ordering::Relaxed) == post && seen.steps != VACANT && !seen.is_held_up()
            })
        };
        (0..self.posts).filter(move |&post| !has_progress(post))
    }
}

impl SeenWorker {
    /// True if the worker hangs in one step, mostly in a source.
    pub(super) fn is_held_up(self) -> bool {
        self.still >= HELD_UP_AFTER
    }
}

const VACANT: u64 = 0;
/// The step count of a worker that joins. It is even, so the worker waits.
const FIRST: u64 = 2;
/// A worker that is in the same step for this long is replaced.
pub(crate) const HELD_UP_AFTER: Duration = Duration::from_millis(10);
/// The most workers of a pool, by default.
pub(super) const MOST_BY_DEFAULT: usize = 64;
/// The highest value of `max_workers()`.
const MOST: usize = 4096;

#[cfg(all(test, not(shuttle)))]
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
    fn the_watchdog_sleeps_while_no_worker_works_and_is_woken_once() {
        let (workers, mut seen) = (WorkerTable::new(1, 1).unwrap(), Vec::new());
        let slot = workers.add(0).unwrap();
        assert!(workers.observe(&mut seen, HELD_UP_AFTER).busy, "it is new");
        assert!(!workers.observe(&mut seen, HELD_UP_AFTER).busy);
        assert!(workers.try_sleep() && workers.watchdog_is_asleep());
        assert_eq!(workers.watchdog_fd.read().map_err(Errno::of), Err(Errno::EAGAIN));
        workers.mark_working(slot);
        assert_eq!((workers.watchdog_fd.read(), workers.watchdog_is_asleep()), (Ok(1), false));
        assert!(!workers.try_sleep());
        workers.step(slot);
        workers.mark_waiting(slot);
        assert!(workers.try_sleep());
    }
}
