//! Limits. Berths: how many workers a region may hold up at once. A fault that finds none waits for one that leaves.

use parking_lot::Mutex;
use std::collections::VecDeque;

/// Some berths, and what waits for one.
#[derive(Debug)]
pub(crate) struct Bulkhead<T> {
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    taken: usize,
    waiting: VecDeque<T>,
}

impl<T> Bulkhead<T> {
    /// With room for so many to wait; more than that, and room is made.
    pub(crate) fn new(room: usize) -> Self {
        let state = Mutex::new(State { taken: 0, waiting: VecDeque::with_capacity(room) });
        Self { state }
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
        None
    }

    /// Leaves the berth, or stays in it for the next that waits.
    pub(crate) fn leave(&self, most: usize) -> Option<T> {
        let mut state = self.state.lock();
        let next = if state.taken <= most { state.waiting.pop_front() } else { None };
        state.taken -= usize::from(next.is_none());
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_finds_no_berth_is_given_to_who_leaves() {
        let berths = Bulkhead::new(4);
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
        let berths = Bulkhead::new(4);
        (0..3).for_each(|item| assert_eq!(berths.enter(3, item), Some(item)));
        assert_eq!(berths.enter(1, 9), None);
        assert_eq!(
            (berths.leave(1), berths.leave(1), berths.leave(1), berths.leave(1)),
            (None, None, Some(9), None)
        );
    }
}
