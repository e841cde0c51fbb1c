//! The entries of a pool's queues: faults that were handed on, and pages to fill ahead.

use crate::fault::Request;
use crate::serve::door::Door;
use pagestitch_kernel::Span;
use std::sync::Arc;

/// A fault that was handed on.
#[derive(Debug)]
pub(super) struct Handed<R> {
    pub(super) door: Arc<Door<R>>,
    pub(super) asked: Request,
}

/// Pages to be filled before anybody asks for them: a span, or the next ones of the region's recording.
#[derive(Debug)]
pub(super) struct Ahead<R> {
    pub(super) door: Arc<Door<R>>,
    pub(super) span: Option<Span>,
}

#[cfg(test)]
impl<R> Handed<R> {
    /// A fault of a region that there is not.
    pub(super) fn at(door: &Arc<Door<R>>) -> Self {
        let page = pagestitch_kernel::Page(0);
        let asked =
            Request { page, read: std::time::Instant::now(), thread: 1, place: None, tries: 0, failures: 0 };
        Self { door: Arc::clone(door), asked }
    }
}
