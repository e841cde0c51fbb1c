//! A worker wakes up, reads a batch of events, serves the first fault itself and queues the rest.
//!
//! The queue is bounded and shared by all workers, so that a slow source holds up one worker and
//! not the region. If no worker is free, this worker takes the queued faults later, or its
//! replacement does. Readahead starts when no fault is queued, and goes block by block to a free
//! worker.
//!
//! A worker that meets several faults on a direct file begins the reads of their pages, and waits for reads and for
//! events at once.
//!
//! A worker allocates nothing between two waits, and never touches the memory that it serves. Its
//! panic aborts the process, because its waiters would hang forever.

use crate::fault::fill::Buffers;
use crate::fault::{AfterFault, FaultRequest, PageReads, fill_ahead, fill_requested, replay, serve};
use crate::guard::AbortOnPanic;
use crate::policy::Replay;
use crate::serve::Served;
use crate::serve::events::to_request;
use crate::serve::fork::orphans::Remaining;
use crate::serve::read_turn::{ReadTurn, TURN_MAX};
use crate::serve::served::{Permit, PrefetchTask, QueuedFault, RequestedPrefetch, TimedTask};
use crate::serve::server_state::ServerState;
use crate::serve::urgency::Urgency;
use crate::serve::watch::shared_index;
use crate::space::target::Busy;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::unistd::Pid;
use pagestitch_kernel::{Batch, Errno, Span};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The state of a worker, created before its thread starts.
pub(super) struct Worker {
    state: Arc<ServerState>,
    ready: Arc<Epoll>,
    /// The index of `ready` among the epolls of the pool.
    post: usize,
    /// The CPU to which it is pinned; `None` for any.
    cpu: Option<usize>,
    /// Its slot in the table of workers.
    slot: usize,
    batch: Batch,
    buffers: Buffers,
    reads: PageReads<Served>,
    served: u64,
    /// The number of served faults at which a call of [`serve_ready`](Self::serve_ready) ends.
    serves_until: u64,
    urgency: Urgency,
}

/// The outcome of one round of a worker's loop.
#[derive(Debug, PartialEq, Eq)]
enum Round {
    /// It has found work.
    Busy,
    /// It has found no work but pages that the application has requested ahead.
    Prefetched,
    /// It has found no work.
    Quiet,
    /// The pool stops.
    Stopped,
}

impl Worker {
    pub(super) fn new(
        state: Arc<ServerState>,
        post: usize,
        cpu: Option<usize>,
        slot: usize,
        reads: PageReads<Served>,
    ) -> Result<Self, Errno> {
        let ready = Arc::clone(&state.epolls[post]);
        Ok(Self {
            state,
            ready,
            post,
            cpu,
            slot,
            batch: Batch::with_capacity(BATCH),
            buffers: Buffers::new()?,
            reads,
            served: 0,
            serves_until: u64::MAX,
            urgency: Urgency::default(),
        })
    }

    /// Works until the pool stops, or another worker waits at the same post and this one is
    /// surplus. Returns the number of faults that it has served.
    pub(super) fn run(mut self) -> u64 {
        let _abort = AbortOnPanic::armed();
        self.pin_to_cpu();
        self.urgency = Urgency::of_this_thread();
        // First the faults that a hanging worker has left in the queue: no descriptor reports them.
        self.state.workers.mark_working(self.slot);
        self.serve_queued();
        self.state.workers.mark_waiting(self.slot);
        loop {
            // With queued work, events are polled without waiting: faults come before prefetches.
            let wait = match (self.state.has_more(), self.state.workers.has_replacements()) {
                (true, _) => Some(Duration::ZERO),
                (false, true) => Some(LINGER),
                (false, false) => None,
            };
            let round = self.round(wait);
            if round == Round::Stopped || self.is_surplus(wait == Some(LINGER) && round == Round::Quiet) {
                self.finish_reads();
                return self.served;
            }
            self.state.workers.mark_waiting(self.slot);
        }
    }

    /// True if the worker was not needed while it waited, or is not needed any more, and another one waits at its
    /// post. It is removed then.
    fn is_surplus(&self, has_lingered: bool) -> bool {
        let state = &self.state;
        let is_free = self.reads.is_idle() && !state.has_more();
        let may_end = is_free && (has_lingered || state.workers.take_dismissal());
        if !may_end || !state.workers.try_remove(self.slot) {
            return false;
        }
        // Work that has come meanwhile may have woken no other worker.
        if state.has_more() || state.has_left_over() {
            state.wake_one();
        }
        true
    }

    /// Works without waiting until no work is left or `budget` faults are served. Returns the
    /// number of served faults.
    pub(super) fn serve_ready(&mut self, budget: u64) -> u64 {
        let _abort = AbortOnPanic::armed();
        let before = self.served;
        self.serves_until = before.saturating_add(budget);
        while self.served < self.serves_until {
            let left = self.state.has_more();
            let round = self.round(Some(Duration::ZERO));
            self.state.workers.mark_waiting(self.slot);
            // A whole prefetch would hold up the caller's loop: the rest comes with its next calls.
            if round == Round::Prefetched || round == Round::Quiet && !left {
                break;
            }
        }
        if self.state.has_more() {
            // The descriptor stays readable, so that the caller's loop comes back.
            self.state.wake_one();
        }
        self.served - before
    }

    /// One round: waits for an event, serves one ready descriptor and the queued faults, and fills
    /// one block ahead. The worker is marked as working when this returns.
    fn round(&mut self, most: Option<Duration>) -> Round {
        // One descriptor a round, because the others then stay ready for a replacement of this
        // worker.
        let mut ready = [EpollEvent::empty()];
        let count = self.wait(&mut ready, most);
        self.state.workers.mark_working(self.slot);
        match count {
            Ok(0) => {}
            Ok(_) => {
                let fd = ready[0].data() as RawFd;
                if fd == self.state.stop.as_fd().as_raw_fd() {
                    return Round::Stopped;
                } else if fd == self.state.wake_fd.as_fd().as_raw_fd() {
                    // EAGAIN if another worker has read it first. The queues hold the work itself.
                    let _ = self.state.wake_fd.read();
                } else if fd == self.state.timers.fd() {
                    self.do_timed_tasks();
                } else if let Some(index) = shared_index(ready[0].data()) {
                    self.serve_shared(index);
                } else if let Some((region, shard)) = self.state.enter(fd) {
                    self.serve_batch(&region, shard);
                }
            }
            Err(Errno::EINTR) => return Round::Busy,
            Err(errno) => panic!("epoll_wait on an owned epoll: {errno}"),
        }
        self.serve_queued();
        let has_read = self.reads.complete(&mut self.buffers);
        self.fill_ahead();
        // Requested prefetches come after readahead and recordings.
        let has_requested = self.state.prefetches.1.is_empty() && self.fill_requested();
        match (has_requested, count) {
            (true, Ok(0)) => Round::Prefetched,
            (false, Ok(0)) if !has_read => Round::Quiet,
            _ => Round::Busy,
        }
    }

    /// Waits until a descriptor is ready, or a read in flight has ended. Returns the number of ready descriptors.
    fn wait(&mut self, ready: &mut [EpollEvent], most: Option<Duration>) -> Result<usize, Errno> {
        let most = match self.reads.is_idle() {
            true => most,
            false => {
                self.reads.wait(self.ready.0.as_fd(), most, &mut self.buffers);
                Some(Duration::ZERO)
            }
        };
        let most = most.map(|most| EpollTimeout::try_from(most).expect("it is a second at most"));
        self.ready.wait(ready, most.unwrap_or(EpollTimeout::NONE)).map_err(Errno::of)
    }

    /// Waits for the reads in flight, before work that may take long or hang: no other worker can install their
    /// pages.
    fn finish_reads(&mut self) {
        self.reads.finish(&mut self.buffers);
    }

    fn pin_to_cpu(&self) {
        match (self.cpu, self.state.cpus.unpinned()) {
            (Some(cpu), _) => self.run_on(&[cpu]),
            (None, Some(cpus)) => self.run_on(cpus),
            (None, None) => {}
        }
    }

    fn run_on(&self, cpus: &[usize]) {
        let mut set = CpuSet::new();
        let all = cpus.iter().try_for_each(|&cpu| set.set(cpu));
        if let Err(errno) = all.and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
            log!(debug, ?cpus, %errno, "the CPUs of a worker cannot be set, so faults may be slower");
        }
    }

    /// Lets the worker run on each CPU of an automatic placement. One worker at a time serves foreign
    /// memory, and it must not wait for its CPU while another one is idle. While pages wait to be
    /// filled ahead, the other workers are busy too, and each stays on its CPU.
    fn unpin(&mut self) {
        if !self.state.prefetches.1.is_empty() || !self.state.cpus.is_automatic || self.cpu.take().is_none() {
            return;
        }
        self.run_on(self.state.cpus.all());
    }

    /// Pins the worker to its CPU again: workers that replay a recording at the same time may
    /// otherwise share a CPU.
    fn pin_again(&mut self) {
        if self.state.cpus.is_automatic && self.cpu.is_none() {
            self.cpu = self.state.cpus.cpu_of(self.post);
            self.pin_to_cpu();
        }
    }

    /// Serves the pending events of a region's shard to the last, because no worker is woken a second time
    /// for them. After [`BATCHES`] batches it requests another look instead, so that other regions
    /// come first.
    ///
    /// The events of foreign memory come to this worker alone. After a batch with faults it reads on
    /// without a wait, because the threads that it has just woken have mostly touched the next pages.
    fn serve_batch(&mut self, region: &Arc<Served>, shard: usize) {
        region.prefetch(shard);
        // Another worker reads from this adopted memory. It may hang in a source: look again later.
        let Some(mut turn) = region.acquire_turn() else {
            return self.state.leave_to_reader(self.post, region);
        };
        if region.target.foreign().is_some() {
            self.unpin();
        }
        for batch in 1..=BATCHES {
            if self.serve_read(region, shard, &mut turn) == Err(Busy) {
                // The turn is not released: the next worker takes it when it is late, and does not
                // wait either.
                return self.state.look_later(region, TURN_MAX);
            }
            let goes_on = batch < BATCHES && self.left() > 0;
            let reads_on = turn.is_held() && !self.batch.faults().is_empty() && goes_on;
            if !reads_on && turn.try_release(self.batch.is_full()) {
                return;
            }
        }
        // There may always be more to read, so other regions come first.
        turn.release_unread();
        self.state.rearm(self.post, region, shard);
    }

    /// As [`serve_batch`](Self::serve_batch), for a userfaultfd that many regions share.
    fn serve_shared(&mut self, index: usize) {
        for _ in 0..BATCHES {
            if !self.serve_read_shared(index) {
                return;
            }
        }
        self.state.rearm_shared(self.post, index);
    }

    /// Reads a batch of events of many regions, serves the first fault and queues the others. True if
    /// there may be more to read.
    fn serve_read_shared(&mut self, index: usize) -> bool {
        let Self { state, post, batch, served, urgency, .. } = self;
        let (mut first, mut queued) = (None, 0);
        state.read_shared(index, batch, |region, request| {
            if first.is_none() {
                first = Some(QueuedFault::new(region, request));
            } else {
                state.enqueue_or_set_aside(region, request);
                queued += 1;
            }
        });
        urgency.note(batch.messages(), batch.faults().len());
        state.wake_others(queued);
        let is_full = batch.is_full();
        if is_full {
            // A source may hold this worker up: another worker reads.
            state.rearm_shared(*post, index);
        }
        if let Some(QueuedFault { handle, request }) = first {
            *served += 1;
            // A region that is being dropped needs no page any more.
            if let Some(region) = handle.enter() {
                self.serve_admitted(&region, request);
            }
        }
        is_full
    }

    /// Reads a batch of events, serves its first fault and queues the others.
    fn serve_read(
        &mut self,
        region: &Arc<Served>,
        shard: usize,
        turn: &mut ReadTurn<'_>,
    ) -> Result<(), Busy> {
        let left = self.left() as usize;
        let Self { state, post, batch, buffers, reads, served, slot, urgency, .. } = self;
        // Workers do not read regions whose children are served, so no event of a child arrives
        // here.
        let defer = &mut |event| region.handle_deferred(event);
        let again = match turn.may_wait() {
            true => region.read_events(shard, batch, defer),
            false => region.try_read_events(shard, batch, defer)?,
        };
        if again {
            state.look_later(region, MOMENT);
        }
        // The owner of foreign memory must not decide the priority of a worker.
        if region.target.foreign().is_none() {
            urgency.note(batch.messages(), batch.faults().len());
        }
        let read = Instant::now();
        let read_again = turn.after_read(read, region.latency.is_fast());
        let mut pages = batch.faults().iter().filter_map(|fault| to_request(region, fault, read));
        // A worker that must read again enters no source before that, so it queues the whole batch.
        let (first, keeps) = match left.checked_sub(1).filter(|_| !read_again) {
            Some(others) => (pages.next(), turn.local_share().min(others)),
            None => (None, 0),
        };
        // A read begins in less time than another worker wakes.
        let may_begin = first.is_some() && reads.is_possible();
        let (mut queued, mut kept) = (0, 0);
        for (index, request) in pages.enumerate() {
            let is_kept = index < keeps || may_begin && region.direct_page(request.page).is_some();
            match state.enqueue(QueuedFault::new(region, request)).ok() {
                // This worker serves the fault soon. It is queued because this worker may hang:
                // then the replacement serves it.
                Some(()) if is_kept => kept += 1,
                Some(()) => queued += 1,
                // The queue is full, so all other workers have work: serve it here.
                None => {
                    state.workers.step(*slot);
                    let admitted = match &region.limit {
                        Some((most, bulkhead)) => bulkhead.admit(*most, request),
                        None => Some(request),
                    };
                    serve_limited(region, admitted, |request| {
                        prepare(state, region, reads, buffers);
                        serve(region, request, None, buffers, reads).is_fetched
                    });
                }
            }
        }
        state.wake_others(queued);
        *served += batch.faults().len() as u64 - queued - kept;
        if batch.is_full() {
            // There may be more to read, and a source may hold this worker up: another worker
            // reads.
            state.rearm(*post, region, shard);
        }
        if let Some(first) = first {
            self.serve_admitted(region, first);
        }
        self.serve_some_queued(kept);
        Ok(())
    }

    /// Serves a fault when it is admitted. With `max_in_flight`, the bulkhead of its region admits
    /// it. Otherwise the fault of a fast region is served at once, and that of a slow region needs
    /// the admission of the pool. A fault that is not admitted waits until a worker releases
    /// another one.
    fn serve_admitted(&mut self, region: &Arc<Served>, request: FaultRequest) {
        if let Some((most, bulkhead)) = &region.limit {
            let first = bulkhead.admit(*most, request);
            serve_limited(region, first, |request| self.serve_now(region, request, None));
        } else if region.latency.is_fast() {
            self.serve_now(region, request, None);
        } else {
            let most = self.state.slow_workers_max();
            let first = self.state.slow_admission.admit(most, QueuedFault::new(region, request));
            self.serve_slow(first);
        }
    }

    /// Serves the faults that have waited for permits.
    fn serve_permitted(&mut self) {
        let state = Arc::clone(&self.state);
        let Some(permits) = &state.permits else { return };
        while let Some((QueuedFault { handle, request }, permit)) = permits.take_waiting() {
            // A region that is being dropped needs no page any more.
            let Some(region) = handle.enter() else { continue };
            let waits_for_source = permit.is_none();
            if waits_for_source && region.limit.is_none() {
                // As any fault that occupies a worker, it needs the admission of a slow region.
                self.serve_admitted(&region, request);
            } else {
                let mut permit = permit.map(Some);
                let serve = |request| self.serve_now(&region, request, permit.take());
                serve_limited(&region, Some(request), serve);
            }
            if waits_for_source {
                // Events of other regions may have come meanwhile. A worker was woken for the next
                // fault.
                return;
            }
        }
    }

    /// Serves the fault of a slow region, and then each waiting fault that is admitted in its place.
    fn serve_slow(&mut self, first: Option<QueuedFault>) {
        let mut next = first;
        while let Some(QueuedFault { handle, request }) = next {
            // A region that is being dropped needs no page any more.
            if let Some(region) = handle.enter() {
                self.serve_now(&region, request, None);
            }
            next = self.state.slow_admission.release(self.state.slow_workers_max(), &handle);
        }
    }

    /// Serves a fault. True if it goes on as a fetch.
    fn serve_now(
        &mut self,
        region: &Arc<Served>,
        request: FaultRequest,
        permit: Option<Option<Permit>>,
    ) -> bool {
        self.state.workers.step(self.slot);
        if !region.latency.is_fast() {
            self.state.watch_left();
        }
        let Self { state, buffers, reads, .. } = self;
        prepare(state, region, reads, buffers);
        let AfterFault { prefetch, is_fetched } = serve(region, request, permit, buffers, reads);
        for span in prefetch.into_iter().flatten() {
            self.prefetch(region, span);
        }
        is_fetched
    }

    /// Queues pages to be filled ahead. If the workers lag behind the readers, fills the first block
    /// at once: in the queue it would come too late, and its reader would fault page by page.
    fn prefetch(&mut self, region: &Arc<Served>, span: Span) {
        if !self.state.prefetches_lag() || !region.latency.is_fast() {
            return self.state.queue_prefetch(region, Some(span));
        }
        self.state.workers.step(self.slot);
        self.finish_reads();
        self.fill_first_block(region, span);
    }

    fn fill_first_block(&mut self, region: &Arc<Served>, span: Span) {
        let (now, later) = region.first_block(span);
        self.state.queue_prefetch(region, Some(later).filter(|later| !later.is_empty()));
        fill_ahead(region, now, &mut self.buffers);
    }

    /// Serves queued faults, and the next fault that waits for admission, if it is admitted by now.
    fn serve_queued(&mut self) {
        self.state.handle_all_deferred();
        // A limited number, because unread faults of the regions come next.
        self.serve_some_queued(QUEUED_AT_ONCE.min(self.left()));
        self.serve_permitted();
        if self.state.slow_admission.has_waiters() {
            let last_resort = self.state.workers.last_resort.load(Ordering::Relaxed);
            let next = self.state.slow_admission.admit_next(self.state.slow_workers_max(), last_resort);
            self.serve_slow(next);
        }
    }

    /// The number of faults until a call ends.
    const fn left(&self) -> u64 {
        self.serves_until.saturating_sub(self.served)
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
    fn do_timed_tasks(&mut self) {
        self.state.timers.acknowledge();
        for _ in 0..QUEUED_AT_ONCE {
            match self.state.timers.take() {
                Some(TimedTask::Serve(QueuedFault { handle, request })) => {
                    // A region that is being dropped needs no page any more.
                    let Some(region) = handle.enter() else { continue };
                    region.repeat_begins();
                    self.serve_admitted(&region, request);
                }
                Some(TimedTask::ServeAdmitted(QueuedFault { handle, request })) => {
                    let Some(region) = handle.enter() else { continue };
                    serve_limited(&region, Some(request), |request| self.serve_now(&region, request, None));
                }
                Some(TimedTask::Prefetch(prefetch)) => match prefetch.job.resume() {
                    true => self.state.requested.add(prefetch),
                    false => prefetch.job.wake(),
                },
                Some(TimedTask::Look(handle)) => {
                    let Some(region) = handle.enter() else { continue };
                    region.turns.look_begins();
                    if region.uffd.is_shared() {
                        self.close_moved(&region);
                        continue;
                    }
                    self.state.watch_again(&region);
                    (0..region.uffd.count()).for_each(|shard| self.serve_batch(&region, shard));
                }
                None => break,
            }
        }
    }

    /// Poisons the parts of a region that were moved, as far as the kernel allows it by now.
    fn close_moved(&self, region: &Arc<Served>) {
        if let Some(suppressed) = region.orphans.log_limit.permit() {
            let what = "a part was moved by mremap(2): its unfilled pages are poisoned";
            log!(error, region = region.name, suppressed, what);
        }
        if region.close_orphans() != Remaining::None {
            self.state.look_later(region, MOMENT);
        }
    }

    /// Fills one block of readahead, and queues the rest for the next free worker.
    fn fill_ahead(&mut self) {
        let Ok(PrefetchTask { handle, span }) = self.state.prefetches.1.try_recv() else { return };
        let Some(region) = handle.enter() else { return };
        self.state.workers.step(self.slot);
        self.state.watch_left();
        self.finish_reads();
        let Some(span) = span else { return self.replay(&region) };
        self.fill_first_block(&region, span);
    }

    /// Fills a part of a prefetch that the application has requested. False if there is none, or if
    /// enough workers have one.
    fn fill_requested(&mut self) -> bool {
        let Some((RequestedPrefetch { handle, job }, block)) = self.state.requested.take(self.slot) else {
            return false;
        };
        let Some(block) = block else {
            job.wake();
            return true;
        };
        match handle.enter() {
            Some(region) => {
                self.state.workers.step(self.slot);
                self.state.watch_left();
                self.finish_reads();
                fill_requested(&region, &job, block, &mut self.buffers);
            }
            None => job.end(),
        }
        self.state.requested.release(self.slot);
        job.wake();
        true
    }

    /// Fills a few pages of a recording, and queues the rest for the next free worker.
    fn replay(&mut self, region: &Arc<Served>) {
        let Some(runs) = region.replay.as_ref().and_then(Replay::next) else { return };
        self.pin_again();
        runs.for_each(|run| replay(region, run, &mut self.buffers));
        self.state.replay(region);
    }
}

/// Prepares the reads in flight for a fault of a region.
fn prepare(state: &ServerState, region: &Served, reads: &mut PageReads<Served>, buffers: &mut Buffers) {
    if !reads.is_possible() && region.reads_at_once() {
        state.workers.note_disk();
    }
    reads.prepare(region, state.has_queued(), buffers);
}

/// Serves an admitted fault of a region, and then each waiting fault that its limit admits instead. A
/// fault that goes on as a fetch, as `serve` tells, stays admitted until the fetch ends.
fn serve_limited(region: &Served, first: Option<FaultRequest>, mut serve: impl FnMut(FaultRequest) -> bool) {
    let mut next = first;
    while let Some(request) = next {
        let is_fetched = serve(request);
        let limit = region.limit.as_ref().filter(|_| !is_fetched);
        next = limit.and_then(|(most, bulkhead)| bulkhead.release(*most));
    }
}

/// A worker that finds no work for this long ends, if there are more workers than posts.
const LINGER: Duration = Duration::from_secs(1);
/// The most queued faults that a worker serves before it reads from regions again.
const QUEUED_AT_ONCE: u64 = 64;
/// The pause before events are read again that could not be handled at once.
const MOMENT: Duration = Duration::from_millis(1);
/// The most events that one read returns.
const BATCH: usize = 64;
/// The most batches that a worker reads of one region before it serves others.
const BATCHES: usize = 8;
