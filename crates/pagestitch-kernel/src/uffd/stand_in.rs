//! A stand-in for the userfaultfd of memory that needs none, because all of its pages are present.

use super::kept_fd::KeptFd;
use super::read::ReadMethod;
use super::{FaultMode, OpenedBy, Uffd};
use crate::errno::Errno;
use crate::features::Features;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

impl Uffd {
    /// A stand-in, for memory without missing pages. No memory can be registered with it, each fill
    /// is refused, and it has no message. All stand-ins share one descriptor, because
    /// opening and closing one takes as long as mapping a file.
    ///
    /// # Errors
    ///
    /// The errno of `eventfd(2)`, of the first stand-in of the process: `EMFILE` if no descriptor is
    /// left.
    pub fn stand_in() -> Result<Self, Errno> {
        Ok(Self {
            fd: KeptFd::shared(shared_descriptor()?),
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

/// The descriptor of all stand-ins: an eventfd, which costs the kernel the least.
fn shared_descriptor() -> Result<BorrowedFd<'static>, Errno> {
    static SHARED: OnceLock<EventFd> = OnceLock::new();
    if let Some(fd) = SHARED.get() {
        return Ok(fd.as_fd());
    }
    let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(Errno::of)?;
    // Another thread may have been first; the descriptor of this one is closed then.
    Ok(SHARED.get_or_init(|| fd).as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, OwnedFd};

    #[test]
    fn stand_ins_share_a_descriptor_that_stays_open() {
        let (one, other) = (Uffd::stand_in().unwrap(), Uffd::stand_in().unwrap());
        let number = one.as_fd().as_raw_fd();
        assert_eq!(other.as_fd().as_raw_fd(), number);
        drop(one);
        let duplicate = OwnedFd::from(other);
        assert_ne!(duplicate.as_raw_fd(), number);
        assert_eq!(Uffd::stand_in().unwrap().as_fd().as_raw_fd(), number);
    }
}
