//! A region in one address space: its layout, the addresses of its pages, and the state of each
//! page. The threads that serve it are in `serve`.
//!
//! | file | content |
//! |---|---|
//! | `chunk` | a byte range of one source |
//! | `into_chunk` | the values that a builder takes as a chunk |
//! | `layout` | the chunk that holds the byte at an offset |
//! | `append`, `growth` | chunks that are appended while threads read; the room for them |
//! | `mapped_in_place` | pages that are mapped in place |
//! | `file_pages` | reads of files that are mapped in place, ahead of their touch |
//! | `fault_free` | regions whose pages are all mapped in place |
//! | `page_table` | the state of each page, and claims on pages |
//! | `discards` | whether the kernel reports the pages that the application discards |
//! | `lacking` | discarded pages become absent in the page table |
//! | `residence` | the trait by which a region's pages count in a memory budget |
//! | `release` | sources that are dropped when the region has all of their bytes |
//! | `deferred_free` | these sources until a thread frees them |
//! | `failure_table` | the failure of each poisoned page |
//! | `flushes` | what earlier flushes of written pages leave for later ones |
//! | `failures` | when failures are kept, reported and removed |
//! | `shards` | the userfaultfds of the pages, each for a part of the addresses |
//! | `shared_uffd` | a userfaultfd that many small regions share |
//! | `spare_uffds` | the userfaultfds of dropped regions, for the next ones |
//! | `target` | the addresses of the pages: a reservation, or memory of another process |
//! | `plan` | the method by which each chunk is installed, with the reason |
//! | `written` | the pages that were written since the last question |

mod append;
mod chunk;
mod deferred_free;
mod discards;
mod failure_table;
mod failures;
mod fault_free;
mod file_pages;
mod flushes;
mod growth;
mod into_chunk;
mod lacking;
pub(crate) mod layout;
pub(crate) mod mapped_in_place;
pub(crate) mod page_table;
mod plan;
mod release;
mod residence;
mod shards;
mod shared_uffd;
mod source_kinds;
mod spare_uffds;
pub(crate) mod target;
mod written;

pub use chunk::Chunk;
pub(crate) use deferred_free::DeferredFree;
pub(crate) use discards::{DiscardNotice, Discards};
pub(crate) use failure_table::FailureCallback;
pub(crate) use fault_free::FaultFree;
pub(crate) use flushes::{FailedSyncs, Flushes};
pub(crate) use growth::{Growth, Reveal};
pub use into_chunk::IntoChunk;
pub(crate) use layout::{Layout, LayoutBuilder, Piece};
pub(crate) use mapped_in_place::{Abilities, MappedRuns, ShownPages};
pub use plan::{Plan, PlanRun};
pub(crate) use release::Releases;
pub(crate) use residence::{ChangedPages, LeftPages, Prepared, Residence, WrittenBack};
pub(crate) use shards::Shards;
#[cfg(all(test, shuttle))]
pub(crate) use shared_uffd::Readers;
pub(crate) use shared_uffd::{SharedPlace, SharedRanges, SharedUffd};
pub(crate) use source_kinds::SourceKinds;
pub(crate) use spare_uffds::SpareUffds;
pub(crate) use target::Target;
pub use target::{AdoptedMemory, OnDiscard, OnUnavailable};
pub(crate) use written::{RecordFor, RecordUses, WrittenPages};

use crate::method::PlanReason;
use crate::metrics::{Counters, Coverage, Presence};
use crate::policy::{Policy, Recording, Replay, TouchRecorder};
use crate::source::{Backing, Donated, Fetched, LazyMemfd, Shared};
use failure_table::Failures;
use mapped_in_place::whole_pages;
use page_table::{PageState, PageTable, Wake};
use pagestitch_kernel::Features;
use pagestitch_kernel::cache::prefetch;
use pagestitch_kernel::direct_read::DirectFile;
use pagestitch_kernel::gate::{Gate, OwnedGateGuard};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::versions::Versions;
use pagestitch_kernel::{Errno, Page, PageSize, Span};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use target::Foreign;

/// A region in one address space: all that the fault path reads and changes.
///
/// ```text
///   layout   | chunk 0 | chunk 1     | chunk 2 ...     which bytes: offset -> source
///   pages    | P | P | - | F | ! | - | ...             state of each page (page_table)
///   target   |  addresses of the pages  |              where the uffd installs them
///              in_place: never fault    lazy: fault, and show a page of a memfd
/// ```
///
/// # Life
///
/// 1. The build pipeline reserves or adopts the target, registers it with the uffd, maps runs of
///    pages in place, and creates the mapping. All other pages are absent.
/// 2. A server attaches. Each fault enters the gate, claims its page, fills and installs it, and
///    settles the claim as present or poisoned. A discard makes pages absent again.
/// 3. [`close`](Self::close) closes the gate and waits for the threads inside. From then on no
///    source is called and no page changes.
/// 4. The server fences the target and wakes all waiting threads, which meet the fence. The last
///    `Arc` closes the uffd and unmaps the target.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) name: String,
    pub(crate) layout: Versions<Layout>,
    /// The number of bytes that callers know. Further chunks are being appended.
    published: AtomicU64,
    /// The number of pages that have bytes and are open to accesses.
    laid: AtomicUsize,
    /// Present if chunks can be appended.
    pub(crate) growth: Option<Growth>,
    /// Pages that are mapped in place.
    ///
    /// Invariant: they are present from the build on, never fault, and are never claimed.
    pub(crate) in_place: Arc<MappedRuns>,
    /// Pages at which a memfd is mapped that is filled later. They fault once, and the fault maps
    /// the memfd's page.
    ///
    /// Invariant: disjoint from `in_place`.
    pub(crate) lazy: MappedRuns,
    /// Donated pages that the build has moved in. They are present until they are discarded.
    pub(crate) moved: MappedRuns,
    /// Pages that the kernel refused to map in place, with the reasons; they are copied.
    pub(crate) refused: Vec<(Span, PlanReason)>,
    has_donated: bool,
    /// The kinds of sources that it has or had.
    kinds: SourceKinds,
    /// True if donated pages move on first touch.
    pub(crate) moves: bool,
    pub(crate) pages: Arc<PageTable>,
    pub(crate) policy: Policy,
    pub(crate) reporter: Option<FailureCallback>,
    pub(crate) recorder: Option<TouchRecorder>,
    pub(crate) replay: Option<Replay>,
    /// `Ok` if whole blocks are filled in staging and moved in, or the reason against it.
    pub(crate) staged: Result<(), &'static str>,
    /// The sources that are released, if there are some.
    releases: Option<Releases>,
    pub(crate) counters: Arc<Counters>,
    /// Its part in a memory budget. Dropped before the target: its pages count as long as they exist.
    pub(crate) residence: Option<Box<dyn Residence>>,
    /// Its userfaultfds, one for each part of the addresses.
    ///
    /// Invariant: dropped before the target. While it has a place among regions that share userfaultfds,
    /// no other region has the addresses.
    pub(crate) uffd: Shards,
    pub(crate) target: Target,
    /// How the server learns of discarded pages.
    pub(crate) discards: Discards,
    failures: Failures,
    /// The number of threads that fill pages in a call, if the builder has set it.
    pub(crate) populate_threads: Option<usize>,
    /// The kernel's record of writes, if changes are tracked. All pages then arrive by a copy,
    /// write-protected.
    pub(crate) written: Option<Box<WrittenPages>>,
    /// Present if written pages go back to their sources.
    pub(crate) flushes: Option<Box<Flushes>>,
    /// Invariant: each thread that claims pages or calls a source for the region is inside. Closing
    /// it, in the drop of the region, waits for them.
    gate: Arc<Gate>,
}

/// The options of a region that concern its faults, and its fills without a fault.
#[derive(Debug, Default)]
pub(crate) struct ServeOptions {
    /// True if the parts of faults are timed.
    pub(crate) record_latency: bool,
    /// The most faults that are served at once; `None` is unlimited.
    pub(crate) max_in_flight: Option<usize>,
    /// The number of threads that fill pages in a call; `None`: the user has not chosen.
    pub(crate) populate_threads: Option<usize>,
    pub(crate) record: bool,
    pub(crate) replay: Option<Recording>,
    pub(crate) reporter: Option<FailureCallback>,
    /// The uses of the record of written pages.
    pub(crate) record_of_writes: RecordUses,
}

/// The tables with an entry for each page.
pub(crate) struct PageTables {
    pages: Arc<PageTable>,
    recorder: Option<TouchRecorder>,
    written: Option<Box<WrittenPages>>,
    flushes: Option<Box<Flushes>>,
}

impl PageTables {
    /// `has_budget`: faults tell the written pages, so that the kernel does not record them.
    pub(crate) fn new(pages: usize, serve_options: &ServeOptions, has_budget: bool) -> Result<Self, Errno> {
        let pages = NonZeroUsize::new(pages).expect("a region has pages");
        let recorder = serve_options.record.then(|| TouchRecorder::new(pages)).transpose()?;
        let uses = serve_options.record_of_writes;
        let written = (uses.any() && !has_budget).then(|| WrittenPages::new(pages, uses));
        let written = written.transpose()?.map(Box::new);
        let flushes = uses.has(RecordFor::WriteBack).then(Box::default);
        Ok(Self { pages: Arc::new(PageTable::new(pages)?), recorder, written, flushes })
    }
}

impl Mapping {
    /// All arguments must be of the same region. `allocates`: whether the thread that reads its
    /// faults may allocate.
    pub(crate) fn new(
        name: String,
        (layout, releases, shown): (Arc<Layout>, Option<Releases>, ShownPages),
        (moves, staged): (bool, Result<(), &'static str>),
        (policy, serve_options, tables): (Policy, ServeOptions, PageTables),
        (target, uffd, residence): (Target, Shards, Option<Box<dyn Residence>>),
        growth: Option<Growth>,
        allocates: bool,
    ) -> Self {
        let ServeOptions { record_latency, replay, reporter, populate_threads, .. } = serve_options;
        let laid = match &growth {
            Some(_) => target.page_size().covering(&(0..layout.total())).pages,
            None => target.all().pages,
        };
        if growth.is_some() {
            // The policy is made for the most pages that there can be, and fills none that are closed.
            policy.set_pages(laid.max(1));
        }
        let counters = Counters::new(name.clone(), (target.page_size(), laid), record_latency, !allocates);
        shown.moved.spans().for_each(|span| tables.pages.mark_present(span));
        Self {
            counters: Arc::new(counters),
            has_donated: layout.has_donated(),
            kinds: layout.source_kinds(),
            published: AtomicU64::new(layout.total()),
            laid: AtomicUsize::new(laid),
            growth,
            name,
            layout: Versions::new(layout),
            in_place: Arc::new(shown.in_place),
            lazy: shown.lazy,
            moved: shown.moved,
            refused: shown.refused,
            moves,
            pages: tables.pages,
            policy,
            reporter,
            recorder: tables.recorder,
            replay: replay.map(Replay::new),
            staged,
            releases,
            discards: Discards::of(&target, uffd.features()),
            residence,
            uffd,
            target,
            failures: Failures::default(),
            populate_threads,
            written: tables.written,
            flushes: tables.flushes,
            gate: Arc::new(Gate::new()),
        }
    }

    /// Has the processor fetch what a fault of a shard needs, while the thread reads the fault. A region
    /// among many is in no cache, and its parts lie in many places.
    pub(crate) fn prefetch(&self, shard: usize) {
        prefetch(self);
        self.layout.prefetch();
        self.pages.prefetch();
        self.counters.prefetch();
        prefetch(self.uffd.get(shard));
        if let Target::Owned(reservation) = &self.target {
            prefetch(&**reservation);
        }
    }

    /// Prefetches the words that a fault of the page reads.
    #[inline]
    pub(crate) fn prefetch_page(&self, page: Page) {
        self.pages.prefetch_state(page);
        if let Target::Foreign(adopted) = &self.target {
            adopted.prefetch_page(page);
        }
    }

    /// The gate that every thread at work for the region passes.
    pub(crate) const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// A handle that tells which pages are present, for metrics.
    pub(crate) fn presence(&self) -> Arc<dyn Presence> {
        let (pages, in_place) = (Arc::clone(&self.pages), Arc::clone(&self.in_place));
        let left = self.residence.as_ref().map(|residence| residence.left_pages());
        Arc::new(Present { pages, in_place, left })
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.target.page_size()
    }

    /// The pages that have bytes.
    pub(crate) fn all(&self) -> Span {
        Span { first: Page(0), pages: self.laid.load(Ordering::Relaxed) }
    }

    /// The number of chunks, including padding.
    pub(crate) fn chunks(&self) -> usize {
        let bytes = self.len();
        self.layout.chunks_in_first(bytes)
    }

    /// The length of all chunks together, in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// True if a page of a span is shown in place, or was donated.
    pub(crate) fn shows_any(&self, span: Span) -> bool {
        let donated = |chunk| matches!(self.layout.backing_of(chunk), Backing::Donated(_));
        [&*self.in_place, &self.lazy, &self.moved].iter().any(|runs| runs.next_gap(span) != span)
            || self.has_donated && self.layout.chunks_in(&self.page_size().offsets(span)).any(donated)
    }

    /// True if present pages may be absent a moment later, although the application discards none.
    pub(crate) fn loses_pages(&self) -> bool {
        self.residence.is_some() || self.layout.has_replaced()
    }

    /// True if sources are released once their pages are present.
    pub(crate) const fn releases_sources(&self) -> bool {
        self.releases.is_some()
    }

    /// Prepares for the bytes of a chunk that replace others.
    pub(crate) fn note_replacement(&self, chunk: Option<&Chunk>) {
        chunk.iter().for_each(|chunk| self.kinds.note(&chunk.backing));
    }

    /// Drops the sources whose bytes the build has copied.
    pub(crate) fn drop_copied_sources(&mut self) {
        self.layout.edit(Layout::drop_copied_sources);
    }

    /// The number of leading pages of a span that map one memfd that is filled later, that memfd,
    /// and the offset in it.
    pub(crate) fn lazy_pages(&self, span: Span) -> Option<(usize, &LazyMemfd, u64)> {
        let (pages, run) = self.lazy.prefix(span)?;
        match self.layout.backing_of(run.chunk) {
            Backing::Shared(Shared::Lazy(memfd)) => {
                Some((pages, memfd, run.offset_of(span.first, self.page_size())))
            }
            _ => unreachable!("only lazy memfds have lazy runs"),
        }
    }

    /// The number of leading pages of a span that lie in one chunk with an asynchronous source,
    /// that source, and the offset in it.
    pub(crate) fn fetched_pages(&self, span: Span) -> Option<(usize, &Fetched, u64)> {
        if !self.kinds.has_fetched() {
            return None;
        }
        let piece = self.piece_to_read(span)?;
        let Backing::Fetched(fetched) = piece.backing else { return None };
        let (page, start) = (self.page_size().bytes() as u64, self.page_size().offset_of(span.first));
        let pages = usize::try_from(piece.bytes / page).unwrap_or(usize::MAX);
        let most = self.layout.read_length(start, FETCH_PAGES as u64 * page) / page;
        (pages > 0).then_some((pages.min((most as usize).max(1)), fetched, piece.offset))
    }

    /// True if a fault may wait for more than a disk: for a source, a writer of a source or a failure callback.
    pub(crate) fn may_hang(&self) -> bool {
        let evicts_written = || self.residence.as_ref().is_some_and(|residence| residence.evicts_written());
        self.kinds.may_hang() || self.reporter.is_some() || evicts_written()
    }

    /// True if one worker may have reads of many pages in flight, because it waits for nothing but disks.
    pub(crate) fn reads_at_once(&self) -> bool {
        self.kinds.has_direct() && self.page_size() == PageSize::system() && !self.may_hang()
    }

    /// The file around the page cache whose blocks have all bytes of a page, and their offset in it, if the page can
    /// be read beside others.
    pub(crate) fn direct_page(&self, page: Page) -> Option<(&DirectFile, u64)> {
        if !self.reads_at_once() {
            return None;
        }
        let piece = self.piece_to_read(page.span())?;
        let is_whole = piece.bytes >= self.page_size().bytes() as u64;
        let file = piece.backing.direct_file()?;
        (is_whole && file.has_block_at(piece.offset)).then_some((file, piece.offset))
    }

    /// The first part of a span that lies in one chunk, if its pages are read one by one. Not the pages that the
    /// owner of foreign memory has discarded, because they are zeros.
    fn piece_to_read(&self, span: Span) -> Option<Piece<'_>> {
        if self.page_size() != PageSize::system() {
            return None;
        }
        let (first, span) = (span.first, self.target.contiguous(span));
        let span = self.target.foreign().map_or(span, |adopted| adopted.next_kept(span));
        if span.is_empty() || span.first != first {
            return None;
        }
        let offsets = self.page_size().offsets(span);
        Some(self.layout.piece_at(offsets.start, offsets.end))
    }

    /// The pages that are filled together with a page, because its source prefers to read them at
    /// once: those around it in one chunk, without the pages that have their bytes from elsewhere.
    /// The page alone, if the source has no preference.
    #[inline]
    pub(crate) fn read_unit(&self, page: Page) -> Span {
        if self.layout.has_read_units() { self.find_read_unit(page) } else { page.span() }
    }

    #[inline(never)]
    fn find_read_unit(&self, page: Page) -> Span {
        let (alone, size) = (page.span(), self.page_size());
        // A region that records needs a fault for each first touch.
        if self.recorder.is_some() || size != PageSize::system() {
            return alone;
        }
        let Some(mut unit) = self.layout.read_unit(size.offset_of(page)) else { return alone };
        let last = size.page_at(unit.end - 1);
        if self.ends_unit(last) {
            unit.end = size.offsets(last.span()).end;
        }
        let mut rest = size.inside(&unit);
        loop {
            let gap = self.next_gap(rest);
            // An empty gap may lie at the region's end, where no page has an address.
            if gap.is_empty() || gap.first > page {
                return alone;
            }
            let run = self.target.contiguous(gap);
            if run.contains(page) {
                return run;
            }
            rest = rest.without_prefix(run.end().0 - rest.first.0);
        }
    }

    /// True if a chunk whose source prefers to be read in units ends inside a page, and the page has no other bytes
    /// than padding: it is filled with the pages before it.
    pub(crate) fn ends_unit(&self, page: Page) -> bool {
        if !self.layout.has_read_units() {
            return false;
        }
        let offsets = self.page_size().offsets(page.span());
        let chunk = self.layout.locate(offsets.start);
        // A fetch replies with whole pages.
        !matches!(self.layout.backing_of(chunk), Backing::Fetched(_))
            && self.layout.offsets_of(chunk).end < offsets.end
            && self.layout.is_free_after(chunk, offsets.end)
            && self.layout.read_unit(offsets.start).is_some()
    }

    /// A span with all of the [read units](Self::read_unit) that it begins or ends in.
    pub(crate) fn with_read_units(&self, span: Span) -> Span {
        if span.is_empty() || !self.layout.has_read_units() {
            return span;
        }
        let first = self.find_read_unit(span.first).first;
        let end = self.find_read_unit(Page(span.end().0 - 1)).end();
        Span { first, pages: end.0 - first.0 }
    }

    /// The number of leading pages of a span that are whole pages of one donation, that donation,
    /// and the offset in it.
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

    /// The block around a page, if its pages are donated together and can move as one huge page.
    /// `None` for a region that records, because the other pages of the block would have no first
    /// touch.
    pub(crate) fn movable_block(&self, page: Page) -> Option<Span> {
        let block = self.block_of(page).filter(|_| self.moves && self.recorder.is_none())?;
        let (movable, _, offset) = self.movable_pages(block)?;
        (movable == block.pages && offset % HUGE as u64 == 0).then_some(block)
    }

    /// The block at the start of a span, if it can be filled in staging and moved in, and splits no
    /// [unit](Self::read_unit) of a source.
    pub(crate) fn stageable_block(&self, span: Span) -> Option<Span> {
        let block = self.block_of(span.first).filter(|_| self.staged.is_ok())?;
        let whole = block.first == span.first && block.pages <= span.pages;
        let whole = whole && self.with_read_units(block) == block;
        (whole && self.lazy.next_gap(block) == block && self.in_place.next_gap(block) == block)
            .then_some(block)
    }

    /// Splits a span at the end of its first block.
    pub(crate) fn first_block(&self, span: Span) -> (Span, Span) {
        let block = self.block_of(span.first).unwrap_or(span);
        let pages = block.end().0 - span.first.0;
        (span.prefix(pages), span.without_prefix(pages))
    }

    /// The aligned block of [`HUGE`] bytes that holds a page, if all of it is in the region.
    pub(crate) fn block_of(&self, page: Page) -> Option<Span> {
        let pages = HUGE / self.page_size().bytes();
        let block = Span { first: Page(page.0 / pages * pages), pages };
        (block.end().0 <= self.laid.load(Ordering::Relaxed)).then_some(block)
    }

    /// True if the source is a memfd that is filled later, and the kernel cannot map it in place.
    pub(crate) fn lacks_minor_faults(&self, backing: &Backing) -> bool {
        let lazy = matches!(backing, Backing::Shared(Shared::Lazy(_)));
        lazy && !self.uffd.features().contains(Features::MINOR_SHMEM)
    }

    /// The first run of a span's pages that may be filled ahead of their touch: neither mapped in
    /// place nor discarded by the owner.
    pub(crate) fn next_gap(&self, span: Span) -> Span {
        match &self.target {
            Target::Owned(_) => self.in_place.next_gap(span),
            Target::Foreign(adopted) => adopted.next_kept(span),
        }
    }

    /// The leading pages of a [contiguous](Target::contiguous) span that lie in one shard.
    #[inline]
    pub(crate) fn in_one_shard(&self, span: Span) -> Span {
        if self.uffd.count() == 1 { span } else { self.cut_at_shard(span) }
    }

    /// The leading pages of a span that are installed at once: if writes are recorded, all of them
    /// arrive write-protected, or none.
    #[inline]
    pub(crate) fn arriving_alike(&self, span: Span) -> Span {
        if let Some(written) = &self.written {
            return written.alike(span);
        }
        self.written_back().map_or(span, |back| {
            let first = back.arrives_protected(span.first);
            let other = span.iter().position(|page| back.arrives_protected(page) != first);
            span.prefix(other.unwrap_or(span.pages))
        })
    }

    /// True if a page that is filled arrives write-protected, because writes are recorded.
    #[inline]
    pub(crate) fn arrives_protected(&self, page: Page) -> bool {
        match &self.written {
            Some(written) => written.arrives_armed(page),
            None => self.written_back().is_some_and(|back| back.arrives_protected(page)),
        }
    }

    /// True if writes are recorded, by the kernel or by faults.
    pub(crate) fn records_writes(&self) -> bool {
        self.written.is_some() || self.written_back().is_some()
    }

    /// The written pages of a region with a budget.
    #[inline]
    pub(crate) fn written_back(&self) -> Option<&dyn WrittenBack> {
        self.residence.as_ref()?.written_back()
    }

    #[inline(never)]
    fn cut_at_shard(&self, span: Span) -> Span {
        let part = self.uffd.in_one(self.target.addresses(span));
        span.prefix(part.bytes() / self.page_size().bytes())
    }

    /// True if the owner of adopted memory is known to have ended.
    pub(crate) fn owner_has_ended(&self) -> bool {
        self.target.foreign().is_some_and(Foreign::has_ended)
    }

    /// Keeps other mappings off the region's addresses for a while after its drop.
    pub(crate) fn linger(&self) {
        if let Target::Owned(reservation) = &self.target {
            reservation.linger();
        }
    }

    /// Never closes the uffd, because a thread that waits in a fault would then read zeros.
    pub(crate) fn keep_open(&self) {
        self.uffd.keep_open();
    }

    /// Enters the gate until the guard is dropped, by any thread. `None` after the gate is closed.
    pub(crate) fn enter_owned(&self) -> Option<OwnedGateGuard> {
        self.gate.enter_owned()
    }

    /// Closes the gate and waits for the threads inside. Afterwards no source is called any more.
    pub(crate) fn close(&self) {
        // A thread that waits in a fault now may be woken before the gate closes, and run after the
        // drop.
        let is_shared = self.uffd.is_shared();
        if self.uffd.has_waiters() || is_shared && self.counters.has_in_flight() {
            self.linger();
        }
        self.gate.close();
        // No worker will take the queued faults, so they end here.
        let has_left = self.counters.finish_all();
        if is_shared && has_left {
            self.linger();
        }
    }

    /// Drops the sources with bytes in a span whose pages are all present. Called by each thread that
    /// has filled these pages, without a claim, because the destructors of sources run here.
    #[inline]
    pub(crate) fn release_sources(&self, span: Span) {
        let Some(releases) = self.releases.as_ref().filter(|_| !span.is_empty()) else { return };
        self.count_released(releases.look_at(&self.layout, &self.pages, span));
    }

    /// Frees the released sources that wait, in this thread.
    pub(crate) fn free_released(&self) {
        if let Some(releases) = &self.releases {
            releases.free_waiting();
        }
    }

    /// Drops all sources that can be released, because none is read any more.
    pub(crate) fn release_all_sources(&self) {
        if self.releases.is_some() {
            self.count_released(self.layout.release_all());
        }
    }

    fn count_released(&self, bytes: u64) {
        if bytes > 0 {
            self.counters.local().bytes_released.add(bytes);
            log!(debug, region = self.name, bytes, "sources released");
        }
    }

    /// Wakes the threads that wait in a span, without a log, because a log takes locks.
    pub(crate) fn wake_quietly(&self, span: Span) {
        let _ = self.uffd.wake(self.target.addresses(span));
    }

    /// Makes the pages of a range that map memfds filled later absent in the page table. False if
    /// the range has none.
    pub(crate) fn mark_lazy_absent(&self, range: &Range<u64>) -> bool {
        let lazy = |page: &Page| self.lazy.contains(*page);
        let shown = self.page_size().covering(range).iter().filter(lazy);
        shown.map(|page| self.pages.mark_absent(page)).count() > 0
    }

    /// True if the kernel has a page, as far as it can tell; false makes the caller fill it again.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        // `mincore(2)` tells that the memfd has the page, not that it is mapped: reclaim and a
        // collapse take it out of the kernel's page table. Mapping a mapped page again is a
        // harmless EEXIST.
        if self.lazy.contains(page) {
            return false;
        }
        // If the kernel cannot tell, filling a present page again is a harmless EEXIST.
        self.target.is_resident(page)
    }
}

impl Wake for Mapping {
    fn wake(&self, span: Span) {
        // No thread waits in memory that needs no uffd.
        let mut rest = if self.uffd.is_stand_in() { span.prefix(0) } else { span };
        while !rest.is_empty() {
            let now = self.target.contiguous(rest);
            rest = rest.without_prefix(now.pages);
            if let Err(errno) = self.uffd.wake(self.target.addresses(now)) {
                log!(error, region = self.name, %errno, "cannot wake");
            }
        }
    }
}

/// Tells which pages of a region are present.
#[derive(Debug)]
struct Present {
    pages: Arc<PageTable>,
    in_place: Arc<MappedRuns>,
    /// The pages that have left, of a region with a budget.
    left: Option<Arc<dyn LeftPages>>,
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
                let state = self.pages.state(page);
                let has_left = || u64::from(self.left.as_ref().is_some_and(|left| left.has_left(page)));
                match state {
                    PageState::Present => {
                        coverage.present += 1;
                        coverage.returned += has_left();
                    }
                    PageState::Absent => coverage.evicted += has_left(),
                    PageState::Poisoned => coverage.poisoned += 1,
                    _ => {}
                }
            }
            rest = rest.without_prefix(shown + gap.pages);
        }
        coverage
    }
}

/// The most pages that one asynchronous fetch requests, if its source prefers no larger reads.
const FETCH_PAGES: usize = 64;
