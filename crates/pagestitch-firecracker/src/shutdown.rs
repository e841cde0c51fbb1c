//! The request to shut a handler down, from a signal handler or another thread.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Shuts a handler down, from a signal handler or another thread. The first request lets the handler
/// fill the memory of its guests; the second ends that work.
///
/// ```no_run
/// # use pagestitch_firecracker::{Handler, Snapshot};
/// let handler = Handler::builder(Snapshot::open(["base.mem"])?).bind("/run/vm/uffd.sock")?;
/// let stop = handler.shutdown_handle();
/// std::thread::spawn(move || {
///     let _ = std::io::stdin().read_line(&mut String::new());
///     stop.shutdown();                                        // fills the memory of all guests; again: at once
/// });
/// handler.run(|event| println!("{event}"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ShutdownHandle(Arc<EventFd>);

impl ShutdownHandle {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        Ok(Self(Arc::new(EventFd::from_flags(flags)?)))
    }

    /// Requests the shutdown. Async-signal-safe.
    pub fn shutdown(&self) {
        let _ = self.0.write(1);
    }

    /// Takes one request, so that [`is_requested`](Self::is_requested) tells of the next one.
    pub(crate) fn take(&self) {
        let _ = self.0.read();
    }

    pub(crate) fn is_requested(&self) -> bool {
        let mut request = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut request, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for ShutdownHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
