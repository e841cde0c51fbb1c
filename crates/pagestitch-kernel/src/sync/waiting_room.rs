//! A waiting room: where threads wait for what other threads say by atomics, and do not lock for.

use super::atomic::{AtomicUsize, Ordering};
use super::futex::Futex;

/// Where threads wait until atomics say something else. Whoever changes these, without a lock, [tells](Self::tell) then.
///
/// Neither side takes a lock: a signal handler tells also where it has interrupted a thread that waits.
#[derive(Debug, Default)]
pub struct WaitingRoom {
    /// How many threads are inside; who tells looks here first.
    inside: AtomicUsize,
    told: Futex,
}

impl WaitingRoom {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits as long as `condition` holds, which reads with [`Ordering::SeqCst`].
    pub fn wait_while(&self, condition: impl Fn() -> bool) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        loop {
            // Seen before the condition is looked at: whoever changes that later changes this, too.
            let seen = self.told.now();
            if !condition() {
                break;
            }
            self.told.wait(seen);
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// Called when something has changed, by a write with [`Ordering::SeqCst`]. Where nobody waits, that is one load.
    pub fn tell(&self) {
        // Sequentially consistent on both sides: either who waits sees what has changed, or we see who waits.
        if self.is_occupied() {
            self.told.change();
        }
    }

    /// Whether somebody waits.
    #[must_use]
    pub fn is_occupied(&self) -> bool {
        self.inside.load(Ordering::SeqCst) > 0
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
        explore_all("a waiting room for one", || {
            let shared = Arc::new((WaitingRoom::new(), AtomicUsize::new(0)));
            let waiting = Arc::clone(&shared);
            let waiter =
                thread::spawn(move || waiting.0.wait_while(|| waiting.1.load(Ordering::SeqCst) == 0));
            shared.1.store(1, Ordering::SeqCst);
            shared.0.tell();
            waiter.join().unwrap();
        });
    }

    #[test]
    fn nobody_is_left_waiting() {
        explore("a waiting room", || {
            let shared = Arc::new((WaitingRoom::new(), AtomicUsize::new(0)));
            let waiting = Arc::clone(&shared);
            let waiter = thread::spawn(move || waiting.0.wait_while(|| waiting.1.load(Ordering::SeqCst) < 2));
            let telling = Arc::clone(&shared);
            let teller = thread::spawn(move || {
                telling.1.fetch_add(1, Ordering::SeqCst);
                telling.0.tell();
            });
            shared.1.fetch_add(1, Ordering::SeqCst);
            shared.0.tell();
            teller.join().unwrap();
            waiter.join().unwrap();
        });
    }
}
