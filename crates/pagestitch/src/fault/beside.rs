//! Pages beside a claim: a signal handler has touched a page that the interrupted thread is filling.

use crate::fault::Filler;
use crate::fault::error::InstallError;
use crate::fault::fill::{Content, Filled};
use crate::fault::install::{put, takes_memory, unchanged};
use crate::space::Mapping;
use pagestitch_kernel::{Outcome, Page};

/// Fills a page beside its claim, which cannot be settled before the handler returns. The later
/// install of the two gets `AlreadyThere`, so this one settles nothing. It counts the page in the budget,
/// because the thread with the claim may fail, and give the page back. False if the
/// page cannot be filled, or the budget has no room: donated pages cannot, because they can move only once, and neither can pages
/// of a released source, nor pages of a source that has changed.
#[cold]
pub(crate) fn fill_beside<F: Filler>(region: &Mapping, page: Page, filler: &mut F) -> bool {
    if returns(region, page) {
        return true;
    }
    match filler.fill(page.span()) {
        Ok(Filled { content: Content::Move(..) | Content::Released, .. }) => false,
        Ok(Filled { content, .. }) if unchanged(region, page.span(), &content, 0).is_err() => false,
        // A signal handler frees memory before the thread touches the page again.
        Ok(Filled { content, .. }) if !counts(region, page, &content, F::MODE.is_quiet()) => {
            F::MODE.is_quiet()
        }
        Ok(Filled { mut content, .. }) => {
            let put = put(region, page.span(), &mut content, 0, F::MODE.is_quiet());
            matches!(put, Some((Outcome::Done | Outcome::AlreadyThere | Outcome::Changing, _)))
        }
        // The thread touches the page again.
        Err(InstallError::Changing) => true,
        Err(_) => false,
    }
}

/// True if the page comes back from standby. Its source may not have its written bytes yet.
fn returns(region: &Mapping, page: Page) -> bool {
    let Some(residence) = &region.residence else { return false };
    let range = region.target.addresses(page.span());
    residence.return_beside(page, range, region.uffd.of(range))
}

/// Counts a page that takes memory. Called before the page is there, because the thread with the claim runs
/// on afterwards, and the page may leave. A page that does not come after all is uncounted when it is chosen
/// to leave.
fn counts(region: &Mapping, page: Page, content: &Content<'_>, quiet: bool) -> bool {
    let residence = region.residence.as_ref().filter(|_| takes_memory(region, content));
    residence.is_none_or(|residence| {
        let has_room = residence.make_room(1, quiet);
        if has_room {
            residence.installed(page.span(), 1, false);
        }
        has_room
    })
}
