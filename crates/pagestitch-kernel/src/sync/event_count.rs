//! An event count: threads wait in it for a condition on atomics, which other threads change
//! without a lock.

use super::atomic::{AtomicUsize, Ordering};
use super::futex::Futex;

/// A place where threads wait until a condition on atomics changes. A thread that changes the
/// atomics calls [`notify_all`](Self::notify_all) afterwards.
///
/// Neither side takes a lock, so a signal handler may notify even if it has interrupted a waiting
/// thread.
#[derive(Debug, Default)]
pub struct EventCount {
    /// The number of waiting threads. `notify_all` reads it first.
    waiters: AtomicUsize,
    changes: Futex,
}

impl EventCount {
    /// An event count without waiters.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits as long as `condition` holds. The condition reads with [`Ordering::SeqCst`].
    pub fn wait_while(&self, condition: impl Fn() -> bool) {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        loop {
            // Read before the condition, because a thread that changes the condition later also
            // changes this count.
            let seen = self.changes.now();
            if !condition() {
                break;
            }
            self.changes.wait(seen);
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes the waiting threads after a write with [`Ordering::SeqCst`]. Without waiters, the cost
    /// is one load.
    pub fn notify_all(&self) {
        // Both sides are sequentially consistent: either the waiter sees the change, or this thread
        // sees the waiter.
        if self.has_waiters() {
            self.changes.change();
        }
    }

    /// True if a thread waits.
    #[must_use]
    pub fn has_waiters(&self) -> bool {
        self.waiters.load(Ordering::SeqCst) > 0
    }
}

#[cfg(all(test, shuttle))]
mod models {
    use super::*;
    use crate::sync::model::{explore, explore_all};
    use shuttle::thread;
    use std::sync::Arc;

    #[test]
    fn a_waiter_is_notified() {
        explore_all("an event count for one", || {
            let shared = Arc::new((EventCount::new(), AtomicUsize::new(0)));
            let waiting = Arc::clone(&shared);
            let waiter =
                thread::spawn(move || waiting.0.wait_while(|| waiting.1.load(Ordering::SeqCst) == 0));
            shared.1.store(1, Ordering::SeqCst);
            shared.0.notify_all();
            waiter.join().unwrap();
        });
    }

    #[test]
    fn two_notifiers_leave_no_waiter() {
        explore("an event count", || {
            let shared = Arc::new((EventCount::new(), AtomicUsize::new(0)));
            let waiting = Arc::clone(&shared);
            let waiter = thread::spawn(move || waiting.0.wait_while(|| waiting.1.load(Ordering::SeqCst) < 2));
            let telling = Arc::clone(&shared);
            let teller = thread::spawn(move || {
                telling.1.fetch_add(1, Ordering::SeqCst);
                telling.0.notify_all();
            });
            shared.1.fetch_add(1, Ordering::SeqCst);
            shared.0.notify_all();
            teller.join().unwrap();
            waiter.join().unwrap();
        });
    }
}
