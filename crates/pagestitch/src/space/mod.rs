//! A region as it is mapped: its contents, where its pages are, and what was done with each. Not how it is served.
//!
//! | file | what |
//! |---|---|
//! | `chunk` | a byte range of one source |
//! | `layout` | which chunk holds the byte at an offset |
//! | `mapped` | pages that are shown where they lie |
//! | `page_table` | what was last done with each page, and claims on pages |
//! | `failure_table` | the reason of each poisoned page |
//! | `failures` | why pages are poisoned |
//! | `target` | the addresses of the pages: a reservation, or memory of another process |
//! | `plan` | how each chunk is installed, with the reason |

mod chunk;
mod failure_table;
mod failures;
pub(crate) mod layout;
pub(crate) mod mapped;
pub(crate) mod page_table;
mod plan;
pub(crate) mod target;

pub use chunk::Chunk;
pub(crate) use failure_table::FailureCallback;
pub(crate) use layout::Layout;
pub(crate) use mapped::{Abilities, Runs, Shown};
pub use plan::{Plan, PlanRun};
pub(crate) use target::Target;
pub use target::{AdoptedMemory, OnDiscard, OnUnavailable};

use crate::metrics::{Counters, Coverage, Presence};
use crate::policy::{Policy, Recorder, Recording, Replay};
use crate::source::{Backing, Donated, Fetched, LazyMemfd, Shared};
use failure_table::Failures;
use mapped::whole_pages;
use page_table::{PageTable, State, Wake};
use pagestitch_kernel::Features;
use pagestitch_kernel::gate::{Gate, OwnedGateGuard};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Page, PageSize, Span, Uffd};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use target::Foreign;

/// A region in one address space: what the fault path looks at.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) name: String,
    pub(crate) layout: Arc<Layout>,
    /// Pages that are mapped in place, and never fault.
    pub(crate) in_place: Arc<Runs>,
    /// Pages that a memfd is mapped at, to be shown when it has them.
    pub(crate) lazy: Runs,
    /// What the kernel would not show in place, and why.
    pub(crate) refused: Vec<(Span, &'static str)>,
    has_donated: bool,
    has_fetched: bool,
    /// Whether donated pages move.
    pub(crate) moves: bool,
    pub(crate) pages: Arc<PageTable>,
    pub(crate) policy: Policy,
    pub(crate) reporter: Option<FailureCallback>,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) replay: Option<Replay>,
    /// Whether whole blocks are filled in staging, and moved in; else why not.
    pub(crate) staged: Result<(), &'static str>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) target: Target,
    pub(crate) uffd: Uffd,
    failures: Failures,
    /// Each thread at work for the region is inside; the drop of the region closes it.
    gate: Arc<Gate>,
}

/// How a region is served.
#[derive(Debug, Default)]
pub(crate) struct ServeOptions {
    /// Whether the parts of faults are timed.
    pub(crate) record_latency: bool,
    /// How many faults are served at once, where there is a limit.
    pub(crate) max_in_flight: Option<usize>,
    pub(crate) record: bool,
    pub(crate) replay: Option<Recording>,
    pub(crate) reporter: Option<FailureCallback>,
}

/// What is a table with a place for each page.
pub(crate) struct PageTables {
    pages: Arc<PageTable>,
    recorder: Option<Recorder>,
}

impl PageTables {
    pub(crate) fn new(pages: usize, manner: &ServeOptions) -> Result<Self, Errno> {
        let pages = NonZeroUsize::new(pages).expect("a region has pages");
        let recorder = manner.record.then(|| Recorder::new(pages)).transpose()?;
        Ok(Self { pages: Arc::new(PageTable::new(pages)?), recorder })
    }
}

impl Mapping {
    /// `layout` and `shown` are of the same region, and so is all else. `allocates`: whether the thread that reads its faults may.
    pub(crate) fn new(
        name: String,
        (layout, shown): (Arc<Layout>, Shown),
        (moves, staged): (bool, Result<(), &'static str>),
        (policy, manner, tables): (Policy, ServeOptions, PageTables),
        (target, uffd): (Target, Uffd),
        allocates: bool,
    ) -> Self {
        let ServeOptions { record_latency, replay, reporter, .. } = manner;
        let size = (target.page_size(), target.all().pages);
        let counters = Counters::new(name.clone(), size, record_latency, !allocates);
        Self {
            counters: Arc::new(counters),
            has_donated: layout.has_donated(),
            has_fetched: layout.has_fetched(),
            name,
            layout,
            in_place: Arc::new(shown.in_place),
            lazy: shown.lazy,
            refused: shown.refused,
            moves,
            pages: tables.pages,
            policy,
            reporter,
            recorder: tables.recorder,
            replay: replay.map(Replay::new),
            staged,
            target,
            uffd,
            failures: Failures::default(),
            gate: Arc::new(Gate::new()),
        }
    }

    /// The gate that every thread at work for the region passes.
    pub(crate) const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Which pages are there, for a picture of it.
    pub(crate) fn presence(&self) -> Arc<dyn Presence> {
        Arc::new(Present { pages: Arc::clone(&self.pages), in_place: Arc::clone(&self.in_place) })
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.target.page_size()
    }

    /// How many pages of a span, from its first on, show a memfd that is filled later; which, and from where on.
    pub(crate) fn lazy_pages(&self, span: Span) -> Option<(usize, &LazyMemfd, u64)> {
        let (pages, run) = self.lazy.prefix(span)?;
        match self.layout.backing_of(run.chunk) {
            Backing::Shared(Shared::Lazy(memfd)) => {
                Some((pages, memfd, run.offset_of(span.first, self.page_size())))
            }
            _ => unreachable!("only lazy memfds have lazy runs"),
        }
    }

    /// How many pages of a span, from its first on, lie in one chunk whose bytes come later; of which source, and from where on.
    pub(crate) fn fetched_pages(&self, span: Span) -> Option<(usize, &Fetched, u64)> {
        if !self.has_fetched || self.page_size() != PageSize::system() {
            return None;
        }
        let (first, span) = (span.first, self.target.contiguous(span));
        // What a balloon has taken is zeros.
        let span = self.target.foreign().map_or(span, |adopted| adopted.next_kept(span));
        if span.is_empty() || span.first != first {
            return None;
        }
        let offsets = self.page_size().offsets(span);
        let piece = self.layout.piece_at(offsets.start, offsets.end);
        let Backing::Fetched(fetched) = piece.backing else { return None };
        let pages = usize::try_from(piece.bytes / self.page_size().bytes() as u64).unwrap_or(usize::MAX);
        (pages > 0).then_some((pages.min(FETCH_PAGES), fetched, piece.offset))
    }

    /// How many pages of a span, from its first on, a donation has to give; which, and from where on.
    pub(crate) fn movable_pages(&self, span: Span) -> Option<(usize, &Donated, u64)> {
        if !self.has_donated {
            return None;
        }
        let size = self.page_size();
        let chunk = self.layout.locate(size.offset_of(span.first));
        let Backing::Donated(donated) = self.layout.backing_of(chunk) else { return None };
        let own = whole_pages(&self.layout, size, chunk..chunk + 1)?;
        if span.first < own.span.first || own.span.end() <= span.first {
            return None;
        }
        let pages = span.pages.min(own.span.end().0 - span.first.0);
        Some((pages, donated, own.offset_of(span.first, size)))
    }

    /// The block of pages around one that are donated together and can move as one huge page. A region that is recorded moves
    /// each page by itself: those that come along have no first touch.
    pub(crate) fn movable_block(&self, page: Page) -> Option<Span> {
        let block = self.block_of(page).filter(|_| self.moves && self.recorder.is_none())?;
        let (movable, _, offset) = self.movable_pages(block)?;
        (movable == block.pages && offset.is_multiple_of(HUGE as u64)).then_some(block)
    }

    /// The block that a span begins with, if it can be filled in staging and moved in.
    pub(crate) fn stageable_block(&self, span: Span) -> Option<Span> {
        let block = self.block_of(span.first).filter(|_| self.staged.is_ok())?;
        let whole = block.first == span.first && block.pages <= span.pages;
        (whole && self.lazy.next_gap(block) == block && self.in_place.next_gap(block) == block)
            .then_some(block)
    }

    /// A span as far as the end of its first block, and what is behind it.
    pub(crate) fn first_block(&self, span: Span) -> (Span, Span) {
        let block = self.block_of(span.first).unwrap_or(span);
        let pages = block.end().0 - span.first.0;
        (span.prefix(pages), span.without_prefix(pages))
    }

    /// The aligned block of [`HUGE`] bytes that holds a page, if all of it is in the region.
    pub(crate) fn block_of(&self, page: Page) -> Option<Span> {
        let pages = HUGE / self.page_size().bytes();
        let block = Span { first: Page(page.0 / pages * pages), pages };
        (block.end() <= self.target.all().end()).then_some(block)
    }

    /// Whether a memfd that is filled later cannot be shown when it is, on this kernel.
    pub(crate) fn lacks_minor_faults(&self, backing: &Backing) -> bool {
        let lazy = matches!(backing, Backing::Shared(Shared::Lazy(_)));
        lazy && !self.uffd.features().contains(Features::MINOR_SHMEM)
    }

    /// The first pages of a span that are filled before they are touched: neither there from the start, nor taken by a
    /// balloon.
    pub(crate) fn next_gap(&self, span: Span) -> Span {
        match &self.target {
            Target::Owned(_) => self.in_place.next_gap(span),
            Target::Foreign(adopted) => adopted.next_kept(span),
        }
    }

    /// Whether the process that adopted memory belongs to has ended, as far as it is known.
    pub(crate) fn owner_has_ended(&self) -> bool {
        self.target.foreign().is_some_and(Foreign::has_ended)
    }

    /// Keeps a region's addresses from other mappings for a while after its drop.
    pub(crate) fn linger(&self) {
        if let Target::Owned(reservation) = &self.target {
            reservation.linger();
        }
    }

    /// Never closes the uffd: to whom waits there, that would be zeros.
    pub(crate) fn keep_open(&self) {
        self.uffd.keep_open();
    }

    /// Goes to work for as long as it takes, in whichever thread.
    pub(crate) fn enter_owned(&self) -> Option<OwnedGateGuard> {
        self.gate.enter_owned()
    }

    /// When this returns, no thread works for the region, now or later: sources are not called any more.
    pub(crate) fn close(&self) {
        // A thread that waits now may be woken before the gate is closed, and run after the drop.
        if self.uffd.has_waiters() {
            self.linger();
        }
        self.gate.close();
        // No worker comes for the faults that are queued.
        self.counters.finish_all();
    }

    /// Whether the kernel lacks pages of a span; those that were filled are forgotten.
    ///
    /// A thread that discards pages continues as soon as the event is read, before our table changes: perhaps right now.
    pub(crate) fn lacks_any(&self, span: Span) -> bool {
        let mut any = false;
        // Where the question cannot be answered, the table is believed.
        self.target.residency(span, |page, here| {
            if !here {
                self.pages.forget_present(page);
                any = true;
            }
        });
        any
    }

    /// Forgets that pages of memfds that are filled later were shown. False if there are none in a range.
    pub(crate) fn forget_lazy(&self, range: &Range<u64>) -> bool {
        let lazy = |page: &Page| self.lazy.contains(*page);
        let shown = self.page_size().covering(range).iter().filter(lazy);
        shown.map(|page| self.pages.forget_present(page)).count() > 0
    }

    /// Whether a page that was touched is there.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        // `mincore(2)` says that the memfd has it, not that it is mapped: reclaim and a collapse take it out of the page table. To map
        // it again is answered with EEXIST where it is there.
        if self.lazy.contains(page) {
            return false;
        }
        // Where the question cannot be answered, filling it again is answered with EEXIST.
        self.target.is_resident(page)
    }
}

impl Wake for Mapping {
    fn wake(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let now = self.target.contiguous(rest);
            rest = rest.without_prefix(now.pages);
            if let Err(errno) = self.uffd.wake(self.target.addresses(now)) {
                log!(error, region = self.name, %errno, "cannot wake");
            }
        }
    }
}

/// The pages of a region that are there.
#[derive(Debug)]
struct Present {
    pages: Arc<PageTable>,
    in_place: Arc<Runs>,
}

impl Presence for Present {
    fn coverage(&self, span: Span) -> Coverage {
        let mut coverage = Coverage { pages: span.pages as u64, ..Coverage::default() };
        let mut rest = span;
        while !rest.is_empty() {
            let gap = self.in_place.next_gap(rest);
            let shown = if gap.is_empty() { rest.pages } else { gap.first.0 - rest.first.0 };
            coverage.present += shown as u64;
            for page in gap.iter() {
                match self.pages.state(page) {
                    State::Present => coverage.present += 1,
                    State::Poisoned => coverage.poisoned += 1,
                    _ => {}
                }
            }
            rest = rest.without_prefix(shown + gap.pages);
        }
        coverage
    }
}

/// Pages asked of a source at once whose bytes come later.
const FETCH_PAGES: usize = 64;
