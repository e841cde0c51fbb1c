//! The entries of a pool's queues: faults for other workers, and pages to fill before their touch.

use crate::fault::FaultRequest;
use crate::serve::weak_handle::RegionHandle;
use pagestitch_kernel::Span;
use std::sync::Arc;

/// A fault that one worker has read, and another one serves.
#[derive(Debug)]
pub(crate) struct QueuedFault<R> {
    pub(super) handle: Arc<RegionHandle<R>>,
    pub(super) request: FaultRequest,
}

/// Pages that are filled before a thread touches them: a span, or the next pages of the region's
/// recording.
#[derive(Debug)]
pub(super) struct PrefetchTask<R> {
    pub(super) handle: Arc<RegionHandle<R>>,
    pub(super) span: Option<Span>,
}

#[cfg(test)]
impl<R> QueuedFault<R> {
    /// A fault for the region of `handle`.
    pub(super) fn at(handle: &Arc<RegionHandle<R>>) -> Self {
        let page = pagestitch_kernel::Page(0);
        let request = FaultRequest::new(page, std::time::Instant::now(), 1, None);
        Self { handle: Arc::clone(handle), request }
    }
}
