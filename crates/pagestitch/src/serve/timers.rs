//! Tasks that a worker does after a pause. The worker does not wait for its end, because other
//! faults need the worker meanwhile.
//!
//! | task | reason |
//! |---|---|
//! | serve a fault again | the kernel had no memory for its page |
//! | serve a fault again | its source has failed, and is read again after a pause |
//! | go on with a requested prefetch | a limit was reached, or a fetch has ended |
//! | look at a region again | the worker that holds its read turn may hang, or an event cannot be handled yet |
//!
//! The queue has no limit of its own. A region has at most one look in it, and its faults have
//! threads that wait for them. The faults of foreign memory are
//! [limited](crate::fault::Host::has_room) for each region.
//!
//! A timer is among the descriptors for which workers wait. The woken worker takes one task after
//! the other. Before it starts a task, it sets the timer for the next one, so that another worker
//! takes over if this one hangs.

use crate::serve::prefetch_queue::RequestedPrefetch;
use crate::serve::queue::QueuedFault;
use crate::serve::weak_handle::RegionHandle;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags};
use pagestitch_kernel::Errno;
use parking_lot::Mutex;
use std::cmp;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A task to do after a pause.
#[derive(Debug)]
pub(super) enum TimedTask<R> {
    Serve(QueuedFault<R>),
    /// A fault that the limit of its region has admitted.
    ServeAdmitted(QueuedFault<R>),
    Look(Arc<RegionHandle<R>>),
    Prefetch(RequestedPrefetch<R>),
}

/// All timed tasks of a pool.
#[derive(Debug)]
pub(crate) struct Timers<R> {
    timer: TimerFd,
    /// The first one that becomes due is on top.
    entries: Mutex<BinaryHeap<Entry<R>>>,
}

/// A task, and the time at which it is due.
#[derive(Debug)]
struct Entry<R> {
    at: Instant,
    task: TimedTask<R>,
}

impl<R> Timers<R> {
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(Errno::of)?,
            entries: Mutex::default(),
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_fd().as_raw_fd()
    }

    /// Adds a task to do after `wait`, or after [`LONGEST`] if that is shorter.
    pub(super) fn add(&self, task: TimedTask<R>, wait: Duration) {
        let wait = wait.min(LONGEST);
        let mut entries = self.entries.lock();
        let at = Instant::now() + wait;
        if entries.peek().is_none_or(|first| at < first.at) {
            self.set(wait);
        }
        entries.push(Entry { at, task });
    }

    /// The next task that is due.
    pub(super) fn take(&self) -> Option<TimedTask<R>> {
        let mut entries = self.entries.lock();
        let now = Instant::now();
        let is_due = entries.peek()?.at <= now;
        let task = is_due.then(|| entries.pop()).flatten().map(|first| first.task);
        if let Some(next) = entries.peek() {
            self.set(next.at.saturating_duration_since(now));
        }
        task
    }

    /// Called when the timer has expired.
    pub(super) fn acknowledge(&self) {
        // EAGAIN if another worker has read the timer.
        let _ = self.timer.wait();
    }

    /// Makes the timer expire again if a task is due, because the worker that it woke may hang.
    pub(super) fn rearm(&self) {
        let entries = self.entries.lock();
        if entries.peek().is_some_and(|first| first.at <= Instant::now()) {
            self.set(Duration::ZERO);
        }
    }

    fn set(&self, wait: Duration) {
        // A timer that is set to zero never expires.
        let wait = wait.max(Duration::from_nanos(1));
        let set = self.timer.set(Expiration::OneShot(wait.into()), TimerSetTimeFlags::empty());
        set.expect("a timer takes a time");
    }
}

impl<R> AsFd for Timers<R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// The longest wait, because a source may ask for a pause that no clock can count: a year.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// Entries are compared by their times only: the earlier one is the greater one.
impl<R> Ord for Entry<R> {
    fn cmp(&self, other: &Self) -> cmp::Ordering {
        other.at.cmp(&self.at)
    }
}

impl<R> PartialOrd for Entry<R> {
    fn partial_cmp(&self, other: &Self) -> Option<cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<R> PartialEq for Entry<R> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<R> Eq for Entry<R> {}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn tasks_become_due_in_order_and_the_timer_reports_each() {
        let timers = Timers::<()>::new().unwrap();
        for wait in [30, 10, 20] {
            timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::from_millis(wait));
        }
        assert!(timers.take().is_none(), "not yet");
        for left in (0..3).rev() {
            poll(&mut [PollFd::new(timers.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            timers.acknowledge();
            assert!(timers.take().is_some());
            assert_eq!(timers.entries.lock().len(), left);
        }
        assert!(timers.take().is_none());
    }

    #[test]
    fn the_timer_reports_a_due_task_again_after_a_rearm() {
        let timers = Timers::<()>::new().unwrap();
        timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::ZERO);
        let is_ready = |wait: u16| {
            poll(&mut [PollFd::new(timers.as_fd(), PollFlags::POLLIN)], PollTimeout::from(wait)).unwrap() > 0
        };
        assert!(is_ready(60_000));
        // A worker reads the timer, and hangs.
        timers.acknowledge();
        assert!(!is_ready(0));
        timers.rearm();
        assert!(is_ready(60_000) && timers.take().is_some());
        timers.acknowledge();
        timers.rearm();
        assert!(!is_ready(0));
    }

    #[test]
    fn a_pause_beyond_the_end_of_the_clock_is_a_long_pause() {
        let timers = Timers::<()>::new().unwrap();
        timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::MAX);
        assert!(timers.take().is_none());
        timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::ZERO);
        assert!(timers.take().is_some());
        assert!(timers.take().is_none());
    }
}
