//! The thread of the fork reader.

use crate::serve::events::to_request;
use crate::serve::fork::fork_reader::ForkReader;
use crate::serve::fork::orphans::Remaining;
use crate::serve::server_state::ServerState;
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use pagestitch_kernel::{Batch, Errno};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

impl ForkReader {
    /// Reads until the pool stops. Waits at `begins` when it has all that it needs, so that no
    /// thread forks before.
    pub(crate) fn run(&self, state: &ServerState, begins: &Barrier) {
        let mut batch = Batch::with_capacity(BATCH);
        begins.wait();
        let mut left = false;
        loop {
            let wait = if left { EpollTimeout::ZERO } else { EpollTimeout::NONE };
            let mut ready = [EpollEvent::empty(); READY];
            let count = match self.ready.wait(&mut ready, wait).map_err(Errno::of) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => panic!("epoll_wait on an owned epoll: {errno}"),
            };
            for event in &ready[..count] {
                let fd = event.data() as RawFd;
                if fd == state.stop.as_fd().as_raw_fd() {
                    return;
                }
                left |= self.read(fd, state, &mut batch);
            }
            if left {
                thread::sleep(MOMENT);
                left = self.close_orphans();
            }
        }
    }

    /// Poisons the next orphaned pages of all regions. True if some are left.
    fn close_orphans(&self) -> bool {
        let regions = self.lock();
        regions.iter().fold(false, |left, (_, region)| region.close_orphans() != Remaining::None || left)
    }

    /// Reads the events of a region and passes them to the workers. True if some work is left.
    fn read(&self, fd: RawFd, state: &ServerState, batch: &mut Batch) -> bool {
        // Held until this is done, because dropping the last reference to a region frees its
        // memory.
        let regions = self.lock();
        let Ok(index) = regions.binary_search_by_key(&fd, |(fd, _)| *fd) else { return false };
        let region = &regions[index].1;
        // A region that is being dropped is read to the last, too: a forking thread may hold the
        // allocator, and the thread that drops the region waits for the allocator.
        if region.orphans.is_full() {
            // The forking thread waits meanwhile.
            return true;
        }
        let again = region.read_events(0, batch, &mut |event| state.defer(region, event));
        let read = Instant::now();
        for request in batch.faults().iter().filter_map(|fault| to_request(region, fault, read)) {
            state.enqueue_or_set_aside(region, request);
        }
        state.wake_workers(batch.faults().len() as u64);
        again
    }
}

/// Events read at once.
const BATCH: usize = 64;
/// Descriptors looked at after one wake-up.
const READY: usize = 16;
const MOMENT: Duration = Duration::from_millis(1);
