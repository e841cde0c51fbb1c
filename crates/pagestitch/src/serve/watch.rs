//! Descriptors that an epoll watches.

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use pagestitch_kernel::{Errno, Uffd};
use std::os::fd::{AsFd, AsRawFd};

/// Watches a descriptor; its events hold its number.
pub(super) fn watch(epoll: &Epoll, fd: impl AsFd, flags: EpollFlags) -> Result<(), Errno> {
    let token = fd.as_fd().as_raw_fd() as u64;
    epoll.add(fd, EpollEvent::new(flags, token)).map_err(Errno::of)
}

/// Watches a userfaultfd that regions share; its events hold its index, marked.
pub(super) fn watch_shared(
    epoll: &Epoll,
    (index, uffd): (usize, &Uffd),
    flags: EpollFlags,
) -> Result<(), Errno> {
    epoll.add(uffd, EpollEvent::new(flags, SHARED | index as u64)).map_err(Errno::of)
}

/// The index of the shared userfaultfd that an event of an epoll is of.
pub(super) fn shared_index(token: u64) -> Option<usize> {
    (token & SHARED != 0).then_some((token & !SHARED) as usize)
}

/// No descriptor has so large a number.
const SHARED: u64 = 1 << 63;
