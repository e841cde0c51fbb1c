//! The state that the workers of a server share: queues, the table of workers, and the regions by
//! their descriptors.

use crate::error::{Error, ErrorKind};
use crate::fault::{FaultRequest, PrefetchJob};
use crate::guard::discard;
use crate::serve::Served;
use crate::serve::events::DeferredEvent;
use crate::serve::fork::fork_reader::ForkReader;
use crate::serve::placement::WorkerCpus;
use crate::serve::read_turn::TURN_MAX;
use crate::serve::served::{
    Entrance, FetchSemaphore, OwnedRegionGuard, PrefetchQueue, PrefetchTask, QueuedFault, RegionHandle,
    RequestedPrefetch, SlowAdmission, TimedTask, Timers,
};
use crate::serve::shared_uffds::SharedUffds;
use crate::serve::watch::{watch, watch_shared};
use crate::serve::worker_table::WorkerTable;
use crate::serve::worker_threads::Threads;
use crate::space::page_table::Wake;
use crate::space::{Mapping, SpareUffds};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch_kernel::{Batch, Errno, Features, Span, Uffd, striped};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The state that the workers of a pool share, or the members of a group of
/// [`Manual`](crate::Manual)s.
#[derive(Debug)]
pub(super) struct ServerState {
    /// Readable once the workers must end.
    pub(super) stop: EventFd,
    /// A semaphore: each count wakes one worker.
    pub(super) wake_fd: Arc<EventFd>,
    /// Faults that wait for a worker.
    faults: (Sender<QueuedFault>, Receiver<QueuedFault>),
    /// Pages to fill ahead while there are no faults, by workers that are awake.
    pub(super) prefetches: (Sender<PrefetchTask>, Receiver<PrefetchTask>),
    /// Prefetches that the application has requested.
    pub(super) requested: PrefetchQueue,
    pub(super) slow_admission: SlowAdmission,
    /// The workers, with their progress.
    pub(super) workers: WorkerTable,
    /// True if a fault was set aside because its queue is full.
    pub(super) overflowed: AtomicBool,
    pub(super) threads: Mutex<Threads>,
    pub(super) name: String,
    pub(super) cpus: WorkerCpus,
    pub(super) permits: Option<Arc<FetchSemaphore>>,
    pub(super) timers: Arc<Timers>,
    /// Events that the fork reader defers to workers.
    deferred: (Sender<DeferredTask>, Receiver<DeferredTask>),
    pub(super) fork_reader: OnceLock<ForkReader>,
    pub(super) epolls: Vec<Arc<Epoll>>,
    pub(super) spare_uffds: Arc<SpareUffds>,
    pub(super) shared_uffds: SharedUffds,
    /// Regions in adopted memory that some posts do not watch for a moment.
    left: Mutex<Vec<Arc<RegionHandle>>>,
    /// True if there are some. It changes under the lock, except that it may stay true.
    has_left: AtomicBool,
    /// The epoll flags of a region: its faults wake all workers, or one.
    wakes: EpollFlags,
    regions: RwLock<Regions>,
}

/// A region and one of its events, which a worker has to handle.
type DeferredTask = (Arc<Served>, DeferredEvent);

#[derive(Debug, Default)]
struct Regions {
    /// The shards by the descriptor of their uffd, which epoll reports: each with its region and
    /// its number.
    shards: HashMap<RawFd, WatchedShard>,
    stopped: bool,
}

/// A shard of a region.
#[derive(Debug)]
struct WatchedShard {
    entrance: Entrance,
    handle: Arc<RegionHandle>,
    /// Its number.
    shard: usize,
}

impl Regions {
    fn served(&self) -> impl Iterator<Item = &Arc<RegionHandle>> {
        // Each region has a first shard.
        self.shards.values().filter(|watched| watched.shard == 0).map(|watched| &watched.handle)
    }
}

impl ServerState {
    /// The state for workers on these CPUs, at most `most`. `name` is the prefix of their threads'
    /// names.
    pub(super) fn new(cpus: &WorkerCpus, most: usize, name: String) -> Result<Self, Errno> {
        // Asked for here, because otherwise the build of the first region waits for the answer, which takes
        // sixteen system calls.
        striped::cpus();
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(Errno::of)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        let wake_fd = EventFd::from_flags(flags).map_err(Errno::of)?;
        let timers = Arc::new(Timers::new()?);
        let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLET | EpollFlags::EPOLLEXCLUSIVE;
        // With a few pinned workers a fault wakes all, so that the worker on the CPU of the fault is
        // among them. Of other workers, a fault wakes one.
        let one = if cpus.wake_all() { EpollFlags::empty() } else { EpollFlags::EPOLLEXCLUSIVE };
        let epolls = (0..cpus.workers).map(|_| {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Errno::of)?;
            watch(&epoll, &*timers, once)?;
            watch(&epoll, &stop, EpollFlags::EPOLLIN)?;
            watch(&epoll, &wake_fd, EpollFlags::EPOLLIN | one)?;
            Ok(Arc::new(epoll))
        });
        let epolls = epolls.collect::<Result<Vec<_>, Errno>>()?;
        Ok(Self {
            stop,
            wake_fd: Arc::new(wake_fd),
            faults: bounded(QUEUE_MAX),
            prefetches: bounded(PREFETCH_MAX),
            requested: PrefetchQueue::new(cpus.workers, most),
            slow_admission: SlowAdmission::new(QUEUE_MAX),
            workers: WorkerTable::new(cpus.workers, most)?,
            overflowed: AtomicBool::new(false),
            threads: Mutex::default(),
            name,
            cpus: cpus.clone(),
            permits: None,
            timers,
            deferred: bounded(DEFERRED_MAX),
            fork_reader: OnceLock::new(),
            epolls,
            spare_uffds: Arc::default(),
            shared_uffds: SharedUffds::default(),
            left: Mutex::new(Vec::with_capacity(LEFT)),
            has_left: AtomicBool::new(false),
            // Edge-triggered: a worker reads to the end, so epoll need not report the rest.
            wakes: EpollFlags::EPOLLIN | EpollFlags::EPOLLET | one,
            regions: RwLock::default(),
        })
    }

    /// Enters the region of the shard whose uffd is `fd`, if it is still served. Returns the shard's
    /// number too.
    pub(super) fn enter(&self, fd: RawFd) -> Option<(OwnedRegionGuard, usize)> {
        let regions = self.regions.read();
        let WatchedShard { entrance, shard, .. } = regions.shards.get(&fd)?;
        Some((entrance.enter()?, *shard))
    }

    /// Queues a fault for any worker. Returns it if the queue is full.
    pub(super) fn enqueue(&self, fault: QueuedFault) -> Result<(), QueuedFault> {
        self.faults.0.try_send(fault).map_err(crossbeam_channel::TrySendError::into_inner)
    }

    /// Queues a fault, or sets it aside for the watchdog if the queue is full. Allocates nothing.
    pub(super) fn enqueue_or_set_aside(&self, region: &Arc<Served>, request: FaultRequest) {
        if self.enqueue(QueuedFault::new(region, request)).is_ok() {
            return;
        }
        match request.slot {
            Some(slot) => {
                region.counters.set_aside(slot);
                self.overflowed.store(true, Ordering::SeqCst);
            }
            // The waiter faults again.
            None => region.wake(request.page.span()),
        }
    }

    /// Defers an event of a region to a worker. Returns the event if the queue is full: this thread
    /// must not wait, because workers may wait for the thread that forks.
    pub(super) fn defer(&self, region: &Arc<Served>, event: DeferredEvent) -> Result<(), DeferredEvent> {
        let passed = self.deferred.0.try_send((Arc::clone(region), event));
        self.wake_one();
        passed.map_err(|refused| refused.into_inner().1)
    }

    /// Handles all deferred events.
    pub(super) fn handle_all_deferred(&self) {
        while let Ok((region, event)) = self.deferred.1.try_recv() {
            match event {
                DeferredEvent::Child(child) => self.serve_child(&region, child),
                DeferredEvent::NoDescriptor => self.free_descriptors(&region),
                event => drop(region.handle_deferred(event)),
            }
            // This may be the last reference to the region.
            discard(region);
        }
    }

    pub(super) fn dequeue(&self) -> Option<QueuedFault> {
        self.faults.1.try_recv().ok()
    }

    /// True if a queued fault waits for a worker.
    pub(super) fn has_queued(&self) -> bool {
        !self.faults.1.is_empty()
    }

    /// True if a fault or a requested prefetch waits that a woken worker can serve.
    pub(super) fn has_left_over(&self) -> bool {
        let can_take_waiting = self.permits.as_ref().is_some_and(|permits| permits.can_take_waiting());
        let has_waiters = self.slow_admission.has_waiters() || self.requested.has_work();
        can_take_waiting || has_waiters || self.has_queued()
    }

    /// True if there is work that no descriptor reports.
    pub(super) fn has_more(&self) -> bool {
        !self.prefetches.1.is_empty() || self.has_queued() || self.requested.has_work()
    }

    /// Queues pages to be filled ahead by a worker that is awake. It wakes no worker, because that
    /// was measured to be slower.
    pub(super) fn queue_prefetch(&self, region: &Arc<Served>, ahead: impl IntoIterator<Item = Span>) {
        for span in ahead {
            // If the queue is full, the workers cannot keep up. A thread that touches these pages
            // requests them by a fault.
            let _ = self.prefetches.0.try_send(PrefetchTask::new(region, span));
        }
    }

    /// True if more pages wait to be filled ahead than there are workers.
    pub(super) fn prefetches_lag(&self) -> bool {
        self.prefetches.1.len() > self.epolls.len()
    }

    /// Queues the next pages of a region's recording, and wakes no worker either.
    pub(super) fn replay(&self, region: &Arc<Served>) {
        // If the queue is full, pages that are not replayed are filled when they are touched.
        let _ = self.prefetches.0.try_send(PrefetchTask::replay(region));
    }

    /// Starts to fill the pages of a region's recording, with all workers.
    pub(super) fn begin_replay(&self, region: &Arc<Served>) {
        for _ in &self.epolls {
            self.replay(region);
            self.wake_one();
        }
    }

    /// An error if the server has ended, and with it its regions.
    pub(super) fn check_running(&self, region: &str) -> Result<(), Error> {
        if self.regions.read().stopped { Err(server_ended(region)) } else { Ok(()) }
    }

    /// Starts a prefetch that the application has requested, with idle workers.
    pub(super) fn start_prefetch(&self, region: &Arc<Served>, job: &Arc<PrefetchJob>) -> Result<(), Error> {
        let regions = self.regions.read();
        if regions.stopped {
            return Err(server_ended(&region.name));
        }
        if job.is_over() {
            return Ok(());
        }
        // Under the lock, because the end of the server ends the prefetches that it finds.
        region.note_prefetch(job);
        drop(regions);
        self.requested.add(RequestedPrefetch::new(region, job));
        self.wake_workers(self.requested.most() as u64);
        Ok(())
    }

    /// Wakes one other worker for each fault, as far as there are workers.
    pub(super) fn wake_others(&self, faults: u64) {
        let others = self.workers.working().saturating_sub(1) as u64;
        self.wake(faults.min(others));
    }

    /// Wakes one worker for each fault, as far as there are workers.
    pub(super) fn wake_workers(&self, faults: u64) {
        if faults > 0 {
            self.wake(faults.min(self.workers.working() as u64).max(1));
        }
    }

    /// Wakes so many workers.
    fn wake(&self, workers: u64) {
        if workers == 0 {
            return;
        }
        // One write wakes all workers, or one of them.
        let (writes, each) = if self.cpus.wake_all() { (1, workers) } else { (workers, 1) };
        for _ in 0..writes {
            self.wake_fd.write(each).expect("an eventfd takes small numbers");
        }
    }

    /// The number of shards that suits a large region.
    pub(super) fn shards(&self) -> usize {
        self.cpus.shards()
    }

    /// Wakes one worker, which may be the calling one, when it waits next.
    pub(super) fn wake_one(&self) {
        self.wake_fd.write(1).expect("an eventfd takes small numbers");
    }

    /// Handles to all served regions.
    pub(super) fn regions(&self) -> Vec<Arc<RegionHandle>> {
        let mut handles: Vec<_> = self.regions.read().served().cloned().collect();
        handles.extend(self.shared_uffds.handles());
        handles
    }

    /// The most workers that slow regions may occupy together: all but one, if there is another
    /// region that would wait. With a single post, all of them: if its worker hangs, the
    /// replacement is the only free worker, and to keep it free would leave none at work.
    pub(super) fn slow_workers_max(&self) -> usize {
        let workers = self.workers.working();
        let keeps_one = self.epolls.len() > 1 && self.has_several_regions();
        if keeps_one { workers - 1 } else { workers }
    }

    fn has_several_regions(&self) -> bool {
        let shared = self.shared_uffds.regions(2);
        shared > 1 || self.regions.read().served().nth(1 - shared).is_some()
    }

    /// Accepts no more regions. Returns handles to the served ones.
    pub(super) fn close(&self) -> Vec<Arc<RegionHandle>> {
        self.regions.write().stopped = true;
        self.regions()
    }

    pub(super) fn epolls(&self) -> &[Arc<Epoll>] {
        &self.epolls
    }

    pub(super) fn add(&self, region: &Arc<Served>) -> Result<(), Error> {
        let mut regions = self.regions.write();
        if regions.stopped {
            return Err(server_ended(&region.name));
        }
        if let Some(permits) = &self.permits {
            let _ = region.permits.set(Arc::clone(permits));
        }
        let _ = region.timers.set(Arc::clone(&self.timers));
        if region.uffd.is_shared() {
            self.shared_uffds.add(region);
        } else {
            for (shard, uffd) in region.uffd.iter().enumerate() {
                let handle = Arc::clone(region.handle());
                let watched = WatchedShard { entrance: handle.entrance(), handle, shard };
                regions.shards.insert(uffd.as_fd().as_raw_fd(), watched);
            }
        }
        drop(regions);
        // A partial watch is undone when the region, which the caller owns by now, is dropped.
        let watched = match (&region.children, self.fork_reader.get()) {
            // It has no faults, or its userfaultfd is watched already.
            _ if region.uffd.is_stand_in() || region.uffd.is_shared() => Ok(()),
            (Some(_), Some(fork_reader)) => fork_reader.add(region),
            _ => (0..region.uffd.count()).try_for_each(|shard| self.watch_shard(region, shard)),
        };
        if watched.is_ok() && region.replay.is_some() {
            self.begin_replay(region);
        }
        watched
            .map_err(|errno| Error::refused(format_args!("region {}: cannot watch it", region.name), errno))
    }

    /// The CPU of the worker that a fault of a shard wakes first. `None` if any worker may be the first,
    /// or if the worker is not pinned.
    pub(super) fn cpu_of(&self, region: &Mapping, shard: usize) -> Option<usize> {
        let has_home = region.uffd.count() > 1 || self.epolls.len() == 1;
        self.cpus.cpu_of(self.home(region, shard)).filter(|_| has_home)
    }

    fn home(&self, region: &Mapping, shard: usize) -> usize {
        home_of(shard, region.uffd.count(), self.epolls.len())
    }

    /// Watches a shard in the epolls of all workers, its home first: of the workers that sleep, an
    /// exclusive watch wakes the one that was added first.
    fn watch_shard(&self, region: &Served, shard: usize) -> Result<(), Errno> {
        let (uffd, home, posts) = (region.uffd.get(shard), self.home(region, shard), self.epolls.len());
        (home..posts)
            .chain(0..home)
            .try_for_each(|post| watch(&self.epolls[post], uffd, self.wakes_of(region, (shard, post))))
    }

    /// Opens the userfaultfds that small regions share, and returns their features. `None` if there are
    /// none.
    pub(super) fn open_shared(&self, wanted: Features) -> Option<Features> {
        let number = self.epolls.len().clamp(SHARED_MIN, SHARED_MAX);
        let watch = |index: usize, uffd: &Uffd| {
            self.epolls.iter().try_for_each(|epoll| watch_shared(epoll, (index, uffd), self.wakes))
        };
        let opened = self.shared_uffds.open((number, wanted), watch).ok()?;
        Some(opened[0].uffd.features())
    }

    /// Reads the events of a shared userfaultfd. See [`SharedUffds::read`].
    pub(super) fn read_shared(
        &self,
        index: usize,
        batch: &mut Batch,
        each: impl FnMut(&Arc<Served>, FaultRequest),
    ) {
        self.shared_uffds.read(index, batch, each, |region| self.look_later(region, Duration::ZERO));
    }

    /// As [`rearm`](Self::rearm), for a shared userfaultfd.
    pub(super) fn rearm_shared(&self, post: usize, index: usize) {
        let (epoll, uffd) = (&self.epolls[post], &self.shared_uffds.get(index).uffd);
        let _ = epoll.delete(uffd);
        let _ = watch_shared(epoll, (index, uffd), self.wakes);
    }

    /// Starts to serve a forked child of a region.
    pub(super) fn serve_child(&self, parent: &Served, child: Uffd) {
        let Some(children) = &parent.children else { return parent.orphan_child(child) };
        self.reap_children(parent);
        if !children.refill_spare() {
            let _ = parent.handle_deferred(DeferredEvent::GivenUp);
            return parent.orphan_child(child);
        }
        match parent.child(child) {
            Ok(child) => {
                let child = Arc::new(child);
                parent.counters.local().children.add(1);
                // In this order, because the thread that closes the list of children then finds
                // each listed child served, and ends its service.
                let served = self.add(&child).is_ok() && children.add(&child);
                if !served {
                    self.detach_child(&child);
                }
            }
            Err((child, errno)) => {
                log!(error, region = parent.name, %errno, "a child cannot be served: the pages that it lacks are poisoned");
                parent.orphan_child(child);
            }
        }
    }

    /// Releases the descriptors of children whose processes have ended, and those that no region needs.
    fn free_descriptors(&self, parent: &Served) {
        self.reap_children(parent);
        self.spare_uffds.close_all();
    }

    /// Releases the children whose processes have ended.
    fn reap_children(&self, parent: &Served) {
        for dead in parent.children.iter().flat_map(|children| children.reap()) {
            log!(debug, region = dead.name, "the child has ended");
            self.remove(&dead);
            self.stop_reading(&dead);
        }
    }

    /// Ends the fork reader's work for a region. Called when no process can fork with it any more.
    pub(super) fn stop_reading(&self, region: &Served) {
        if let (Some(_), Some(fork_reader)) = (&region.children, self.fork_reader.get()) {
            fork_reader.remove(region);
        }
    }

    /// Ends the service of a child: its absent pages are poisoned.
    pub(super) fn detach_child(&self, child: &Served) {
        self.remove(child);
        self.stop_reading(child);
        child.close();
        child.end_service();
    }

    /// Requests that a worker looks at a region after a pause.
    pub(super) fn look_later(&self, region: &Arc<Served>, wait: Duration) {
        // At most one request of a region waits.
        if region.turns.request_look() {
            self.timers.add(TimedTask::Look(Arc::clone(region.handle())), wait);
        }
    }

    /// Makes the epoll of a post report a shard again if there is something to read; or that of another
    /// post, if this one does not watch the region for a moment.
    pub(super) fn rearm(&self, post: usize, region: &Served, shard: usize) {
        // The home of a shard watches it by level, so its epoll reports the shard anyway. A new watch would be the
        // last, and other workers would wake before the home from then on.
        if self.stays_first(region, (shard, post)) {
            return;
        }
        let uffd = region.uffd.get(shard);
        // Under the lock, because the end of the service deletes the watches afterwards. A watch that is
        // left would be in the way of the next region that has this userfaultfd.
        let regions = self.regions.read();
        if !regions.shards.contains_key(&uffd.as_fd().as_raw_fd()) {
            return;
        }
        // A new watch reports at once. Without a watch, the region is being dropped.
        let mut from_post = (post..self.epolls.len()).chain(0..post);
        if let Some(post) = from_post.find(|&post| self.epolls[post].delete(uffd).is_ok()) {
            let _ = watch(&self.epolls[post], uffd, self.wakes_of(region, (shard, post)));
        }
    }

    /// Called at a post whose worker was woken for adopted memory while another worker reads it. The
    /// other worker reads on, so this post need not watch meanwhile.
    pub(super) fn leave_to_reader(&self, post: usize, region: &Arc<Served>) {
        if region.latency.is_fast() && region.turns.try_unwatch(post, self.epolls.len()) {
            for uffd in region.uffd.iter() {
                // A refusal means that the region is being dropped.
                let _ = self.epolls[post].delete(uffd);
            }
            self.left.lock().push(Arc::clone(region.handle()));
            self.has_left.store(true, Ordering::SeqCst);
        }
        // The reader may hang in a source.
        self.look_later(region, TURN_MAX);
    }

    /// Called before a worker begins work that may take long: it may be the only one that watches the
    /// regions that others have left to a reader, so the others watch again.
    pub(super) fn watch_left(&self) {
        if !self.has_left.load(Ordering::SeqCst) {
            return;
        }
        for _ in 0..LEFT {
            let Some(handle) = self.next_left() else { return };
            if let Some(region) = handle.enter() {
                self.watch_again(&region);
            }
        }
    }

    fn next_left(&self) -> Option<Arc<RegionHandle>> {
        let mut left = self.left.lock();
        let next = left.pop();
        self.has_left.store(!left.is_empty(), Ordering::SeqCst);
        next
    }

    /// Watches a region again at the posts that have left it to a reader.
    pub(super) fn watch_again(&self, region: &Arc<Served>) {
        self.left.lock().retain(|handle| !handle.is_of(region));
        let regions = self.regions.read();
        for post in region.turns.unwatched() {
            // Under the lock, because the end of the service deletes the watches afterwards.
            // Adopted memory is one shard.
            let watch = |uffd: &Uffd| watch(&self.epolls[post], uffd, self.wakes_of(region, (0, post)));
            let is_served = |uffd: &Uffd| regions.shards.contains_key(&uffd.as_fd().as_raw_fd());
            // Refused while the worker of that post is about to delete its watch.
            if region.uffd.iter().filter(|uffd| is_served(uffd)).all(|uffd| watch(uffd).is_ok()) {
                region.turns.watched_again(post);
            } else {
                self.look_later(region, TURN_MAX);
            }
        }
    }

    /// The epoll flags with which a post watches a shard.
    fn wakes_of(&self, region: &Served, (shard, post): (usize, usize)) -> EpollFlags {
        // Workers take turns at reading from foreign memory, so waking all of them is in vain. Each
        // shard has a worker of its own.
        let wakes_one = region.target.foreign().is_some() || region.uffd.count() > 1;
        let wakes = self.wakes | if wakes_one { EpollFlags::EPOLLEXCLUSIVE } else { EpollFlags::empty() };
        if self.stays_first(region, (shard, post)) { wakes - EpollFlags::EPOLLET } else { wakes }
    }

    /// True if a post is the home of one shard of several, which a fault wakes first. Its watch is never made anew:
    /// it reports the shard as long as there is something to read.
    fn stays_first(&self, region: &Served, (shard, post): (usize, usize)) -> bool {
        region.uffd.count() > 1 && self.home(region, shard) == post
    }

    pub(super) fn remove(&self, region: &Served) {
        // Faults of a region that shares a userfaultfd end at its gate. Its place goes with its range.
        if region.uffd.is_shared() {
            return;
        }
        let mut regions = self.regions.write();
        for uffd in region.uffd.iter() {
            let fd = uffd.as_fd().as_raw_fd();
            if regions.shards.get(&fd).is_some_and(|watched| watched.handle.is_of(region)) {
                regions.shards.remove(&fd);
            }
        }
        drop(regions);
        if region.children.is_some() || region.uffd.is_stand_in() {
            return;
        }
        for epoll in &self.epolls {
            for uffd in region.uffd.iter() {
                // ENOENT if the region was not added completely.
                let _ = epoll.delete(uffd);
            }
        }
    }

    pub(super) fn refuse_regions(&self) -> Result<(), Error> {
        let mut regions = self.regions.write();
        let shared = self.shared_uffds.handles();
        if regions.shards.is_empty() && shared.is_empty() {
            regions.stopped = true;
            return Ok(());
        }
        let name = |handle: &Arc<RegionHandle>| {
            handle.enter().map_or_else(String::new, |region| region.name.clone())
        };
        let names: Vec<_> = regions.served().chain(&shared).map(name).collect();
        let what =
            format!("the pool still serves {} ({}): drop the regions first", names.len(), names.join(", "));
        Err(Error::new(ErrorKind::InUse, what))
    }
}

/// The worker that a fault of a shard wakes first. The shards of a region are spread evenly over all
/// workers, and with as many of both, shard `i` is worker `i`'s.
const fn home_of(shard: usize, shards: usize, workers: usize) -> usize {
    if shards <= workers { shard * workers / shards } else { shard % workers }
}

fn server_ended(region: &str) -> Error {
    let what = format!(
        "region {region}: its server has ended, because the pool was stopped or the server dropped: start another"
    );
    Error::new(ErrorKind::ServerStopped, what)
}

/// The fewest userfaultfds that small regions share: a region and its two neighbours have different ones.
const SHARED_MIN: usize = 3;
/// The most.
const SHARED_MAX: usize = 16;
/// The regions that are left to their readers before their list has to grow.
const LEFT: usize = 64;
/// The most events that may wait for a worker.
const DEFERRED_MAX: usize = 1024;
/// The most faults that may wait for a worker. Above this, the worker that reads a fault serves it.
const QUEUE_MAX: usize = 1024;
/// The most spans that may wait to be filled ahead.
const PREFETCH_MAX: usize = 64;
