//! Which parts of a region are there: for a picture of it.

use crate::region::in_place::Runs;
use crate::region::page_table::{PageTable, State};
use pagestitch_kernel::{Page, Span};

/// A part of a region: how many pages it has, and what has become of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Coverage {
    /// Pages in this part.
    pub pages: u64,
    /// Of these, those that were filled, or are there without that.
    pub present: u64,
    /// Those whose bytes could not be had.
    pub poisoned: u64,
}

/// Divides all pages into so many parts, as equal as can be.
pub(super) fn parts(table: &PageTable, in_place: &Runs, pages: usize, parts: usize) -> Vec<Coverage> {
    let bound = |part: usize| (pages as u128 * part as u128 / parts as u128) as usize;
    let spans =
        (0..parts).map(|part| Span { first: Page(bound(part)), pages: bound(part + 1) - bound(part) });
    spans.map(|span| part(table, in_place, span)).collect()
}

fn part(table: &PageTable, in_place: &Runs, span: Span) -> Coverage {
    let mut coverage = Coverage { pages: span.pages as u64, ..Coverage::default() };
    let mut rest = span;
    while !rest.is_empty() {
        let gap = in_place.next_gap(rest);
        let shown = if gap.is_empty() { rest.pages } else { gap.first.0 - rest.first.0 };
        coverage.present += shown as u64;
        for page in gap.iter() {
            match table.state(page) {
                State::Present => coverage.present += 1,
                State::Poisoned => coverage.poisoned += 1,
                _ => {}
            }
        }
        rest = rest.without_prefix(shown + gap.pages);
    }
    coverage
}
