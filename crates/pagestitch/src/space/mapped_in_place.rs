//! Pages that are mapped in place. The build decides once which they are, and maps them.
//!
//! ```text
//!   memfd     |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|
//!   chunks        [ a ........ ][ b ............. ]            adjacent in the memfd too: one extent
//!   region    |--- 7 ---|--- 8 ---|--- 9 ---|-- 10 ---|        at the same offset in a page
//!                  copied   mapped    mapped   copied           one mapping for all whole pages
//! ```
//!
//! Chunks that are adjacent in source and region are one *extent*. Its whole pages become one
//! mapping, even if chunks meet inside a page. The kernel limits the number of mappings, so the
//! build has a budget; pages above it are copied.

use crate::method::PlanReason;
use crate::source::{Backing, Shared};
use crate::space::{Layout, Shards};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Page, PageSize, Span, View};
use std::ops::Range;

/// A run of pages of the region that are adjacent pages of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MappedRun {
    pub(crate) span: Span,
    /// The first chunk of the extent, which has the source.
    pub(crate) chunk: usize,
    /// The offset of the span's first byte in the source.
    pub(crate) offset: u64,
}

impl MappedRun {
    /// The offset in the source at which one of its pages begins.
    pub(crate) fn offset_of(&self, page: Page, size: PageSize) -> u64 {
        self.offset + ((page.0 - self.span.first.0) * size.bytes()) as u64
    }
}

/// The abilities of the kernel that decide how pages are mapped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    /// The build moves donated pages.
    pub(crate) moves_now: bool,
    /// Memfds that are filled later can be mapped. Otherwise they are copied.
    pub(crate) minor_faults: bool,
}

impl Abilities {
    /// True if the build maps whole pages of a source.
    const fn map(self, backing: &Backing) -> bool {
        match backing {
            Backing::Shared(Shared::Lazy(_)) => self.minor_faults,
            Backing::Donated(_) => self.moves_now,
            Backing::Memfd(_) | Backing::Immutable(_) | Backing::Shared(_) => true,
            Backing::Memory(_)
            | Backing::Hole(_)
            | Backing::Read(_)
            | Backing::Fetched(_)
            | Backing::Mapped(_) => false,
        }
    }
}

/// Runs of mapped pages, in ascending order.
#[derive(Debug, Default)]
pub(crate) struct MappedRuns {
    runs: Vec<MappedRun>,
}

/// The pages of its sources that a region maps.
#[derive(Debug, Default)]
pub(crate) struct ShownPages {
    /// Present from the build on: they never fault.
    pub(crate) in_place: MappedRuns,
    /// Pages of memfds that are filled later: each faults once.
    pub(crate) lazy: MappedRuns,
    /// Donated pages that have moved in.
    pub(crate) moved: MappedRuns,
    /// Pages that the kernel refused to map, with the reasons, ascending. They are copied.
    pub(crate) refused: Vec<(Span, PlanReason)>,
    /// The number of pages in `in_place` that are padding, and so no source's.
    pub(crate) padding: usize,
}

impl ShownPages {
    /// Decides which pages to map with at most `budget` mappings, and maps them over the registered
    /// range. Pages that the kernel refuses are copied. An error names the chunk that caused it.
    pub(crate) fn map(
        layout: &Layout,
        page: PageSize,
        budget: impl FnOnce() -> usize,
        abilities: Abilities,
        view: &mut View,
        shards: &Shards,
    ) -> Result<Self, (usize, Errno)> {
        let mut shown = Self::default();
        for run in decide(layout, page, budget, abilities) {
            let backing = layout.backing_of(run.chunk);
            match map_run(run, backing, page, (view, shards)) {
                Ok(()) if matches!(backing, Backing::Shared(Shared::Lazy(_))) => shown.lazy.runs.push(run),
                Ok(()) if matches!(backing, Backing::Donated(_)) => shown.moved.runs.push(run),
                Ok(()) => shown.in_place.runs.push(run),
                Err(errno) => match refusal_reason(backing, page, errno, view.is_writable()) {
                    Some(reason) => {
                        let restored = shards
                            .spans(run.span, page)
                            .try_for_each(|(uffd, part)| view.restore(part, uffd));
                        restored.map_err(|errno| (run.chunk, errno))?;
                        shown.refused.push((run.span, reason));
                    }
                    // Other threads have taken the last mappings: the rest is copied.
                    None if errno == Errno::ENOMEM => break,
                    None => return Err((run.chunk, errno)),
                },
            }
        }
        Ok(shown)
    }
}

/// The reason why the kernel refuses to map one source, which is copied then. `None` if the error
/// does not concern this source alone, or if the region is written and its file is not open for that.
pub(super) fn refusal_reason(
    backing: &Backing,
    page: PageSize,
    errno: Errno,
    is_writable: bool,
) -> Option<PlanReason> {
    match (backing, errno) {
        (Backing::Donated(_), Errno::EINVAL) => Some(PlanReason::NoMoves),
        (Backing::Memfd(_) | Backing::Immutable(_) | Backing::Shared(Shared::File(..)), Errno::ENODEV) => {
            Some(PlanReason::UnmappableFile)
        }
        // Some files, and before Linux 6.7 memfds that are sealed against writes, have no shared mappings.
        (Backing::Shared(Shared::File(..)), Errno::EACCES | Errno::EPERM) if !is_writable => {
            Some(PlanReason::UnmappableFile)
        }
        (_, Errno::ENOMEM) if backing.granule() != page => Some(PlanReason::NoHugePages),
        _ => None,
    }
}

pub(super) fn map_run(
    run: MappedRun,
    backing: &Backing,
    page: PageSize,
    (view, shards): (&mut View, &Shards),
) -> Result<(), Errno> {
    let MappedRun { span, offset, .. } = run;
    // Memory that faults is registered with the userfaultfd of its shard.
    let mut parts =
        shards.spans(span, page).map(|(uffd, part)| (part, run.offset_of(part.first, page), uffd));
    match backing {
        Backing::Memfd(memfd) => view.map(span, memfd.sealed(), offset),
        Backing::Immutable(file) => view.map_stable(span, file.stable(), offset),
        Backing::Donated(donated) => {
            parts.try_for_each(|(part, offset, uffd)| view.move_in(part, donated, offset, uffd))
        }
        Backing::Shared(Shared::File(file, sharing)) => view.map_file(span, file, offset, *sharing),
        Backing::Shared(Shared::Alias(alias)) => view.alias(span, alias, offset),
        Backing::Shared(Shared::Physical(physical)) => view.map_physical(span, physical, offset),
        Backing::Shared(Shared::Lazy(memfd)) => {
            parts.try_for_each(|(part, offset, uffd)| view.map_lazy(part, memfd.memfd(), offset, uffd))
        }
        Backing::Memory(_)
        | Backing::Hole(_)
        | Backing::Read(_)
        | Backing::Fetched(_)
        | Backing::Mapped(_) => {
            unreachable!("has no pages of its own")
        }
    }
}

/// The runs to map. Each is a mapping for the kernel, and so is the gap before it, if any.
pub(super) fn decide(
    layout: &Layout,
    page: PageSize,
    budget: impl FnOnce() -> usize,
    abilities: Abilities,
) -> Vec<MappedRun> {
    let mut runs: Vec<MappedRun> = Vec::new();
    if !layout.has_source(|source| abilities.map(source)) {
        return runs;
    }
    let mut budget = Some(budget);
    let mut left = 0_usize;
    let mut chunk = 0;
    while chunk < layout.chunks() {
        let end = extent_end(layout, chunk);
        if abilities.map(layout.backing_of(chunk)) {
            // The budget is read from /proc, so only a region with pages to map asks for it.
            left = budget.take().map_or(left, |budget| budget());
            if let Some(run) = whole_pages(layout, page, chunk..end) {
                let follows = runs.last().map_or(Page(0), |last| last.span.end()) == run.span.first;
                let cost = usize::from(!follows) + layout.backing_of(chunk).mappings();
                if cost <= left {
                    left -= cost;
                    runs.push(run);
                }
            }
        }
        chunk = end;
    }
    runs
}

impl MappedRuns {
    /// The runs must be ascending.
    pub(super) const fn of(runs: Vec<MappedRun>) -> Self {
        Self { runs }
    }

    /// The spans, ascending.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> {
        self.runs.iter().map(|run| run.span)
    }

    /// The number of their pages.
    pub(crate) fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.span.pages as u64).sum()
    }

    /// The number of leading pages of `span` that lie in one run, and that run. `None` if the first
    /// page lies in none.
    pub(crate) fn prefix(&self, span: Span) -> Option<(usize, &MappedRun)> {
        let run = self.after(span.first).filter(|run| run.span.first <= span.first)?;
        Some(((run.span.end().0 - span.first.0).min(span.pages), run))
    }

    /// True if a run has the page.
    pub(crate) fn contains(&self, page: Page) -> bool {
        self.after(page).is_some_and(|run| run.span.first <= page)
    }

    /// The first part of a span that is in no run: skips the runs at its start, and ends before the
    /// next one.
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

    /// The parts of a span that are in no run, if there are few runs.
    pub(crate) fn few_gaps(&self, span: Span) -> Option<impl Iterator<Item = Span>> {
        let mut rest = span;
        let next = move || {
            let gap = Some(rest).filter(|rest| !rest.is_empty()).map(|rest| self.next_gap(rest))?;
            rest = rest.without_prefix(gap.end().0 - rest.first.0);
            Some(gap).filter(|gap| !gap.is_empty())
        };
        (self.runs.len() <= FEW).then(|| std::iter::from_fn(next))
    }

    /// The run that holds a page, or the next one after it.
    fn after(&self, page: Page) -> Option<&MappedRun> {
        self.runs.get(self.runs.partition_point(|run| run.span.end() <= page))
    }
}

/// The most runs between which each gap is worth a system call of its own.
const FEW: usize = 64;

/// The end of the extent that starts with the chunk `first`.
fn extent_end(layout: &Layout, first: usize) -> usize {
    let mut end = first + 1;
    while end < layout.chunks() && layout.continues(end) {
        end += 1;
    }
    end
}

/// The pages that belong to an extent alone, if its offsets in source and region differ by whole
/// pages. Such a page may include padding, or addresses past the region's end: these show whatever
/// the source has there.
pub(crate) fn whole_pages(layout: &Layout, page: PageSize, chunks: Range<usize>) -> Option<MappedRun> {
    let first = chunks.start;
    let start = layout.offsets_of(first).start;
    let source = layout.source_offset(first);
    if !is_aligned(page, start, source) {
        return None;
    }
    let granule = layout.backing_of(first).granule();
    let span = if granule == page {
        page.inside(&with_padding(layout, page, chunks))
    } else {
        let stop = layout.offsets_of(chunks.end - 1).end;
        whole_granules((page, granule), start..stop, source)
    };
    // The span may begin before the extent, but in the same page of the source.
    let offset = (source + page.offset_of(span.first)).wrapping_sub(start);
    (!span.is_empty()).then_some(MappedRun { span, chunk: first, offset })
}

/// The huge pages that belong to an extent alone, if its offsets in source and region differ by
/// whole huge pages, because hugetlbfs maps whole huge pages only. A region begins at a multiple of
/// [`HUGE`].
fn whole_granules((page, granule): (PageSize, PageSize), offsets: Range<u64>, source: u64) -> Span {
    let whole = granule.inside(&offsets);
    if granule.bytes() > HUGE || whole.is_empty() || !is_aligned(granule, offsets.start, source) {
        return Span { first: page.page_at(offsets.start), pages: 0 };
    }
    page.covering(&granule.offsets(whole))
}

/// The offsets of an extent, extended to whole pages where only padding or the region's end
/// follows. Not so in a donated page, unless the donation ends there: the page moves with all of
/// its bytes, and the rest may belong to another chunk of any region, now or later.
fn with_padding(layout: &Layout, page: PageSize, chunks: Range<usize>) -> Range<u64> {
    let (first, last) = (chunks.start, chunks.end - 1);
    let (start, stop) = (layout.offsets_of(first).start, layout.offsets_of(last).end);
    let around = page.offsets(page.covering(&(start..stop)));
    let (before, after) = match layout.backing_of(first) {
        Backing::Donated(donated) => {
            let end = layout.source_offset(first) + (stop - start);
            (false, end == donated.len() as u64)
        }
        _ => (true, true),
    };
    let from = if before && layout.is_free_before(first, around.start) { around.start } else { start };
    let to = if after && layout.is_free_after(last, around.end) { around.end } else { stop };
    from..to
}

/// True if an offset in a region and one in a source differ by whole pages.
pub(crate) fn is_aligned(page: PageSize, region: u64, source: u64) -> bool {
    (region ^ source) & (page.bytes() as u64 - 1) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Memfd, UnsealedMemfd};
    use crate::space::{Chunk, LayoutBuilder};

    const PAGE: PageSize = PageSize::new(4096).unwrap();

    const ABILITIES: Abilities = Abilities { moves_now: false, minor_faults: true };

    fn decide(chunks: &[(u64, u64)], before: u64, budget: usize) -> Vec<(usize, usize, u64)> {
        let memfd = Memfd::from(UnsealedMemfd::create("test", 1 << 20).unwrap().seal().unwrap());
        let mut layout = LayoutBuilder::default();
        if before > 0 {
            layout.push(Chunk::hole(before)).unwrap();
        }
        for &(start, bytes) in chunks {
            layout.push(Chunk::from(memfd.clone()).range(start..start + bytes)).unwrap();
        }
        let layout = layout.finish(false).unwrap();
        let runs = super::decide(&layout, PAGE, || budget, ABILITIES);
        runs.iter().map(|run| (run.span.first.0, run.span.pages, run.offset)).collect()
    }

    #[test]
    fn whole_pages_are_mapped_and_edges_are_not() {
        assert_eq!(decide(&[(0, 8192)], 0, 9), [(0, 2, 0)]);
        assert_eq!(decide(&[(100, 12_000), (0, 1)], 100, 9), [(1, 1, 4096)]);
        assert_eq!(decide(&[(4096, 10_000), (0, 100)], 8192, 9), [(2, 2, 4096)]);
        assert_eq!(decide(&[(0, 4095), (0, 100)], 0, 9), []);
    }

    #[test]
    fn the_last_page_may_extend_past_the_region() {
        assert_eq!(decide(&[(4096, 10_000)], 8192, 9), [(2, 3, 4096)]);
        assert_eq!(decide(&[(0, 4095)], 0, 9), [(0, 1, 0)]);
        assert_eq!(decide(&[(100, 5)], 100, 9), [], "another chunk lies before it in its page");
    }

    #[test]
    fn an_extent_includes_the_padding_around_it() {
        let memfd = Memfd::from(UnsealedMemfd::create("test", 1 << 20).unwrap().seal().unwrap());
        let mut layout = LayoutBuilder::default();
        for (start, bytes) in [(100, 5000), (4096, 1), (0, 4096)] {
            let chunk = Chunk::from(memfd.clone()).range(start..start + bytes);
            layout.pad_for(&chunk, 1, Some(PAGE)).unwrap();
            layout.push(chunk).unwrap();
        }
        let layout = layout.finish(false).unwrap();
        let runs = super::decide(&layout, PAGE, || 9, ABILITIES);
        let runs: Vec<_> = runs.iter().map(|run| (run.span.first.0, run.span.pages, run.offset)).collect();
        assert_eq!(runs, [(0, 2, 0), (2, 1, 4096), (3, 1, 0)]);
    }

    #[test]
    fn a_chunk_at_another_offset_in_its_page_is_not_mapped() {
        assert_eq!(decide(&[(1, 100_000)], 0, 9), []);
    }

    #[test]
    fn adjacent_chunks_are_one_run() {
        assert_eq!(decide(&[(0, 5000), (5000, 3192), (8192, 4096)], 0, 9), [(0, 3, 0)]);
        assert_eq!(decide(&[(8192, 4096), (0, 4096), (4096, 4096)], 0, 9), [(0, 1, 8192), (1, 2, 0)]);
    }

    #[test]
    fn the_mappings_stay_within_the_budget() {
        assert_eq!(decide(&[(8192, 4096), (0, 4096), (16_384, 4096)], 0, 2), [(0, 1, 8192), (1, 1, 0)]);
        assert_eq!(decide(&[(8192, 4096), (0, 4096)], 4096, 2), [(1, 1, 8192)], "a gap is a mapping too");
    }

    #[test]
    fn a_gap_is_the_space_between_two_runs() {
        let run = |first, pages| MappedRun { span: Span { first: Page(first), pages }, chunk: 0, offset: 0 };
        let runs = MappedRuns { runs: vec![run(2, 3), run(5, 1), run(10, 2)] };
        let gap = |first, pages| {
            let gap = runs.next_gap(Span { first: Page(first), pages });
            (gap.first.0, gap.pages)
        };
        assert_eq!(gap(0, 20), (0, 2));
        assert_eq!(gap(2, 20), (6, 4));
        assert_eq!(gap(3, 2), (5, 0));
        assert_eq!(gap(11, 20), (12, 19));
        let gaps = |first, pages| -> Vec<_> {
            let gaps = runs.few_gaps(Span { first: Page(first), pages }).unwrap();
            gaps.map(|gap| (gap.first.0, gap.pages)).collect()
        };
        assert_eq!(gaps(0, 20), [(0, 2), (6, 4), (12, 8)]);
        assert_eq!(gaps(3, 8), [(6, 4)]);
        assert_eq!(gaps(2, 4), []);
        assert_eq!(
            (runs.contains(Page(4)), runs.contains(Page(6)), runs.contains(Page(11))),
            (true, false, true)
        );
    }
}
