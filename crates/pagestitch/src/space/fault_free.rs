//! Regions without faults: every page is mapped in place, or is padding.
//!
//! ```text
//!   chunks    [ file a .......... ]               [ file b ..... ]
//!   pages     |--- a ---|--- a ---|-- padding --|--- b ---|--- b ---|
//!              mapped              zeros         mapped
//! ```
//!
//! Nothing fills their pages, so they need no userfaultfd. A page that is discarded has the bytes of
//! its file again, and padding is zeros again.

use crate::source::{Backing, Shared};
use crate::space::mapped_in_place::{
    Abilities, MappedRun, MappedRuns, ShownPages, decide, map_run, refusal_reason,
};
use crate::space::{Layout, Shards};
use pagestitch_kernel::{Errno, PageSize, Span, View};

/// The runs of all pages of a region without faults.
#[derive(Debug)]
pub(crate) struct FaultFree {
    /// Ascending, without a gap between them. A run of a hole is padding.
    runs: Vec<MappedRun>,
    padding: usize,
}

impl FaultFree {
    /// `None` for a layout with other pages, and if `budget` mappings do not suffice.
    pub(crate) fn of(layout: &Layout, page: PageSize, budget: impl FnOnce() -> usize) -> Option<Self> {
        if !(0..layout.chunks()).all(|chunk| is_mapped_or_padding(layout, chunk)) {
            return None;
        }
        // No chunk depends on them.
        let abilities = Abilities { moves_now: false, minor_faults: false };
        let mut all = Self { runs: Vec::new(), padding: 0 };
        let mut rest = page.covering(&(0..layout.total()));
        for run in decide(layout, page, budget, abilities) {
            all.add_padding(layout, page, rest.prefix(run.span.first.0 - rest.first.0))?;
            rest = rest.without_prefix(run.span.end().0 - rest.first.0);
            all.runs.push(run);
        }
        all.add_padding(layout, page, rest)?;
        Some(all)
    }

    /// Adds pages that no mapping shows. `None` if a chunk has bytes there.
    fn add_padding(&mut self, layout: &Layout, page: PageSize, span: Span) -> Option<()> {
        if span.is_empty() {
            return Some(());
        }
        let offsets = page.offsets(span);
        let chunk = layout.locate(offsets.start);
        let is_all = layout.offsets_of(chunk).end >= offsets.end.min(layout.total());
        if !is_all || !matches!(layout.backing_of(chunk), Backing::Hole(_)) {
            return None;
        }
        self.runs.push(MappedRun { span, chunk, offset: 0 });
        self.padding += span.pages;
        Some(())
    }

    pub(crate) const fn has_padding(&self) -> bool {
        self.padding > 0
    }

    /// Maps all runs but the padding, which the view must show already. `None` if the kernel refuses
    /// one that can be copied instead; the view is of no use then. An error names the chunk that
    /// caused it.
    pub(crate) fn map(
        self,
        layout: &Layout,
        page: PageSize,
        view: &mut View,
        shards: &Shards,
    ) -> Result<Option<ShownPages>, (usize, Errno)> {
        for &run in &self.runs {
            let backing = layout.backing_of(run.chunk);
            if matches!(backing, Backing::Hole(_)) {
                continue;
            }
            match map_run(run, backing, page, (view, shards)) {
                Ok(()) => {}
                Err(Errno::ENOMEM) => return Ok(None),
                Err(errno) => match refusal_reason(backing, page, errno, view.is_writable()) {
                    Some(_) => return Ok(None),
                    None => return Err((run.chunk, errno)),
                },
            }
        }
        let in_place = MappedRuns::of(self.runs);
        Ok(Some(ShownPages { in_place, padding: self.padding, ..ShownPages::default() }))
    }
}

/// True for a chunk whose pages can be mapped by the build and never fault then, and for padding.
fn is_mapped_or_padding(layout: &Layout, chunk: usize) -> bool {
    match layout.backing_of(chunk) {
        Backing::Shared(Shared::Lazy(_)) => false,
        Backing::Memfd(_) | Backing::Immutable(_) | Backing::Shared(_) => true,
        Backing::Hole(_) => layout.is_padding(chunk),
        Backing::Memory(_)
        | Backing::Donated(_)
        | Backing::Read(_)
        | Backing::Fetched(_)
        | Backing::Mapped(_) => false,
    }
}
