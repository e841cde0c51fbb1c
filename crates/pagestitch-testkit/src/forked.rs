//! Children of `fork(2)` of a process with threads. They touch memory, and exit.

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork};

/// A running child.
#[derive(Debug)]
#[must_use = "a child stays a zombie until `wait`"]
pub struct ForkedChild(Pid);

impl ForkedChild {
    /// Starts a child that exits with the code of `body`. SIGALRM kills it after half a minute.
    ///
    /// # Panics
    ///
    /// If the fork fails.
    #[expect(unsafe_code, reason = "fork(2) limits its child")]
    pub fn start(body: impl FnOnce() -> i32) -> Self {
        // SAFETY: the child has its own copy of this process's memory. It runs `body`, which
        // touches memory of its test only, and allocates, which the C library allows after a fork.
        match unsafe { fork() }.expect("a process") {
            ForkResult::Parent { child } => Self(child),
            ForkResult::Child => {
                alarm::set(30);
                let code = body();
                // Not exit(3), because exit(3) takes locks of the standard library that another
                // thread may have held at the fork.
                // SAFETY: ends the process of the child, and touches no memory.
                unsafe { nix::libc::_exit(code) }
            }
        }
    }

    /// The pid of the child.
    #[must_use]
    pub const fn id(&self) -> Pid {
        self.0
    }

    /// Waits for the end of the child, and returns its status.
    ///
    /// # Panics
    ///
    /// If another thread has waited for the child.
    #[must_use]
    pub fn wait(self) -> WaitStatus {
        waitpid(self.0, None).expect("a child of ours")
    }

    /// Waits for the end of the child. True if its body returned 0.
    #[must_use]
    pub fn succeeds(self) -> bool {
        matches!(self.wait(), WaitStatus::Exited(_, 0))
    }
}
