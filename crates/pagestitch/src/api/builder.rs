//! Building a region: lay out, reserve, open, register, hand to the pool. All or nothing.

use crate::api::nesting::Below;
use crate::api::{AdoptedRegion, Core, Region, SharedRegion};
use crate::error::{Error, ErrorKind, Failure};
use crate::policy::{Blocks, Policy, Readahead, Recording};
use crate::serve::fork::Family;
use crate::serve::{Served, Server, Who};
use crate::space::{
    Abilities, AdoptedMemory, Chunk, How, Layout, Manner, Mapping, Plan, PlanRun, Reporter, Shown, Tables,
    Target,
};
use pagestitch_kernel::Features;
use pagestitch_kernel::limits::mappings_left;
use pagestitch_kernel::limits::{Limit, ReserveError};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::{self, FaultMode, OpenError, RegisterMode};
use pagestitch_kernel::{Access, Errno, PageSize, Reservation, Uffd, View};
use pagestitch_kernel::{staging, swap};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Describes a region. Made by [`Region::builder`]; nothing is reserved before [`build`](Builder::build).
#[derive(Debug)]
pub struct Builder {
    name: Option<String>,
    access: Access,
    hardware_read_only: bool,
    dumped: bool,
    zero_copy: bool,
    aligned: bool,
    readahead: Readahead,
    max_mappings: Option<usize>,
    inherit_on_fork: bool,
    manner: Manner,
    /// The layout so far, or the first chunk that could not be laid.
    layout: Result<Layout, Error>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            name: None,
            access: Access::ReadOnly,
            hardware_read_only: false,
            dumped: false,
            zero_copy: false,
            aligned: false,
            readahead: Readahead::Adaptive,
            max_mappings: None,
            inherit_on_fork: false,
            manner: Manner::default(),
            layout: Ok(Layout::default()),
        }
    }
}

impl Region {
    /// Starts to describe a region.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }
}

impl SharedRegion {
    /// As [`Region::builder`]; end it with [`build_shared`](Builder::build_shared).
    #[must_use]
    pub fn builder() -> Builder {
        Region::builder()
    }
}

impl Builder {
    /// What to call the region in errors, logs and plans. By default `"unnamed"`.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Lets [`Region::as_mut_slice`] write to the region. By default it is read-only.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.access = Access::Writable;
        self
    }

    /// Has the hardware stop stray writes to a region that is not [writable](Self::writable). The kernel moves pages only
    /// between mappings that can be written to, so that whole blocks of such a region are copied in, page by page, which
    /// takes more than twice as long. Not for donated pages, which have to move.
    ///
    /// Safe code never writes to such a region, guarded or not.
    #[must_use]
    pub fn hardware_read_only(mut self) -> Self {
        self.hardware_read_only = true;
        self
    }

    /// Includes the region in core dumps of the process. By default it is left out: the kernel walks all addresses of what it dumps, which
    /// takes half a minute for a tebibyte of absent pages, and the bytes are in the sources.
    #[must_use]
    pub fn dumped(mut self) -> Self {
        self.dumped = true;
        self
    }

    /// How far ahead of a sequential reader pages are filled. By default [`Readahead::Adaptive`].
    #[must_use]
    pub fn readahead(mut self, readahead: Readahead) -> Self {
        self.readahead = readahead;
        self
    }

    /// Makes it an error if a byte would have to be copied: [`ErrorKind::NotZeroCopy`] names the chunk and the reason.
    #[must_use]
    pub fn require_zero_copy(mut self) -> Self {
        self.zero_copy = true;
        self
    }

    /// Lays each chunk from here on on a page boundary: at the same place in a page as in its source, so that it can be
    /// shown in place. What lies between is padding, whose bytes mean nothing; [`Region::offset_of`] tells where a
    /// chunk is.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().page_aligned().chunk(vec![1u8; 5]).chunk(vec![2u8; 5]).build(&Pool::new()?)?;
    /// assert_eq!(region.offset_of(1), Some(4096));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn page_aligned(mut self) -> Self {
        self.aligned = true;
        self
    }

    /// How many mappings the region may take to show pages in place; what is beyond is copied. By default half of what
    /// `vm.max_map_count` leaves this process, which other parts of the program need too.
    #[must_use]
    pub fn max_mappings(mut self, most: usize) -> Self {
        self.max_mappings = Some(most);
        self
    }

    /// How many of its faults may be served at once; those beyond wait for the others, and hold up no worker. A source that
    /// answers later ([`Fetch`](crate::source::Fetch)) is waited for then. By default as many as there are workers, which is the
    /// limit of a pool, and as many fetches as the source takes; where a pool serves several regions and faults take longer than a millisecond, the slow regions
    /// together leave one worker to the others.
    ///
    /// # Panics
    ///
    /// If it is none.
    #[must_use]
    pub fn max_in_flight(mut self, most: usize) -> Self {
        assert!(most > 0, "nobody would serve it");
        self.manner.max_in_flight = Some(most);
        self
    }

    /// Records the order in which pages are first touched, for [`Region::recording`]. Only a fault reveals a touch, so the region
    /// fills nothing ahead meanwhile. `build` refuses a region that also [replays](Self::replay).
    #[must_use]
    pub fn record(mut self) -> Self {
        self.manner.record = true;
        self
    }

    /// Fills the pages of a recording, in its order, from when the region is built: by workers that are awake, after faults. What
    /// cannot be filled is asked for again when it is touched.
    #[must_use]
    pub fn replay(mut self, recording: &Recording) -> Self {
        self.manner.replay = Some(recording.clone());
        self
    }

    /// Has whoever is told know of each page whose bytes cannot be had, by its offset in the region, when that is found: in the thread
    /// that serves, which must not touch the region, or in the one that gives faults up, which gives up no other one until `tell` returns.
    /// [`Region::failures`] lists those that there are.
    #[must_use]
    pub fn on_page_failure(mut self, tell: impl Fn(u64, &Failure) + Send + Sync + 'static) -> Self {
        self.manner.reporter = Some(Reporter(Arc::new(tell)));
        self
    }

    /// Takes the time of the parts of each fault, for [`Meter::latency`](crate::Meter::latency): some five looks at the clock a
    /// fault. By default faults are only counted.
    #[must_use]
    pub fn record_latency(mut self) -> Self {
        self.manner.record_latency = true;
        self
    }

    /// Has children of `fork(2)` inherit the region, and theirs. What was filled by then is theirs as any memory is; what was not
    /// is filled from the same sources when they touch it, in a page of their own. By default a child does not have the
    /// region: to touch it there is SIGSEGV.
    ///
    /// * By a pool, which has one more thread for it: `fork(2)` waits until somebody has read of it, and holds the allocator
    ///   meanwhile. A fault takes one more hand on the way.
    /// * In a child, [`Region`] reads as ever (`as_slice`, `read_at`, `populate`); to drop it there does nothing. What a child has
    ///   not touched when its parent drops the region is bad: SIGBUS, never zeros.
    /// * If the parent is killed, or ends without dropping the region, a touch of a page that the child does not have waits until the
    ///   child is ended, and `read_at` and `populate` are errors. For that, children inherit a socket in which their userfaultfds
    ///   are in flight: a child that closes descriptors it does not know (`close_range(2)`) reads zeros then, as does one that
    ///   is being forked in the very moment in which its parent is killed. A child that is not to wait asks for its parent's end
    ///   itself (`getppid(2)`, or a pidfd).
    /// * A child takes a descriptor of this process until it ends; the region takes seven, and two more for each 128 children that live
    ///   at the same time. Where there is none (`ulimit -n`), what it does not have is bad
    ///   there, which is logged; for that, the region keeps four.
    /// * Donated pages are moved in when the region is built, as a child needs them, too. Memfds that are filled later are refused.
    /// * Takes `CAP_SYS_PTRACE`, and Linux 6.6.
    ///
    /// ```no_run
    /// # use pagestitch::{Pool, Region};
    /// let pool = Pool::new()?;
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).inherit_on_fork().build(&pool)?;
    /// // From here on fork(2) as you like: a worker process for each request, a snapshot to write out.
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn inherit_on_fork(mut self) -> Self {
        self.inherit_on_fork = true;
        self
    }

    /// Lays a chunk at the end.
    #[must_use]
    pub fn chunk(mut self, chunk: impl Into<Chunk>) -> Self {
        self.push(chunk.into());
        self
    }

    /// Lays chunks at the end, in order.
    #[must_use]
    pub fn chunks(mut self, chunks: impl IntoIterator<Item = impl Into<Chunk>>) -> Self {
        let chunks = chunks.into_iter();
        if let Ok(layout) = &mut self.layout {
            layout.reserve(chunks.size_hint().0);
        }
        chunks.for_each(|chunk| self.push(chunk.into()));
        self
    }

    /// Reserves the addresses and starts to serve them: by a pool (`&pool`), [inline](crate::Inline), or by
    /// the [caller's own loop](crate::Manual). Reads no source.
    ///
    /// # Errors
    ///
    /// The first chunk that is [bad](ErrorKind::BadChunk) or [too much](ErrorKind::TooLarge); no chunk at all; no
    /// [userfaultfd](ErrorKind::NoUserfaultfd); a [limit](ErrorKind::Resources) of the process; a chunk that others may
    /// [change](ErrorKind::Shared); a server that was made [before `fork(2)`](ErrorKind::ForkedChild). Each names the thing and what to do.
    pub fn build(self, server: impl Into<Server>) -> Result<Region, Error> {
        if let Ok(layout) = &self.layout
            && let Some(shared) = layout.first_shared()
        {
            let name = self.name.as_deref().unwrap_or(UNNAMED);
            let what =
                format!("region {name}: others may change {shared}: build_shared() it, or seal or copy it");
            return Err(Error::new(ErrorKind::Shared, what));
        }
        let (view, core) = self.make(server.into())?;
        let view = view.into_stable().expect("only what others may change makes a view unstable");
        Ok(Region::new(view, core))
    }

    /// As [`build`](Self::build), for a region of which others may change parts: files, unsealed memfds, aliases,
    /// physical memory.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build); a file that cannot be shown as [`writable`](Self::writable).
    pub fn build_shared(self, server: impl Into<Server>) -> Result<SharedRegion, Error> {
        let (view, core) = self.make(server.into())?;
        Ok(SharedRegion::new(view, core))
    }

    /// As [`build`](Self::build), for memory that somebody else has registered already: another part of this program, or another
    /// process. The chunks have to hold exactly as many bytes as its ranges; they are copied, whatever they are.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build); [`ErrorKind::BadOption`] for ranges that are not whole pages, overlap, or do not add up;
    /// [`ErrorKind::NotInline`] for a server that is [`Inline`](crate::Inline).
    pub fn build_adopted(
        self,
        memory: AdoptedMemory,
        server: impl Into<Server>,
    ) -> Result<AdoptedRegion, Error> {
        let (server, name) = (server.into(), self.name.unwrap_or_else(|| UNNAMED.to_owned()));
        let in_region = |error: Error| error.inside(&name);
        if matches!(server.who, Who::Inline) {
            let what =
                "adopted memory cannot be served inline: its owner has registered it for events; use a pool";
            return Err(in_region(Error::new(ErrorKind::NotInline, what)));
        }
        let mut layout = self.layout.map_err(in_region)?;
        layout.finish().map_err(in_region)?;
        Below::of(&layout).check(&name, &layout, &server)?;
        let (adopted, uffd) = memory.settle(&name, layout.total()).map_err(in_region)?;
        let target = Target::Foreign(adopted);
        let readahead =
            settle_recording(self.readahead, &self.manner, &target, &layout).map_err(in_region)?;
        // Neither a window nor a block is made up of huge pages: each is its own.
        let readahead = if target.page_size() == PageSize::system() { readahead } else { Readahead::None };
        let no_table = |errno| no_table(&name, errno);
        let policy = Policy::new(readahead, target.all().pages, target.page_size(), Blocks::Never)
            .map_err(no_table)?;
        let copied = (false, Err("the kernel moves pages only inside a process"));
        let tables = Tables::new(target.all().pages, &self.manner).map_err(no_table)?;
        let max_in_flight = self.manner.max_in_flight;
        let mapping = Mapping::new(
            name.clone(),
            (Arc::new(layout), Shown::default()),
            copied,
            (policy, self.manner, tables),
            (target, uffd),
            true,
        );
        if self.zero_copy {
            refuse_copies(&mapping)?;
        }
        // The children of another process cannot be followed: which pages its balloons have taken is not known of them.
        Ok(AdoptedRegion::new(attach(Served::new(mapping, max_in_flight, None), server)?))
    }

    fn make(mut self, server: Server) -> Result<(View, Core), Error> {
        let name = self.name.take().unwrap_or_else(|| UNNAMED.to_owned());
        let in_region = |error: Error| error.inside(&name);
        let mut layout = std::mem::replace(&mut self.layout, Ok(Layout::default())).map_err(in_region)?;
        layout.finish().map_err(in_region)?;
        let limit = |what, errno| {
            Error::because(ErrorKind::Resources, format_args!("region {name}: cannot {what}"), errno)
        };
        let below = Below::of(&layout);
        below.check(&name, &layout, &server)?;
        if self.inherit_on_fork {
            refuse_children(&name, &layout, &server)?;
        }
        let uffd = open(&name, &layout, &server, self.inherit_on_fork)?;
        layout.unlock_donated().map_err(|errno| limit("unlock donated pages", errno))?;
        let moves = layout.has_donated() && !self.inherit_on_fork && can_move(&uffd);
        let minor_faults = uffd.features().contains(Features::MISSING_SHMEM | Features::MINOR_SHMEM);
        let page = PageSize::system();
        let pages = pages_for(&layout, page).map_err(in_region)?;
        let staged = self.stages(&layout, pages.get() * page.bytes(), &uffd);
        let huge = moves || staged.is_ok();
        let access =
            if huge && self.access == Access::ReadOnly { Access::LogicallyReadOnly } else { self.access };
        let (reservation, mut view) = reserve(&name, (pages, page), access, huge)?;
        register(&name, &uffd, &reservation)?;
        let budget = || self.max_mappings.unwrap_or_else(|| mappings_left() / BUDGET_SHARE);
        let abilities = Abilities { moves, minor_faults };
        let shown = Shown::map(&layout, page, budget, abilities, &mut view, &uffd)
            .map_err(|error| cannot_show(&name, &layout, error))?;
        if shown.in_place.pages() > 0 {
            layout.let_go_of_mapped(|offsets| shown.in_place.next_gap(page.covering(&offsets)).is_empty());
        }
        let no_table = |errno| no_table(&name, errno);
        let blocks = if staged.is_ok() { Blocks::Whole } else { Blocks::Copied };
        if !self.dumped {
            reservation.hide_from_dumps().map_err(|errno| limit("keep it out of core dumps", errno))?;
        }
        if shown.in_place.pages() < pages.get() as u64 {
            reservation.serve(below.served_by(&name, &server));
        }
        let target = Target::Owned(reservation);
        let readahead =
            settle_recording(self.readahead, &self.manner, &target, &layout).map_err(in_region)?;
        let policy = Policy::new(readahead, pages.get(), page, blocks).map_err(no_table)?;
        let tables = Tables::new(target.all().pages, &self.manner).map_err(no_table)?;
        let family = self.inherit_on_fork.then(|| Family::new().map(Arc::new)).transpose();
        let family = family.map_err(|errno| limit("serve children (descriptors: ulimit -n)", errno))?;
        let max_in_flight = self.manner.max_in_flight;
        let mapping = Mapping::new(
            name.clone(),
            (Arc::new(layout), shown),
            (moves, staged),
            (policy, self.manner, tables),
            (target, uffd),
            family.is_none(),
        );
        if self.zero_copy {
            refuse_copies(&mapping)?;
        }
        mapping.counters.local().pages_in_place.add(mapping.in_place.pages());
        Ok((view, attach(Served::new(mapping, max_in_flight, family), server)?))
    }

    /// Whether whole blocks of a region of so many bytes are filled in staging; else why not.
    fn stages(&self, layout: &Layout, bytes: usize, uffd: &Uffd) -> Result<(), &'static str> {
        match self.access {
            Access::ReadOnly if self.hardware_read_only => {
                Err("the region is built hardware_read_only(): pages move only between writable mappings")
            }
            _ if !layout.has_copied() => Err("its chunks are mapped: only edges are copied"),
            _ if bytes < HUGE => Err("the region is smaller than a huge page"),
            _ => staging::available(uffd.features()),
        }
    }

    fn push(&mut self, chunk: Chunk) {
        if let Ok(layout) = &mut self.layout {
            let padded = if self.aligned { layout.pad_for(&chunk, PageSize::system()) } else { Ok(()) };
            if let Err(error) = padded.and_then(|()| layout.push(chunk)) {
                self.layout = Err(error);
            }
        }
    }
}

/// Checks that the recording to replay is of this region. Returns how far to read ahead: a page that is filled ahead has no first
/// touch, so a region that is recorded reads nothing ahead.
fn settle_recording(
    readahead: Readahead,
    manner: &Manner,
    target: &Target,
    layout: &Layout,
) -> Result<Readahead, Error> {
    if let Some(recording) = &manner.replay {
        recording.check(target.page_size(), layout.total())?;
        if manner.record {
            let what =
                "a page that is replayed has no first touch: record() another region, without replay()";
            return Err(Error::new(ErrorKind::BadOption, what));
        }
    }
    Ok(if manner.record { Readahead::None } else { readahead })
}

/// Starts to serve.
fn attach(served: Served, server: Server) -> Result<Core, Error> {
    let served = Arc::new(served);
    let core = Core { server: server.attach(&served)?, served };
    // Not before somebody reads of them: who builds may wait for the allocator, and that for a fork.
    core.show_to_children()?;
    log!(debug, region = core.name(), bytes = core.len(), metrics = ?core.metrics(), "region built");
    Ok(core)
}

fn no_table(name: &str, errno: Errno) -> Error {
    let limit = Limit::met(0, errno);
    let what = format_args!("region {name}: cannot reserve its page table: {limit}");
    Error::because(ErrorKind::Resources, what, errno)
}

fn pages_for(layout: &Layout, page: PageSize) -> Result<NonZeroUsize, Error> {
    let bytes = page.round_up(layout.total()).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.and_then(|bytes| NonZeroUsize::new(bytes / page.bytes())).ok_or_else(|| {
        let what = format!("{} bytes are more than there are addresses: split it", layout.total());
        Error::new(ErrorKind::TooLarge, what)
    })
}

/// A run of pages was refused, with the run's first chunk to name.
fn cannot_show(name: &str, layout: &Layout, (chunk, errno): (usize, Errno)) -> Error {
    let (number, source) = (layout.number_of(chunk), layout.backing_of(chunk).source().name());
    let what = format!("region {name}: cannot show chunk {number} ({source}) in place");
    match errno {
        Errno::EACCES => {
            let why = "it is open for reading only: open it for writing too, or show it copy-on-write";
            Error::new(ErrorKind::File, format!("{what}: {why}"))
        }
        Errno::EAGAIN => {
            Error::because(ErrorKind::Resources, format_args!("{what}: {}", Limit::met(0, errno)), errno)
        }
        errno => Error::because(ErrorKind::Resources, what, errno),
    }
}

fn refuse_copies(mapping: &Mapping) -> Result<(), Error> {
    match Plan::of(mapping)
        .runs()
        .iter()
        .find(|run| !matches!(run.how, How::Map | How::Move | How::Continue | How::Zero))
    {
        Some(PlanRun { chunks, source, reason, .. }) => {
            let what = format!(
                "region {}: chunk {} ({source}) is not zero-copy: {reason}",
                mapping.name, chunks.start
            );
            Err(Error::new(ErrorKind::NotZeroCopy, what))
        }
        None => Ok(()),
    }
}

/// Reserves the addresses; `huge`: huge pages may move in.
fn reserve(
    name: &str,
    (pages, page): (NonZeroUsize, PageSize),
    access: Access,
    huge: bool,
) -> Result<(Arc<Reservation>, View), Error> {
    let (reservation, view) = View::reserve(pages, page, access)
        .map_err(|error| Error::because(ErrorKind::TooLarge, format_args!("region {name}"), error))?;
    if name != UNNAMED {
        reservation.set_name(name);
    }
    if huge {
        reservation.advise_hugepage();
    }
    Ok((reservation, view))
}

/// Registers the range, and opens it.
fn register(name: &str, uffd: &Uffd, reservation: &Reservation) -> Result<(), Error> {
    uffd.register(reservation, RegisterMode::MISSING).map_err(|errno| match errno {
        Errno::ENOMEM | Errno::EAGAIN => {
            let met = ReserveError::met(reservation.range().bytes(), errno);
            Error::because(ErrorKind::TooLarge, format_args!("region {name}"), met)
        }
        errno => Error::because(
            ErrorKind::Resources,
            format_args!("region {name}: cannot register its range"),
            errno,
        ),
    })
}

/// What cannot be served in children: said before anything is reserved.
fn refuse_children(name: &str, layout: &Layout, server: &Server) -> Result<(), Error> {
    let bad = |kind, what: &str| Err(Error::new(kind, format!("region {name}: {what}")));
    match server.who {
        Who::Pool(_) => {}
        Who::Inline => {
            return bad(ErrorKind::NotInline, "an inline region serves no forked children: use a pool");
        }
        Who::Manual(_) => {
            let what = "a manual serves no forked children, because its loop may wait for the allocator while fork(2) holds it: use a pool";
            return bad(ErrorKind::BadOption, what);
        }
    }
    if layout.has_lazy() {
        let what = "children cannot be served a memfd that is filled later: seal it first, or copy it";
        return bad(ErrorKind::BadOption, what);
    }
    let features = uffd::kernel_features()
        .map_err(|error| Error::because(ErrorKind::NoUserfaultfd, format_args!("region {name}"), error))?;
    if !features.contains(Features::POISON) {
        return bad(
            ErrorKind::BadOption,
            "children can be served from Linux 6.6 on, which has marks for bad pages",
        );
    }
    Ok(())
}

/// Says which way no userfaultfd was to be had. To be told of forks is not a matter of the kernel but of who asks: the only feature
/// of which that is so.
fn cannot_open(name: &str, children: bool, error: OpenError) -> Error {
    if children && error.system_call == Errno::EPERM && Uffd::open(Features::NONE).is_ok() {
        let what = "to serve children takes CAP_SYS_PTRACE, which this process lacks: grant it (setcap, --cap-add), or do without";
        return Error::new(ErrorKind::BadOption, format!("region {name}: {what}"));
    }
    Error::because(ErrorKind::NoUserfaultfd, format_args!("region {name}"), error)
}

/// Whether donated pages move when they are touched. Where they may be swapped out, and lost on the way, they move when the region is
/// built.
fn can_move(uffd: &Uffd) -> bool {
    uffd.features().contains(Features::MOVE) && swap::moves_safely().is_ok()
}

fn open(name: &str, layout: &Layout, server: &Server, children: bool) -> Result<Uffd, Error> {
    // Who asks for events and does not read them stops whoever lets go of pages.
    let events = match server.who {
        // Somewhere else, what was not filled would be zeros.
        Who::Pool(_) | Who::Manual(_) => Features::EVENT_REMOVE | Features::EVENT_REMAP | Features::THREAD_ID,
        Who::Inline => Features::SIGBUS,
    };
    let events = if children { events | Features::EVENT_FORK } else { events };
    let mut wanted = events | Features::POISON | Features::MOVE;
    if layout.has_lazy() {
        wanted = wanted | Features::MISSING_SHMEM | Features::MINOR_SHMEM;
    }
    let uffd = Uffd::open(wanted).map_err(|error| cannot_open(name, children, error))?;
    if matches!(server.who, Who::Inline) && !uffd.features().contains(Features::SIGBUS) {
        let what = format!("region {name}: this kernel cannot serve faults inline (Linux 4.14): use a pool");
        return Err(Error::new(ErrorKind::NotInline, what));
    }
    if uffd.mode() == FaultMode::UserOnly {
        log!(
            debug,
            region = name,
            "faults of system calls are not served: populate() before one reads the region"
        );
    }
    Ok(uffd)
}

const UNNAMED: &str = "unnamed";
/// One region takes no more than half of the mappings that are left.
const BUDGET_SHARE: usize = 2;
