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
    places: Box<[Place]>,
    posts: usize,
    working: AtomicUsize,
    /// One joins or leaves at a time.
    change: Mutex<()>,
    /// The watchdog waits to be [called](Self::call).
    dozes: AtomicBool,
    pub(super) call: EventFd,
    /// No further worker may be started, and all but one are held up.
    pub(super) last_resort: AtomicBool,
    pub(super) held_up: AtomicUsize,
    pub(super) replacements: AtomicU64,
    pub(super) shortages: AtomicU64,
}

/// A worker, if there is one. Apart from others, so that to count costs no other processor anything.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Place {
    /// [`VACANT`], or how many steps the worker has done: odd at work, even while it waits.
    steps: AtomicU64,
    post: AtomicUsize,
}

/// What the watchdog remembers of the worker at a place.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    steps: u64,
    /// For how long it has been in the same step of its work.
    still: Duration,
}

/// What the watchdog sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
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
            places: (0..most.min(MOST).max(posts)).map(|_| Place::default()).collect(),
            posts,
            working: AtomicUsize::new(0),
            change: Mutex::default(),
            dozes: AtomicBool::new(false),
            call: EventFd::from_flags(flags)?,
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
        self.places.len()
    }

    /// One more worker at a post; `None` where there are as many as there may be.
    pub(super) fn join(&self, post: usize) -> Option<usize> {
        let _one = self.change.lock();
        let place = self.places.iter().position(|place| place.steps.load(Ordering::Relaxed) == VACANT)?;
        self.places[place].post.store(post, Ordering::Relaxed);
        self.places[place].steps.store(FIRST, Ordering::SeqCst);
        self.working.fetch_add(1, Ordering::Relaxed);
        Some(place)
    }

    /// A worker that has just looked for work leaves, if another one waits at its post. False if it is to stay.
    pub(super) fn leave(&self, place: usize) -> bool {
        let _one = self.change.lock();
        let post = self.places[place].post.load(Ordering::Relaxed);
        let other = |(index, other): (usize, &Place)| {
            let steps = other.steps.load(Ordering::SeqCst);
            index != place
                && other.post.load(Ordering::Relaxed) == post
                && steps != VACANT
                && steps.is_multiple_of(2)
        };
        let others = self.places.iter().enumerate().any(other);
        if others {
            self.gone(place);
        }
        others
    }

    /// A worker could not be started after all.
    pub(super) fn never_came(&self, place: usize) {
        let _one = self.change.lock();
        self.gone(place);
    }

    fn gone(&self, place: usize) {
        self.places[place].steps.store(VACANT, Ordering::SeqCst);
        self.working.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether there are more workers than posts: one that finds nothing to do for a while is to [leave](Self::leave).
    pub(super) fn is_large(&self) -> bool {
        self.working() > self.posts
    }

    /// The worker waits from now on.
    pub(super) fn waits(&self, place: usize) {
        self.places[place].steps.fetch_add(1, Ordering::SeqCst);
    }

    /// The worker is at work from now on; the watchdog looks.
    pub(super) fn works(&self, place: usize) {
        self.places[place].steps.fetch_add(1, Ordering::SeqCst);
        // Either this is seen, or the watchdog sees the step: it looks once more before it dozes.
        if self.dozes.load(Ordering::SeqCst) {
            self.call();
        }
    }

    /// The worker gets on.
    pub(super) fn steps(&self, place: usize) {
        let steps = &self.places[place].steps;
        // No other thread writes it.
        steps.store(steps.load(Ordering::Relaxed).wrapping_add(2), Ordering::Relaxed);
    }

    #[cold]
    fn call(&self) {
        if self.dozes.swap(false, Ordering::SeqCst) {
            let _ = self.call.write(1);
        }
    }

    /// The watchdog looks no more until it is called. False if a worker is at work.
    pub(super) fn doze(&self) -> bool {
        self.dozes.store(true, Ordering::SeqCst);
        let at_work = |place: &Place| !place.steps.load(Ordering::SeqCst).is_multiple_of(2);
        if self.places.iter().any(at_work) {
            self.dozes.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub(super) fn is_dozing(&self) -> bool {
        self.dozes.load(Ordering::SeqCst)
    }

    /// Looks at all workers, `passed` after the last look.
    pub(super) fn look(&self, seen: &mut Vec<Seen>, passed: Duration) -> Look {
        seen.resize(self.places.len(), Seen::default());
        let mut look = Look { held_up: 0, waiting: 0, busy: false };
        for (place, seen) in self.places.iter().zip(seen) {
            let steps = place.steps.load(Ordering::SeqCst);
            let at_work = !steps.is_multiple_of(2);
            look.busy |= at_work || steps != seen.steps;
            let still = if at_work && steps == seen.steps { seen.still + passed } else { Duration::ZERO };
            *seen = Seen { steps, still };
            look.held_up += usize::from(seen.is_held_up());
            look.waiting += usize::from(steps != VACANT && !at_work);
        }
        self.held_up.store(look.held_up, Ordering::Relaxed);
        look
    }

    /// The posts at which no worker gets on.
    pub(super) fn abandoned<'a>(&'a self, seen: &'a [Seen]) -> impl Iterator<Item = usize> + 'a {
        let gets_on = move |post: usize| {
            self.places.iter().zip(seen).any(|(place, seen)| {
                place.post.load(Ordering::Relaxed) == post && seen.steps != VACANT && !seen.is_held_up()
            })
        };
        (0..self.posts).filter(move |&post| !gets_on(post))
    }
}

impl Seen {
    /// Whether a source holds the worker up, or other code that is not ours.
    fn is_held_up(self) -> bool {
        self.still >= BOUND
    }
}

const VACANT: u64 = 0;
/// The step count of a worker that joins. It is even, so the worker waits.
const FIRST: u64 = 2;
/// A worker in the same step for so long is replaced.
pub(super) const BOUND: Duration = Duration::from_millis(10);
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
        let [first, second] = [0, 1].map(|post| workers.join(post).unwrap());
        workers.works(first);
        workers.works(second);
        assert_eq!(workers.look(&mut seen, BOUND), Look { held_up: 0, waiting: 0, busy: true });
        workers.steps(second);
        assert_eq!(workers.look(&mut seen, BOUND), Look { held_up: 1, waiting: 0, busy: true });
        assert_eq!(workers.abandoned(&seen).collect::<Vec<_>>(), [0]);
        let third = workers.join(0).unwrap();
        assert_eq!((workers.join(0), workers.working(), workers.is_large()), (None, 3, true));
        workers.waits(second);
        assert_eq!(workers.look(&mut seen, BOUND), Look { held_up: 1, waiting: 2, busy: true });
        assert_eq!(workers.abandoned(&seen).count(), 0);
        workers.works(third);
        assert!(!workers.leave(third), "no other worker waits at the post");
        workers.waits(first);
        assert!(workers.leave(third) && !workers.is_large());
    }

    #[test]
    fn the_watchdog_dozes_while_no_worker_works_and_is_called_once() {
        let (workers, mut seen) = (WorkerTable::new(1, 1).unwrap(), Vec::new());
        let place = workers.join(0).unwrap();
        assert!(workers.look(&mut seen, BOUND).busy, "it is new");
        assert!(!workers.look(&mut seen, BOUND).busy);
        assert!(workers.doze() && workers.is_dozing());
        assert_eq!(workers.call.read(), Err(Errno::EAGAIN));
        workers.works(place);
        assert_eq!((workers.call.read(), workers.is_dozing()), (Ok(1), false));
        assert!(!workers.doze());
        workers.steps(place);
        workers.waits(place);
        assert!(workers.doze());
    }
}
