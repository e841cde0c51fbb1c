//! The priority of a worker while many threads wait for the same pages.
//!
//! Threads that touch the same pages in the same order wait for each page together. The fill wakes all of
//! them, and the worker pays for the wakes. So the kernel lets each of them run before the worker, and
//! each waits for the next page again. A worker with a higher priority fills the next page after the
//! first touch, and the other threads find it present. Measured with eight threads on one CPU: 15 us a
//! page, where it took 40.
//!
//! Not at all times: a worker that runs before the touching thread sleeps makes a single thread slower.

use pagestitch_kernel::priority::{nice, set_nice};

/// The priority of the thread of a worker.
#[derive(Debug, Default)]
pub(super) struct Urgency {
    /// The nice value of the thread without urgency. `None` if it is not changed: the thread belongs to
    /// the caller, or the process may not raise it.
    usual: Option<i32>,
    /// The batches until it is lowered again; 0 if it is not raised.
    left: u32,
}

impl Urgency {
    /// For the calling thread, which belongs to a pool.
    pub(super) fn of_this_thread() -> Self {
        Self { usual: Some(nice()), left: 0 }
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
        let Some(usual) = self.usual else { return };
        if is_shared {
            // Without the privilege it is not tried again.
            if self.left == 0 && set_nice((usual - RAISE).max(-20)).is_err() {
                self.usual = None;
                return;
            }
            self.left = BATCHES;
            return;
        }
        self.left -= 1;
        if self.left == 0 {
            // Lowering the priority needs no privilege.
            let _ = set_nice(usual);
        }
    }
}

/// By so much the nice value is lower, which is ten times the share of the CPU.
const RAISE: i32 = 10;
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
            assert!([before, (before - RAISE).max(-20)].contains(&raised), "{raised}");
            (0..BATCHES).for_each(|_| urgency.note(1, 1));
            assert_eq!(nice(), before);
            Urgency::default().note(8, 1);
            assert_eq!(nice(), before, "the thread of a caller");
        });
        checked.join().unwrap();
    }
}
