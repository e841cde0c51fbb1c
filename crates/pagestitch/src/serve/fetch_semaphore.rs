//! The limit on concurrent fetches. A fault above the limit waits for a permit, and holds no worker
//! meanwhile. A worker that replaces another one takes a permit, too, because both have a fault in
//! flight.

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
    /// The free permits.
    permits: usize,
    /// The permits of fetches, and the free ones.
    not_of_workers: usize,
    waiting: VecDeque<T>,
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
        let queue =
            Mutex::new(Queue { permits, not_of_workers: permits, waiting: VecDeque::with_capacity(room) });
        Self { queue, waiting: AtomicUsize::new(0), wake_fd }
    }

    /// Takes a permit for a fetch; `None` at the limit, or if another fault waits for the permit.
    pub(super) fn take(self: &Arc<Self>) -> Option<Permit<T>> {
        self.take_for(false)
    }

    /// As [`take`](Self::take), for a worker that replaces another one.
    pub(super) fn take_for_worker(self: &Arc<Self>) -> Option<Permit<T>> {
        self.take_for(true)
    }

    fn take_for(self: &Arc<Self>, is_of_worker: bool) -> Option<Permit<T>> {
        let mut queue = self.queue.lock();
        let is_free = queue.permits > 0 && queue.waiting.is_empty();
        is_free.then(|| {
            queue.permits -= 1;
            queue.not_of_workers -= usize::from(is_of_worker);
            Permit { semaphore: Arc::clone(self), is_of_worker }
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
        if queue.permits > 0 {
            self.wake();
        }
    }

    /// The first waiting fault with its permit, if there is a permit.
    pub(super) fn take_waiting(self: &Arc<Self>) -> Option<(T, Permit<T>)> {
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut queue = self.queue.lock();
        if queue.permits == 0 {
            return None;
        }
        let fault = queue.waiting.pop_front()?;
        queue.permits -= 1;
        self.waiting.store(queue.waiting.len(), Ordering::SeqCst);
        Some((fault, Permit { semaphore: Arc::clone(self), is_of_worker: false }))
    }

    fn wake(&self) {
        self.wake_fd.write(1).expect("an eventfd takes small numbers");
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        let mut queue = self.semaphore.queue.lock();
        queue.permits += 1;
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
