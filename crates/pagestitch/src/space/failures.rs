//! The failures of poisoned pages: when they are kept, reported and removed.

use super::Mapping;
use super::failure_table::FailureCallback;
use super::page_table::PageState;
use crate::error::Failure;
use crate::guard::guarded;
use pagestitch_kernel::{Features, Page, Span};
use std::sync::Arc;

impl Mapping {
    pub(crate) fn failure(&self, page: Page) -> Option<Arc<Failure>> {
        // Usually no page has failed, and no lock is taken.
        if self.failures.is_unused() {
            return None;
        }
        self.failures.locked().get(&page).cloned()
    }

    /// Holds the lock of the failures while `body` runs.
    #[cfg(all(test, not(shuttle)))]
    pub(crate) fn with_failures_locked<R>(&self, body: impl FnOnce() -> R) -> R {
        let _failures = self.failures.locked();
        body()
    }

    /// The failed pages of a span with their failures, ascending.
    pub(crate) fn failures(&self, span: Span) -> Vec<(Page, Arc<Failure>)> {
        // A discarded page is absent, and not poisoned any more. A page whose fault timed out is
        // still claimed by the worker in its source, and counts.
        let counts = |page| self.pages.state(page) != PageState::Absent || self.is_poisoned_by_kernel(page);
        self.failed_pages(span).filter(|(page, _)| counts(*page)).collect()
    }

    /// True if a failed page is poisoned although the table has it as absent: its discard was read
    /// after the page had failed anew.
    fn is_poisoned_by_kernel(&self, page: Page) -> bool {
        // A page without a marker is covered for good.
        let mut poisoned =
            self.target.foreign().is_none() && !self.uffd.features().contains(Features::POISON);
        self.target.residency(page.span(), |_, here| poisoned |= here);
        poisoned
    }

    /// The pages of a span that have failed and were not filled since, with their failures,
    /// ascending. Such a page may have been discarded.
    pub(crate) fn failed_pages(&self, span: Span) -> impl Iterator<Item = (Page, Arc<Failure>)> {
        let failures = self.failures.locked();
        let bad = failures.range(span.first..span.end()).map(|(&page, failure)| (page, Arc::clone(failure)));
        let bad: Vec<_> = bad.filter(|(page, _)| self.pages.state(*page) != PageState::Present).collect();
        bad.into_iter()
    }

    /// Calls the callback for a page that fails.
    pub(crate) fn report(&self, page: Page, failure: &Failure) {
        if let Some(FailureCallback(tell)) = &self.reporter {
            let offset = self.page_size().offset_of(page);
            // A panic of the callback must not keep the faulting thread from its signal.
            if guarded(|| tell(offset, failure)).is_err() {
                log!(error, region = self.name, "the callback of on_page_failure() panicked");
            }
        }
    }

    /// Removes the failures of claimed pages that get other bytes.
    pub(crate) fn forget_failures(&self, span: Span) {
        if !self.failures.is_unused() {
            let mut failures = self.failures.locked();
            let failed: Vec<_> = failures.range(span.first..span.end()).map(|(&page, _)| page).collect();
            failed.iter().for_each(|page| drop(failures.remove(page)));
        }
    }

    /// Removes the failures of pages that have been filled.
    pub(crate) fn remove_failures(&self, span: Span) {
        if !self.failures.is_unused() {
            let mut failures = self.failures.locked();
            let failed = failures.range(span.first..span.end()).map(|(&page, _)| page);
            // Only pages that are still present: others were discarded and failed anew since.
            let filled: Vec<_> =
                failed.filter(|page| self.pages.state(*page) == PageState::Present).collect();
            filled.iter().for_each(|page| drop(failures.remove(page)));
        }
    }

    /// Records the failure of a page again, after it was settled as poisoned, unless it is present.
    /// `retry_failed` may have filled the page meanwhile and removed the failure, before the page
    /// failed anew.
    ///
    /// Invariant: a poisoned page has a failure. Otherwise `populate` would look for it forever. An
    /// absent page keeps its failure, because it may have been discarded before it was poisoned.
    pub(crate) fn settle_failure(&self, page: Page, failure: &Arc<Failure>) {
        let mut failures = self.failures.locked();
        if self.pages.state(page) != PageState::Present {
            failures.entry(page).or_insert_with(|| Arc::clone(failure));
        }
    }

    pub(crate) fn record_failure(&self, page: Page, failure: Arc<Failure>) {
        self.failures.keep(page, failure);
    }
}
