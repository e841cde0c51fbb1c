//! The usher: a thread that reads the events of regions whose children are served, and hands all of it on.
//!
//! `fork(2)` does not return before its event has been read, and the C library holds the locks of its allocator meanwhile. A worker
//! that waits for one of these reads nothing, and sources allocate; so they could wait for each other, and for ever. The usher
//! allocates nothing, frees nothing, logs nothing, and takes no lock under which somebody else does.

use crate::serve::Served;
use crate::serve::fork::strays::Rest;
use crate::serve::pool::{Shared, watch};
use crate::serve::worker::asked_of;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use pagestitch_kernel::Batch;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What it reads.
#[derive(Debug)]
pub(crate) struct Usher {
    ready: Epoll,
    /// By their descriptors. Made anew beside the lock, as that is to allocate. The standard library's lock, as waiting for it does
    /// not allocate.
    regions: Mutex<Vec<(RawFd, Arc<Served>)>>,
}

impl Usher {
    /// It looks up, too, when `stop` is readable.
    pub(crate) fn new(stop: impl AsFd) -> Result<Self, Errno> {
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        watch(&ready, stop, EpollFlags::EPOLLIN)?;
        Ok(Self { ready, regions: Mutex::default() })
    }

    pub(crate) fn add(&self, region: &Arc<Served>) -> Result<(), Errno> {
        self.replace(|regions| regions.push((region.uffd.as_fd().as_raw_fd(), Arc::clone(region))));
        watch(&self.ready, &region.uffd, EpollFlags::EPOLLIN)
    }

    pub(crate) fn remove(&self, region: &Served) {
        // ENOENT where adding was refused half-way.
        let _ = self.ready.delete(&region.uffd);
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
                // What was there is freed when the lock is not held any more.
                drop(regions);
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(RawFd, Arc<Served>)>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the pool stops; says when it has all that it needs, so that nobody forks before.
    pub(crate) fn run(&self, shared: &Shared, begins: &Barrier) {
        let mut batch = Batch::with_capacity(BATCH);
        begins.wait();
        let mut left = false;
        loop {
            let wait = if left { EpollTimeout::ZERO } else { EpollTimeout::NONE };
            let mut ready = [EpollEvent::empty(); READY];
            let count = match self.ready.wait(&mut ready, wait) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => panic!("epoll_wait on an owned epoll: {errno}"),
            };
            for event in &ready[..count] {
                let fd = event.data() as RawFd;
                if fd == shared.stop.as_fd().as_raw_fd() {
                    return;
                }
                left |= self.read(fd, shared, &mut batch);
            }
            if left {
                thread::sleep(MOMENT);
                left = self.close_strays();
            }
        }
    }

    /// Sees to what nobody serves. True if something is left of it.
    fn close_strays(&self) -> bool {
        let regions = self.lock();
        regions.iter().fold(false, |left, (_, region)| region.close_strays() != Rest::None || left)
    }

    /// Hands on what there is. True if something could not be done yet.
    fn read(&self, fd: RawFd, shared: &Shared, batch: &mut Batch) -> bool {
        // Held until it is done: the last to let go of a region frees its memory.
        let regions = self.lock();
        let Ok(index) = regions.binary_search_by_key(&fd, |(fd, _)| *fd) else { return false };
        let region = &regions[index].1;
        // Also of a region that is being dropped, until its last: whoever forks may hold the allocator, and who drops waits for that.
        if region.strays.is_full() {
            // Who forks waits meanwhile.
            return true;
        }
        let again = region.read_events(batch, &mut |news| shared.pass_on(region, news));
        let read = Instant::now();
        for asked in batch.faults().iter().filter_map(|fault| asked_of(region, fault, read)) {
            shared.hand_on_or_leave(region, asked);
        }
        shared.ring_all(batch.faults().len() as u64);
        again
    }
}

/// Events read at once.
const BATCH: usize = 64;
/// Descriptors looked at after one wake-up.
const READY: usize = 16;
const MOMENT: Duration = Duration::from_millis(1);
