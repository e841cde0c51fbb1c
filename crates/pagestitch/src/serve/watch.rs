//! Descriptors that an epoll watches.

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use pagestitch_kernel::Errno;
use std::os::fd::{AsFd, AsRawFd};

/// Watches a descriptor; its events hold its number.
pub(super) fn watch(epoll: &Epoll, fd: impl AsFd, flags: EpollFlags) -> Result<(), Errno> {
    let token = fd.as_fd().as_raw_fd() as u64;
    epoll.add(fd, EpollEvent::new(flags, token)).map_err(Errno::of)
}
