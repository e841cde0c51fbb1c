//! A gate that threads enter until it is closed: after [`Gate::close`] no thread is inside, and
//! none can enter.
//!
//! To enter and to leave take one atomic operation each, no lock and no allocation.

use crate::sync::EventCount;
use crate::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// A gate that threads enter until it is closed.
#[derive(Debug, Default)]
pub struct Gate {
    /// The number of guards, plus [`CLOSED`] once the gate is closed.
    state: AtomicUsize,
    /// `close` waits here for the last guard.
    left: EventCount,
}

impl Gate {
    /// An open gate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters the gate; `None` if it is closed. The thread is inside until it drops the guard.
    #[must_use]
    pub fn enter(&self) -> Option<GateGuard<'_>> {
        let before = self.state.fetch_add(1, Ordering::SeqCst);
        let guard = GateGuard { gate: self };
        // If the gate is closed, the drop of this guard takes the count back and wakes `close`.
        (before & CLOSED == 0).then_some(guard)
    }

    /// As [`enter`](Self::enter), with a guard that owns a share of the gate.
    #[must_use]
    pub fn enter_owned(self: &Arc<Self>) -> Option<OwnedGateGuard> {
        let guard = self.enter()?;
        // The drop of the owned guard takes the count back.
        std::mem::forget(guard);
        Some(OwnedGateGuard { gate: Arc::clone(self) })
    }

    /// Closes the gate and waits until the last guard is dropped. A thread that calls this while it
    /// holds a guard waits for itself.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        self.left.wait_while(|| self.state.load(Ordering::SeqCst) != CLOSED);
    }

    /// True if [`close`](Self::close) has been called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }
}

/// Proof that a thread is inside a [`Gate`].
#[derive(Debug)]
pub struct GateGuard<'g> {
    gate: &'g Gate,
}

/// Proof that a thread is inside a [`Gate`], which it keeps alive.
#[derive(Debug)]
pub struct OwnedGateGuard {
    gate: Arc<Gate>,
}

impl Drop for OwnedGateGuard {
    fn drop(&mut self) {
        drop(GateGuard { gate: &self.gate });
    }
}

impl Drop for GateGuard<'_> {
    fn drop(&mut self) {
        if self.gate.state.fetch_sub(1, Ordering::SeqCst) == CLOSED + 1 {
            self.gate.left.notify_all();
        }
    }
}

const CLOSED: usize = 1 << (usize::BITS - 1);

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn a_closed_gate_cannot_be_entered() {
        let gate = Gate::new();
        assert!(gate.enter().is_some());
        gate.close();
        assert!(gate.is_closed());
        assert!(gate.enter().is_none());
    }

    #[test]
    fn close_waits_for_the_last_guard() {
        let gate = Gate::new();
        let gone = AtomicBool::new(false);
        thread::scope(|scope| {
            let guard = gate.enter().expect("open");
            let closer = scope.spawn(|| {
                gate.close();
                assert!(gone.load(Ordering::Acquire), "closed while a guard was inside");
            });
            while !gate.is_closed() {
                thread::yield_now();
            }
            gone.store(true, Ordering::Release);
            drop(guard);
            closer.join().expect("the closer saw the guard gone");
        });
    }
}

#[cfg(all(test, shuttle))]
mod models {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use crate::sync::model::{explore, explore_all};
    use shuttle::thread;

    /// Guards come and go while the gate closes: none is left afterwards, and `close` returns.
    fn closed_among(guards: usize) {
        let shared = Arc::new((Gate::new(), AtomicBool::new(false)));
        let guard = |shared: Arc<(Gate, AtomicBool)>| {
            move || {
                let guard = shared.0.enter();
                assert!(guard.is_none() || !shared.1.load(Ordering::SeqCst), "inside a closed gate");
            }
        };
        let guards: Vec<_> = (0..guards).map(|_| thread::spawn(guard(Arc::clone(&shared)))).collect();
        shared.0.close();
        shared.1.store(true, Ordering::SeqCst);
        guards.into_iter().for_each(|guard| guard.join().unwrap());
        assert!(shared.0.enter().is_none());
    }

    #[test]
    fn a_gate_closes_while_a_thread_enters() {
        explore_all("a gate and a guard", || closed_among(1));
    }

    #[test]
    fn a_gate_closes_while_three_threads_enter() {
        explore("a gate and three guards", || closed_among(3));
    }
}
