//! The thread of the fork reader.

use crate::serve::events::to_request;
use crate::serve::fork::fork_reader::ForkReader;
use crate::serve::fork::orphans::Rest;
use crate::serve::shared::Shared;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use pagestitch_kernel::Batch;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

impl ForkReader {
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
                left = self.close_orphans();
            }
        }
    }

    /// Sees to what nobody serves. True if something is left of it.
    fn close_orphans(&self) -> bool {
        let regions = self.lock();
        regions.iter().fold(false, |left, (_, region)| region.close_orphans() != Rest::None || left)
    }

    /// Hands on what there is. True if something could not be done yet.
    fn read(&self, fd: RawFd, shared: &Shared, batch: &mut Batch) -> bool {
        // Held until it is done: the last to let go of a region frees its memory.
        let regions = self.lock();
        let Ok(index) = regions.binary_search_by_key(&fd, |(fd, _)| *fd) else { return false };
        let region = &regions[index].1;
        // Also of a region that is being dropped, until its last: whoever forks may hold the allocator, and who drops waits for that.
        if region.orphans.is_full() {
            // Who forks waits meanwhile.
            return true;
        }
        let again = region.read_events(batch, &mut |news| shared.pass_on(region, news));
        let read = Instant::now();
        for asked in batch.faults().iter().filter_map(|fault| to_request(region, fault, read)) {
            shared.enqueue_or_leave(region, asked);
        }
        shared.wake_workers(batch.faults().len() as u64);
        again
    }
}

/// Events read at once.
const BATCH: usize = 64;
/// Descriptors looked at after one wake-up.
const READY: usize = 16;
const MOMENT: Duration = Duration::from_millis(1);
