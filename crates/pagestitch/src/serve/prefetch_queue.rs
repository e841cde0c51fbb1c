//! The prefetches that the application has requested, until idle workers fill their pages.
//!
//! They take turns, block by block. They occupy all workers of a server but one, so that a source
//! that hangs leaves one to the faults. Workers that the watchdog finds held up do not count, so that
//! such a source does not end the prefetches of other regions. Two limits remain for these workers:
//!
//! * those of one region count in that region, and its other blocks are *parked* at the limit;
//! * all of them leave one worker of `max_workers()` to the faults.

use crate::fault::PrefetchJob;
use crate::serve::weak_handle::RegionHandle;
use pagestitch_kernel::Span;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A prefetch of a region.
#[derive(Debug)]
pub(crate) struct RequestedPrefetch<R> {
    pub(super) handle: Arc<RegionHandle<R>>,
    pub(super) job: Arc<PrefetchJob>,
}

/// The prefetches that wait for a worker, and the workers that have one.
#[derive(Debug)]
pub(super) struct PrefetchQueue<R> {
    inner: Mutex<Inner<R>>,
    /// The length of the queue, readable without the lock.
    waiting: AtomicUsize,
    /// True if a worker may take a block; it changes under the lock.
    has_room: AtomicBool,
    /// The most workers that fill blocks and make progress.
    most: usize,
    /// The most workers that fill blocks.
    most_in_all: usize,
}

#[derive(Debug)]
struct Inner<R> {
    queue: VecDeque<RequestedPrefetch<R>>,
    /// Prefetches of regions that are at their limit.
    parked: Vec<RequestedPrefetch<R>>,
    working: Vec<Working<R>>,
}

/// A worker that fills a block.
#[derive(Debug)]
struct Working<R> {
    /// Its slot in the table of workers.
    slot: usize,
    handle: Arc<RegionHandle<R>>,
    is_held_up: bool,
}

impl<R> PrefetchQueue<R> {
    /// A queue for a server with a worker at each of so many posts, and room for more workers.
    pub(super) fn new(posts: usize, workers_max: usize) -> Self {
        let most = posts.saturating_sub(1).max(1);
        let most_in_all = workers_max.saturating_sub(1).max(most);
        let working = Vec::with_capacity(most_in_all.min(ROOM));
        let inner = Mutex::new(Inner { queue: VecDeque::new(), parked: Vec::new(), working });
        Self { inner, waiting: AtomicUsize::new(0), has_room: AtomicBool::new(true), most, most_in_all }
    }

    /// The most workers that fill blocks at once and make progress.
    pub(super) const fn most(&self) -> usize {
        self.most
    }

    pub(super) fn add(&self, prefetch: RequestedPrefetch<R>) {
        let mut inner = self.inner.lock();
        inner.queue.push_back(prefetch);
        self.note(&inner);
    }

    /// True if a worker can take a block. Two loads.
    pub(super) fn has_work(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0 && self.has_room.load(Ordering::SeqCst)
    }

    /// The next block, for the worker in a slot, which calls [`release`](Self::release) afterwards. A
    /// prefetch without a block has left the queue: the worker wakes its task.
    pub(super) fn take(&self, slot: usize) -> Option<(RequestedPrefetch<R>, Option<Span>)> {
        if !self.has_work() {
            return None;
        }
        let mut inner = self.inner.lock();
        let taken = if self.finds_room(&inner) { self.take_first(&mut inner, slot) } else { None };
        self.note(&inner);
        taken
    }

    fn take_first(&self, inner: &mut Inner<R>, slot: usize) -> Option<(RequestedPrefetch<R>, Option<Span>)> {
        loop {
            let first = inner.queue.pop_front()?;
            if inner.working.iter().filter(|working| working.is_of(&first)).count() >= self.most {
                inner.parked.push(first);
                continue;
            }
            let Some((block, goes_on)) = first.job.take() else { return Some((first, None)) };
            if goes_on {
                // In the place of the one that was taken, so that the queue does not grow.
                inner.queue.push_back(first.clone());
            }
            inner.working.push(Working { slot, handle: Arc::clone(&first.handle), is_held_up: false });
            return Some((first, Some(block)));
        }
    }

    /// Ends the block of the worker in a slot.
    pub(super) fn release(&self, slot: usize) {
        let mut inner = self.inner.lock();
        let Inner { queue, parked, working } = &mut *inner;
        if let Some(at) = working.iter().position(|working| working.slot == slot) {
            let ended = working.swap_remove(at);
            while let Some(at) = parked.iter().position(|parked| ended.is_of(parked)) {
                queue.push_back(parked.swap_remove(at));
            }
        }
        self.note(&inner);
    }

    /// Notes the workers that are held up; they no longer count.
    pub(super) fn note_held_up(&self, is_held_up: impl Fn(usize) -> bool) {
        let mut inner = self.inner.lock();
        inner.working.iter_mut().for_each(|working| working.is_held_up |= is_held_up(working.slot));
        self.note(&inner);
    }

    fn finds_room(&self, inner: &Inner<R>) -> bool {
        let progressing = inner.working.iter().filter(|working| !working.is_held_up).count();
        progressing < self.most && inner.working.len() < self.most_in_all
    }

    fn note(&self, inner: &Inner<R>) {
        self.waiting.store(inner.queue.len(), Ordering::SeqCst);
        self.has_room.store(self.finds_room(inner), Ordering::SeqCst);
    }
}

impl<R> Working<R> {
    fn is_of(&self, prefetch: &RequestedPrefetch<R>) -> bool {
        Arc::ptr_eq(&self.handle, &prefetch.handle)
    }
}

impl<R> Clone for RequestedPrefetch<R> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle), job: Arc::clone(&self.job) }
    }
}

/// The workers with a block before their list has to grow.
const ROOM: usize = 64;

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
        let (queue, handle) = (PrefetchQueue::new(3, 3), RegionHandle::dangling());
        let both = [prefetch(&handle, 1024), prefetch(&handle, 512)];
        both.iter().for_each(|prefetch| queue.add(prefetch.clone()));
        let take = |slot| {
            let taken = queue.take(slot);
            taken.map(|(taken, block)| (Arc::ptr_eq(&taken.job, &both[0].job), block.unwrap().first.0))
        };
        assert_eq!((take(0), take(1)), (Some((true, 0)), Some((false, 0))));
        assert!(take(2).is_none() && !queue.has_work());
        queue.release(1);
        assert!(queue.has_work());
        assert_eq!(take(2), Some((true, 512)));
        queue.release(2);
        assert!(take(1).is_none() && !queue.has_work());
    }

    #[test]
    fn workers_that_are_held_up_leave_room_to_other_regions() {
        let (queue, handles) = (PrefetchQueue::new(2, 4), [0, 1, 2, 3].map(|_| RegionHandle::dangling()));
        handles.iter().for_each(|handle| queue.add(prefetch(handle, 1024)));
        let take = |slot| {
            let taken = queue.take(slot)?.0;
            handles.iter().position(|handle| Arc::ptr_eq(handle, &taken.handle))
        };
        assert_eq!((take(0), take(1)), (Some(0), None));
        queue.note_held_up(|slot| slot == 0);
        assert_eq!((take(1), take(2)), (Some(1), None));
        queue.note_held_up(|slot| slot == 1);
        assert_eq!(take(2), Some(2));
        queue.note_held_up(|slot| slot == 2);
        assert!(take(3).is_none() && !queue.has_work(), "the fourth worker is for faults");
        queue.release(1);
        assert_eq!(take(1), Some(3));
        queue.note_held_up(|slot| slot == 1);
        queue.release(2);
        assert_eq!(take(2), Some(1), "the region 0 is parked");
        queue.release(2);
        assert!(take(2) == Some(2) && queue.inner.lock().parked.len() == 1);
        queue.release(0);
        queue.release(2);
        assert_eq!(take(0), Some(0));
    }

    #[test]
    fn a_cancelled_prefetch_leaves_the_queue() {
        let queue = PrefetchQueue::new(1, 1);
        let cancelled = prefetch(&RegionHandle::dangling(), 1024);
        queue.add(cancelled.clone());
        cancelled.job.cancel();
        assert!(queue.has_work());
        assert_eq!(queue.take(0).unwrap().1, None);
        assert!(!queue.has_work() && cancelled.job.is_over());
    }
}
