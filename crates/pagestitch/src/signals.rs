//! Signals that a thread of the library does not take.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Threads inherit their signal mask when they are started. An application's signal handler that ran on a worker and
/// touched a region would wait for that same worker.
pub(crate) struct NoSignals {
    before: Option<SigSet>,
}

impl NoSignals {
    pub(crate) fn until_dropped() -> Self {
        let mut blocked = SigSet::all();
        // What a thread does to itself is not blocked: the application may want a stack trace of it.
        for own in
            [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGSYS]
        {
            blocked.remove(own);
        }
        Self { before: blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok() }
    }
}

impl Drop for NoSignals {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = before.thread_set_mask();
        }
    }
}
