//! The present share of each part of a region.

use pagestitch_kernel::{Page, Span};
use std::fmt::Debug;

/// The state of one part of a region, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Coverage {
    /// Pages in this part.
    pub pages: u64,
    /// Of these, the pages that are present: filled, or mapped in place.
    pub present: u64,
    /// Of these, the pages that are poisoned, because their bytes were unavailable.
    pub poisoned: u64,
    /// Of these, the absent pages that have left because of the region's [budget](crate::Budget).
    pub evicted: u64,
    /// Of the present pages, those that had left because of the budget before.
    pub returned: u64,
}

/// Tells which pages of a region are present. The mapping implements it, because metrics know
/// nothing of page tables.
pub(crate) trait Presence: Debug + Send + Sync {
    /// Counts the pages of a span.
    fn coverage(&self, span: Span) -> Coverage;
}

/// Divides all pages into `parts` parts of nearly equal size.
pub(super) fn parts(presence: &dyn Presence, pages: usize, parts: usize) -> Vec<Coverage> {
    let bound = |part: usize| (pages as u128 * part as u128 / parts as u128) as usize;
    let spans =
        (0..parts).map(|part| Span { first: Page(bound(part)), pages: bound(part + 1) - bound(part) });
    spans.map(|span| presence.coverage(span)).collect()
}
