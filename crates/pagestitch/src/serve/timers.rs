//! Tasks that a worker does in a moment. It does not wait for that moment, because other faults
//! need it meanwhile.
//!
//! | what | why |
//! |---|---|
//! | a fault again | the kernel had no memory for its page: there may be some, or its thread gets a signal |
//! | a fault again | its source has failed, and is asked again after a pause |
//! | a look at a region | the worker that has its turn may hang; or there is more to do, but not at once |
//!
//! Workers wait for a timer among their descriptors. The woken worker takes one entry after the
//! other. It sets the timer for the next entry before it starts one, so that another worker takes
//! over if it hangs.

use crate::serve::queue::QueuedFault;
use crate::serve::region_handle::RegionHandle;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags};
use pagestitch_kernel::Errno;
use parking_lot::Mutex;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A task for a later moment.
#[derive(Debug)]
pub(super) enum TimedTask<R> {
    Serve(QueuedFault<R>),
    Look(Arc<RegionHandle<R>>),
}

/// All timed tasks of a pool.
#[derive(Debug)]
pub(crate) struct Timers<R> {
    timer: TimerFd,
    /// Few, in no order.
    entries: Mutex<Vec<(Instant, TimedTask<R>)>>,
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

    /// Keeps a task until `wait` has passed. Returns the task if there are so many that only a
    /// hostile owner causes them.
    pub(super) fn add(&self, what: TimedTask<R>, wait: Duration) -> Result<(), TimedTask<R>> {
        let mut entries = self.entries.lock();
        if entries.len() >= MOST {
            return Err(what);
        }
        let at = Instant::now() + wait;
        if entries.iter().all(|(other, _)| at < *other) {
            self.set(wait);
        }
        entries.push((at, what));
        Ok(())
    }

    /// The next task that is due.
    pub(super) fn take(&self) -> Option<TimedTask<R>> {
        let mut entries = self.entries.lock();
        let now = Instant::now();
        let first = entries.iter().enumerate().min_by_key(|(_, (at, _))| *at).map(|(index, _)| index)?;
        let what = (entries[first].0 <= now).then(|| entries.swap_remove(first).1);
        if let Some(next) = entries.iter().map(|(at, _)| *at).min() {
            self.set(next.saturating_duration_since(now));
        }
        what
    }

    /// Called when the timer has expired.
    pub(super) fn acknowledge(&self) {
        // EAGAIN if another worker has read the timer.
        let _ = self.timer.wait();
    }

    /// Makes the timer expire again if a task is due: a worker that it woke may hang.
    pub(super) fn rearm(&self) {
        let entries = self.entries.lock();
        if entries.iter().any(|(at, _)| *at <= Instant::now()) {
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

/// How much of it is kept.
const MOST: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn what_comes_later_comes_in_order_and_the_timer_tells_of_each() {
        let timers = Timers::<()>::new().unwrap();
        for wait in [30, 10, 20] {
            timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::from_millis(wait)).unwrap();
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
    fn a_due_entry_is_told_of_again() {
        let timers = Timers::<()>::new().unwrap();
        timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::ZERO).unwrap();
        let is_told = |wait: u16| {
            poll(&mut [PollFd::new(timers.as_fd(), PollFlags::POLLIN)], PollTimeout::from(wait)).unwrap() > 0
        };
        assert!(is_told(60_000));
        // As a worker does that hangs then.
        timers.acknowledge();
        assert!(!is_told(0));
        timers.rearm();
        assert!(is_told(60_000) && timers.take().is_some());
        timers.acknowledge();
        timers.rearm();
        assert!(!is_told(0));
    }

    #[test]
    fn no_more_is_kept_than_there_may_be() {
        let timers = Timers::<()>::new().unwrap();
        let add = || timers.add(TimedTask::Look(RegionHandle::dangling()), Duration::from_secs(3600));
        assert!((0..MOST).all(|_| add().is_ok()) && add().is_err());
    }
}
