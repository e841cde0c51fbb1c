//! A uffd that its drop closes, unless it is kept open for good. A duplicate is no alternative,
//! because it may be refused at the limit on descriptors.

use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct KeptFd {
    /// Invariant: `None` only while it is dropped or given up.
    fd: Option<Descriptor>,
    stays: AtomicBool,
}

#[derive(Debug)]
enum Descriptor {
    Own(OwnedFd),
    /// The process keeps it open, and all stand-ins share it.
    Shared(BorrowedFd<'static>),
}

impl KeptFd {
    /// Owns the descriptor of a userfaultfd.
    pub(super) const fn own(fd: OwnedFd) -> Self {
        Self { fd: Some(Descriptor::Own(fd)), stays: AtomicBool::new(false) }
    }

    /// Borrows a descriptor that stays open as long as the process lives.
    pub(super) const fn shared(fd: BorrowedFd<'static>) -> Self {
        Self { fd: Some(Descriptor::Shared(fd)), stays: AtomicBool::new(false) }
    }

    /// Leaves the descriptor open after the drop.
    pub(super) fn keep(&self) {
        self.stays.store(true, Ordering::SeqCst);
    }

    /// Gives the descriptor up, which its new owner closes. A shared one is duplicated.
    ///
    /// # Panics
    ///
    /// If no descriptor is left for the duplicate.
    pub(super) fn into_fd(mut self) -> OwnedFd {
        match self.fd.take().expect("by the field's invariant") {
            Descriptor::Own(fd) => fd,
            Descriptor::Shared(fd) => fd.try_clone_to_owned().expect("a descriptor is left (ulimit -n)"),
        }
    }
}

impl AsFd for KeptFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self.fd.as_ref().expect("by the field's invariant") {
            Descriptor::Own(fd) => fd.as_fd(),
            Descriptor::Shared(fd) => *fd,
        }
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
