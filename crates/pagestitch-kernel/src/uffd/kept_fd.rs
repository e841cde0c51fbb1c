//! A uffd that its drop closes, unless it is kept open for good. A duplicate is no alternative,
//! because it may be refused at the limit on descriptors.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct KeptFd {
    /// Invariant: dropped once at most, in `drop`.
    fd: ManuallyDrop<userfaultfd::Uffd>,
    stays: AtomicBool,
}

impl KeptFd {
    /// Owns the descriptor of a userfaultfd.
    pub(super) fn own(fd: OwnedFd) -> Self {
        // SAFETY: the fd is a userfaultfd without another owner, because `into_raw_fd` of an OwnedFd
        // gives it up.
        #[expect(unsafe_code, reason = "the userfaultfd crate takes raw descriptors")]
        let uffd = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        Self { fd: ManuallyDrop::new(uffd), stays: AtomicBool::new(false) }
    }

    /// Leaves the descriptor open after the drop.
    pub(super) fn keep(&self) {
        self.stays.store(true, Ordering::SeqCst);
    }
}

impl Deref for KeptFd {
    type Target = userfaultfd::Uffd;

    fn deref(&self) -> &userfaultfd::Uffd {
        &self.fd
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
