//! The pages of a region that the build fills, and the holes that take no memory.

use crate::source::Backing;
use crate::space::{Layout, Mapping};
use pagestitch_kernel::limits::mappings_left;
use pagestitch_kernel::{Page, PageSize, Span};
use std::cmp::Reverse;

/// The pages that are not mapped in place. Both lists are ascending, and disjoint.
#[derive(Debug)]
pub(super) struct Spans {
    /// Pages that are filled.
    pub(super) filled: Vec<Span>,
    /// Pages of holes, which stay the kernel's zero page.
    pub(super) zeros: Vec<Span>,
}

impl Spans {
    pub(super) fn of(region: &Mapping) -> Self {
        let gaps = gaps(region, region.target.all());
        let holes = holes(&region.layout, region.page_size());
        let in_gaps = holes.into_iter().flat_map(|hole| self::gaps(region, hole));
        let zeros = largest(in_gaps.filter(|hole| hole.pages >= HOLE_PAGES).collect());
        Self { filled: without(&gaps, &zeros), zeros }
    }

    /// The number of pages that are filled.
    pub(super) fn pages(&self) -> usize {
        self.filled.iter().map(|span| span.pages).sum()
    }

    /// The page after the last one that is filled.
    pub(super) fn end(&self) -> Page {
        self.filled.last().map_or(Page(0), |span| span.end())
    }
}

/// The parts of a span that are not mapped in place.
fn gaps(region: &Mapping, span: Span) -> Vec<Span> {
    let (mut gaps, mut rest) = (Vec::new(), span);
    loop {
        let gap = region.in_place.next_gap(rest);
        if gap.is_empty() {
            return gaps;
        }
        gaps.push(gap);
        rest = rest.without_prefix(gap.end().0 - rest.first.0);
    }
}

/// The runs of whole pages that consist of holes.
fn holes(layout: &Layout, page: PageSize) -> Vec<Span> {
    let (mut found, mut start) = (Vec::new(), None);
    for chunk in 0..layout.chunks() {
        let offsets = layout.offsets_of(chunk);
        match (layout.backing_of(chunk), start) {
            (Backing::Hole(_), None) => start = Some(offsets.start),
            (Backing::Hole(_), Some(_)) | (_, None) => {}
            (_, Some(first)) => {
                found.push(page.inside(&(first..offsets.start)));
                start = None;
            }
        }
    }
    if let Some(first) = start {
        // Bytes of the last page past the region's end are zeros too.
        let end = page.offsets(page.covering(&(0..layout.total()))).end;
        found.push(page.inside(&(first..end)));
    }
    found
}

/// The largest holes: each takes two more mappings, of which the process has a limited number.
fn largest(mut holes: Vec<Span>) -> Vec<Span> {
    if !holes.is_empty() {
        holes.sort_unstable_by_key(|hole| Reverse(hole.pages));
        holes.truncate(mappings_left() / MAPPINGS_SHARE);
        holes.sort_unstable_by_key(|hole| hole.first);
    }
    holes
}

/// The parts of spans that no hole covers. Each hole lies in one span.
fn without(spans: &[Span], holes: &[Span]) -> Vec<Span> {
    let (mut parts, mut holes) = (Vec::new(), holes.iter().peekable());
    for &span in spans {
        let mut rest = span;
        while let Some(hole) = holes.next_if(|hole| hole.first < span.end()) {
            parts.push(rest.prefix(hole.first.0 - rest.first.0));
            rest = rest.without_prefix(hole.end().0 - rest.first.0);
        }
        parts.push(rest);
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Holes of fewer pages are filled, because a mapping costs more than their memory.
const HOLE_PAGES: usize = 16;
/// The holes of a region take at most this share of the mappings that the process has left, with the
/// mappings between them.
const MAPPINGS_SHARE: usize = 4;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::Chunk;
    use crate::space::LayoutBuilder;

    fn span(first: usize, pages: usize) -> Span {
        Span { first: Page(first), pages }
    }

    #[test]
    fn a_hole_has_only_whole_pages_and_neighbours_are_one() {
        let page = PageSize::new(4096).unwrap();
        let mut layout = LayoutBuilder::default();
        for chunk in [Chunk::hole(5000), Chunk::hole(5000), vec![1; 10].into(), Chunk::hole(10_000)] {
            layout.push(chunk).unwrap();
        }
        let layout = layout.finish(false).unwrap();
        assert_eq!(holes(&layout, page), [span(0, 2), span(3, 2)]);
    }

    #[test]
    fn the_filled_pages_lie_between_the_holes() {
        let spans = [span(0, 10), span(20, 10), span(40, 1)];
        let holes = [span(0, 2), span(5, 1), span(9, 1), span(20, 10)];
        assert_eq!(without(&spans, &holes), [span(2, 3), span(6, 3), span(40, 1)]);
    }
}
