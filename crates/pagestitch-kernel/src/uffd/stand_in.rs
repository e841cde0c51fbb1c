//! A stand-in for the userfaultfd of memory that needs none, because all of its pages are present.

use super::kept_fd::KeptFd;
use super::read::ReadMethod;
use super::{FaultMode, OpenedBy, Uffd};
use crate::errno::Errno;
use crate::features::Features;
use nix::sys::memfd::{MFdFlags, memfd_create};

impl Uffd {
    /// A stand-in, for a process that may not open a userfaultfd. No memory can be registered with
    /// it, and each fill is refused. Its descriptor is an empty memfd.
    ///
    /// # Errors
    ///
    /// The errno of `memfd_create(2)`.
    pub fn stand_in() -> Result<Self, Errno> {
        let fd = memfd_create(c"pagestitch-stand-in", MFdFlags::MFD_CLOEXEC).map_err(Errno::of)?;
        Ok(Self {
            fd: KeptFd::own(fd),
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
