//! A stand-in for the userfaultfd of memory that needs none, because all of its pages are present.

use super::kept_fd::KeptFd;
use super::read::ReadMethod;
use super::{FaultMode, OpenedBy, Uffd};
use crate::errno::Errno;
use crate::features::Features;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::OwnedFd;

impl Uffd {
    /// A stand-in, for memory without missing pages. No memory can be registered with it, each fill
    /// is refused, and it has no message. Its descriptor is an eventfd, which costs the kernel the
    /// least.
    ///
    /// # Errors
    ///
    /// The errno of `eventfd(2)`: `EMFILE` if no descriptor is left.
    pub fn stand_in() -> Result<Self, Errno> {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(Errno::of)?;
        Ok(Self {
            fd: KeptFd::own(OwnedFd::from(fd)),
            opened_by: OpenedBy::StandIn,
            // No system call finds a page absent.
            mode: FaultMode::All,
            features: Features::NONE,
            read_method: ReadMethod::Own,
        })
    }

    /// True if this is a [stand-in](Self::stand_in).
    #[must_use]
    pub fn is_stand_in(&self) -> bool {
        self.opened_by == OpenedBy::StandIn
    }
}
