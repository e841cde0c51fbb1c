//! A door that can be closed: after [`Gate::close`] nobody is inside, and nobody gets in.
//!
//! Entering and leaving are one atomic operation each, take no lock and allocate nothing.

use crate::sync::EventCount;
use crate::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// A door that visitors pass until it is closed.
#[derive(Debug, Default)]
pub struct Gate {
    /// Visitors inside, plus [`CLOSED`] once the door is shut.
    state: AtomicUsize,
    /// Where the closer waits for the last visitor.
    left: EventCount,
}

impl Gate {
    /// An open gate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes in, unless the gate is closed. The guard lasts until the value is dropped.
    #[must_use]
    pub fn enter(&self) -> Option<GateGuard<'_>> {
        let before = self.state.fetch_add(1, Ordering::SeqCst);
        let guard = GateGuard { gate: self };
        // Too late: the dropped guard takes the count back, and tells the closer if it waits for that.
        (before & CLOSED == 0).then_some(guard)
    }

    /// The same, for a guard that outlives the caller.
    #[must_use]
    pub fn enter_owned(self: &Arc<Self>) -> Option<OwnedGateGuard> {
        let guard = self.enter()?;
        // Left when the owned guard is dropped.
        std::mem::forget(guard);
        Some(OwnedGateGuard { gate: Arc::clone(self) })
    }

    /// Closes the gate and waits until the last visitor has left. A visitor that calls this waits for itself.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        self.left.wait_while(|| self.state.load(Ordering::SeqCst) != CLOSED);
    }

    /// Whether [`close`](Self::close) has been called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }
}

/// The proof of being inside a [`Gate`].
#[derive(Debug)]
pub struct GateGuard<'g> {
    gate: &'g Gate,
}

/// The proof of being inside a [`Gate`], kept for as long as it takes.
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
    fn a_closed_gate_lets_nobody_in() {
        let gate = Gate::new();
        assert!(gate.enter().is_some());
        gate.close();
        assert!(gate.is_closed());
        assert!(gate.enter().is_none());
    }

    #[test]
    fn closing_waits_for_the_last_visitor() {
        let gate = Gate::new();
        let gone = AtomicBool::new(false);
        thread::scope(|scope| {
            let guard = gate.enter().expect("open");
            let closer = scope.spawn(|| {
                gate.close();
                assert!(gone.load(Ordering::Acquire), "closed while a visitor was inside");
            });
            while !gate.is_closed() {
                thread::yield_now();
            }
            gone.store(true, Ordering::Release);
            drop(guard);
            closer.join().expect("the closer saw the visitor gone");
        });
    }
}

#[cfg(all(test, shuttle))]
mod models {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use crate::sync::model::{explore, explore_all};
    use shuttle::thread;

    /// Visitors come and go while it is closed: nobody is inside then, and who closes it does not wait for ever.
    fn closed_among(visitors: usize) {
        let shared = Arc::new((Gate::new(), AtomicBool::new(false)));
        let guard = |shared: Arc<(Gate, AtomicBool)>| {
            move || {
                let guard = shared.0.enter();
                assert!(guard.is_none() || !shared.1.load(Ordering::SeqCst), "inside a closed gate");
            }
        };
        let visitors: Vec<_> = (0..visitors).map(|_| thread::spawn(guard(Arc::clone(&shared)))).collect();
        shared.0.close();
        shared.1.store(true, Ordering::SeqCst);
        visitors.into_iter().for_each(|visitor| visitor.join().unwrap());
        assert!(shared.0.enter().is_none());
    }

    #[test]
    fn a_gate_is_closed_while_somebody_comes() {
        explore_all("a gate and a visitor", || closed_among(1));
    }

    #[test]
    fn a_gate_is_closed_while_several_come() {
        explore("a gate and three visitors", || closed_among(3));
    }
}
