//! Admission of faults, so that one region occupies only some of the workers. A fault above the
//! limit waits until an admitted fault is released.

use parking_lot::Mutex;
use std::collections::VecDeque;

/// The number of admitted items, and the queue of items that wait for admission.
#[derive(Debug)]
pub(crate) struct Bulkhead<T> {
    queue: Mutex<Queue<T>>,
}

#[derive(Debug)]
struct Queue<T> {
    admitted: usize,
    waiting: VecDeque<T>,
}

impl<T> Bulkhead<T> {
    /// Reserves queue space for `room` waiting items; the queue grows beyond it.
    pub(crate) fn new(room: usize) -> Self {
        let queue = Mutex::new(Queue { admitted: 0, waiting: VecDeque::with_capacity(room) });
        Self { queue }
    }

    /// Admits `item` if fewer than `most` are admitted, and returns it. `None`: the item waits, and a
    /// later [`release`](Self::release) returns it.
    pub(crate) fn admit(&self, most: usize, item: T) -> Option<T> {
        let mut queue = self.queue.lock();
        if queue.admitted < most {
            queue.admitted += 1;
            return Some(item);
        }
        queue.waiting.push_back(item);
        None
    }

    /// Admits an item that does not wait otherwise. False at the limit.
    pub(crate) fn try_admit(&self, most: usize) -> bool {
        let mut queue = self.queue.lock();
        let is_admitted = queue.admitted < most;
        queue.admitted += usize::from(is_admitted);
        is_admitted
    }

    /// Releases an item. If another one waits, that item is admitted in its place and returned.
    pub(crate) fn release(&self, most: usize) -> Option<T> {
        let mut queue = self.queue.lock();
        let next = if queue.admitted <= most { queue.waiting.pop_front() } else { None };
        queue.admitted -= usize::from(next.is_none());
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_admits_the_waiting_item() {
        let bulkhead = Bulkhead::new(4);
        assert_eq!(
            (bulkhead.admit(2, 1), bulkhead.admit(2, 2), bulkhead.admit(2, 3)),
            (Some(1), Some(2), None)
        );
        assert_eq!(bulkhead.release(2), Some(3));
        assert_eq!((bulkhead.release(2), bulkhead.release(2)), (None, None));
        assert_eq!(bulkhead.admit(1, 4), Some(4));
        assert_eq!(bulkhead.admit(1, 5), None);
        assert_eq!((bulkhead.release(1), bulkhead.release(1)), (Some(5), None));
    }

    /// The limit falls while items are admitted: the first releases return no item, the last does.
    #[test]
    fn a_waiting_item_survives_a_lower_limit() {
        let bulkhead = Bulkhead::new(4);
        (0..3).for_each(|item| assert_eq!(bulkhead.admit(3, item), Some(item)));
        assert_eq!(bulkhead.admit(1, 9), None);
        assert_eq!(
            (bulkhead.release(1), bulkhead.release(1), bulkhead.release(1), bulkhead.release(1)),
            (None, None, Some(9), None)
        );
    }
}
