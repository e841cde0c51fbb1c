//! Claim: the right to fill pages, for each kind of journey.

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
) -> Result<Claim<'t>, Unclaimed> {
    let pages = &region.pages;
    match wanted {
        Wanted::Touched(page, unit) => pages.claim_touched(page, unit, waker, || region.is_resident(page)),
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
