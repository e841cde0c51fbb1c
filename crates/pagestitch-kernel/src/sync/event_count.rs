//! An event count: where threads wait for what other threads say by atomics, and do not lock for.

use super::atomic::{AtomicUsize, Ordering};
use super::futex::Futex;

/// Where threads wait until atomics say something else. Whoever changes these, without a lock, [tells](Self::notify_all) then.
///
/// Neither side takes a lock: a signal handler tells also where it has interrupted a thread that waits.
#[derive(Debug, Default)]
pub struct EventCount {
    /// How many threads are inside; who tells looks here first.
    waiters: AtomicUsize,
    changes: Futex,
}

impl EventCount {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits as long as `condition` holds, which reads with [`Ordering::SeqCst`].
    pub fn wait_while(&self, condition: impl Fn() -> bool) {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        loop {
            // Seen before the condition is looked at: whoever changes that later changes this, too.
            let seen = self.changes.now();
            if !condition() {
                break;
            }
            self.changes.wait(seen);
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// Called when something has changed, by a write with [`Ordering::SeqCst`]. Where nobody waits, that is one load.
    pub fn notify_all(&self) {
        // Sequentially consistent on both sides: either who waits sees what has changed, or we see who waits.
        if self.has_waiters() {
            self.changes.change();
        }
    }

    /// Whether somebody waits.
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
    fn who_waits_is_told() {
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
    fn nobody_is_left_waiting() {
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
