//! The signal mask of the library's threads.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Blocks signals on the calling thread until dropped. Threads started meanwhile inherit the mask.
///
/// Without it, an application's signal handler could run on a worker, touch a region, and wait for
/// that same worker.
pub(crate) struct NoSignals {
    before: Option<SigSet>,
}

impl NoSignals {
    pub(crate) fn until_dropped() -> Self {
        let mut blocked = SigSet::all();
        // Signals that a thread raises by its own defect stay unblocked, because the application
        // may want a stack trace of them.
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
