//! A userfaultfd whose messages a test writes.

use crate::features::Features;
use crate::uffd::Uffd;
use crate::uffd::kept_fd::KeptFd;
use crate::uffd::opened::{FaultMode, OpenedBy};
use crate::uffd::read::ReadMethod;
use std::os::fd::OwnedFd;

/// Takes a descriptor for a userfaultfd whose messages a test writes.
///
/// # Safety
///
/// - A pretended fork event holds a descriptor without an owner, because the child's [`Uffd`]
///   closes it.
/// - If the descriptor is a userfaultfd of this process, the promise of
///   [`OwnMemory`](crate::uffd::OwnMemory) holds for its memory.
#[must_use]
#[expect(unsafe_code, reason = "declares an obligation")]
pub unsafe fn pretend(fd: OwnedFd) -> Uffd {
    Uffd {
        fd: KeptFd::own(fd),
        opened_by: OpenedBy::Other,
        mode: FaultMode::UserOnly,
        features: Features::default(),
        read_method: ReadMethod::Own,
    }
}
