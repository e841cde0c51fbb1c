//! A request to serve a fault, and the trait through which faults use their server.

use crate::fault::prefetch_job::{NextStep, PrefetchJob};
use crate::fault::recovery::Attempts;
use crate::space::Mapping;
use crate::space::page_table::Claim;
use pagestitch_kernel::Page;
use pagestitch_kernel::event::Touch;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The services that a fault needs from its server. The fault layer calls the serve layer only
/// through this trait.
pub(crate) trait Host: Deref<Target = Mapping> + fmt::Debug + Send + Sync + 'static {
    /// The right to one more asynchronous fetch, under the limit of the pool.
    type Permit: fmt::Debug + Send + Sync;

    /// Whether fetches have permits at all. False: the worker waits for the source.
    fn may_fetch(&self) -> bool;

    /// The permit to fetch the page of an admitted fault; `None` at the limit.
    fn permit_fetch(&self) -> Option<Self::Permit>;

    /// The permit to fetch pages ahead of their touch, which also needs an admission of the region;
    /// `None` at a limit.
    fn permit_prefetch(&self) -> Option<Self::Permit>;

    /// Queues an admitted fault until there is a permit for its fetch. It is served with the permit
    /// then, or without one if workers hold all permits.
    fn wait_for_permit(self: &Arc<Self>, request: FaultRequest);

    /// Ends the admission of a fetch.
    fn fetch_ended(self: &Arc<Self>);

    /// Whether a fault of this region can be queued to be served again. False if the owner of
    /// foreign memory has queued too many, or if the region has no queue.
    fn has_room(&self) -> bool;

    /// Queues a fault to be served again after `wait`.
    fn handle_later(self: &Arc<Self>, request: FaultRequest, wait: Duration);

    /// Goes on with a requested prefetch, as its last step or fetch tells. Also by a thread of a
    /// source.
    fn go_on_with(self: &Arc<Self>, job: &Arc<PrefetchJob>, next: NextStep);

    /// Records the time that a fault took, in nanoseconds.
    fn record_latency(&self, ns: u64);
}

/// A fault to be served: its page, its thread, and the time at which a worker read it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FaultRequest {
    pub(crate) page: Page,
    pub(crate) read: Instant,
    /// The kernel's number of the faulting thread.
    pub(crate) thread: u32,
    /// Its slot among the faults in flight, if it has one. The slot is freed when the fault is
    /// served.
    pub(crate) slot: Option<usize>,
    /// The attempts so far; none at first.
    pub(crate) attempts: Attempts,
    /// Whether a worker has taken it up before.
    pub(crate) is_repeated: bool,
    pub(crate) touch: Touch,
}

impl FaultRequest {
    pub(crate) fn new(page: Page, read: Instant, thread: u32, slot: Option<usize>) -> Self {
        Self {
            page,
            read,
            thread,
            slot,
            attempts: Attempts::default(),
            is_repeated: false,
            touch: Touch::Read,
        }
    }

    pub(crate) const fn by(self, touch: Touch) -> Self {
        Self { touch, ..self }
    }

    /// The request to serve it again, or to go on with it elsewhere.
    pub(super) const fn again(self, slot: Option<usize>, attempts: Attempts) -> Self {
        Self { slot, attempts, is_repeated: true, ..self }
    }
}

/// Gives a claim back without waking the faulting thread, and queues its fault to be served again
/// after a pause. False, and nothing is changed, if its region has [no room](Host::has_room) for it.
///
/// The claim ends before the fault is queued: the worker that takes the fault would meet it.
#[must_use]
pub(super) fn serve_later<H: Host>(
    region: &Arc<H>,
    claim: &mut Claim<'_>,
    again: impl FnOnce() -> FaultRequest,
    pause: Duration,
) -> bool {
    if !region.has_room() {
        return false;
    }
    claim.release_without_wake();
    region.handle_later(again(), pause);
    true
}
