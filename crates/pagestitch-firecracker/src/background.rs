//! The ends of background fills: they wake the thread of the handler.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::{Wake, Waker};

/// Readable after the fill of a guest has ended.
#[derive(Debug)]
pub(crate) struct FillEnds {
    ended: Arc<Ended>,
    waker: Waker,
}

#[derive(Debug)]
struct Ended(EventFd);

impl Wake for Ended {
    fn wake(self: Arc<Self>) {
        // It cannot block, because it is read after each wake.
        let _ = self.0.write(1);
    }
}

impl FillEnds {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let ended = Arc::new(Ended(EventFd::from_flags(flags)?));
        let waker = Waker::from(Arc::clone(&ended));
        Ok(Self { ended, waker })
    }

    /// The waker for each fill.
    pub(crate) const fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Called before the fills are looked at.
    pub(crate) fn acknowledge(&self) {
        let _ = self.ended.0.read();
    }
}

impl AsFd for FillEnds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.0.as_fd()
    }
}
