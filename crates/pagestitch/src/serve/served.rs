//! A region as its server has it: the mapping, and what serving it takes.

use crate::fault::{FaultRequest, FetchSemaphore, Host, Permit};
use crate::serve::bulkhead::Bulkhead;
use crate::serve::fork::ForkedChildren as ForkedChildrenOf;
use crate::serve::fork::orphans::Orphans;
use crate::serve::pace::{Pace, Reading};
use crate::serve::{queue, region_handle, slow_admission, timers};
use crate::space::{Mapping, Target};
use pagestitch_kernel::Span;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// A mapping that is served.
#[derive(Debug)]
pub(crate) struct Served {
    mapping: Mapping,
    pub(crate) pace: Pace,
    /// How many faults may be served at once, and those that wait for that.
    pub(crate) limit: Option<(usize, Bulkhead<FaultRequest>)>,
    /// How many fetches its pool may have under way, where there is a limit.
    pub(crate) permits: OnceLock<Arc<FetchSemaphore>>,
    /// Where what is to be done in a moment is kept.
    pub(crate) later: OnceLock<Arc<Timers>>,
    /// Its forked children, where they are served.
    pub(crate) children: Option<Arc<ForkedChildren>>,
    /// What nobody serves, until it has been seen to.
    pub(crate) orphans: Orphans,
    /// What its server keeps of it.
    door: OnceLock<Arc<RegionHandle>>,
}

// Doors, queues and families do not know the type of a region: here they are of this one.
pub(crate) type RegionHandle = region_handle::RegionHandle<Served>;
pub(crate) type ForkedChildren = ForkedChildrenOf<Served>;
pub(super) type QueuedFault = queue::QueuedFault<Served>;
pub(super) type PrefetchTask = queue::PrefetchTask<Served>;
pub(crate) type Timers = timers::Timers<Served>;
pub(super) type TimedTask = timers::TimedTask<Served>;
pub(super) type SlowAdmission = slow_admission::SlowAdmission<Served>;

impl QueuedFault {
    pub(super) fn new(region: &Arc<Served>, asked: FaultRequest) -> Self {
        Self { door: Arc::clone(region.door()), asked }
    }
}

impl PrefetchTask {
    pub(super) fn new(region: &Arc<Served>, span: Span) -> Self {
        Self { door: Arc::clone(region.door()), span: Some(span) }
    }

    pub(super) fn replay(region: &Arc<Served>) -> Self {
        Self { door: Arc::clone(region.door()), span: None }
    }
}

impl Served {
    /// At most so many faults are served at once, where there is a limit.
    pub(crate) fn new(
        mapping: Mapping,
        max_in_flight: Option<usize>,
        children: Option<Arc<ForkedChildren>>,
    ) -> Self {
        Self {
            mapping,
            pace: Pace::default(),
            permits: OnceLock::new(),
            later: OnceLock::new(),
            limit: max_in_flight.map(|most| (most, Bulkhead::new(ROOM))),
            orphans: Orphans::new(children.is_none()),
            children,
            door: OnceLock::new(),
        }
    }

    /// The way in, for its server to keep.
    pub(crate) fn door(self: &Arc<Self>) -> &Arc<RegionHandle> {
        self.door.get_or_init(|| Arc::new(RegionHandle::new(self.gate(), self)))
    }

    /// The right to read what the kernel has to tell, if nobody has it who will.
    pub(crate) fn turn(&self) -> Option<Reading<'_>> {
        match &self.target {
            Target::Owned(_) => Some(Reading::free()),
            Target::Foreign(_) => self.pace.turn(),
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
    // Where there is a limit on faults, or something to be done about failures, sources are waited for.
    fn may_fetch(&self) -> Option<Option<Permit>> {
        if self.limit.is_some() || !self.layout.only_poisons() {
            return None;
        }
        match self.permits.get() {
            Some(permits) => permits.take().map(Some),
            None => Some(None),
        }
    }

    fn handle_later(self: &Arc<Self>, request: FaultRequest, wait: Duration) -> bool {
        let again = QueuedFault::new(self, request);
        self.later.get().is_some_and(|later| later.add(TimedTask::Serve(again), wait).is_ok())
    }

    fn took(&self, ns: u64) {
        self.pace.took(ns);
    }
}

/// Faults that may wait for a berth before room has to be made.
const ROOM: usize = 256;
