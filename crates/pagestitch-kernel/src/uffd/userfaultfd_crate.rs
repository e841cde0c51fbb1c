//! Conversions from and to the `Uffd` of the `userfaultfd` crate, behind the feature `userfaultfd`.
//!
//! Both types own the descriptor of a userfaultfd. A conversion hands that descriptor over.

use super::{AdoptError, OwnMemory, Uffd};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

impl From<Uffd> for userfaultfd::Uffd {
    fn from(uffd: Uffd) -> Self {
        let fd = OwnedFd::from(uffd).into_raw_fd();
        // SAFETY: the descriptor is of a userfaultfd, and `into_raw_fd` has taken it from its only
        // owner.
        #[expect(unsafe_code, reason = "the userfaultfd crate takes raw descriptors")]
        unsafe {
            Self::from_raw_fd(fd)
        }
    }
}

/// As [`Uffd::adopt`]: memory of another process.
impl TryFrom<userfaultfd::Uffd> for Uffd {
    type Error = AdoptError;

    fn try_from(uffd: userfaultfd::Uffd) -> Result<Self, AdoptError> {
        Self::adopt(owned(uffd))
    }
}

/// As [`Uffd::adopt_own`]: memory of any process, also of this one.
impl TryFrom<(userfaultfd::Uffd, OwnMemory)> for Uffd {
    type Error = AdoptError;

    fn try_from((uffd, promise): (userfaultfd::Uffd, OwnMemory)) -> Result<Self, AdoptError> {
        Self::adopt_own(owned(uffd), promise)
    }
}

fn owned(uffd: userfaultfd::Uffd) -> OwnedFd {
    // `into_raw_fd` of version 0.9 closes the descriptor that it returns, in its drop.
    let uffd = ManuallyDrop::new(uffd);
    // SAFETY: `uffd` owns the descriptor alone, and is neither used nor dropped again.
    #[expect(unsafe_code, reason = "the userfaultfd crate gives raw descriptors")]
    unsafe {
        OwnedFd::from_raw_fd(uffd.as_raw_fd())
    }
}
