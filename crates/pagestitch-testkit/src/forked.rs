//! Children of `fork(2)`, of a process with threads: they touch memory, and exit.

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork};

/// A child that runs.
#[derive(Debug)]
#[must_use = "it is to be waited for"]
pub struct ForkedChild(Pid);

impl ForkedChild {
    /// Starts a child that ends with what `body` says, or by a signal; after half a minute by SIGALRM.
    ///
    /// # Panics
    ///
    /// If it cannot be had.
    #[expect(unsafe_code, reason = "fork(2) is unsafe for what its child may do")]
    pub fn start(body: impl FnOnce() -> i32) -> Self {
        // SAFETY: what a child may do is up to the tests that ask for one: to touch memory. The C library lets it allocate.
        match unsafe { fork() }.expect("a process") {
            ForkResult::Parent { child } => Self(child),
            ForkResult::Child => {
                alarm::set(30);
                let code = body();
                // Not exit(3): it waits for a lock of the standard library's, that a thread may have held when it was forked away.
                // SAFETY: it takes a number, and ends the process.
                unsafe { nix::libc::_exit(code) }
            }
        }
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> Pid {
        self.0
    }

    /// Waits for its end, and says how that came.
    ///
    /// # Panics
    ///
    /// If it was waited for by somebody else.
    #[must_use]
    pub fn wait(self) -> WaitStatus {
        waitpid(self.0, None).expect("a child of ours")
    }

    /// Waits for its end. Whether its body said 0.
    #[must_use]
    pub fn succeeds(self) -> bool {
        matches!(self.wait(), WaitStatus::Exited(_, 0))
    }
}
