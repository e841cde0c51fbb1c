//! The fork reader: a thread that reads the events of regions whose children are served, and passes
//! them to the workers.
//!
//! `fork(2)` does not return before its event has been read, and the C library holds the locks of
//! its allocator meanwhile. A worker that waits for one of these locks reads no event, and sources
//! allocate; so the fork and the worker could wait for each other forever. The fork reader
//! allocates nothing, frees nothing, logs nothing, and takes no lock under which another thread
//! does so.

use crate::serve::Served;
use crate::serve::watch::watch;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollFlags};
use pagestitch_kernel::Errno;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The regions whose events the fork reader reads. Each has one shard.
#[derive(Debug)]
pub(crate) struct ForkReader {
    pub(super) ready: Epoll,
    /// Sorted by descriptor. A change builds the new list outside the lock, because that allocates.
    /// The standard library's lock, because waiting for it does not allocate.
    regions: Mutex<Vec<(RawFd, Arc<Served>)>>,
}

impl ForkReader {
    /// It also wakes up when `stop` is readable.
    pub(crate) fn new(stop: impl AsFd) -> Result<Self, Errno> {
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Errno::of)?;
        watch(&ready, stop, EpollFlags::EPOLLIN)?;
        Ok(Self { ready, regions: Mutex::default() })
    }

    pub(crate) fn add(&self, region: &Arc<Served>) -> Result<(), Errno> {
        self.replace(|regions| regions.push((region.uffd.get(0).as_fd().as_raw_fd(), Arc::clone(region))));
        watch(&self.ready, region.uffd.get(0), EpollFlags::EPOLLIN)
    }

    pub(crate) fn remove(&self, region: &Served) {
        // ENOENT if the region was not added completely.
        let _ = self.ready.delete(region.uffd.get(0));
        self.replace(|regions| regions.retain(|(_, other)| !std::ptr::eq(other.as_ref(), region)));
    }

    fn replace(&self, change: impl Fn(&mut Vec<(RawFd, Arc<Served>)>)) {
        loop {
            let room = self.lock().len() + 1;
            let mut changed = Vec::with_capacity(room);
            let mut regions = self.lock();
            if regions.len() < room {
                changed.extend(regions.iter().cloned());
                change(&mut changed);
                changed.sort_unstable_by_key(|(fd, _)| *fd);
                std::mem::swap(&mut *regions, &mut changed);
                // The old list is freed when the lock is not held any more.
                drop(regions);
                return;
            }
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<(RawFd, Arc<Served>)>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
