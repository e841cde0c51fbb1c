//! Limits. Berths: how many workers may be held up by the same thing at once. Who finds none waits for whoever leaves.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Some berths, and what waits for one.
#[derive(Debug)]
pub(crate) struct Berths<T> {
    state: Mutex<State<T>>,
    /// How many wait, to be looked at without the lock.
    waiting: AtomicUsize,
}

#[derive(Debug)]
struct State<T> {
    taken: usize,
    waiting: VecDeque<T>,
}

impl<T> Berths<T> {
    /// With room for so many to wait; more than that, and room is made.
    pub(crate) fn new(room: usize) -> Self {
        let state = Mutex::new(State { taken: 0, waiting: VecDeque::with_capacity(room) });
        Self { state, waiting: AtomicUsize::new(0) }
    }

    /// Takes one of `most` berths for `item`, which is given back to be worked on. `None`: it waits, and is given to whoever
    /// leaves.
    pub(crate) fn enter(&self, most: usize, item: T) -> Option<T> {
        let mut state = self.state.lock();
        if state.taken < most {
            state.taken += 1;
            return Some(item);
        }
        state.waiting.push_back(item);
        self.waiting.store(state.waiting.len(), Ordering::Relaxed);
        None
    }

    /// Whether somebody waits, who is not to wait too long.
    pub(crate) fn are_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// One more berth than there are, for the first that waits and is `wanted`.
    pub(crate) fn enter_beyond(&self, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let mut state = self.state.lock();
        let place = state.waiting.iter().position(wanted)?;
        state.taken += 1;
        let item = state.waiting.remove(place);
        self.waiting.store(state.waiting.len(), Ordering::Relaxed);
        item
    }

    /// Leaves the berth, or stays in it for the next that waits.
    pub(crate) fn leave(&self, most: usize) -> Option<T> {
        let mut state = self.state.lock();
        let next = if state.taken <= most { state.waiting.pop_front() } else { None };
        state.taken -= usize::from(next.is_none());
        self.waiting.store(state.waiting.len(), Ordering::Relaxed);
        next
    }
}

/// How many fetches may be under way at once, over all regions of a pool.
#[derive(Debug)]
pub(crate) struct Permits {
    left: AtomicUsize,
}

/// The permission for one, until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Permits>);

impl Permits {
    pub(crate) const fn new(most: usize) -> Self {
        Self { left: AtomicUsize::new(most) }
    }

    /// One more, if it may be.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Permit> {
        let one_less = |left: usize| left.checked_sub(1);
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        taken.is_ok().then(|| Permit(Arc::clone(self)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_finds_no_berth_is_given_to_who_leaves() {
        let berths = Berths::new(4);
        assert_eq!((berths.enter(2, 1), berths.enter(2, 2), berths.enter(2, 3)), (Some(1), Some(2), None));
        assert_eq!(berths.leave(2), Some(3));
        assert_eq!((berths.leave(2), berths.leave(2)), (None, None));
        assert_eq!(berths.enter(1, 4), Some(4));
        assert_eq!(berths.enter(1, 5), None);
        assert_eq!((berths.leave(1), berths.leave(1)), (Some(5), None));
    }

    /// There were more berths when they were taken: those who leave first take nothing on, and the last one does.
    #[test]
    fn where_there_are_fewer_by_now_nothing_is_forgotten() {
        let berths = Berths::new(4);
        (0..3).for_each(|item| assert_eq!(berths.enter(3, item), Some(item)));
        assert_eq!(berths.enter(1, 9), None);
        assert_eq!(
            (berths.leave(1), berths.leave(1), berths.leave(1), berths.leave(1)),
            (None, None, Some(9), None)
        );
    }

    #[test]
    fn who_may_not_wait_any_longer_gets_one_beyond() {
        let berths = Berths::new(4);
        assert!(berths.enter(1, 1).is_some() && !berths.are_waited_for());
        assert!(berths.enter(1, 2).is_none() && berths.enter(1, 3).is_none() && berths.are_waited_for());
        assert_eq!(
            (berths.enter_beyond(|item| *item > 3), berths.enter_beyond(|item| *item > 2)),
            (None, Some(3))
        );
        assert_eq!((berths.leave(1), berths.leave(1), berths.leave(1)), (None, Some(2), None));
        assert!(!berths.are_waited_for());
    }

    #[test]
    fn there_are_as_many_permits_as_were_given() {
        let permits = Arc::new(Permits::new(2));
        let both = (permits.take().unwrap(), permits.take().unwrap());
        assert!(permits.take().is_none());
        drop(both);
        assert!(permits.take().is_some());
    }
}
