//! A worker: wakes up, reads a batch of events, serves the first fault itself and hands on the rest.
//!
//! Readahead waits until no fault is queued, and goes block by block to a free worker.
//!
//! The rest of a batch goes through a bounded channel, so that a slow source holds up one worker and not the region; if no
//! worker is free, this worker comes back for it, or a replacement at its post does. A worker allocates nothing between wake-up
//! and wake-up, and never touches the memory that it serves. If it panics, the process is aborted: its waiters would hang for ever.

use crate::fault::fill::Buffers;
use crate::fault::{FaultRequest, fill_ahead, replay, serve};
use crate::guard::AbortOnPanic;
use crate::policy::Replay;
use crate::serve::Served;
use crate::serve::events::to_request;
use crate::serve::read_turn::{ReadTurn, TURN_MAX};
use crate::serve::served::{PrefetchTask, QueuedFault, RegionHandle, TimedTask};
use crate::serve::server_state::ServerState;
use crate::space::target::Busy;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::unistd::Pid;
use pagestitch_kernel::Batch;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The state of a worker. Everything it needs is made before it starts.
pub(super) struct Worker {
    state: Arc<ServerState>,
    ready: Arc<Epoll>,
    /// The CPU it stays on; `None` for any.
    cpu: Option<usize>,
    /// Its place in the crew.
    slot: usize,
    batch: Batch,
    buffers: Buffers,
    served: u64,
}

/// The outcome of one turn.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// There was something to serve.
    Busy,
    /// There was nothing.
    Quiet,
    /// The pool is being stopped.
    Stopped,
}

impl Worker {
    pub(super) fn new(
        state: Arc<ServerState>,
        ready: Arc<Epoll>,
        cpu: Option<usize>,
        slot: usize,
    ) -> Result<Self, Errno> {
        Ok(Self {
            state,
            ready,
            cpu,
            slot,
            batch: Batch::with_capacity(BATCH),
            buffers: Buffers::new()?,
            served: 0,
        })
    }

    /// Works until the pool stops, or another worker does at its post; says how many faults it has served.
    pub(super) fn run(mut self) -> u64 {
        let _abort = AbortOnPanic::armed();
        self.pin_to_cpu();
        // The faults that a hanging worker has left in the queues: no descriptor reports them.
        self.state.workers.mark_working(self.slot);
        self.serve_queued();
        self.state.workers.mark_waiting(self.slot);
        let linger = EpollTimeout::from(LINGER_MS);
        loop {
            // Faults come first; to fill ahead is what to do while there are none.
            let wait = match (self.state.has_more(), self.state.workers.has_replacements()) {
                (true, _) => EpollTimeout::ZERO,
                (false, true) => linger,
                (false, false) => EpollTimeout::NONE,
            };
            match self.turn(wait) {
                Turn::Stopped => return self.served,
                Turn::Quiet if wait == linger && self.state.workers.try_remove(self.slot) => {
                    return self.served;
                }
                Turn::Quiet | Turn::Busy => self.state.workers.mark_waiting(self.slot),
            }
        }
    }

    /// Works without waiting until nothing is left to do, or so many faults have been served; says how many were.
    pub(super) fn serve_ready(&mut self, budget: u64) -> u64 {
        let _abort = AbortOnPanic::armed();
        let before = self.served;
        while self.served - before < budget {
            let left = self.state.has_more();
            let turn = self.turn(EpollTimeout::ZERO);
            self.state.workers.mark_waiting(self.slot);
            if turn == Turn::Quiet && !left {
                break;
            }
        }
        if self.state.has_more() {
            // A loop that waits for this descriptor is woken, because work is left.
            self.state.wake_one();
        }
        self.served - before
    }

    /// Waits for events as long as it may, serves those of one descriptor, and fills one block ahead. It is at work from then on.
    fn turn(&mut self, wait: EpollTimeout) -> Turn {
        // One at a time: what else is ready stays so for the worker that takes this post over.
        let mut ready = [EpollEvent::empty()];
        let count = self.ready.wait(&mut ready, wait);
        self.state.workers.mark_working(self.slot);
        match count {
            Ok(0) => {}
            Ok(_) => {
                let fd = ready[0].data() as RawFd;
                if fd == self.state.stop.as_fd().as_raw_fd() {
                    return Turn::Stopped;
                } else if fd == self.state.wake_fd.as_fd().as_raw_fd() {
                    // EAGAIN if another worker has read it first. The channel holds the remaining work.
                    let _ = self.state.wake_fd.read();
                } else if fd == self.state.timers.fd() {
                    self.serve_later();
                } else if let Some(handle) = self.state.region(fd) {
                    self.serve_batch(&handle);
                }
            }
            Err(Errno::EINTR) => return Turn::Busy,
            Err(errno) => panic!("epoll_wait on an owned epoll: {errno}"),
        }
        self.serve_queued();
        self.fill_ahead();
        if count == Ok(0) { Turn::Quiet } else { Turn::Busy }
    }

    fn pin_to_cpu(&self) {
        let Some(cpu) = self.cpu else { return };
        let mut set = CpuSet::new();
        let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
        if let Err(errno) = pinned {
            log!(debug, cpu, %errno, "not pinned: served from any CPU, which is slower");
        }
    }

    /// Serves the pending events of a region to the last, because no worker is woken a second time
    /// for them. After [`BATCHES`] batches it requests another look instead, so that other regions
    /// come first.
    fn serve_batch(&mut self, handle: &RegionHandle) {
        let Some(region) = handle.enter() else { return };
        // Another worker reads from this adopted memory. It may hang in a source: look again later.
        let Some(mut turn) = region.acquire_turn() else { return self.state.look_later(&region, TURN_MAX) };
        for _ in 0..BATCHES {
            if self.serve_read(&region, &mut turn) == Err(Busy) {
                // The turn is not released: the next worker takes it when it is late, and does not wait either.
                return self.state.look_later(&region, TURN_MAX);
            }
            if turn.try_release(self.batch.is_full()) {
                return;
            }
        }
        // There may always be more to read: other regions come first.
        turn.release_unread();
        self.state.rearm(&self.ready, &region);
    }

    /// Reads a batch of events, and serves it or hands it on.
    fn serve_read(&mut self, region: &Arc<Served>, turn: &mut ReadTurn<'_>) -> Result<(), Busy> {
        let Self { state, ready, batch, buffers, served, slot, .. } = self;
        // Workers do not read regions whose children are served, so no event of a child arrives here.
        let defer = &mut |event| region.handle_deferred(event);
        let again = match turn.may_wait() {
            true => region.read_events(batch, defer),
            false => region.try_read_events(batch, defer)?,
        };
        if again {
            state.look_later(region, MOMENT);
        }
        let read = Instant::now();
        let read_again = turn.after_read(read, region.latency.is_fast());
        let mut pages = batch.faults().iter().filter_map(|fault| to_request(region, fault, read));
        // A worker that reads again enters no source before: all that it has read is for others.
        let (first, keeps) = if read_again { (None, 0) } else { (pages.next(), turn.local_share()) };
        let (mut queued, mut kept) = (0, 0);
        for (index, request) in pages.enumerate() {
            match state.enqueue(QueuedFault::new(region, request)).ok() {
                // Not worth another worker, but one that stands in for this one has to find them.
                Some(()) if index < keeps => kept += 1,
                Some(()) => queued += 1,
                // The channel is full, so all others have work: do it here.
                None => {
                    state.workers.step(*slot);
                    serve(region, request, buffers);
                }
            }
        }
        state.wake_others(queued);
        *served += batch.faults().len() as u64 - queued - kept;
        if batch.is_full() {
            // There is more to read, and a source may hold this worker up first: another one reads on.
            state.rearm(ready, region);
        }
        if let Some(first) = first {
            self.serve_admitted(region, first);
        }
        self.serve_some_queued(kept);
        Ok(())
    }

    /// Serves a fault. With `max_in_flight`, the fault takes a berth of its region. Without it, the
    /// fault of a fast region is served at once, without a berth, and the fault of a slow region
    /// takes a berth of the pool. A fault without a free berth waits for a worker that leaves one.
    fn serve_admitted(&mut self, region: &Arc<Served>, request: FaultRequest) {
        if let Some((most, bulkhead)) = &region.limit {
            let mut next = bulkhead.admit(*most, request);
            while let Some(request) = next {
                self.serve_now(region, request);
                next = bulkhead.release(*most);
            }
        } else if region.latency.is_fast() {
            self.serve_now(region, request);
        } else {
            let most = self.state.slow_workers_max();
            let first = self.state.slow_admission.admit(most, QueuedFault::new(region, request));
            self.serve_slow(first);
        }
    }

    /// Serves the fault of a slow region, and then each waiting fault that takes over its berth.
    fn serve_slow(&mut self, first: Option<QueuedFault>) {
        let mut next = first;
        while let Some(QueuedFault { handle, request }) = next {
            // A region that is being dropped needs no page any more.
            if let Some(region) = handle.enter() {
                self.serve_now(&region, request);
            }
            next = self.state.slow_admission.release(self.state.slow_workers_max(), &handle);
        }
    }

    fn serve_now(&mut self, region: &Arc<Served>, request: FaultRequest) {
        self.state.workers.step(self.slot);
        let ahead = serve(region, request, &mut self.buffers);
        self.state.queue_prefetch(region, ahead.into_iter().flatten());
    }

    /// Serves queued faults, and the next fault that waits for a berth, if one is free by now.
    fn serve_queued(&mut self) {
        self.state.handle_all_deferred();
        // Then it looks at the regions again, whose faults are in no channel yet.
        self.serve_some_queued(QUEUED_AT_ONCE);
        if self.state.slow_admission.has_waiters() {
            let last_resort = self.state.workers.last_resort.load(Ordering::Relaxed);
            let next = self.state.slow_admission.admit_next(self.state.slow_workers_max(), last_resort);
            self.serve_slow(next);
        }
    }

    fn serve_some_queued(&mut self, most: u64) {
        for _ in 0..most {
            let Some(QueuedFault { handle, request }) = self.state.dequeue() else { break };
            // A region that is being dropped needs no page any more.
            let Some(region) = handle.enter() else { continue };
            self.served += 1;
            self.serve_admitted(&region, request);
        }
    }

    /// Does the timed tasks that are due.
    fn serve_later(&mut self) {
        self.state.timers.acknowledge();
        for _ in 0..QUEUED_AT_ONCE {
            match self.state.timers.take() {
                Some(TimedTask::Serve(QueuedFault { handle, request })) => {
                    // A region that is being dropped needs no page any more.
                    let Some(region) = handle.enter() else { continue };
                    self.serve_admitted(&region, request);
                }
                Some(TimedTask::Look(handle)) => {
                    if let Some(region) = handle.enter() {
                        region.turns.look_begins();
                    }
                    self.serve_batch(&handle);
                }
                None => break,
            }
        }
    }

    /// Fills one block of readahead, and queues the rest for the next free worker.
    fn fill_ahead(&mut self) {
        let Ok(PrefetchTask { handle, span }) = self.state.prefetches.1.try_recv() else { return };
        let Some(region) = handle.enter() else { return };
        self.state.workers.step(self.slot);
        let Some(span) = span else { return self.replay(&region) };
        let (now, later) = region.first_block(span);
        self.state.queue_prefetch(&region, Some(later).filter(|later| !later.is_empty()));
        fill_ahead(&region, now, &mut self.buffers);
    }

    /// Fills a few pages of a recording, and queues the rest for the next free worker.
    fn replay(&mut self, region: &Arc<Served>) {
        let Some(runs) = region.replay.as_ref().and_then(Replay::next) else { return };
        runs.for_each(|run| replay(region, run, &mut self.buffers));
        self.state.replay(region);
    }
}

/// How long a worker waits for something to do where there are more than there are posts.
const LINGER_MS: u16 = 1000;
/// Faults that were handed on, and are served before the worker looks at the regions again.
const QUEUED_AT_ONCE: u64 = 64;
/// Until what could not be done is tried again.
const MOMENT: Duration = Duration::from_millis(1);
/// Events read at once.
const BATCH: usize = 64;
/// Batches read of a region before others are looked at.
const BATCHES: usize = 8;
