//! Children of `fork(2)` of a process with threads. They touch memory, and exit.

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;

/// A running child.
#[derive(Debug)]
#[must_use = "a child stays a zombie until `wait`"]
pub struct ForkedChild(Pid);

impl ForkedChild {
    /// Starts a child that exits with the code of `body`, or with 101 if `body` panics. SIGALRM
    /// kills it after five minutes, which no child takes on a loaded machine.
    ///
    /// A body starts threads only in a process that runs no other test ([`child::run`](crate::child::run)), because a new thread waits
    /// for a lock of the standard library, which a starting or ending thread of another test may hold at the fork.
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
                alarm::set(300);
                // A panic must not unwind into the frames of the parent, because the thread would end
                // there, and with it the child: with code 0.
                let code = catch_unwind(AssertUnwindSafe(body)).unwrap_or(PANICKED);
                // Not exit(3), because exit(3) takes locks of the standard library that another
                // thread may have held at the fork.
                // SAFETY: ends the process of the child, and touches no memory.
                unsafe { nix::libc::_exit(code) }
            }
        }
    }

    /// The pid of the child.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.0.as_raw() as u32
    }

    /// Waits for the end of the child, and returns its status.
    ///
    /// # Panics
    ///
    /// If another thread has waited for the child.
    #[must_use]
    pub fn wait(self) -> ExitStatus {
        match waitpid(self.0, None).expect("a child of ours") {
            WaitStatus::Exited(_, code) => ExitStatus::from_raw(code << 8),
            WaitStatus::Signaled(_, signal, _) => ExitStatus::from_raw(signal as i32),
            other => unreachable!("waitpid(2) returns at the end of the child: {other:?}"),
        }
    }

    /// Waits for the end of the child. True if its body returned 0.
    #[must_use]
    pub fn succeeds(self) -> bool {
        self.wait().success()
    }
}

/// The exit code of a child whose body panicked, as that of a program whose main thread panicked.
const PANICKED: i32 = 101;
