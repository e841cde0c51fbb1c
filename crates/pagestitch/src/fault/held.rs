//! Holds off the discards of foreign memory while its pages are installed.

use crate::space::Mapping;
use crate::space::page_table::PageState;
use crate::space::target::{Busy, Foreign};
use pagestitch_kernel::Span;
use pagestitch_kernel::sync::RwLockReadGuard;

/// The bytes of a page may have changed by a discard: the server must read its events first.
pub(super) struct Changing;

/// Blocks discard events while it is held. `None` if discards do not change the bytes of pages.
pub(super) type Held<'r> = Option<RwLockReadGuard<'r, ()>>;

/// Blocks discard events of foreign memory. `Changing` if a page of the span was discarded since
/// its claim, because the filled bytes are outdated.
pub(super) fn held(region: &Mapping, span: Span) -> Result<Held<'_>, Changing> {
    unless_invalidated(region, span, region.target.foreign().and_then(Foreign::hold))
}

/// As [`held`], for a thread that must not block: `Changing` also if the lock is taken.
pub(super) fn held_now(region: &Mapping, span: Span) -> Result<Held<'_>, Changing> {
    let held = region.target.foreign().map(Foreign::try_hold).transpose();
    unless_invalidated(region, span, held.map_err(|Busy| Changing)?.flatten())
}

fn unless_invalidated<'r>(region: &Mapping, span: Span, held: Held<'r>) -> Result<Held<'r>, Changing> {
    if held.is_some() && span.iter().any(|page| region.pages.state(page) == PageState::Invalidated) {
        region.counters.local().retries.add(1);
        return Err(Changing);
    }
    Ok(held)
}
