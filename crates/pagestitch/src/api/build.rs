//! The build pipeline: turns options, a layout, the kind of target and a server into a served
//! region. An error leaves no address reserved.
//!
//! ```text
//!   options, layout ── check: no address is reserved yet
//!       │
//!       ├─ TargetKind::Own ────── open, reserve, register, show ──▶ PreparedTarget
//!       │                         (without faults: reserve, show)
//!       └─ TargetKind::Adopted ── settle ─────────────────────────▶ PreparedTarget
//!                                                                      │
//!       policy, tables, children ──▶ Mapping ──▶ fill, if the server asks ──▶ attach to it
//! ```

use crate::api::AnyRegion;
use crate::api::nesting::Below;
use crate::api::options::Options;
use crate::api::reserve_on_memfd;
use crate::api::userfaultfds;
use crate::error::{BuildOption, Bytes, Error, ErrorKind};
use crate::policy::{Blocks, Policy, Readahead};
use crate::reclaim::{Budget, Evicted, Membership, evictable};
use crate::serve::ForkedChildren;
use crate::serve::{Served, Server};
use crate::source::Releasables;
use crate::space::{
    Abilities, AdoptedMemory, FaultFree, Growth, Layout, Mapping, PageTables, Plan, PlanRun, RecordFor,
    Releases, Residence, ServeOptions, Shards, ShownPages, Target,
};
use pagestitch_kernel::limits::{Limit, ReserveError, mappings_to_try};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::page_scan::PageScan;
use pagestitch_kernel::uffd;
use pagestitch_kernel::{Access, Errno, Features, PageSize, Reservation, Uffd, View};
use pagestitch_kernel::{staging, swap};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// The kind of memory that holds a region's pages.
#[derive(Debug)]
pub(super) enum TargetKind {
    /// A range that the region reserves.
    Own,
    /// Memory that its owner has registered.
    Adopted(AdoptedMemory),
}

/// The addresses of the pages, and the methods that the kernel offers there.
struct PreparedTarget {
    target: Target,
    uffd: Shards,
    shown: ShownPages,
    /// True if donated pages move on first touch.
    moves: bool,
    /// `Ok` if whole blocks are filled in staging, or the reason against it.
    staged: Result<(), &'static str>,
    blocks: Blocks,
    /// The region's part in its budget.
    membership: Option<Membership>,
    view: Option<View>,
}

/// Builds a region. The view is `Some` for [`TargetKind::Own`].
pub(super) fn build(
    options: Options,
    layout: Result<Layout, Error>,
    target: TargetKind,
    server: &Server,
) -> Result<(Option<View>, AnyRegion), Error> {
    let name = options.name().to_owned();
    let in_region = |error: Error| error.inside(&name);
    let mut layout = layout.map_err(in_region)?;
    check(&options, &layout, &target, server).map_err(in_region)?;
    let below = Below::of(&layout);
    below.check(&name, &layout, server)?;
    let prepared = match target {
        TargetKind::Own => prepare_own(&name, &mut layout, &options, (below, server))?,
        TargetKind::Adopted(memory) => prepare_adopted(memory, &name, layout.total()).map_err(in_region)?,
    };
    finish(name, options, layout, prepared, server)
}

/// Refuses options that the target, the server or the kernel cannot have, before anything is
/// reserved.
fn check(options: &Options, layout: &Layout, target: &TargetKind, server: &Server) -> Result<(), Error> {
    if options.shards == Some(0) {
        let what = "a region has at least one shard: ask for shards(1) or more";
        return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Shards));
    }
    if options.serve_options.populate_threads == Some(0) {
        let what =
            "a thread must fill pages in populate() and read_at(): ask for populate_threads(1) or more";
        return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::PopulateThreads));
    }
    options.check_target(matches!(target, TargetKind::Adopted(_)))?;
    check_capacity(options, layout)?;
    let demands = options.demands(matches!(target, TargetKind::Adopted(_)));
    server.inner().check(&demands)?;
    reserve_on_memfd::check(options, layout, &demands)?;
    if let Some(option) = options.serve_options.record_of_writes.option() {
        check_tracked(layout, option, options.budget.as_ref())?;
    }
    if let Some(budget) = &options.budget {
        check_budget(budget, layout, (options, server))?;
    }
    let served = options.inherit_on_fork && server.inner().serves_faults();
    if served { check_children(layout) } else { Ok(()) }
}

/// Refuses chunks and kernels whose writes are not recorded.
fn check_tracked(layout: &Layout, option: BuildOption, budget: Option<&Budget>) -> Result<(), Error> {
    let refused = |kind, what: &str| Err(Error::new(kind, what).of_option(option));
    let unwritable = (option == BuildOption::WriteBack).then(|| layout.first_unwritable()).flatten();
    if let Some((chunk, source)) = unwritable {
        let what = format!(
            "chunk {chunk} ({source}) takes no written pages back: make it with Chunk::writable(), or leave out write_back()"
        );
        return refused(ErrorKind::OptionConflict, &what).map_err(|error| error.of_chunk(chunk));
    }
    if let Some((chunk, source)) = layout.first_written_by_others() {
        let what = format!(
            "chunk {chunk} ({source}) is memory that others write to, and their writes are not recorded: map it copy_on_write(), copy it, or leave out {option}()"
        );
        return refused(ErrorKind::OptionConflict, &what).map_err(|error| error.of_chunk(chunk));
    }
    if let Some(budget) = budget {
        // Faults tell the first write to a page, also where the kernel keeps no record.
        return budget.check_moves();
    }
    let features = uffd::kernel_features().map_err(|error| Error::no_userfaultfd(&error))?;
    if !features.contains(Features::WRITE_PROTECT_ASYNC) {
        let what = "the kernel records writes since Linux 6.7 (arm64: 6.10): update the kernel, or leave out track_changes() and write_back()";
        return refused(ErrorKind::Unsupported, what);
    }
    // The page tables of the region open it again.
    let scan = PageScan::open().map(drop);
    scan.map_err(|errno| Error::refused("cannot open /proc/self/pagemap, which tells written pages", errno))
}

/// Refuses chunks and servers that a region with a budget cannot have.
fn check_budget(
    budget: &Budget,
    layout: &Layout,
    (options, server): (&Options, &Server),
) -> Result<(), Error> {
    if !server.inner().serves_faults() {
        let noun = server.inner().noun();
        let what = format!("{noun} has no thread that evicts pages: leave out budget(), or use a pool");
        return Err(Error::new(ErrorKind::UnsuitableServer, what).of_option(BuildOption::Budget));
    }
    if server.inner().is_in_handler() {
        check_in_handler(options, layout)?;
    }
    if let Some((chunk, source)) = layout.first_donated() {
        let what = format!(
            "chunk {chunk} ({source}) is donated, and a page that leaves could not be filled again: copy it, or leave out budget()"
        );
        return Err(Error::new(ErrorKind::OptionConflict, what)
            .of_chunk(chunk)
            .of_option(BuildOption::Budget));
    }
    budget.check(server.inner().threads())
}

/// Refuses what a signal handler cannot do with pages that leave and come back.
fn check_in_handler(options: &Options, layout: &Layout) -> Result<(), Error> {
    let refused = |what: String| Error::new(ErrorKind::UnsuitableServer, what).of_option(BuildOption::Budget);
    match layout.first_unstable().filter(|_| options.slices) {
        Some((chunk, source)) => {
            let what = format!(
                "chunk {chunk} ({source}) may change, and a signal handler has no stack for hashes: use build_shared(), an ImmutableFile, Chunk::stable(), or a pool"
            );
            Err(refused(what).of_chunk(chunk))
        }
        None => Ok(()),
    }
}

/// Refuses a capacity that has no room for the chunks.
fn check_capacity(options: &Options, layout: &Layout) -> Result<(), Error> {
    let Some(capacity) = options.capacity else { return Ok(()) };
    let least = layout.total().max(1);
    if capacity >= least {
        return Ok(());
    }
    let capacity = Bytes(capacity);
    let what = format!("a capacity of {capacity} is too little: ask for capacity({least}) or more");
    Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Capacity))
}

/// Refuses chunks and kernels that cannot serve forked children.
fn check_children(layout: &Layout) -> Result<(), Error> {
    let refused = |kind, what| Err(Error::new(kind, what).of_option(BuildOption::InheritOnFork));
    if layout.has_lazy() {
        let what = "a forked child cannot be served a memfd that is filled later: seal it first, or copy it";
        return refused(ErrorKind::OptionConflict, what);
    }
    let features = uffd::kernel_features().map_err(|error| Error::no_userfaultfd(&error))?;
    if !features.contains(Features::POISON) {
        let what = "forked children need the poison markers of Linux 6.6: update the kernel, or leave out inherit_on_fork()";
        return refused(ErrorKind::Unsupported, what);
    }
    Ok(())
}

/// Reserves a range, registers it, and maps pages in place where the sources allow it.
fn prepare_own(
    name: &str,
    layout: &mut Layout,
    options: &Options,
    (below, server): (Below, &Server),
) -> Result<PreparedTarget, Error> {
    // Forked children are found through the userfaultfd.
    let tracked = options.serve_options.record_of_writes.any();
    if !options.inherit_on_fork && !tracked && options.capacity.is_none() && !options.on_memfd {
        if let Some(prepared) = prepare_fault_free(name, layout, options)? {
            return Ok(prepared);
        }
    }
    if !server.inner().serves_faults() {
        return prepare_closed(name, layout, options);
    }
    let page = PageSize::system();
    let most = options.capacity.unwrap_or_else(|| layout.total());
    let pages = pages_for(most, page).map_err(|error| error.inside(name))?;
    let bytes = pages.get() * page.bytes();
    let uffds = userfaultfds::open(name, (layout, bytes), options, server)?;
    let features = uffds.features();
    layout.unlock_donated().map_err(|errno| limit(name, "unlock donated pages", errno))?;
    let moves = moves_in(options, layout, features);
    let ahead = options.budget.as_ref().map(|budget| budget.blocks_ahead(server.inner().threads()));
    let staged = ahead.unwrap_or(Ok(0)).and_then(|_| stages(options, layout, bytes, features));
    let huge = moves || staged.is_ok();
    // Pages move, in and out, only between writable mappings.
    let moves_out = !options.hardware_read_only && options.budget.as_ref().is_some_and(Budget::moves);
    // An append writes behind the last byte of a page.
    let logical = huge || moves_out || options.capacity.is_some();
    let logical = logical && options.access == Access::ReadOnly;
    let access = if logical { Access::LogicallyReadOnly } else { options.access };
    let on_memfd = reserve_on_memfd::reserve(name, options, (pages, page), access)?;
    let (reservation, mut view) = on_memfd.map_or_else(|| reserve(name, (pages, page), access, huge), Ok)?;
    let laid = page.covering(&(0..layout.total()));
    let uffd = userfaultfds::register(name, uffds, server, &reservation, laid)?;
    let minor_faults = uffd.features().contains(Features::MISSING_SHMEM | Features::MINOR_SHMEM);
    let abilities = Abilities { moves_now: !moves, minor_faults };
    // Pages of a memfd neither move in nor are others mapped over them.
    let shown = match tracked || options.on_memfd {
        true => ShownPages::default(),
        false => show(name, layout, options.max_mappings, abilities, (&mut view, &uffd))?,
    };
    if options.capacity.is_some() {
        view.hide_from(layout.total() as usize);
    }
    if shown.in_place.pages() < pages.get() as u64 {
        reservation.serve(below.served_by(name, server));
    }
    let membership =
        join(options, &reservation, (layout, staged, server)).map_err(|error| error.inside(name))?;
    let blocks = blocks(staged, ahead.map(|ahead| ahead.unwrap_or(0)));
    Ok(PreparedTarget {
        target: Target::Owned(reservation),
        uffd,
        shown,
        moves,
        staged,
        blocks,
        membership,
        view: Some(view),
    })
}

/// Joins the budget, if the region has one.
fn join(
    options: &Options,
    reservation: &Arc<Reservation>,
    (layout, staged, server): (&Layout, Result<(), &str>, &Server),
) -> Result<Option<Membership>, Error> {
    let Some(budget) = &options.budget else { return Ok(None) };
    if staged.is_err() {
        reservation.use_small_pages();
    }
    let uses = options.serve_options.record_of_writes;
    let evicted = Evicted {
        in_handlers: server.inner().is_in_handler(),
        written_back: uses.has(RecordFor::WriteBack),
        tracks_changes: uses.has(RecordFor::Changes),
    };
    budget.join(evictable(reservation), layout, (options.slices, evicted, staged.is_ok())).map(Some)
}

/// The handling of blocks. In a budget, sequential readers have `ahead` pages ahead of them.
const fn blocks(staged: Result<(), &str>, ahead: Option<usize>) -> Blocks {
    match (staged, ahead) {
        // A block that is filled for a few touches of it takes the place of pages that are read.
        (Ok(()), Some(most)) => Blocks::Streamed(most),
        (Ok(()), None) => Blocks::Whole,
        (Err(_), Some(_)) => Blocks::Never,
        (Err(_), None) => Blocks::Copied,
    }
}

/// Reserves a range and maps every page in place, without a userfaultfd. `None` if the layout has
/// other pages than padding that are not mapped, or the kernel refuses a mapping.
fn prepare_fault_free(
    name: &str,
    layout: &mut Layout,
    options: &Options,
) -> Result<Option<PreparedTarget>, Error> {
    let page = PageSize::system();
    let budget = budget(layout, options.max_mappings);
    let Some(runs) = FaultFree::of(layout, page, budget) else { return Ok(None) };
    let uffd = stand_in(name)?;
    let pages = pages_for(layout.total(), page).map_err(|error| error.inside(name))?;
    let staged = stages(options, layout, pages.get() * page.bytes(), uffd.features());
    let (reservation, mut view) = reserve(name, (pages, page), options.access, false)?;
    if runs.has_padding() {
        // Padding is the kernel's zero pages.
        let bytes = reservation.range().bytes();
        let unreserved = |errno| Error::unreserved(name, ReserveError::met(bytes, errno));
        reservation.open().map_err(unreserved)?;
    }
    let shown = runs.map(layout, page, &mut view, &uffd).map_err(|error| cannot_show(name, layout, error))?;
    let Some(shown) = shown else { return Ok(None) };
    layout.drop_mapped_sources(|_| true);
    Ok(Some(PreparedTarget {
        target: Target::Owned(reservation),
        uffd,
        shown,
        moves: false,
        staged,
        blocks: Blocks::Never,
        membership: None,
        view: Some(view),
    }))
}

/// Reserves a range, and maps pages in place where the sources allow it. The rest of the range is
/// closed until its server has filled it. No page moves in, because a moved page that is discarded
/// would read as zeros without a userfaultfd.
fn prepare_closed(name: &str, layout: &mut Layout, options: &Options) -> Result<PreparedTarget, Error> {
    let uffd = stand_in(name)?;
    let page = PageSize::system();
    let pages = pages_for(layout.total(), page).map_err(|error| error.inside(name))?;
    let (reservation, mut view) = reserve(name, (pages, page), options.access, false)?;
    let abilities = Abilities { moves_now: false, minor_faults: false };
    let shown = show(name, layout, options.max_mappings, abilities, (&mut view, &uffd))?;
    Ok(PreparedTarget {
        target: Target::Owned(reservation),
        uffd,
        shown,
        moves: false,
        staged: Err("the build fills the region, without userfaultfd (Eager)"),
        blocks: Blocks::Never,
        membership: None,
        view: Some(view),
    })
}

/// Takes over memory that its owner has registered. All of its pages are copied in: none is mapped
/// or moved.
fn prepare_adopted(memory: AdoptedMemory, name: &str, bytes: u64) -> Result<PreparedTarget, Error> {
    let (foreign, uffd) = memory.settle(name, bytes)?;
    Ok(PreparedTarget {
        target: Target::Foreign(foreign),
        uffd: Shards::adopted(uffd),
        shown: ShownPages::default(),
        moves: false,
        staged: Err("the kernel moves pages only inside a process"),
        blocks: Blocks::Never,
        membership: None,
        view: None,
    })
}

/// Builds the mapping and attaches it to the server; the same for both kinds of target.
fn finish(
    name: String,
    options: Options,
    mut layout: Layout,
    prepared: PreparedTarget,
    server: &Server,
) -> Result<(Option<View>, AnyRegion), Error> {
    let PreparedTarget { target, uffd, shown, moves, staged, blocks, membership, mut view } = prepared;
    let releasables = options.releasables(uffd.features().contains(Features::POISON));
    // All fields are named, without `..`: an option that is forgotten here does not compile.
    let Options {
        name: _,
        access: _,
        hardware_read_only: _,
        dumped,
        max_mappings: _,
        zero_copy,
        readahead,
        shards: _,
        report_discards: _,
        inherit_on_fork,
        release_sources: _,
        budget: _,
        slices: _,
        capacity,
        on_memfd: _,
        align,
        serve_options,
    } = options;
    let (pages, size) = (target.all().pages, target.page_size());
    let no_table = |errno| no_table(&name, errno);
    let has_faults = shown.in_place.pages() < pages as u64;
    let settled = settle_readahead(readahead, &serve_options, (size, has_faults), layout.total());
    let readahead = settled.map_err(|error| error.inside(&name))?;
    let policy = Policy::new(readahead, pages, size, blocks).map_err(no_table)?;
    let tables = PageTables::new(pages, &serve_options, membership.is_some()).map_err(no_table)?;
    let children = forked_children(&name, inherit_on_fork && server.inner().serves_faults())?;
    let (max_in_flight, share) = (serve_options.max_in_flight, membership.as_ref().map(Membership::share));
    let releases = releases(&mut layout, releasables, size, server);
    let shown_pages = shown.in_place.pages() - shown.padding as u64 + shown.moved.pages();
    let growth = capacity.map(|capacity| Growth::new(capacity, align, layout.chunks()));
    let mut mapping = Mapping::new(
        name,
        (Arc::new(layout), releases, shown),
        (moves, staged),
        (policy, serve_options, tables),
        (target, uffd, membership.map(|membership| Box::new(membership) as Box<dyn Residence>)),
        growth,
        children.is_none(),
    );
    refuse_copies(&mapping, zero_copy && has_faults)?;
    mapping.counters.local().pages_in_place.add(shown_pages);
    if let Some(view) = &mut view {
        server.inner().fill(&mapping, view, max_in_flight)?;
    }
    drop_filled_sources(&mut mapping, server);
    if !dumped {
        hide_from_dumps(&mapping)?;
    }
    let any = attach(Served::new(mapping, max_in_flight, children), server)?;
    if let Some(share) = share {
        share.serve(any.served.handle().clone());
    }
    Ok((view, any))
}

/// Makes sources releasable. By default, only where no thread that fills pages has to free them.
fn releases(
    layout: &mut Layout,
    which: Option<Releasables>,
    page: PageSize,
    server: &Server,
) -> Option<Releases> {
    let (frees, is_asked) = (server.inner().deferred_free(), which == Some(Releasables::Owned));
    let releases = |which: &Releasables| (is_asked || frees.is_some()) && layout.has_releasable(*which);
    which.filter(releases).map(|which| Releases::new(layout, which, page, frees))
}

/// Drops the sources of a region that the build has filled.
fn drop_filled_sources(mapping: &mut Mapping, server: &Server) {
    if !server.inner().serves_faults() {
        mapping.release_all_sources();
        mapping.drop_copied_sources();
    }
}

/// The service of children of `fork(2)`, if the region has one.
fn forked_children(name: &str, served: bool) -> Result<Option<Arc<ForkedChildren>>, Error> {
    let children = served.then(|| ForkedChildren::new().map(Arc::new)).transpose();
    children.map_err(|errno| limit(name, "serve forked children (descriptors: ulimit -n)", errno))
}

/// Leaves the region, with everything that is mapped there by now, out of core dumps. Adopted memory
/// is part of its owner's.
fn hide_from_dumps(mapping: &Mapping) -> Result<(), Error> {
    let Target::Owned(reservation) = &mapping.target else { return Ok(()) };
    reservation.hide_from_dumps().map_err(|errno| limit(&mapping.name, "keep it out of core dumps", errno))
}

/// `Ok` if whole blocks of a region of `bytes` bytes are filled in staging, or the reason against
/// it.
fn stages(options: &Options, layout: &Layout, bytes: usize, features: Features) -> Result<(), &'static str> {
    if options.hardware_read_only {
        return Err("the region is built hardware_read_only(): pages move only between writable mappings");
    }
    if options.on_memfd {
        return Err("the region is built on_memfd(): the kernel moves private pages only");
    }
    if options.serve_options.record_of_writes.any() {
        return Err("changes are tracked, and a page that moves in has no record of its writes");
    }
    match bytes {
        _ if !layout.has_copied() && options.capacity.is_none() => {
            Err("its chunks are mapped: only edges are copied")
        }
        ..HUGE => Err("the region is smaller than a huge page"),
        _ => staging::available(features),
    }
}

/// Maps pages in place where the sources allow it, in at most `most` mappings.
fn show(
    name: &str,
    layout: &mut Layout,
    most: Option<usize>,
    abilities: Abilities,
    (view, uffd): (&mut View, &Shards),
) -> Result<ShownPages, Error> {
    let page = PageSize::system();
    let shown = ShownPages::map(layout, page, budget(layout, most), abilities, view, uffd)
        .map_err(|error| cannot_show(name, layout, error))?;
    if shown.in_place.pages() > 0 {
        layout.drop_mapped_sources(|offsets| shown.in_place.next_gap(page.covering(&offsets)).is_empty());
    }
    Ok(shown)
}

/// The number of mappings that the pages of a region may take: `most`, or a share of those that are
/// left.
fn budget(layout: &Layout, most: Option<usize>) -> impl FnOnce() -> usize + use<> {
    // A chunk takes a mapping, and the gap before it another one.
    let few = 2 * layout.chunks();
    move || most.unwrap_or_else(|| mappings_to_try(few) / BUDGET_SHARE)
}

/// Checks that the recording to replay belongs to this region, and returns the readahead to use.
///
/// A page that is filled ahead has no first touch, so a region that records fills nothing ahead.
/// Pages of another size than the system's are not filled ahead either, and without faults there is
/// nothing to fill.
fn settle_readahead(
    readahead: Option<Readahead>,
    serve_options: &ServeOptions,
    (page, has_faults): (PageSize, bool),
    bytes: u64,
) -> Result<Readahead, Error> {
    if let Some(recording) = &serve_options.replay {
        recording.check(page, bytes)?;
        if serve_options.record {
            let what =
                "a page that is replayed has no first touch: record() another region, without replay()";
            return Err(Error::new(ErrorKind::OptionConflict, what).of_option(BuildOption::Record));
        }
    }
    let none = serve_options.record || page != PageSize::system() || !has_faults;
    Ok(if none { Readahead::None } else { readahead.unwrap_or(Readahead::Adaptive) })
}

/// Starts to serve the region.
fn attach(served: Served, server: &Server) -> Result<AnyRegion, Error> {
    let served = Arc::new(served);
    let any = AnyRegion { server: server.start(&served)?, served };
    // Inheritance starts only after the fork reader runs: a fork blocks on its unread event while
    // it holds the allocator lock, which this thread may need.
    any.show_to_children()?;
    log!(debug, region = any.name(), bytes = any.len(), metrics = ?any.metrics(), "region built");
    Ok(any)
}

/// The error for a limit of the process.
fn limit(name: &str, what: &str, errno: Errno) -> Error {
    Error::refused(format_args!("region {name}: cannot {what}"), errno)
}

fn no_table(name: &str, errno: Errno) -> Error {
    let limit = Limit::met(0, errno);
    Error::refused(format_args!("region {name}: cannot reserve its page table: {limit}"), errno)
}

fn pages_for(bytes: u64, page: PageSize) -> Result<NonZeroUsize, Error> {
    let rounded = page.round_up(bytes).and_then(|bytes| usize::try_from(bytes).ok());
    rounded.and_then(|bytes| NonZeroUsize::new(bytes / page.bytes())).ok_or_else(|| {
        let what = format!("{bytes} bytes are more than there are addresses: split it");
        Error::new(ErrorKind::TooLarge, what)
    })
}

/// The error for a run of pages that the kernel does not map; it names the run's first chunk.
fn cannot_show(name: &str, layout: &Layout, (chunk, errno): (usize, Errno)) -> Error {
    let (number, source) = (layout.number_of(chunk), layout.backing_of(chunk).source().name());
    let what = format!("region {name}: cannot map chunk {number} ({source}) in place");
    let error = match errno {
        Errno::EACCES => {
            let reason = "it is open for reading only: open it for writing too, or map it copy_on_write()";
            Error::new(ErrorKind::UnusableFile, format!("{what}: {reason}"))
        }
        Errno::EAGAIN => Error::refused(format_args!("{what}: {}", Limit::met(0, errno)), errno),
        errno => Error::refused(what, errno),
    };
    error.of_chunk(number)
}

/// Refuses pages that are copied, if the user has asked for that.
fn refuse_copies(mapping: &Mapping, asked: bool) -> Result<(), Error> {
    let copied = asked.then(|| Plan::first_copy(mapping)).flatten();
    let Some(PlanRun { chunks, source, reason, .. }) = copied else { return Ok(()) };
    let what =
        format!("region {}: chunk {} ({source}) is not zero-copy: {reason}", mapping.name, chunks.start);
    Err(Error::new(ErrorKind::NotZeroCopy, what).of_chunk(chunks.start).of_plan(reason))
}

/// Reserves the addresses. `huge`: huge pages may move in.
fn reserve(
    name: &str,
    (pages, page): (NonZeroUsize, PageSize),
    access: Access,
    huge: bool,
) -> Result<(Arc<Reservation>, View), Error> {
    let (reservation, view) =
        View::reserve(pages, page, access).map_err(|error| Error::unreserved(name, error))?;
    if name != Options::UNNAMED {
        reservation.set_name(name);
    }
    if huge {
        reservation.advise_hugepage();
    }
    Ok((reservation, view))
}

/// The stand-in for the userfaultfds of a region without faults.
fn stand_in(name: &str) -> Result<Shards, Error> {
    let uffd = Uffd::stand_in();
    uffd.map(Shards::one).map_err(|errno| limit(name, "open a descriptor (ulimit -n)", errno))
}

/// True if the region has donated pages that move on first touch.
fn moves_in(options: &Options, layout: &Layout, features: Features) -> bool {
    let copies = options.serve_options.record_of_writes.any() || options.on_memfd;
    layout.has_donated() && !options.inherit_on_fork && !copies && can_move(features)
}

/// True if donated pages move on first touch. If they could be swapped out and lost during the
/// move, they move when the region is built.
fn can_move(features: Features) -> bool {
    features.contains(Features::MOVE) && swap::moves_safely().is_ok()
}

/// A region takes at most this share, one half, of the mappings that the process has left.
const BUDGET_SHARE: usize = 2;
