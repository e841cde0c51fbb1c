//! The part of a region in a memory budget, as the fault path uses it. The room `reclaim` implements it.

use crate::error::Failure;
use crate::space::page_table::Claim;
use pagestitch_kernel::{AddressRange, Page, Span, Uffd};
use std::fmt;
use std::sync::Arc;

/// Counts the pages of a region in its budget, and makes room for them.
///
/// A journey [prepares](Self::prepare) the first pages of its claim, [makes room](Self::make_room) for
/// the pages that it is about to install, tells [which are installed](Self::installed), and
/// [tidies](Self::tidy) at its end.
///
/// A signal handler has a small stack, so its journey neither evicts nor tidies (`quiet`). The handler
/// [frees a page](Self::free_in_handler) before its journey and [tidies](Self::tidy_in_handler) after it.
pub(crate) trait Residence: fmt::Debug + Send + Sync {
    /// Brings the first page of a claim back from standby, or tells how many pages to fill. The page lies
    /// in `range`, and is registered with `uffd`. `writes`: the page of the claim that is touched by a write.
    fn prepare(
        &self,
        claim: &mut Claim<'_>,
        range: AddressRange,
        uffd: &Uffd,
        writes: Option<Page>,
    ) -> Prepared;

    /// Brings a page back from standby for a signal handler, whose interrupted thread has the page's claim.
    /// True if the page is there now, or a touch has to try again.
    fn return_beside(&self, page: Page, range: AddressRange, uffd: &Uffd) -> bool;

    /// Reserves memory for pages in the budget. Evicts others before, if it is used up. False if there is
    /// no room, because written pages cannot go back to their sources; or because the budget is used up and
    /// the thread is `quiet`.
    fn make_room(&self, pages: usize, quiet: bool) -> bool;

    /// The first `pages` pages of a span are installed. The room for the rest is given back. `is_block`: all
    /// of them are one huge page.
    fn installed(&self, span: Span, pages: usize, is_block: bool);

    /// Evicts the pages that are above the share of the budget for resident pages. Waits for no lock.
    fn tidy(&self);

    /// Evicts pages before the journey of a signal handler, if the budget is used up. Takes no lock, and waits
    /// for a bounded time. Where written pages go back, a thread of the budget evicts instead.
    fn free_in_handler(&self);

    /// Waits for that thread, after a journey that had no room. False if there is none, as
    /// [`make_room`](Self::make_room).
    fn wait_for_room_in_handler(&self) -> bool;

    /// As [`tidy`](Self::tidy), after the journey of a signal handler.
    fn tidy_in_handler(&self);

    /// Before a write to a present page: has pages go back to their sources, if nearly all pages of the budget are
    /// dirty. Else each page that comes would wait for the write of another one. The caller has no claim.
    fn throttle(&self);

    /// As [`throttle`](Self::throttle), in a signal handler.
    fn throttle_in_handler(&self);

    /// True if the source of a page may change, and a hash tells that the page has the bytes of its first
    /// reading.
    fn hashes(&self, page: Page) -> bool;

    /// Compares the bytes of pages with their first reading. Returns the number of leading pages that do
    /// not differ. The bytes are in a buffer of the thread, so that they do not change meanwhile.
    fn unchanged(&self, span: Span, bytes: &[u8]) -> usize;

    /// Has the resident pages of a span leave, except for pinned and locked ones. Returns their number.
    fn evict(&self, span: Span) -> usize;

    /// Pins a span: its pages that are filled afterwards do not leave. The error is the number of pages that
    /// all regions of the budget can pin.
    fn pin(&self, span: Span) -> Result<(), usize>;

    /// Ends the pins of a span.
    fn unpin(&self, span: Span);

    /// The pages of a span are dropped, and get other bytes: also those in standby are not wanted any
    /// more. The caller has claimed them.
    fn discarded(&self, span: Span);

    /// A handle that tells which pages have left. It outlives the region.
    fn left_pages(&self) -> Arc<dyn LeftPages>;

    /// The most pages that are resident at once.
    fn limit(&self) -> usize;

    /// The number of written pages of all regions of the budget that have gone back to their sources.
    fn written_back_pages(&self) -> u64;

    /// True if an eviction may write pages to a source of any region of the budget.
    fn evicts_written(&self) -> bool;

    /// The written pages, if they go back to their sources.
    fn written_back(&self) -> Option<&dyn WrittenBack>;
}

/// Tells which pages of a region have left because of its budget.
pub(crate) trait LeftPages: fmt::Debug + Send + Sync {
    /// True if a page has left since it was filled first, whether it is back or not. False after it got
    /// other bytes.
    fn has_left(&self, page: Page) -> bool;
}

/// The written pages of a region with a budget, which go back to their sources. A page arrives
/// write-protected, so that its first write is a fault.
pub(crate) trait WrittenBack {
    /// True if a page that is filled arrives write-protected.
    fn arrives_protected(&self, page: Page) -> bool;

    /// A page is written soon: the caller has its claim, and lets it be written.
    fn will_write(&self, page: Page);

    /// Writes the dirty pages of a span to their sources. Tells the first failure of each run, whose pages
    /// stay dirty.
    fn flush(&self, span: Span, failed: &mut dyn FnMut(Page, Failure));

    /// The next flush is the last one, and the region ends after it.
    fn end(&self);

    /// The record of changes, if the region keeps one.
    fn changed(&self) -> Option<&dyn ChangedPages>;

    /// True if the source of a chunk, by its number, was written since the last call.
    fn take_unsynced(&self, chunk: usize) -> bool;
}

/// The record of the changes to a region with a budget.
pub(crate) trait ChangedPages {
    /// The pages that were written since the last call, ascending, as runs that do not touch. A page is found
    /// again and again until it goes back to its source.
    fn take(&self) -> Vec<Span>;

    /// Has the next call find pages again.
    fn give_back(&self, spans: &[Span]);
}

/// The next step for the first pages of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prepared {
    /// These pages are filled from their sources.
    Fill(Span),
    /// The first page has come back. It is settled.
    Returned,
    /// The memory map is changing: the first page is still absent.
    Changing,
}
