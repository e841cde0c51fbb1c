//! Shows the pages of a region that is filled: maps them, opens the holes, poisons the failed pages.

use super::fill::FilledPages;
use super::spans::Spans;
use crate::error::{Error, Failure};
use crate::fault::count;
use crate::fault::poison::settle_poisoned;
use crate::method::Method;
use crate::space::{Mapping, Target};
use pagestitch_kernel::limits::Limit;
use pagestitch_kernel::memfd::SealedFile;
use pagestitch_kernel::{Errno, Page, Span, View};
use std::sync::Arc;

/// Shows all pages that are not mapped in place. Before, and after an error, they are closed.
pub(super) fn show(
    region: &Mapping,
    view: &mut View,
    spans: &Spans,
    filled: FilledPages,
) -> Result<(), Error> {
    let refused = |errno| refused(region, errno);
    let FilledPages { memfd, failed } = filled;
    if let Some(memfd) = memfd {
        let sealed = memfd
            .seal_unmapped()
            .map_err(|error| refused(error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)))?;
        map(region, view, &spans.filled, &sealed, &failed).map_err(refused)?;
    }
    for &hole in &spans.zeros {
        view.show_zeros(hole).map_err(refused)?;
        count(region, hole, Method::Zero);
    }
    poison(region, failed).map_err(refused)
}

/// Maps the filled pages, except for the failed ones.
fn map(
    region: &Mapping,
    view: &mut View,
    filled: &[Span],
    memfd: &SealedFile,
    failed: &[(Page, Arc<Failure>)],
) -> Result<(), Errno> {
    let size = region.page_size();
    let mut failed = failed.iter().map(|(page, _)| *page).peekable();
    for &span in filled {
        let mut rest = span;
        while !rest.is_empty() {
            let bad = failed.next_if(|&page| page < rest.end());
            let good = rest.prefix(bad.unwrap_or_else(|| rest.end()).0 - rest.first.0);
            view.map_sealed(good, memfd, size.offset_of(good.first))?;
            rest = rest.without_prefix(good.pages + usize::from(bad.is_some()));
        }
    }
    Ok(())
}

/// Covers the failed pages, in one mapping for neighbours, and keeps their failures.
fn poison(region: &Mapping, failed: Vec<(Page, Arc<Failure>)>) -> Result<(), Errno> {
    let Target::Owned(reservation) = &region.target else { unreachable!("adopted memory is refused") };
    for run in failed.chunk_by(|(before, _), (after, _)| before.0 + 1 == after.0) {
        reservation.revoke(Span { first: run[0].0, pages: run.len() })?;
    }
    for (page, failure) in failed {
        let claim = region.pages.claim(page, region);
        settle_poisoned(region, &mut claim.expect("no other thread has the region yet"), failure);
    }
    Ok(())
}

fn refused(region: &Mapping, errno: Errno) -> Error {
    let what = format!("region {}: cannot map its filled pages", region.name);
    match errno {
        Errno::ENOMEM | Errno::EAGAIN => {
            let limit = Limit::met(0, errno);
            Error::refused(format_args!("{what}: {limit}"), errno)
        }
        errno => Error::refused(what, errno),
    }
}
