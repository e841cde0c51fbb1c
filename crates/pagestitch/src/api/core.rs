//! What regions of either kind are: layout and pages, served by a pool, torn down in order.

use crate::error::Failure;
use crate::error::{Error, ErrorKind};
use crate::metrics::{Meter, Metrics};
use crate::policy::Recording;
use crate::serve::Served;
use crate::serve::fork::block_forks;
use crate::serve::{Attachment, fill_rest, populate, retry_failed};
use crate::space::Plan;
use crate::space::Target;
use pagestitch_kernel::Span;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

/// A region without its bytes.
pub(crate) struct Core {
    pub(super) served: Arc<Served>,
    pub(super) server: Box<dyn Attachment>,
}

impl Core {
    pub(crate) fn name(&self) -> &str {
        &self.served.name
    }

    pub(crate) fn len(&self) -> usize {
        // What was reserved fits in usize.
        self.served.layout.total() as usize
    }

    pub(crate) fn offset_of(&self, number: usize) -> Option<u64> {
        let layout = &self.served.layout;
        layout.chunk_of(number).map(|chunk| layout.offsets_of(chunk).start)
    }

    pub(crate) fn chunk_at(&self, offset: u64) -> Option<usize> {
        let layout = &self.served.layout;
        let chunk = (offset < layout.total()).then(|| layout.locate(offset))?;
        (!layout.is_padding(chunk)).then(|| layout.number_of(chunk))
    }

    pub(crate) fn serves_system_calls(&self) -> bool {
        let all = self.served.uffd.mode() == pagestitch_kernel::uffd::FaultMode::All;
        all && self.server.serves_system_calls()
    }

    pub(crate) fn populate(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        let span = self.span(range)?;
        if !self.server.is_of_this_process() {
            return self.touch(span);
        }
        populate(&self.served, span).map_err(|failure| self.failed(failure))
    }

    /// Fills what can be filled, as long as it is told to go on.
    pub(super) fn fill_rest(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Error> {
        fill_rest(&self.served, go_on).map_err(|failure| self.failed(failure))
    }

    /// From now on forked children have the region, where they are served.
    pub(super) fn show_to_children(&self) -> Result<(), Error> {
        match (&self.served.family, &self.served.target) {
            (Some(_), Target::Owned(reservation)) => reservation.inherit_on_fork().map_err(|errno| {
                let what = format_args!("region {}: cannot let children have its range", self.name());
                Error::because(ErrorKind::Resources, what, errno)
            }),
            _ => Ok(()),
        }
    }

    /// As a forked child has it: who serves is in another process, and what is filled is here.
    fn touch(&self, span: Span) -> Result<(), Error> {
        if self.served.family.as_ref().is_some_and(|family| family.has_no_server()) && !self.has_all(span) {
            let what = format_args!(
                "region {}: in a forked child whose parent has ended: what it has not read by then is not to be had",
                self.name()
            );
            return Err(Error::new(ErrorKind::Source, what.to_string()));
        }
        match &self.served.target {
            Target::Owned(reservation) if !span.is_empty() => reservation.populate_read(span).map_err(|errno| {
                let why = "in a forked child: its source has failed, its parent has dropped it, or has built it without inherit_on_fork()";
                Error::because(ErrorKind::Source, format_args!("region {}: {why}", self.name()), errno)
            }),
            _ => Ok(()),
        }
    }

    /// Whether the kernel has all pages of a span.
    fn has_all(&self, span: Span) -> bool {
        let mut all = true;
        self.served.target.residency(span, |_, here| all &= here);
        all
    }

    pub(crate) fn retry_failed(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        if !self.server.is_of_this_process() {
            // The uffd is the parent's: what it installs goes into the parent's memory.
            let what = format!(
                "region {}: it belongs to the parent process: after fork(2), the child cannot call retry_failed()",
                self.name()
            );
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        retry_failed(&self.served, self.span(range)?).map_err(|failure| self.failed(failure))
    }

    pub(crate) fn failures(&self) -> Vec<(u64, Arc<Failure>)> {
        let size = self.served.page_size();
        self.served
            .failures(self.served.target.all())
            .into_iter()
            .map(|(page, failure)| (size.offset_of(page), failure))
            .collect()
    }

    fn failed(&self, failure: Arc<Failure>) -> Error {
        Error::because(ErrorKind::Source, format_args!("region {}", self.name()), failure)
    }

    /// The pages of a range of offsets.
    fn span(&self, range: impl RangeBounds<u64>) -> Result<Span, Error> {
        let start = match range.start_bound() {
            Bound::Included(&start) => Some(start),
            Bound::Excluded(&before) => before.checked_add(1),
            Bound::Unbounded => Some(0),
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.checked_add(1),
            Bound::Excluded(&end) => Some(end),
            Bound::Unbounded => Some(self.len() as u64),
        };
        let range = self.inside(start.unwrap_or(u64::MAX), end)?;
        Ok(self.served.page_size().covering(&range))
    }

    pub(crate) fn plan(&self) -> Plan {
        Plan::of(&self.served)
    }

    pub(crate) fn metrics(&self) -> Metrics {
        self.served.counters.read()
    }

    pub(crate) fn recording(&self) -> Option<Recording> {
        let served = &self.served;
        Some(served.recorder.as_ref()?.read(served.page_size(), served.layout.total()))
    }

    pub(crate) fn meter(&self) -> Meter {
        Meter::new(Arc::clone(&self.served.counters), self.served.presence())
    }

    pub(crate) fn close(self) -> Metrics {
        self.server.detach(&self.served);
        self.served.close();
        self.metrics()
    }

    /// The range from `start` to `end`, if it is inside; `None` stands for an end past 2^64.
    pub(crate) fn inside(&self, start: u64, end: Option<u64>) -> Result<Range<u64>, Error> {
        let len = self.len() as u64;
        match end {
            Some(end) if start <= end && end <= len => Ok(start..end),
            _ => {
                let end = end.map_or_else(|| String::from("2^64"), |end| end.to_string());
                let what =
                    format!("bytes {start}..{end} are not inside region {} of {len} bytes", self.name());
                Err(Error::new(ErrorKind::OutOfRange, what))
            }
        }
    }
}

/// Teardown. Closing a uffd shows **zeros** to whoever waits in a missing page, so it comes last:
///
/// 0. forked children do not have the region any more; those that are just being made are served;
/// 1. stop intake: no worker looks at this uffd any more, and no signal handler at this range;
/// 2. join: wait for those that are at work for the region; no source is called from here on; forked children likewise, in which
///    what is missing becomes bad;
/// 3. fence: the whole range becomes inaccessible (adopted memory: what is missing becomes bad);
/// 4. wake: whoever waits tries again and meets that;
/// 5. close the uffd and unmap, when the last `Arc` goes. Where a thread waited at 3, the addresses stay closed for a second
///    ([`ranges`](pagestitch_kernel::ranges)): the thread may run after all of this, and must not meet another mapping there.
impl Drop for Core {
    fn drop(&mut self) {
        if !self.server.is_of_this_process() {
            // A forked child: the range is not there, and what serves it belongs to the parent.
            return;
        }
        block_forks(&self.served);
        // What the usher has read of children is announced by then.
        self.server.retire(&self.served);
        self.server.detach(&self.served);
        self.served.close();
        self.server.leave_family(&self.served);
        log!(debug, region = self.name(), metrics = ?self.metrics(), "region dropped");
        self.served.shut();
    }
}
