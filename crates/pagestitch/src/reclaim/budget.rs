//! The public handle to a budget.

use crate::error::{BuildOption, Bytes, Error, ErrorKind};
use crate::policy::Replacement;
use crate::reclaim::blocks::{BLOCK_PAGES, ahead_max};
use crate::reclaim::fingerprints::unstable_pages;
use crate::reclaim::metrics::BudgetMetrics;
use crate::reclaim::places::SLOTS_MAX;
use crate::reclaim::pressure;
use crate::reclaim::share::{Evicted, JoinError, Membership, Share, State};
use crate::reclaim::slots::Slots;
use crate::reclaim::state::{BATCH, Standby, room_for};
use crate::space::Layout;
use pagestitch_kernel::arena::{Arena, ArenaError};
use pagestitch_kernel::memory_left::MemoryLeft;
use pagestitch_kernel::sync::atomic::{AtomicU64, Ordering};
use pagestitch_kernel::{Errno, Evictable, PageSize};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

/// A limit for the resident bytes of any number of regions: their pages leave when it is used up, and
/// come back from their sources when they are touched.
///
/// Clones share the budget. [`Builder::budget`](crate::Builder::budget) gives it to a region.
///
/// * **What counts**: pages that regions of the budget have filled, and pages that wait on the standby
///   list, an eighth of the budget at most. Pages that are mapped in place are page cache, and do not
///   count. Nor do zeros of holes, the regions' tables (5 bytes for each page that was ever touched), and
///   64 KiB and a huge page of buffers for each worker, and 256 KiB for each thread that writes pages back.
/// * **Hashes**: a page of a file or of a source of your own may come back with other bytes, which a slice
///   must not show. So 16 bytes are kept for each such page of a [`Region`](crate::Region), and count: an
///   eighth of the budget at most, so these pages are 32 times the budget at most. More take
///   [`build_shared`](crate::Builder::build_shared), an [`ImmutableFile`](crate::source::ImmutableFile) or a
///   [`StableSource`](crate::source::StableSource).
/// * **Standby**: a page that leaves waits for a while before its memory is freed. A touch meanwhile
///   brings it back without a read of its source. While few pages come back, the list of a budget of 8 MiB or
///   more is short (a 32nd as long, from 68 MiB on), and most pages leave at once.
/// * **Sequential readers** get whole blocks of 2 MiB ahead of them in a budget of 64 MiB or more. These leave
///   first, without standby, and displace no other page, except for an eighth of the budget.
/// * **Which pages leave**: pages that were touched once, before those that were touched again while they
///   were on the standby list, or soon after (S3-FIFO). So one pass over a long region does not displace
///   the pages in use. [`with_replacement`](Self::with_replacement) chooses another order.
/// * **Pages that cannot leave**, because they are locked (`mlock(2)`) or pinned by a device, stay. If
///   there is nothing else to evict, the regions exceed the budget, and
///   [`overruns`](Self::overruns) counts the pages.
/// * **Written pages** of a region that is built [`write_back`](crate::Builder::write_back) go to their
///   sources before their memory is used for other pages: neighbouring pages at once, by the thread that
///   needs the room. So a thread that writes faster than the source takes bytes waits in its faults, and a
///   source that hangs holds up the faults of all regions of the budget that need room. That thread may be
///   the only worker of a pool, so a source [never touches](crate::source::WritableSource#contract) a region
///   that the same pool serves. If dirty pages take seven eighths of the memory that the budget leaves to its
///   regions, the first write to a page that is in memory has some of them go back before, while no source fails: so
///   pages that come find free room.
/// * **A scratch file**, for written pages whose source must not change, is a copy of it: a
///   [`WritableFile`](crate::source::WritableFile) without a name (`O_TMPFILE`) as the chunk.
/// * **A source that takes no bytes back** loses none: the page stays, and is dirty.
///   [`on_page_failure`](crate::Builder::on_page_failure) gets the first error, and
///   [`flush`](crate::AnyRegion::flush) returns it. Other pages leave meanwhile. If none is left, a fault that
///   needs room fails after three seconds without a write that succeeds, and touches of its page get SIGBUS
///   ([`FailureReason::NoRoom`](crate::source::FailureReason::NoRoom)) until
///   [`retry_failed`](crate::AnyRegion::retry_failed).
/// * **Padding** between chunks has no source: a page with written padding stays.
/// * **Discarded pages** (`MADV_DONTNEED`) of a region with write-back may have their written bytes again,
///   because the kernel does not tell a discard of a page that has left.
/// * **Kernels** before Linux 6.8 cannot move pages: there, pages are dropped at once, without standby.
///   So they are where swap is on and the kernel may lose a page that moves while it is swapped out
///   (before Linux 6.16). Regions with write-back are refused there.
/// * **Regions that are served [`Inline`](crate::Inline)**: a touch evicts other pages in its signal handler, and
///   writes them to their [`WritableFile`](crate::source::WritableFile). For written pages of other sources, and
///   while a source fails, a thread of the budget evicts, because a handler calls no source; a touch without room
///   waits for it. A handler that other threads, which lack a CPU, keep from evicting for two seconds fills its
///   page above the limit.
/// * **Forked children** do not have regions with a budget.
///
/// ```
/// use pagestitch::{Budget, Pool, Region};
///
/// let budget = Budget::bytes(16 << 20)?;
/// let region = Region::builder().chunk(vec![7u8; 64 << 20]).budget(&budget).build(&Pool::builder().workers(2).start()?)?;
/// assert!(region.as_slice().iter().all(|&byte| byte == 7));
/// assert!(budget.resident_bytes() <= 16 << 20);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Budget {
    pub(super) state: Arc<State>,
}

impl Budget {
    /// A budget of so many bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidOption`] for less than 4 MiB, and for more than the memory that the machine and
    /// the cgroups of this process have left; [`ErrorKind::OutOfMemory`] without memory for its tables.
    ///
    /// ```
    /// use pagestitch::Budget;
    ///
    /// let budget = Budget::bytes(64 << 20)?;
    /// assert_eq!(budget.limit(), 64 << 20);
    /// println!("{}", Budget::bytes(0).unwrap_err());             // a budget of 0 bytes is too small ...
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn bytes(bytes: u64) -> Result<Self, Error> {
        let page = PageSize::system().bytes() as u64;
        let limit = usize::try_from(bytes / page).unwrap_or(usize::MAX);
        check_size(bytes, limit)?;
        let slots =
            NonZeroUsize::new((limit / STANDBY_SHARE).min(SLOTS_MAX)).expect("a budget has its least size");
        let standby = standby(slots)?;
        let state =
            State::new(limit, standby, Replacement::default().policy(room_for(limit))).map_err(no_tables)?;
        Ok(Self { state: Arc::new(state) })
    }

    /// A budget of a part of the memory that this process can have: that of the machine, or the least limit of
    /// a memory cgroup above the process (`memory.max`; `memory.limit_in_bytes` of version 1). For a program in
    /// a container, whose limit is set elsewhere.
    ///
    /// The limit is read once. The rest of the program and the page cache take memory of the same cgroup, so a
    /// share of 1.0 leaves nothing for them.
    ///
    /// **Memory pressure**: a thread of the budget (`pagestitch/psi`) waits for the kernel to report that
    /// tasks of this cgroup, or of the machine, wait for memory: 100 ms in 2 s. Each report lowers the
    /// memory that the budget uses by an eighth, to half of it at most, and pages leave at once. After ten
    /// seconds without a report it rises by an eighth. [`limit`](Self::limit) stays as it is, pinned pages
    /// stay, and so do pages that need the memory while no other can leave.
    /// [`BudgetMetrics::pressure_reports`] counts the reports. Where the kernel has none (no
    /// `CONFIG_PSI`, or `psi=0`; for an ordinary user before Linux 6.4), or where this process may not ask
    /// for them, the budget is as one of [`bytes`](Self::bytes).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidOption`] for a share that is not above 0 and at most 1; and as
    /// [`bytes`](Self::bytes). [`ErrorKind::Unsupported`] if the kernel tells no memory (no `/proc`).
    ///
    /// ```
    /// use pagestitch::Budget;
    ///
    /// let budget = Budget::share_of_cgroup(0.1)?;
    /// println!("{} MiB", budget.limit() >> 20);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn share_of_cgroup(share: f64) -> Result<Self, Error> {
        let refused = |kind, what: String| Err(Error::new(kind, what).of_option(BuildOption::Budget));
        if !(share > 0.0 && share <= 1.0) {
            let what =
                format!("a share of {share} is no part of the memory: give one above 0.0, 1.0 at most");
            return refused(ErrorKind::InvalidOption, what);
        }
        match MemoryLeft::most() {
            Some(most) => {
                Self::bytes((most as f64 * share) as u64).inspect(|budget| pressure::watch(&budget.state))
            }
            None => {
                let what =
                    "the kernel does not tell how much memory there is: mount /proc, or use Budget::bytes()";
                refused(ErrorKind::Unsupported, what.to_owned())
            }
        }
    }

    /// Has pages leave in another order, also those that are in memory. All clones of the budget have the new order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ForkedChild`] for a budget of the parent process.
    ///
    /// ```
    /// use pagestitch::{Budget, Replacement};
    ///
    /// let budget = Budget::bytes(64 << 20)?.with_replacement(Replacement::Fifo)?;
    /// # let _ = budget;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn with_replacement(self, replacement: Replacement) -> Result<Self, Error> {
        self.check_process()?;
        self.state.set_policy(replacement.policy(room_for(self.state.limit)));
        Ok(self)
    }

    /// The limit, in bytes.
    ///
    /// ```
    /// # use pagestitch::Budget;
    /// assert_eq!(Budget::bytes(8 << 20)?.limit(), 8 << 20);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn limit(&self) -> u64 {
        in_bytes(self.state.limit)
    }

    /// The bytes of memory in use, with those of the standby list and of pages that are being filled. A page
    /// that is filled again after the program has discarded it counts twice meanwhile. The bytes exceed the
    /// limit only by [`overruns`](Self::overruns).
    ///
    /// ```
    /// # use pagestitch::{Budget, Pool, Region};
    /// let budget = Budget::bytes(16 << 20)?;
    /// let pool = Pool::builder().workers(1).start()?;
    /// let region = Region::builder().chunk(vec![7u8; 10_000]).budget(&budget).build(&pool)?;
    /// region.populate(..)?;
    /// assert_eq!(budget.resident_bytes(), 12_288);
    /// drop(region);
    /// assert_eq!(budget.resident_bytes(), 0);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        in_bytes(self.state.frames())
    }

    /// The bytes of memory of the standby list.
    ///
    /// ```
    /// # use pagestitch::Budget;
    /// assert_eq!(Budget::bytes(8 << 20)?.standby_bytes(), 0);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn standby_bytes(&self) -> u64 {
        in_bytes(self.state.standby_pages())
    }

    /// The number of pages that have left their regions so far.
    ///
    /// ```
    /// # use pagestitch::{Budget, Pool, Region};
    /// let budget = Budget::bytes(16 << 20)?;
    /// let pool = Pool::builder().workers(1).start()?;
    /// let region = Region::builder().chunk(vec![7u8; 32 << 20]).budget(&budget).build(&pool)?;
    /// assert!(region.as_slice().iter().all(|&byte| byte == 7));
    /// assert!(budget.evictions() >= 4096);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.state.tally.evictions.load(Ordering::Relaxed)
    }

    /// The number of pages that have come back from the standby list so far, without a read of their
    /// source.
    ///
    /// ```
    /// # use pagestitch::Budget;
    /// assert_eq!(Budget::bytes(8 << 20)?.soft_faults(), 0);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn soft_faults(&self) -> u64 {
        self.state.tally.soft_faults.load(Ordering::Relaxed)
    }

    /// The number of pages that were filled above the limit so far, because no page could leave.
    ///
    /// ```
    /// # use pagestitch::Budget;
    /// assert_eq!(Budget::bytes(8 << 20)?.overruns(), 0);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn overruns(&self) -> u64 {
        self.state.tally.overruns.load(Ordering::Relaxed)
    }

    /// All counts at once.
    ///
    /// ```
    /// # use pagestitch::{Budget, BudgetMetrics};
    /// assert_eq!(Budget::bytes(8 << 20)?.metrics(), BudgetMetrics::default());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn metrics(&self) -> BudgetMetrics {
        let tally = &self.state.tally;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // Returns are read first: each comes after its eviction.
        let (soft_faults, refaults) = (read(&tally.soft_faults), read(&tally.refaults));
        BudgetMetrics {
            resident_bytes: self.resident_bytes(),
            standby_bytes: self.standby_bytes(),
            evictions: read(&tally.evictions),
            soft_faults,
            refaults,
            kept: read(&tally.refused),
            dirty_bytes: in_bytes(self.state.dirty_pages()),
            write_backs: read(&tally.write_backs),
            write_failures: read(&tally.write_failures),
            pressure_reports: read(&self.state.marks.reports),
            lowered_bytes: in_bytes(self.state.lowered()),
            overruns: read(&tally.overruns),
            stalled: Duration::from_nanos(read(&tally.stalled_ns)),
        }
    }

    /// Takes a region in. Its pages leave once it is [served](Share::serve). If the region gives out
    /// `slices`, pages of sources that may change come back with the bytes of their first reading.
    /// `has_blocks`: whole blocks may come at once.
    pub(crate) fn join(
        &self,
        evictable: Evictable,
        layout: &Layout,
        (slices, evicted, has_blocks): (bool, Evicted, bool),
    ) -> Result<Membership, Error> {
        let page = PageSize::system();
        let hashed = if slices { unstable_pages(layout, page) } else { Vec::new() };
        let chunks = layout.chunks();
        Share::join(&self.state, evictable, hashed, (chunks, evicted, has_blocks)).map_err(|error| match error {
            JoinError::NoThread(error) => {
                Error::no_thread("cannot start the thread that evicts pages for regions that are served inline (ulimit -u)", error)
            },
            JoinError::Full => {
                let what = "a budget has at most 1,048,576 regions: make another one";
                Error::new(ErrorKind::LimitReached, what).of_option(BuildOption::Budget)
            }
            JoinError::Hashes(pages) => self.too_many_hashes(pages),
            JoinError::NoTable(errno) | JoinError::NoMoves(ArenaError::Refused(errno)) => no_tables(errno),
            JoinError::NoMoves(ArenaError::NoMoves(reason)) => no_moves(reason),
            JoinError::NoMoves(ArenaError::Open(error)) => Error::no_userfaultfd(&error),
        })
    }

    fn too_many_hashes(&self, pages: usize) -> Error {
        let [pages, most] = [pages, self.state.hashes_max()].map(in_bytes);
        let what = format!(
            "the sources may change, and the hashes of the pages take {pages} bytes of the budget's {most} for hashes: use \
             build_shared(), an ImmutableFile, Chunk::stable(), or a larger budget"
        );
        Error::new(ErrorKind::LimitReached, what).of_option(BuildOption::Budget)
    }

    /// The most pages that sequential readers of a region have ahead of them, in whole blocks. The reason against
    /// blocks, if the budget is too small for as many serving threads.
    pub(crate) fn blocks_ahead(&self, threads: usize) -> Result<usize, &'static str> {
        if !self.state.has_blocks() || self.state.limit / 4 < threads * BLOCK_PAGES {
            return Err(
                "the region has a budget() that is too small for whole blocks: give it 64 MiB, and 8 MiB a worker",
            );
        }
        Ok(ahead_max(self.state.limit))
    }

    /// True if pages move to a standby list, so that the region has to be mapped for writing.
    pub(crate) fn moves(&self) -> bool {
        self.state.standby.is_some()
    }

    /// Refuses a writable region on a kernel that drops pages at once, because a write would be lost.
    pub(crate) fn check_moves(&self) -> Result<(), Error> {
        match Arena::new(NonZeroUsize::MIN) {
            Err(ArenaError::NoMoves(reason)) => Err(no_moves(reason)),
            _ if !self.moves() => Err(no_moves("the kernel could not move pages when the budget was made")),
            _ => Ok(()),
        }
    }

    /// Refuses a budget of the parent process, whose locks another thread may have held at the fork.
    fn check_process(&self) -> Result<(), Error> {
        if self.state.generation.is_current() {
            return Ok(());
        }
        let what = "the budget belongs to the parent process: after fork(2), make a budget in the child";
        Err(Error::new(ErrorKind::ForkedChild, what).of_option(BuildOption::Budget))
    }

    /// Refuses a region that `threads` threads serve, if they need more than the budget.
    pub(crate) fn check(&self, threads: usize) -> Result<(), Error> {
        self.check_process()?;
        let least = LEAST + threads * THREAD_PAGES;
        self.state.marks.need(least);
        if self.state.limit >= least {
            return Ok(());
        }
        let (limit, least) = (self.limit(), in_bytes(least));
        let what = format!(
            "a budget of {limit} bytes is too small for {threads} threads that serve: it takes {least} bytes, or fewer workers()"
        );
        Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Budget))
    }
}

fn check_size(bytes: u64, limit: usize) -> Result<(), Error> {
    let refused = |what| Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Budget));
    if limit < LEAST {
        return refused(format!(
            "a budget of {} is too small: give it {} bytes or more",
            Bytes(bytes),
            in_bytes(LEAST)
        ));
    }
    match MemoryLeft::now() {
        Some(left) if left.bytes < bytes => {
            let what =
                format!("a budget of {bytes} bytes is more than there is ({}): give it less", left.limit);
            refused(what).map_err(|error| error.of_limit(left.limit))
        }
        _ => Ok(()),
    }
}

/// The standby list; `None` on a kernel that cannot move pages.
fn standby(slots: NonZeroUsize) -> Result<Option<Standby>, Error> {
    match Arena::new(slots) {
        Ok(arena) => Ok(Some(Standby::new(arena, Slots::new(slots).map_err(no_tables)?))),
        Err(ArenaError::NoMoves(reason)) => {
            log!(debug, reason, "pages of the budget are dropped without standby");
            Ok(None)
        }
        Err(ArenaError::Open(error)) => Err(Error::no_userfaultfd(&error)),
        Err(ArenaError::Refused(errno)) => Err(no_tables(errno)),
    }
}

fn no_tables(errno: Errno) -> Error {
    Error::refused("a budget cannot reserve its tables", errno)
}

fn no_moves(reason: &str) -> Error {
    let what = format!(
        "a written page leaves by a move, so that no write is lost, and {reason}; or leave out budget()"
    );
    Error::new(ErrorKind::Unsupported, what).of_option(BuildOption::Budget)
}

fn in_bytes(pages: usize) -> u64 {
    (pages * PageSize::system().bytes()) as u64
}

/// The standby list has at most this share of a budget.
const STANDBY_SHARE: usize = 8;
/// The least budget: the batches that leave, the standby list, and some pages beside.
const LEAST: usize = 16 * BATCH;
/// The pages that a thread may need at once: those that it fills, and those that it moves out.
const THREAD_PAGES: usize = 2 * BATCH;
