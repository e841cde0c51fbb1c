//! A uffd that its drop closes, unless it is kept open for good. A duplicate is no alternative,
//! because it may be refused at the limit on descriptors.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct KeptFd {
    /// Invariant: dropped once at most, in `drop`.
    fd: ManuallyDrop<OwnedFd>,
    stays: AtomicBool,
}

impl KeptFd {
    /// Owns the descriptor of a userfaultfd.
    pub(super) const fn own(fd: OwnedFd) -> Self {
        Self { fd: ManuallyDrop::new(fd), stays: AtomicBool::new(false) }
    }

    /// Leaves the descriptor open after the drop.
    pub(super) fn keep(&self) {
        self.stays.store(true, Ordering::SeqCst);
    }
}

impl AsFd for KeptFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for KeptFd {
    fn drop(&mut self) {
        if !self.stays.load(Ordering::SeqCst) {
            // SAFETY: by the field's invariant it was not dropped before, and no code uses `self`
            // afterwards.
            #[expect(unsafe_code, reason = "drops a field by hand")]
            unsafe {
                ManuallyDrop::drop(&mut self.fd);
            }
        }
    }
}
