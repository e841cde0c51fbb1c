//! A served region: its mapping and the state that its server needs for it.

use crate::fault::{FaultRequest, Host, NextStep, PrefetchJob};
use crate::serve::bulkhead::Bulkhead;
use crate::serve::fork::ForkedChildren as ForkedChildrenOf;
use crate::serve::fork::orphans::Orphans;
use crate::serve::latency_estimate::LatencyEstimate;
use crate::serve::read_turn::{ReadTurn, TurnLock};
use crate::serve::{fetch_semaphore, prefetch_queue, queue, slow_admission, timers, weak_handle};
use crate::space::{Mapping, Target};
use pagestitch_kernel::Span;
use parking_lot::Mutex;
use std::mem;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

/// A mapping that is served.
#[derive(Debug)]
pub(crate) struct Served {
    mapping: Mapping,
    /// The recent duration of its faults.
    pub(crate) latency: LatencyEstimate,
    /// The turn to read its events.
    pub(crate) turns: TurnLock,
    /// The limit on concurrent faults, and the queue of faults above it.
    pub(crate) limit: Option<(usize, Bulkhead<FaultRequest>)>,
    /// Permits for the fetches of the pool; unset without a limit.
    pub(super) permits: OnceLock<Arc<FetchSemaphore>>,
    /// The number of its faults that are served again after a pause.
    repeated: AtomicUsize,
    /// The timer queue of the pool, for work that is repeated after a pause.
    pub(crate) timers: OnceLock<Arc<Timers>>,
    /// Its forked children, if they are served.
    pub(crate) children: Option<Arc<ForkedChildren>>,
    /// Moved parts and unserved children, until their missing pages are poisoned.
    pub(crate) orphans: Orphans,
    /// The prefetches that the application has requested.
    prefetches: Mutex<Vec<Weak<PrefetchJob>>>,
    /// The weak handle that its server keeps.
    handle: OnceLock<Arc<RegionHandle>>,
}

// Handles, queues and admission are generic over the region; these aliases are for `Served`.
pub(crate) type RegionHandle = weak_handle::RegionHandle<Served>;
pub(super) type Entrance = weak_handle::Entrance<Served>;
pub(super) type OwnedRegionGuard = weak_handle::OwnedRegionGuard<Served>;
pub(crate) type ForkedChildren = ForkedChildrenOf<Served>;
pub(crate) type QueuedFault = queue::QueuedFault<Served>;
pub(super) type PrefetchTask = queue::PrefetchTask<Served>;
pub(super) type FetchSemaphore = fetch_semaphore::FetchSemaphore<QueuedFault>;
pub(super) type Permit = fetch_semaphore::Permit<QueuedFault>;
pub(crate) type Timers = timers::Timers<Served>;
pub(super) type TimedTask = timers::TimedTask<Served>;
pub(super) type RequestedPrefetch = prefetch_queue::RequestedPrefetch<Served>;
pub(super) type PrefetchQueue = prefetch_queue::PrefetchQueue<Served>;
pub(super) type SlowAdmission = slow_admission::SlowAdmission<Served>;

impl QueuedFault {
    pub(super) fn new(region: &Arc<Served>, request: FaultRequest) -> Self {
        Self { handle: Arc::clone(region.handle()), request }
    }
}

impl PrefetchTask {
    pub(super) fn new(region: &Arc<Served>, span: Span) -> Self {
        Self { handle: Arc::clone(region.handle()), span: Some(span) }
    }

    pub(super) fn replay(region: &Arc<Served>) -> Self {
        Self { handle: Arc::clone(region.handle()), span: None }
    }
}

impl RequestedPrefetch {
    pub(super) fn new(region: &Arc<Served>, job: &Arc<PrefetchJob>) -> Self {
        Self { handle: Arc::clone(region.handle()), job: Arc::clone(job) }
    }
}

impl Served {
    /// `max_in_flight` limits concurrent faults; `None` sets no limit.
    pub(crate) fn new(
        mapping: Mapping,
        max_in_flight: Option<usize>,
        children: Option<Arc<ForkedChildren>>,
    ) -> Self {
        Self {
            mapping,
            latency: LatencyEstimate::default(),
            turns: TurnLock::default(),
            permits: OnceLock::new(),
            repeated: AtomicUsize::new(0),
            timers: OnceLock::new(),
            limit: max_in_flight.map(|most| (most, Bulkhead::new(ROOM))),
            orphans: Orphans::new(children.is_none()),
            children,
            prefetches: Mutex::default(),
            handle: OnceLock::new(),
        }
    }

    /// The weak handle to this region, for its server to keep.
    pub(crate) fn handle(self: &Arc<Self>) -> &Arc<RegionHandle> {
        self.handle.get_or_init(|| Arc::new(RegionHandle::new(self.gate(), self)))
    }

    /// True if a fault was read after the gate was closed.
    pub(super) fn has_stray_faults(&self) -> bool {
        self.handle.get().is_some_and(|handle| handle.has_stray())
    }

    /// Keeps a requested prefetch, so that it ends with the service of the region.
    pub(super) fn note_prefetch(&self, job: &Arc<PrefetchJob>) {
        let mut prefetches = self.prefetches.lock();
        prefetches.retain(|job| job.strong_count() > 0);
        prefetches.push(Arc::downgrade(job));
    }

    /// Ends the requested prefetches, because no thread fills their pages any more.
    pub(super) fn end_prefetches(&self) {
        let prefetches = mem::take(&mut *self.prefetches.lock());
        prefetches.iter().filter_map(Weak::upgrade).for_each(|job| job.end());
    }

    /// As [`Mapping::close`], and ends the requested prefetches.
    pub(crate) fn close(&self) {
        self.mapping.close();
        self.end_prefetches();
    }

    /// Called before a worker serves a fault again.
    pub(super) fn repeat_begins(&self) {
        self.repeated.fetch_sub(1, Ordering::Relaxed);
    }

    /// The right to read events; `None` if another thread holds it and will read them.
    pub(crate) fn acquire_turn(&self) -> Option<ReadTurn<'_>> {
        match &self.target {
            Target::Owned(_) => Some(ReadTurn::shared(self.uffd.count() > 1 && self.latency.is_fast())),
            Target::Foreign(_) => self.turns.try_acquire(),
        }
    }
}

impl Deref for Served {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

impl Host for Served {
    /// `None` if the pool has no limit.
    type Permit = Option<Permit>;

    fn may_fetch(&self) -> bool {
        self.permits.get().is_none_or(|permits| permits.has_any())
    }

    fn permit_fetch(&self) -> Option<Self::Permit> {
        match self.permits.get() {
            Some(permits) => permits.take().map(Some),
            None => Some(None),
        }
    }

    fn permit_prefetch(&self) -> Option<Self::Permit> {
        let permit = self.permit_fetch()?;
        let is_admitted = self.limit.as_ref().is_none_or(|(most, bulkhead)| bulkhead.try_admit(*most));
        is_admitted.then_some(permit)
    }

    fn wait_for_permit(self: &Arc<Self>, request: FaultRequest) {
        let permits = self.permits.get().expect("only a pool with permits has a limit");
        permits.wait(QueuedFault::new(self, request));
    }

    fn fetch_ended(self: &Arc<Self>) {
        let Some((most, bulkhead)) = &self.limit else { return };
        let (Some(request), Some(timers)) = (bulkhead.release(*most), self.timers.get()) else { return };
        // A worker serves the fault that is admitted instead: this thread belongs to the source.
        timers.add(TimedTask::ServeAdmitted(QueuedFault::new(self, request)), Duration::ZERO);
    }

    fn has_room(&self) -> bool {
        // A signal makes a waiting thread fault again, so a hostile owner of foreign memory can queue
        // faults without end. Threads of this process are trusted not to.
        let is_limited = self.target.foreign().is_some();
        self.timers.get().is_some() && !(is_limited && self.repeated.load(Ordering::Relaxed) >= REPEATED_MAX)
    }

    fn handle_later(self: &Arc<Self>, request: FaultRequest, wait: Duration) {
        let timers = self.timers.get().expect("it has room");
        self.repeated.fetch_add(1, Ordering::Relaxed);
        timers.add(TimedTask::Serve(QueuedFault::new(self, request)), wait);
    }

    fn go_on_with(self: &Arc<Self>, job: &Arc<PrefetchJob>, next: NextStep) {
        let pause = match next {
            NextStep::Resume => Duration::ZERO,
            NextStep::Pause(pause) => pause,
            NextStep::None => return,
        };
        let timers = self.timers.get().expect("only a server with workers takes prefetches");
        timers.add(TimedTask::Prefetch(RequestedPrefetch::new(self, job)), pause);
    }

    fn record_latency(&self, ns: u64) {
        self.latency.record(ns);
    }
}

/// Faults that can wait for admission before the queue has to grow.
const ROOM: usize = 256;
/// The most faults of a region in foreign memory that wait to be served again.
const REPEATED_MAX: usize = 4096;
