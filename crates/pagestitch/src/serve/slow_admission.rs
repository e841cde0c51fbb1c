//! Admission of the faults of slow regions: their faults take more than a millisecond, or none has
//! been served yet. Together they may occupy all workers but one, which serves fast regions.

use crate::serve::queue::QueuedFault;
use crate::serve::weak_handle::RegionHandle;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Admits faults of slow regions to as many workers as these may occupy, and queues the others.
#[derive(Debug)]
pub(super) struct SlowAdmission<R> {
    queue: Mutex<Queue<R>>,
    /// The length of the queue, readable without the lock.
    waiting: AtomicUsize,
}

#[derive(Debug)]
struct Queue<R> {
    admitted: usize,
    waiting: VecDeque<QueuedFault<R>>,
}

impl<R> SlowAdmission<R> {
    /// Reserves queue space for `room` waiting items; the queue grows beyond it.
    pub(super) fn new(room: usize) -> Self {
        let queue = Queue { admitted: 0, waiting: VecDeque::with_capacity(room) };
        Self { queue: Mutex::new(queue), waiting: AtomicUsize::new(0) }
    }

    /// Admits a fault if fewer than `most` are admitted, and returns it to be served. `None`: the
    /// fault waits until an admitted fault is [released](Self::release).
    pub(super) fn admit(&self, most: usize, fault: QueuedFault<R>) -> Option<QueuedFault<R>> {
        let mut queue = self.queue.lock();
        if queue.admitted < most {
            return Some(take(&mut queue, fault));
        }
        queue.waiting.push_back(fault);
        self.waiting.store(queue.waiting.len(), Ordering::Relaxed);
        None
    }

    pub(super) fn has_waiters(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Admits the first waiting fault if fewer than `most` are admitted. As a last resort it admits
    /// one more, of a region that occupies no worker yet, because the admitted faults may hang.
    pub(super) fn admit_next(&self, most: usize, last_resort: bool) -> Option<QueuedFault<R>> {
        let mut queue = self.queue.lock();
        let fault = if queue.admitted < most {
            queue.waiting.pop_front()
        } else if last_resort {
            let holds_none = |fault: &QueuedFault<R>| fault.handle.admitted.load(Ordering::Relaxed) == 0;
            let first = queue.waiting.iter().position(holds_none);
            first.and_then(|first| queue.waiting.remove(first))
        } else {
            None
        }?;
        self.waiting.store(queue.waiting.len(), Ordering::Relaxed);
        Some(take(&mut queue, fault))
    }

    /// Releases a fault of `region`, and admits the first waiting fault in its place.
    pub(super) fn release(&self, most: usize, region: &RegionHandle<R>) -> Option<QueuedFault<R>> {
        let mut queue = self.queue.lock();
        region.admitted.fetch_sub(1, Ordering::Relaxed);
        queue.admitted -= 1;
        if queue.admitted >= most {
            return None;
        }
        let fault = queue.waiting.pop_front()?;
        self.waiting.store(queue.waiting.len(), Ordering::Relaxed);
        Some(take(&mut queue, fault))
    }
}

/// Counts an admitted fault. This happens under the lock, so that a region whose worker changes
/// from one fault to the next never seems to occupy no worker.
fn take<R>(queue: &mut Queue<R>, fault: QueuedFault<R>) -> QueuedFault<R> {
    queue.admitted += 1;
    fault.handle.admitted.fetch_add(1, Ordering::Relaxed);
    fault
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn is_of(fault: Option<&QueuedFault<()>>, handle: &Arc<RegionHandle<()>>) -> bool {
        fault.is_some_and(|fault| Arc::ptr_eq(&fault.handle, handle))
    }

    /// Two faults of one region are admitted. A third one waits, and behind it a fault of another
    /// region.
    #[test]
    fn a_region_counts_its_workers_also_between_two_faults_that_one_of_them_serves() {
        let (hangs, other, slow) =
            (RegionHandle::dangling(), RegionHandle::dangling(), SlowAdmission::new(4));
        let held = |handle: &RegionHandle<()>| handle.admitted.load(Ordering::Relaxed);
        assert!(
            slow.admit(2, QueuedFault::at(&hangs)).is_some()
                && slow.admit(2, QueuedFault::at(&hangs)).is_some()
        );
        assert!(
            slow.admit(2, QueuedFault::at(&hangs)).is_none()
                && slow.admit(2, QueuedFault::at(&other)).is_none()
        );
        assert!(slow.has_waiters() && slow.admit_next(2, false).is_none());
        assert!(is_of(slow.release(2, &hangs).as_ref(), &hangs));
        assert_eq!((held(&hangs), held(&other)), (2, 0));
        assert!(slow.admit(2, QueuedFault::at(&hangs)).is_none());
        assert!(
            is_of(slow.admit_next(2, true).as_ref(), &other),
            "as a last resort, of a region that occupies no worker"
        );
        assert!(slow.admit_next(2, true).is_none());
        assert!(slow.release(2, &other).is_none(), "it was one above the limit");
        assert!(is_of(slow.release(2, &hangs).as_ref(), &hangs));
        assert!(slow.release(2, &hangs).is_none() && slow.release(2, &hangs).is_none());
        assert_eq!((held(&hangs), held(&other), slow.has_waiters()), (0, 0, false));
    }

    #[test]
    fn a_higher_limit_admits_the_first_waiting_fault() {
        let (slow, handle) = (SlowAdmission::new(4), RegionHandle::<()>::dangling());
        assert!(
            slow.admit(1, QueuedFault::at(&handle)).is_some()
                && slow.admit(1, QueuedFault::at(&handle)).is_none()
        );
        assert!(slow.admit_next(2, false).is_some() && !slow.has_waiters());
    }
}
