//! The priority of a worker while many threads wait for the same pages.
//!
//! Threads that touch the same pages in the same order wait for each page together. The fill wakes all of
//! them, and the worker pays for the wakes. So the kernel lets each of them run before the worker, and
//! each waits for the next page again. A worker with a higher priority fills the next page after the
//! first touch, and the other threads find it present. Measured with eight threads on one CPU: 15 us a
//! page, where it took 40.
//!
//! Not at all times: a worker that runs before the touching thread sleeps makes a single thread slower.
//!
//! A source may start threads in the meantime, such as those of a runtime that starts at its first use.
//! They must not inherit the priority: the kernel lets them begin with a nice value of 0. So only a
//! worker that has this value itself changes it.

use pagestitch_kernel::priority::{keep_from_children, nice, set_nice};

/// The priority of the thread of a worker.
#[derive(Debug, Default)]
pub(super) struct Urgency {
    /// False if the priority is not changed: the thread belongs to the caller, has a nice value of its
    /// own, or may not change it.
    may_rise: bool,
    /// The batches until it is lowered again; 0 if it is not raised.
    left: u32,
}

impl Urgency {
    /// For the calling thread, which belongs to a pool.
    pub(super) fn of_this_thread() -> Self {
        Self { may_rise: nice() == USUAL, left: 0 }
    }

    /// Notes a batch of so many messages for so many pages, and raises or lowers the priority.
    #[inline]
    pub(super) fn note(&mut self, messages: usize, pages: usize) {
        let is_shared = messages >= 2 * pages + 2;
        if is_shared || self.left > 0 {
            self.change(is_shared);
        }
    }

    #[cold]
    fn change(&mut self, is_shared: bool) {
        if !self.may_rise {
            return;
        }
        if is_shared {
            // Without the privilege it is not tried again.
            let raise = || keep_from_children().and_then(|()| set_nice(RAISED));
            if self.left == 0 && raise().is_err() {
                self.may_rise = false;
                return;
            }
            self.left = BATCHES;
            return;
        }
        self.left -= 1;
        if self.left == 0 {
            // Lowering the priority needs no privilege.
            let _ = set_nice(USUAL);
        }
    }
}

/// The nice value that threads begin with.
const USUAL: i32 = 0;
/// The nice value of a raised priority, which is ten times the share of the CPU.
const RAISED: i32 = -10;
/// Batches for single threads until the priority is lowered. With a raised priority few threads wait
/// for the same page, although they touch the same pages.
const BATCHES: u32 = 256;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_worker_has_a_higher_priority_while_threads_wait_for_the_same_page() {
        let checked = thread::spawn(|| {
            let (before, mut urgency) = (nice(), Urgency::of_this_thread());
            urgency.note(3, 3);
            assert_eq!(nice(), before);
            urgency.note(8, 1);
            let raised = nice();
            // An ordinary user may not raise it.
            assert!(raised == before || (before, raised) == (USUAL, RAISED), "{raised}");
            (0..BATCHES).for_each(|_| urgency.note(1, 1));
            assert_eq!(nice(), before);
            Urgency::default().note(8, 1);
            assert_eq!(nice(), before, "the thread of a caller");
            set_nice(before.max(3)).unwrap();
            Urgency::of_this_thread().note(8, 1);
            assert_eq!(nice(), before.max(3), "a thread with a nice value of its own");
        });
        checked.join().unwrap();
    }
}
