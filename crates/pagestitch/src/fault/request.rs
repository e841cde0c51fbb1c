//! A request to serve a fault, and the trait through which faults use their server.

use crate::fault::error::Unfilled;
use crate::fault::fetch_semaphore::Permit;
use crate::fault::recovery::{Attempts, Pause};
use crate::space::Mapping;
use crate::space::page_table::Claim;
use pagestitch_kernel::Page;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The services that a fault needs from its server. The fault layer calls the serve layer only
/// through this trait.
pub(crate) trait Host: Deref<Target = Mapping> + fmt::Debug + Send + Sync + 'static {
    /// Whether one more asynchronous fetch may start; with its permit, if there is a limit. `None`:
    /// the worker waits for the source.
    fn may_fetch(&self) -> Option<Option<Permit>>;

    /// Whether the queue of repeated faults has room.
    fn has_room(&self) -> bool;

    /// Queues a fault to be served again after `wait`.
    fn handle_later(self: &Arc<Self>, request: FaultRequest, wait: Duration);

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
}

impl FaultRequest {
    pub(crate) fn new(page: Page, read: Instant, thread: u32, slot: Option<usize>) -> Self {
        Self { page, read, thread, slot, attempts: Attempts::default() }
    }

    /// The request to serve it again, or to go on with it elsewhere.
    pub(super) const fn again(self, slot: Option<usize>, attempts: Attempts) -> Self {
        Self { slot, attempts, ..self }
    }

    pub(super) fn is_first(&self) -> bool {
        self.attempts == Attempts::default()
    }
}

/// Gives a claim back without waking the faulting thread, and queues its fault to be served again
/// after a pause. `Ok`: the queue is full.
///
/// The claim ends before the fault is queued: the worker that takes the fault would meet it.
pub(super) fn serve_later<H: Host>(
    region: &Arc<H>,
    claim: &mut Claim<'_>,
    again: impl FnOnce() -> FaultRequest,
    pause: Pause,
) -> Result<(), Unfilled> {
    if !region.has_room() {
        return Ok(());
    }
    claim.release_without_wake();
    region.handle_later(again(), pause.length());
    Err(Unfilled::Later)
}
