//! A uffd that its drop closes, unless it is kept open for good. A duplicate is no alternative,
//! because it may be refused at the limit on descriptors.

use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct KeptFd {
    /// Invariant: `None` only while it is dropped or given up.
    fd: Option<OwnedFd>,
    stays: AtomicBool,
}

impl KeptFd {
    /// Owns the descriptor of a userfaultfd.
    pub(super) const fn own(fd: OwnedFd) -> Self {
        Self { fd: Some(fd), stays: AtomicBool::new(false) }
    }

    /// Leaves the descriptor open after the drop.
    pub(super) fn keep(&self) {
        self.stays.store(true, Ordering::SeqCst);
    }

    /// Gives the descriptor up, which its new owner closes.
    pub(super) fn into_fd(mut self) -> OwnedFd {
        self.fd.take().expect("by the field's invariant")
    }
}

impl AsFd for KeptFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("by the field's invariant").as_fd()
    }
}

impl Drop for KeptFd {
    fn drop(&mut self) {
        let fd = self.fd.take();
        if self.stays.load(Ordering::SeqCst) {
            mem::forget(fd);
        }
    }
}
