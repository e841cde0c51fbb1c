//! Lets threads write to pages that arrived write-protected, because their region tells written pages.

use crate::fault::Quiet;
use crate::space::Mapping;
use crate::space::page_table::PageState;
use pagestitch_kernel::Span;

/// Lets the present pages at the start of a span be written, and wakes their waiters. Returns their number;
/// the error is the state of the first page if it is not present.
///
/// The claim keeps an evictor and a flush off the pages between the mark and the end of the protection:
/// such a page would look clean and be written. Async-signal-safe.
pub(crate) fn let_write(region: &Mapping, span: Span) -> Result<usize, PageState> {
    let Some(back) = region.written_back() else { return Err(PageState::Present) };
    let quiet = Quiet(region);
    let mut claim = region.pages.claim_present(region.in_one_shard(span), &quiet)?;
    let span = claim.span();
    span.iter().for_each(|page| back.will_write(page));
    unprotect(region, span);
    claim.settle(span.pages, PageState::Present);
    Ok(span.pages)
}

/// As [`let_write`], for a page whose claim belongs to a thread that waits for this one, below a signal
/// handler.
#[cold]
pub(crate) fn let_write_beside(region: &Mapping, span: Span) {
    if let Some(back) = region.written_back() {
        span.iter().for_each(|page| back.will_write(page));
        unprotect(region, span);
    }
}

fn unprotect(region: &Mapping, span: Span) {
    let range = region.target.addresses(span);
    // If the kernel refuses, because the map is changing, the woken thread faults again.
    let _ = region.uffd.of(range).unprotect(range);
    region.wake_quietly(span);
}
