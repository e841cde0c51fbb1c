//! The prefetches that the application has requested, until idle workers fill their pages.
//!
//! They take turns, block by block. They occupy all workers of a server but one, so that a source
//! that hangs leaves one to the faults.

use crate::fault::PrefetchJob;
use crate::serve::weak_handle::RegionHandle;
use pagestitch_kernel::Span;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A prefetch of a region.
#[derive(Debug)]
pub(crate) struct RequestedPrefetch<R> {
    pub(super) handle: Arc<RegionHandle<R>>,
    pub(super) job: Arc<PrefetchJob>,
}

/// The prefetches that wait for a worker, and the workers that have one.
#[derive(Debug)]
pub(super) struct PrefetchQueue<R> {
    queue: Mutex<VecDeque<RequestedPrefetch<R>>>,
    /// The length of the queue, readable without the lock.
    waiting: AtomicUsize,
    /// The number of workers that fill a block; it changes under the lock.
    working: AtomicUsize,
    /// The most workers that fill blocks.
    most: usize,
}

impl<R> PrefetchQueue<R> {
    /// A queue for a server with a worker at each of so many posts.
    pub(super) fn new(posts: usize) -> Self {
        let (waiting, working) = Default::default();
        Self { queue: Mutex::default(), waiting, working, most: posts.saturating_sub(1).max(1) }
    }

    /// The most workers that fill blocks at once.
    pub(super) const fn most(&self) -> usize {
        self.most
    }

    pub(super) fn add(&self, prefetch: RequestedPrefetch<R>) {
        let mut queue = self.queue.lock();
        queue.push_back(prefetch);
        self.waiting.store(queue.len(), Ordering::SeqCst);
    }

    /// True if a worker can take a block. Two loads.
    pub(super) fn has_work(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0 && self.working.load(Ordering::SeqCst) < self.most
    }

    /// The next block, for a worker that calls [`release`](Self::release) afterwards.
    pub(super) fn take(&self) -> Option<(RequestedPrefetch<R>, Span)> {
        if !self.has_work() {
            return None;
        }
        let mut queue = self.queue.lock();
        if self.working.load(Ordering::SeqCst) >= self.most {
            return None;
        }
        let taken = self.take_first(&mut queue);
        self.waiting.store(queue.len(), Ordering::SeqCst);
        taken
    }

    fn take_first(&self, queue: &mut VecDeque<RequestedPrefetch<R>>) -> Option<(RequestedPrefetch<R>, Span)> {
        loop {
            let first = queue.pop_front()?;
            let Some((block, goes_on)) = first.job.take() else { continue };
            if goes_on {
                // In the place of the one that was taken, so that the queue does not grow.
                queue.push_back(first.clone());
            }
            self.working.fetch_add(1, Ordering::SeqCst);
            return Some((first, block));
        }
    }

    /// Ends a worker's block.
    pub(super) fn release(&self) {
        let _queue = self.queue.lock();
        self.working.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<R> Clone for RequestedPrefetch<R> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle), job: Arc::clone(&self.job) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagestitch_kernel::Page;

    fn prefetch(handle: &Arc<RegionHandle<()>>, pages: usize) -> RequestedPrefetch<()> {
        let job = Arc::new(PrefetchJob::new(Span { first: Page(0), pages }, 512));
        RequestedPrefetch { handle: Arc::clone(handle), job }
    }

    #[test]
    fn prefetches_take_turns_and_leave_a_worker_to_faults() {
        let (queue, handle) = (PrefetchQueue::new(3), RegionHandle::dangling());
        let both = [prefetch(&handle, 1024), prefetch(&handle, 512)];
        both.iter().for_each(|prefetch| queue.add(prefetch.clone()));
        let take =
            || queue.take().map(|(taken, block)| (Arc::ptr_eq(&taken.job, &both[0].job), block.first.0));
        assert_eq!((take(), take()), (Some((true, 0)), Some((false, 0))));
        assert!(take().is_none() && !queue.has_work());
        queue.release();
        assert!(queue.has_work());
        assert_eq!(take(), Some((true, 512)));
        queue.release();
        assert!(take().is_none() && !queue.has_work());
    }

    #[test]
    fn a_cancelled_prefetch_leaves_the_queue() {
        let queue = PrefetchQueue::new(1);
        let cancelled = prefetch(&RegionHandle::dangling(), 1024);
        queue.add(cancelled.clone());
        cancelled.job.cancel();
        assert!(queue.has_work() && queue.take().is_none());
        assert!(!queue.has_work() && cancelled.job.is_over());
    }
}
