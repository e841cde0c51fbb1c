//! A uffd that is closed when it is dropped, or stays open for good. To duplicate it instead could be refused, where there is no
//! descriptor left.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct KeptFd {
    /// Invariant: dropped once, in `drop`.
    fd: ManuallyDrop<userfaultfd::Uffd>,
    stays: AtomicBool,
}

impl KeptFd {
    pub(super) const fn new(fd: userfaultfd::Uffd) -> Self {
        Self { fd: ManuallyDrop::new(fd), stays: AtomicBool::new(false) }
    }

    /// Leaves it open when this is dropped.
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
            // SAFETY: by the field's invariant it was not dropped, and `self` is not used any more.
            #[expect(unsafe_code, reason = "drops a field by hand")]
            unsafe {
                ManuallyDrop::drop(&mut self.fd);
            }
        }
    }
}
