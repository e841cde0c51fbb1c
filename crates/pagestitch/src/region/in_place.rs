//! Which pages are shown in place, decided once, before the region exists.
//!
//! ```text
//!   memfd     |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|
//!   chunks        [ a ........ ][ b ............. ]            end to end in the memfd too: one extent
//!   region    |--- 7 ---|--- 8 ---|--- 9 ---|-- 10 ---|        at the same place in a page
//!                  copied   mapped    mapped   copied           whole pages are mapped, at once
//! ```
//!
//! Chunks that continue each other in source and region are one extent, whatever their edges; its whole pages become
//! one mapping. The kernel counts mappings, so there is a budget; what is beyond it is copied.

use crate::region::Layout;
use crate::source::{Backing, Memfd};
use pagestitch_kernel::{Page, PageSize, Span};

/// A run of pages that are a memfd's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InPlace {
    pub(crate) span: Span,
    /// A chunk of the extent, to find the memfd by.
    pub(crate) chunk: usize,
    /// The span's first byte in the memfd.
    pub(crate) offset: u64,
}

/// The runs of pages that can be shown in place, in the order of the region.
#[derive(Debug, Default)]
pub(crate) struct InPlaceRuns {
    runs: Vec<InPlace>,
}

impl InPlaceRuns {
    /// At most `budget` runs: each is a mapping, and parts its neighbours.
    pub(crate) fn decide(layout: &Layout, page: PageSize, budget: impl FnOnce() -> usize) -> Self {
        let mut runs = Vec::new();
        let mut budget = Some(budget);
        let mut most = 0;
        let mut chunk = 0;
        while chunk < layout.chunks() {
            let end = extent_end(layout, chunk);
            if memfd_of(layout, chunk).is_some() {
                // Asking for the budget reads /proc: only who has a memfd pays.
                most = budget.take().map_or(most, |budget| budget());
                runs.extend(whole_pages(layout, page, chunk, end).filter(|_| runs.len() < most));
            }
            chunk = end;
        }
        Self { runs }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &InPlace> {
        self.runs.iter()
    }

    /// Keeps only the first `count`: the kernel would map no more.
    pub(crate) fn truncate(&mut self, count: usize) {
        self.runs.truncate(count);
    }

    /// How many pages they have together.
    pub(crate) fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.span.pages as u64).sum()
    }

    /// Whether a page is shown in place.
    pub(crate) fn contains(&self, page: Page) -> bool {
        self.after(page).is_some_and(|run| run.span.first <= page)
    }

    /// The first part of a span that is not shown in place: skips runs at its start, and ends before the next.
    pub(crate) fn next_gap(&self, span: Span) -> Span {
        let mut rest = span;
        while let Some(run) = self.after(rest.first) {
            if run.span.first > rest.first {
                return rest.prefix(run.span.first.0 - rest.first.0);
            }
            rest = rest.without_prefix(run.span.end().0 - rest.first.0);
            if rest.is_empty() {
                break;
            }
        }
        rest
    }

    /// The run that holds a page, or the next one after it.
    fn after(&self, page: Page) -> Option<&InPlace> {
        self.runs.get(self.runs.partition_point(|run| run.span.end() <= page))
    }
}

pub(crate) fn memfd_of(layout: &Layout, chunk: usize) -> Option<&Memfd> {
    match layout.backing_of(chunk) {
        Backing::Memfd(memfd) => Some(memfd),
        _ => None,
    }
}

/// The chunk after those that continue `first` in its source.
fn extent_end(layout: &Layout, first: usize) -> usize {
    let mut end = first + 1;
    while end < layout.chunks() && layout.continues(end) {
        end += 1;
    }
    end
}

/// The whole pages of an extent, if it lies at the same place in pages of source and region.
fn whole_pages(layout: &Layout, page: PageSize, first: usize, end: usize) -> Option<InPlace> {
    let (start, stop) = (layout.offsets_of(first).start, layout.offsets_of(end - 1).end);
    let source = layout.source_offset(first);
    if !is_aligned(page, start, source) {
        return None;
    }
    let span = page.inside(&(start..stop));
    (!span.is_empty()).then(|| InPlace {
        span,
        chunk: first,
        offset: source + (page.offset_of(span.first) - start),
    })
}

/// Whether an offset in a region and one in a source are at the same place in their pages.
pub(crate) fn is_aligned(page: PageSize, region: u64, source: u64) -> bool {
    (region ^ source) & (page.bytes() as u64 - 1) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Chunk;
    use pagestitch_kernel::memfd::UnsealedMemfd;

    const PAGE: PageSize = PageSize::new(4096).unwrap();

    fn decide(chunks: &[(u64, u64)], before: u64, budget: usize) -> Vec<(usize, usize, u64)> {
        let memfd = Memfd::from(UnsealedMemfd::create("test", 1 << 20).unwrap().seal().unwrap());
        let mut layout = Layout::default();
        if before > 0 {
            layout.push(Chunk::hole(before)).unwrap();
        }
        for &(start, bytes) in chunks {
            layout.push(Chunk::from(memfd.clone()).range(start..start + bytes)).unwrap();
        }
        layout.finish().unwrap();
        let runs = InPlaceRuns::decide(&layout, PAGE, || budget);
        runs.iter().map(|run| (run.span.first.0, run.span.pages, run.offset)).collect()
    }

    #[test]
    fn whole_pages_are_in_place_and_ragged_edges_are_not() {
        assert_eq!(decide(&[(0, 8192)], 0, 9), [(0, 2, 0)]);
        assert_eq!(decide(&[(100, 12_000)], 100, 9), [(1, 1, 4096)]);
        assert_eq!(decide(&[(4096, 10_000)], 8192, 9), [(2, 2, 4096)]);
        assert_eq!(decide(&[(0, 4095)], 0, 9), []);
    }

    #[test]
    fn what_lies_elsewhere_in_its_page_is_not_in_place() {
        assert_eq!(decide(&[(1, 100_000)], 0, 9), []);
    }

    #[test]
    fn chunks_that_continue_each_other_are_one_run() {
        assert_eq!(decide(&[(0, 5000), (5000, 3192), (8192, 4096)], 0, 9), [(0, 3, 0)]);
        assert_eq!(decide(&[(8192, 4096), (0, 4096), (4096, 4096)], 0, 9), [(0, 1, 8192), (1, 2, 0)]);
    }

    #[test]
    fn the_budget_is_kept() {
        assert_eq!(decide(&[(8192, 4096), (0, 4096), (16_384, 4096)], 0, 2), [(0, 1, 8192), (1, 1, 0)]);
    }

    #[test]
    fn gaps_are_what_lies_between() {
        let run = |first, pages| InPlace { span: Span { first: Page(first), pages }, chunk: 0, offset: 0 };
        let runs = InPlaceRuns { runs: vec![run(2, 3), run(5, 1), run(10, 2)] };
        let gap = |first, pages| {
            let gap = runs.next_gap(Span { first: Page(first), pages });
            (gap.first.0, gap.pages)
        };
        assert_eq!(gap(0, 20), (0, 2));
        assert_eq!(gap(2, 20), (6, 4));
        assert_eq!(gap(3, 2), (5, 0));
        assert_eq!(gap(11, 20), (12, 19));
        assert_eq!(
            (runs.contains(Page(4)), runs.contains(Page(6)), runs.contains(Page(11))),
            (true, false, true)
        );
    }
}
