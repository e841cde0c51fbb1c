//! A region as its handler threads see it: where to look, where to put it, who is at it. Not its bytes.

use crate::metrics::Counters;
use crate::policy::{Readahead, Streams};
use crate::region::Layout;
use crate::region::in_place::InPlaceRuns;
use crate::region::page_table::{PageTable, Wake};
use crate::source::Failure;
use pagestitch_kernel::gate::{Gate, Visit};
use pagestitch_kernel::{Event, Page, PageSize, Reservation, Span, Uffd};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// What the server shares with the region that it serves.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) layout: Layout,
    /// Pages that are there without us, and never fault.
    pub(crate) in_place: InPlaceRuns,
    pub(crate) pages: PageTable,
    /// `None` where nothing is to be filled ahead.
    pub(crate) streams: Option<Streams>,
    pub(crate) counters: Counters,
    pub(crate) reservation: Arc<Reservation>,
    pub(crate) uffd: Uffd,
    /// Why a page was poisoned. Grows by an entry for each page that fails.
    failures: Mutex<BTreeMap<Page, Arc<Failure>>>,
    /// Whoever works for the region is inside; dropping the region closes it.
    gate: Gate,
}

impl Served {
    pub(crate) fn new(
        name: String,
        layout: Layout,
        in_place: InPlaceRuns,
        readahead: Readahead,
        reservation: Arc<Reservation>,
        uffd: Uffd,
    ) -> Result<Self, pagestitch_kernel::Errno> {
        let pages = NonZeroUsize::new(reservation.pages()).expect("a reservation has pages");
        Ok(Self {
            name,
            layout,
            in_place,
            pages: PageTable::new(pages)?,
            streams: Streams::new(readahead, pages.get()),
            counters: Counters::default(),
            reservation,
            uffd,
            failures: Mutex::default(),
            gate: Gate::new(),
        })
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.reservation.page_size()
    }

    /// Goes to work for the region, unless it is being dropped.
    pub(crate) fn enter(&self) -> Option<Visit<'_>> {
        self.gate.enter()
    }

    /// Acts on a change of the memory map.
    pub(crate) fn note(&self, event: Event) {
        let Event::Remove { start, end } = event else {
            // Only remove events are asked for.
            return tracing::warn!(region = self.name, ?event, "unexpected event");
        };
        let range = self.reservation.range();
        let (start, end) = (start.max(range.start()), end.min(range.end()));
        if start >= end {
            return;
        }
        let base = range.start();
        let span = self.page_size().covering(&((start - base) as u64..(end - base) as u64));
        tracing::debug!(region = self.name, first = span.first.0, pages = span.pages, "let go");
        self.pages.forget(span);
        self.failures.lock().retain(|page, _| *page < span.first || *page >= span.end());
    }

    pub(crate) fn failure(&self, page: Page) -> Option<Arc<Failure>> {
        self.failures.lock().get(&page).cloned()
    }

    pub(crate) fn keep_failure(&self, page: Page, failure: Arc<Failure>) {
        self.failures.lock().insert(page, failure);
    }

    /// Nobody works for the region when this returns, and nobody will: sources are not called any more.
    pub(crate) fn close(&self) {
        self.gate.close();
    }

    /// Whether the kernel has the page.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        let mut resident = false;
        // Where the question fails, the page counts as absent: filling it again is then answered with EEXIST.
        let _ = self.reservation.residency(page.span(), |_, here| resident = here);
        resident
    }
}

impl Wake for Served {
    fn wake(&self, span: Span) {
        if let Err(errno) = self.uffd.wake(self.reservation.addresses(span)) {
            tracing::error!(region = self.name, %errno, "cannot wake");
        }
    }
}
