//! Claim: the right to fill pages, for each kind of journey.

use super::install::Mode;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState, Unclaimed, Wake};
use pagestitch_kernel::{Page, Span};

/// The pages that a journey fills.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wanted {
    /// The page of a fault, and the absent pages of its read unit that lie around it.
    Touched(Page, Span),
    /// The first page of a span, and the absent pages that follow it without a gap.
    Absent(Span),
    /// A poisoned page that is tried again.
    Poisoned(Page),
    /// Pages that an asynchronous fetch has kept claimed.
    Fetched(Span),
}

/// Claims pages. An error is the reason why another thread need not, or must not, fill the first.
#[inline]
pub(super) fn claim<'t>(
    region: &'t Mapping,
    wanted: Wanted,
    waker: &'t dyn Wake,
    mode: Mode,
) -> Result<Claim<'t>, Unclaimed> {
    let pages = &region.pages;
    match wanted {
        Wanted::Touched(page, unit) => {
            pages.claim_touched(page, unit, waker, || is_resident(region, page, mode))
        }
        Wanted::Absent(span) => pages.claim_run(span, waker).map_err(unclaimed),
        // A page that was discarded, and failed anew before that was noted, is absent here and has
        // its marker.
        Wanted::Poisoned(page) => {
            let claim = pages.claim_from(page, PageState::Poisoned, waker);
            claim.or_else(|_| pages.claim(page, waker)).map_err(unclaimed)
        }
        Wanted::Fetched(span) => Ok(pages.resume(span, waker)),
    }
}

/// True if the kernel has the page of a fault. Otherwise the page was discarded.
#[cold]
fn is_resident(region: &Mapping, page: Page, mode: Mode) -> bool {
    let is_resident = region.is_resident(page);
    // A signal handler fills one page at a time, and has a small stack.
    if !is_resident && !mode.is_quiet() {
        region.note_discard(page);
    }
    is_resident
}

const fn unclaimed(state: PageState) -> Unclaimed {
    match state {
        PageState::Present => Unclaimed::Resident,
        PageState::Poisoned => Unclaimed::Poisoned,
        // A page is absent here if another thread's claim on it has just ended.
        PageState::Filling | PageState::Contended | PageState::Invalidated | PageState::Absent => {
            Unclaimed::Filling
        }
    }
}
