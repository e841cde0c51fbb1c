//! The limit on concurrent fetches. A fault above the limit waits for a permit, and holds no worker
//! meanwhile. A worker that replaces another one takes a permit, too, because both have a fault in
//! flight.
//!
//! Replacements come before waiting faults, because only a worker can serve a waiting fault. If
//! workers hold all permits, no fetch gives one back, and hanging workers may never do: a waiting
//! fault is then served without a permit, and its worker waits for the source.

use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Limits the concurrent fetches over all regions of a pool.
#[derive(Debug)]
pub(super) struct FetchSemaphore<T> {
    queue: Mutex<Queue<T>>,
    /// The number of waiting faults, readable without the lock.
    waiting: AtomicUsize,
    /// Wakes a worker, which serves a waiting fault.
    wake_fd: Arc<EventFd>,
}

#[derive(Debug)]
struct Queue<T> {
    /// The permits that are free now.
    free: usize,
    /// The permits that no worker holds: each one is free or held by a fetch. A replacement takes
    /// one away until it ends.
    not_of_workers: usize,
    waiting: VecDeque<T>,
}

impl<T> Queue<T> {
    /// Whether the first waiting fault can be served: with a free permit, or without one, because
    /// workers hold all of them.
    const fn serves_waiting(&self) -> bool {
        self.free > 0 || self.not_of_workers == 0
    }
}

/// The permit of a fetch or a worker, until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit<T> {
    semaphore: Arc<FetchSemaphore<T>>,
    is_of_worker: bool,
}

impl<T> FetchSemaphore<T> {
    /// Reserves queue space for `room` waiting faults; the queue grows beyond it.
    pub(super) fn new(permits: usize, room: usize, wake_fd: Arc<EventFd>) -> Self {
        let queue = Mutex::new(Queue {
            free: permits,
            not_of_workers: permits,
            waiting: VecDeque::with_capacity(room),
        });
        Self { queue, waiting: AtomicUsize::new(0), wake_fd }
    }

    /// Takes a permit for a fetch; `None` at the limit, or if another fault waits for the permit.
    pub(super) fn take(self: &Arc<Self>) -> Option<Permit<T>> {
        let mut queue = self.queue.lock();
        let is_free = queue.free > 0 && queue.waiting.is_empty();
        is_free.then(|| {
            queue.free -= 1;
            Permit { semaphore: Arc::clone(self), is_of_worker: false }
        })
    }

    /// Takes a permit for a worker that replaces another one; `None` at the limit.
    pub(super) fn take_for_worker(self: &Arc<Self>) -> Option<Permit<T>> {
        let mut queue = self.queue.lock();
        (queue.free > 0).then(|| {
            queue.free -= 1;
            queue.not_of_workers -= 1;
            Permit { semaphore: Arc::clone(self), is_of_worker: true }
        })
    }

    /// Whether fetches have permits. False if the limit is the number of the workers.
    pub(super) fn has_any(&self) -> bool {
        self.queue.lock().not_of_workers > 0
    }

    /// Queues a fault that waits for a permit.
    pub(super) fn wait(&self, fault: T) {
        let mut queue = self.queue.lock();
        queue.waiting.push_back(fault);
        self.waiting.store(queue.waiting.len(), Ordering::SeqCst);
        if queue.serves_waiting() {
            self.wake();
        }
    }

    /// Whether a waiting fault can be taken.
    pub(super) fn can_take_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0 && self.queue.lock().serves_waiting()
    }

    /// The first waiting fault with its permit, if there is a permit. Without a permit if workers
    /// hold all: another worker is then woken for the next fault, because this one waits for the
    /// source.
    pub(super) fn take_waiting(self: &Arc<Self>) -> Option<(T, Option<Permit<T>>)> {
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut queue = self.queue.lock();
        if !queue.serves_waiting() {
            return None;
        }
        let fault = queue.waiting.pop_front()?;
        self.waiting.store(queue.waiting.len(), Ordering::SeqCst);
        if queue.free == 0 {
            if !queue.waiting.is_empty() {
                self.wake();
            }
            return Some((fault, None));
        }
        queue.free -= 1;
        Some((fault, Some(Permit { semaphore: Arc::clone(self), is_of_worker: false })))
    }

    fn wake(&self) {
        self.wake_fd.write(1).expect("an eventfd takes small numbers");
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        let mut queue = self.semaphore.queue.lock();
        queue.free += 1;
        queue.not_of_workers += usize::from(self.is_of_worker);
        if !queue.waiting.is_empty() {
            self.semaphore.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;

    fn semaphore(permits: usize) -> (Arc<FetchSemaphore<u8>>, Arc<EventFd>) {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        let wake_fd = Arc::new(EventFd::from_flags(flags).unwrap());
        (Arc::new(FetchSemaphore::new(permits, 4, Arc::clone(&wake_fd))), wake_fd)
    }

    #[test]
    fn there_are_as_many_permits_as_were_given() {
        let (semaphore, _) = semaphore(2);
        let both = (semaphore.take().unwrap(), semaphore.take().unwrap());
        assert!(semaphore.take().is_none());
        drop(both);
        assert!(semaphore.take().is_some());
    }

    /// A hanging worker never gives its permit back, so that no fault waits for it.
    #[test]
    fn fetches_have_no_permits_while_workers_have_all() {
        let (semaphore, _) = semaphore(2);
        let fetch = semaphore.take().unwrap();
        let worker = semaphore.take_for_worker().unwrap();
        assert!(semaphore.has_any());
        drop(fetch);
        let both = (worker, semaphore.take_for_worker().unwrap());
        assert!(!semaphore.has_any());
        drop(both);
        assert!(semaphore.has_any());
    }

    /// A worker that hangs is replaced although faults wait, and the replacement serves them.
    #[test]
    fn a_replacement_comes_before_a_waiting_fault_and_serves_it_without_a_permit() {
        let (semaphore, wake_fd) = semaphore(1);
        let fetch = semaphore.take().unwrap();
        semaphore.wait(7);
        semaphore.wait(8);
        assert!(semaphore.take_for_worker().is_none() && !semaphore.can_take_waiting());
        drop(fetch);
        assert!(wake_fd.read().is_ok());
        let worker = semaphore.take_for_worker().unwrap();
        assert!(semaphore.can_take_waiting());
        assert!(matches!(semaphore.take_waiting(), Some((7, None))));
        assert!(wake_fd.read().is_ok(), "the worker waits for the source of the first fault");
        assert!(matches!(semaphore.take_waiting(), Some((8, None))));
        assert!(wake_fd.read().is_err() && !semaphore.can_take_waiting());
        drop(worker);
        assert!(semaphore.take().is_some());
    }

    /// A replacement takes the permit between a failed take and the wait.
    #[test]
    fn a_fault_that_waits_while_workers_hold_all_permits_wakes_a_worker() {
        let (semaphore, wake_fd) = semaphore(1);
        let _worker = semaphore.take_for_worker().unwrap();
        semaphore.wait(7);
        assert!(wake_fd.read().is_ok() && semaphore.can_take_waiting());
        assert!(matches!(semaphore.take_waiting(), Some((7, None))));
    }

    #[test]
    fn a_waiting_fault_wakes_a_worker_for_each_permit_and_comes_first() {
        let (semaphore, wake_fd) = semaphore(1);
        let permit = semaphore.take().unwrap();
        semaphore.wait(7);
        semaphore.wait(8);
        assert!(wake_fd.read().is_err() && semaphore.take_waiting().is_none());
        drop(permit);
        assert!(wake_fd.read().is_ok());
        assert!(semaphore.take().is_none(), "a fault waits");
        let (fault, permit) = semaphore.take_waiting().unwrap();
        assert_eq!((fault, semaphore.take_waiting().is_none()), (7, true));
        drop(permit);
        assert!(wake_fd.read().is_ok());
        assert_eq!(semaphore.take_waiting().unwrap().0, 8);
    }

    /// The permit returns between a failed take and the wait.
    #[test]
    fn a_fault_that_waits_while_a_permit_is_free_wakes_a_worker() {
        let (semaphore, wake_fd) = semaphore(1);
        semaphore.wait(7);
        assert!(wake_fd.read().is_ok());
        assert_eq!(semaphore.take_waiting().unwrap().0, 7);
    }
}
