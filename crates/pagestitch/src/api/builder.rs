//! The description of a region; `build` makes a region of it.

mod chunks;
mod finish;

use crate::api::options::Options;
use crate::api::{Region, SharedRegion, WriteBack};
use crate::error::{Error, Failure};
use crate::policy::{Readahead, Recording};
use crate::reclaim::Budget;
use crate::space::{FailureCallback, LayoutBuilder, RecordFor};
use pagestitch_kernel::Access;
use std::sync::Arc;

/// Describes a region. [`Region::builder`] creates it; nothing is reserved before
/// [`build`](Builder::build).
///
/// `build` fails, and names the option, if an option does not apply to the kind of region or to its
/// server.
///
/// `S` is the [`Scope`](crate::Scope) of borrowed chunks; a [`ScopedBuilder`](crate::ScopedBuilder)
/// has one, and all options of this builder.
#[derive(Debug)]
#[must_use]
pub struct Builder<S = ()> {
    pub(super) scope: S,
    pub(super) options: Options,
    aligned: bool,
    /// Each later chunk starts at a multiple of so many bytes.
    align: u64,
    /// The layout so far, or the error of the first invalid chunk.
    layout: Result<LayoutBuilder, Error>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::in_scope(())
    }
}

impl Region {
    /// Starts to describe a region.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let pool = Pool::new()?;
    /// let region = Region::builder().name("index").chunk(vec![1u8; 5_000]).chunk(vec![2u8; 5_000]).build(&pool)?;
    /// assert_eq!((region.len(), region.as_slice()[5_000]), (10_000, 2));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn builder() -> Builder {
        Builder::default()
    }
}

impl SharedRegion {
    /// As [`Region::builder`]. Finish with [`build_shared`](Builder::build_shared).
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Pool, SharedRegion};
    /// let file = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// let region = SharedRegion::builder().chunk(file).build_shared(&Pool::new()?)?;
    /// let mut magic = [0; 4];
    /// region.read_at(0, &mut magic)?;
    /// assert_eq!(&magic, b"\x7fELF");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder() -> Builder {
        Region::builder()
    }
}

impl<S> Builder<S> {
    pub(super) fn in_scope(scope: S) -> Self {
        let (options, layout) = (Options::default(), Ok(LayoutBuilder::default()));
        Self { scope, options, aligned: false, align: 1, layout }
    }

    /// The same region, without the guard of a scope around it.
    pub(super) fn unscoped(self) -> Builder {
        let Self { scope: _, options, aligned, align, layout } = self;
        Builder { scope: (), options, aligned, align, layout }
    }

    /// Names the region in errors, logs and plans. Default: `"unnamed"`.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().name("weights").chunk(vec![0u8; 10]).build(&Pool::new()?)?;
    /// let error = region.read_at(7, &mut [0; 4]).unwrap_err();
    /// println!("{error}");            // bytes 7..11 are not inside region weights of 10 bytes
    /// assert_eq!(region.name(), "weights");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = Some(name.into());
        self
    }

    /// Lets [`Region::as_mut_slice`] write to the region. Default: read-only.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let mut region = Region::builder().chunk(vec![7u8; 10]).writable().build(&Pool::new()?)?;
    /// region.as_mut_slice().expect("it is writable")[3] = 9;
    /// assert_eq!(&region.as_slice()[2..5], [7, 9, 7]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn writable(mut self) -> Self {
        self.options.access = Access::Writable;
        self
    }

    /// Protects a read-only region by the hardware against stray writes. Safe code never writes to
    /// a read-only region, with or without this protection.
    ///
    /// The kernel moves pages only between writable mappings. Whole blocks of such a region are
    /// therefore copied in page by page, which takes more than twice as long. Does not suit donated
    /// pages, which have to move.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 10]).hardware_read_only().build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[3], 7);        // a stray write of unsafe code would raise SIGSEGV
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn hardware_read_only(mut self) -> Self {
        self.options.hardware_read_only = true;
        self
    }

    /// Includes the region in core dumps of the process. Default: left out, because the kernel
    /// walks all addresses of a dumped mapping (half a minute for a tebibyte of absent pages), and
    /// the sources hold the bytes anyway.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 10]).dumped().build(&Pool::new()?)?;
    /// region.populate(..)?;                       // a dump has the pages that are filled before it
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn dumped(mut self) -> Self {
        self.options.dumped = true;
        self
    }

    /// Sets the pages that are filled ahead of their touch. Default: [`Readahead::Adaptive`].
    ///
    /// ```
    /// # use pagestitch::{Pool, Readahead, Region};
    /// let region = Region::builder().chunk(vec![7u8; 1 << 20]).readahead(Readahead::None).build(&Pool::new()?)?;
    /// assert!(region.as_slice()[..65_536].iter().all(|&byte| byte == 7));
    /// assert_eq!(region.close().pages_installed(), 16);           // no more pages than were touched
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn readahead(mut self, readahead: Readahead) -> Self {
        self.options.readahead = Some(readahead);
        self
    }

    /// Makes `build` fail if a byte would have to be copied. The error,
    /// [`ErrorKind::NotZeroCopy`](crate::ErrorKind::NotZeroCopy), names the chunk and the reason.
    ///
    /// ```
    /// # use pagestitch::source::{Memfd, UnsealedMemfd};
    /// # use pagestitch::{Chunk, ErrorKind, Pool, Region};
    /// let memfd = Memfd::from(UnsealedMemfd::create("frames", 65_536)?.seal()?);
    /// let aligned = Chunk::from(memfd.clone()).range(4096..12_288);
    /// let shifted = Chunk::from(memfd).range(100..4196);
    /// let builder = Region::builder().chunk(aligned).chunk(shifted).require_zero_copy();
    /// let error = builder.build(&Pool::new()?).unwrap_err();
    /// assert_eq!((error.kind(), error.chunk()), (ErrorKind::NotZeroCopy, Some(1)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn require_zero_copy(mut self) -> Self {
        self.options.zero_copy = true;
        self
    }

    /// Limits the mappings that the region uses to map pages in place; pages beyond the limit are
    /// copied. Default: half of the mappings that `vm.max_map_count` still allows this process,
    /// because the rest of the program needs some too. (A few hundred are taken without a count of
    /// those that are left.)
    ///
    /// ```
    /// # use pagestitch::source::{Memfd, UnsealedMemfd};
    /// # use pagestitch::{Chunk, Method, Pool, Region};
    /// let memfd = Memfd::from(UnsealedMemfd::create("frames", 8192)?.seal()?);
    /// let swapped = [Chunk::from(memfd.clone()).range(4096..8192), Chunk::from(memfd).range(0..4096)];
    /// let region = Region::builder().chunks(swapped).max_mappings(0).build(&Pool::new()?)?;
    /// assert!(region.plan().runs().iter().all(|run| run.method == Method::Copy));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn max_mappings(mut self, most: usize) -> Self {
        self.options.max_mappings = Some(most);
        self
    }

    /// Divides the region into at most this many shards: contiguous parts of its addresses, each with
    /// a userfaultfd of its own, in whole blocks of 2 MiB. Default: one on machines with up to eight
    /// CPUs. With more, as many as the [`Pool`](crate::Pool) has workers, if each has 8 MiB or more.
    ///
    /// The kernel has one queue and one lock for each userfaultfd. Threads on many CPUs wait for each
    /// other there, unless they fault in different shards. A fault in a shard wakes one worker: the
    /// shard's own, or another one if that is busy. Any worker that is awake serves any shard, so a
    /// source that hangs in a fault of a shard does not hold up the others. With as many shards as
    /// workers, shard `i` wakes worker `i`.
    ///
    /// * **A region of a single shard** has a lower latency for single touches, because the wakes of
    ///   one thread's faults then meet few CPUs.
    /// * **Limits.** A shard takes a descriptor (`ulimit -n`) and a mapping (`vm.max_map_count`). By
    ///   default, a region has one shard if less than four times as many are left: with 1,024
    ///   descriptors on 16 CPUs, about 60 regions have 16 shards, and the others have one.
    /// * **A region without faults**, because all of its pages are mapped in place, is one shard.
    /// * **`mremap(2)`** moves a part of the region within one shard only, and fails with EFAULT across
    ///   a border.
    /// * Not for adopted memory, for [`Inline`](crate::Inline), and not with
    ///   [`inherit_on_fork`](Self::inherit_on_fork). [`Eager`](crate::Eager) ignores it.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Pool, Region};
    /// let pool = Pool::builder().workers(4).start()?;
    /// let region = Region::builder().chunk(Chunk::hole(64 << 20)).shards(4).build(&pool)?;    // 16 MiB each
    /// assert_eq!(region.as_slice()[40 << 20], 0);                 // wakes the worker `pagestitch/2`
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn shards(mut self, most: usize) -> Self {
        self.options.shards = Some(most);
        self
    }

    /// Sets whether the kernel reports it to the workers when this process discards pages of the region
    /// (`MADV_DONTNEED`). Default: true, except for small regions of a [`Pool`](crate::Pool).
    ///
    /// A choice here, either one, also makes the region [keep its sources](Self::keep_sources), unless
    /// [`release_sources`](Self::release_sources) is set. So a discarded page is filled again by its next
    /// touch in either case. `false` suits a program that discards pages often:
    ///
    /// | | `true` | `false` |
    /// |---|---|---|
    /// | the thread that discards | waits until a worker has read the report | does not wait |
    /// | other faults of the region | wait until that thread runs again | are served |
    /// | [`Meter::coverage`](crate::Meter::coverage) | knows the discard at once | counts the page as present until it is touched, populated or prefetched |
    ///
    /// **Shared userfaultfds.** Without reports, regions of up to 256 KiB share a few userfaultfds of their
    /// pool. So thousands of them take no descriptor each, and are built and dropped in less time. This
    /// is their default. Regions with [`shards`](Self::shards), with
    /// [`inherit_on_fork`](Self::inherit_on_fork), with a [`budget`](Self::budget), with
    /// [`track_changes`](Self::track_changes), with [`write_back`](Self::write_back), [on a memfd](Self::on_memfd) or with a memfd that is filled later
    /// have their own.
    ///
    /// Not for adopted memory, whose owner chooses. The kernel reports no discard of
    /// [`Inline`](crate::Inline) and [`Eager`](crate::Eager) regions.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let builder = Region::builder().chunk(vec![7u8; 100_000]).report_discards(false);
    /// let region = builder.build(&Pool::new()?)?;                 // `madvise(2)` waits for no worker
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn report_discards(mut self, report: bool) -> Self {
        self.options.report_discards = Some(report);
        self
    }

    /// Limits the faults of this region that are served at once. Faults above the limit queue up
    /// and occupy no worker. An asynchronous fetch ([`Fetch`](crate::source::Fetch)) counts until its
    /// reply, also one ahead of a touch.
    ///
    /// Default: only the workers of the pool and the fetches that a source accepts limit them. If a
    /// pool serves several regions, the regions whose faults take longer than a millisecond
    /// together leave one worker to the others.
    ///
    /// # Panics
    ///
    /// If `most` is 0.
    ///
    /// ```
    /// # use pagestitch::source::FileSource;
    /// # use pagestitch::{Pool, Region};
    /// let disk = FileSource::open("/proc/self/exe")?;
    /// let region = Region::builder().chunk(disk).max_in_flight(2).build(&Pool::builder().workers(8).start()?)?;
    /// assert_eq!(&region.as_slice()[1..4], b"ELF");       // at most two workers read the disk at once
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn max_in_flight(mut self, most: usize) -> Self {
        assert!(most > 0, "max_in_flight must be at least 1: no fault would be served");
        self.options.serve_options.max_in_flight = Some(most);
        self
    }

    /// Sets the number of threads that fill pages in [`populate`](crate::AnyRegion::populate),
    /// [`read_at`](crate::Region::read_at) and the build of an [`Eager`](crate::Eager) region. The calling
    /// thread is one of them; the others help with 32 MiB and more, and with each build. Default: as
    /// many as there are CPUs, at most 4; a build takes all CPUs. A build never reads with more than
    /// [`max_in_flight`](Self::max_in_flight) threads.
    ///
    /// `1` suits a source that only the calling thread can read, because it needs a lock that this
    /// thread has, or a thread-local value. A larger number suits a source that is slow to answer and
    /// answers many reads at once. Faults are served by the workers of the server in any case. `build`
    /// fails for 0.
    ///
    /// ```
    /// use pagestitch::{Chunk, Eager, Region, Source};
    /// use std::sync::Arc;
    /// use std::{io, thread};
    ///
    /// struct OfThisThread(thread::ThreadId);
    /// impl Source for OfThisThread {
    ///     fn size(&self) -> u64 {
    ///         20 << 20
    ///     }
    ///     fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
    ///         assert_eq!(thread::current().id(), self.0);
    ///         Ok(into.fill(7))
    ///     }
    /// }
    /// let source = Arc::new(OfThisThread(thread::current().id()));
    /// let region = Region::builder().chunk(Chunk::source(source)).populate_threads(1).build(Eager)?;
    /// assert_eq!(region.as_slice()[10 << 20], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn populate_threads(mut self, threads: usize) -> Self {
        self.options.serve_options.populate_threads = Some(threads);
        self
    }

    /// Records the order in which pages are first touched;
    /// [`recording`](crate::AnyRegion::recording) returns it. Only a fault reveals a touch, so such
    /// a region fills nothing ahead. `build` fails if the region also [replays](Self::replay).
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).record().build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// let recording = region.recording().expect("it records");
    /// assert_eq!(recording.offsets().collect::<Vec<_>>(), [49_152]);
    /// # let folder = std::env::temp_dir().join(format!("pagestitch-doc-{}", std::process::id()));
    /// # std::fs::create_dir_all(&folder).unwrap();
    /// # let path = folder.join("touches");
    /// recording.write(&path)?;                                    // for the next run of the program
    /// # std::fs::remove_dir_all(&folder).unwrap();
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn record(mut self) -> Self {
        self.options.serve_options.record = true;
        self
    }

    /// Fills the pages of a recording in their order, from the build on. Workers do so while they
    /// are awake, after faults. A page whose source fails is not poisoned: its first touch reads
    /// the source again.
    ///
    /// ```no_run
    /// use pagestitch::source::FileSource;
    /// use pagestitch::{Pool, Recording, Region};
    ///
    /// let recording = Recording::read("touches")?;                // of an earlier run, with the same sizes
    /// let image = FileSource::open("guest.mem")?;
    /// let region = Region::builder().chunk(image).replay(&recording).build(&Pool::new()?)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn replay(mut self, recording: &Recording) -> Self {
        self.options.serve_options.replay = Some(recording.clone());
        self
    }

    /// Calls `tell(offset, failure)` for each page that fails; `offset` is the page's byte offset
    /// in the region. It runs on the serving thread and must not touch the region. For a fault that
    /// times out it runs on the watchdog thread, and no other fault times out until it returns.
    /// [`failures`](crate::AnyRegion::failures) lists the failed pages.
    ///
    /// The drop of a region with [`write_back`](Self::write_back) calls it in the dropping thread, with
    /// the first page of each run that is not written back. A failed sync tells page 0.
    ///
    /// ```
    /// use pagestitch::{Chunk, Pool, Region, Source};
    /// use std::io;
    /// use std::sync::{Arc, mpsc};
    ///
    /// struct Broken;
    /// impl Source for Broken {
    ///     fn size(&self) -> u64 {
    ///         10_000
    ///     }
    ///     fn read_at(&self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
    ///         Err(io::Error::other("the disk is gone"))
    ///     }
    /// }
    /// let (tell, told) = mpsc::channel();
    /// let region = Region::builder()
    ///     .chunk(Chunk::source(Arc::new(Broken)))
    ///     .on_page_failure(move |offset, failure| tell.send((offset, failure.to_string())).unwrap())
    ///     .build(&Pool::new()?)?;
    /// assert!(region.read_at(5_000, &mut [0]).is_err());
    /// assert_eq!(told.recv().unwrap().0, 4096);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn on_page_failure(mut self, tell: impl Fn(u64, &Failure) + Send + Sync + 'static) -> Self {
        self.options.serve_options.reporter = Some(FailureCallback(Arc::new(tell)));
        self
    }

    /// Measures the time of each part of a fault, for [`Meter::latency`](crate::Meter::latency).
    /// Costs about five clock reads a fault. Default: faults are only counted.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).record_latency().build(&Pool::new()?)?;
    /// let meter = region.meter();
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// drop(region);                                               // so that the last fault is counted, too
    /// let latency = meter.latency().expect("it is measured");
    /// println!("{:?} until a worker begins, {:?} to get the bytes", latency.queue.quantile(0.99), latency.fill.quantile(0.99));
    /// # assert_eq!(latency.fill.count(), 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn record_latency(mut self) -> Self {
        self.options.serve_options.record_latency = true;
        self
    }

    /// Lets children of `fork(2)`, and their children, inherit the region. A child shares the pages
    /// filled before the fork as it shares any memory. Pages absent at the fork are filled from the
    /// same sources when the child touches them, into pages of its own. Default: a child does not
    /// have the region, and touching it there raises SIGSEGV.
    ///
    /// * **Server.** Needs a [`Pool`](crate::Pool), which runs one more thread: `fork(2)` blocks on
    ///   its unread event while it holds the allocator lock. That thread also passes each fault to
    ///   a worker, so a fault takes one more step.
    /// * **In a child**, `as_slice`, `read_at` and `populate` work as in the parent; dropping the
    ///   region does nothing. When the parent drops the region, the pages that a child has not
    ///   touched are poisoned there: SIGBUS, never zeros.
    /// * **Parent killed**, or ended without dropping the region: touching an absent page in a
    ///   child blocks until the child ends, and later calls of `read_at` and `populate` fail. To make this
    ///   possible, children inherit a socket in which their userfaultfds are in flight. A child
    ///   that closes unknown descriptors (`close_range(2)`) reads zeros in that case. `fork(2)` waits in
    ///   the child until its userfaultfd is there; if the parent is killed meanwhile, each access to the
    ///   region is SIGSEGV. (A child of `clone(2)` or `_Fork(3)`, for which no fork handler runs, reads
    ///   zeros then.) A child that must not block has to watch for its parent's end itself, by a pidfd:
    ///   `getppid(2)` changes a moment before.
    /// * **Descriptors.** Each live child takes one descriptor of this process. The region takes
    ///   seven, and two more for each 128 children that live at the same time. A child that finds
    ///   none left (`ulimit -n`) gets its absent pages poisoned, which is logged; the region keeps
    ///   four descriptors for that.
    /// * **Sources.** Donated pages are moved in at the build, because a child needs them too.
    ///   Memfds that are filled later are refused.
    /// * Requires `CAP_SYS_PTRACE` and Linux 6.6.
    ///
    /// ```no_run
    /// # use pagestitch::{Pool, Region};
    /// let pool = Pool::new()?;
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).inherit_on_fork().build(&pool)?;
    /// // From here on fork(2) as you like: a worker process for each request, a snapshot to write out.
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn inherit_on_fork(mut self) -> Self {
        self.options.inherit_on_fork = true;
        self
    }

    /// Frees each source in owned memory (`Vec<u8>`, `Bytes`, [`Memory::new`]) as soon as the region has
    /// all of its bytes, so that these are not in memory twice.
    ///
    /// **Default.** A read-only [`Region`] of a [`Pool`](crate::Pool) frees buffers of the standard library
    /// (`Vec<u8>`, `Box<[u8]>`, `Arc<[u8]>`, `String`, arrays) of a page or more. If your code discards or
    /// moves pages of it (`MADV_DONTNEED`, `mremap(2)`), say [`keep_sources`](Self::keep_sources). All sources
    /// are kept where a page may be filled again for other reasons: in a [`SharedRegion`], and with
    /// [`writable`](Self::writable), [`report_discards`](Self::report_discards), [`budget`](Self::budget),
    /// [`capacity`](Self::capacity) or [`inherit_on_fork`](Self::inherit_on_fork); also before Linux 6.6. This
    /// option frees all owned memory.
    ///
    /// * **Discarded pages** of a released source are lost: touching one raises SIGBUS, and `read_at` and
    ///   `populate` fail with [`FailureReason::Released`](crate::source::FailureReason::Released), whatever
    ///   the [policy](crate::OnFailure) of the chunk. So are pages with some bytes of it. Before the release,
    ///   they are filled again.
    /// * **All bytes**: all pages with bytes of the source, in all of its chunks, are present at the same
    ///   time. A page that other chunks share counts too. Bytes that are in no chunk do not count.
    /// * **Shared memory.** The region drops its own share: the bytes are freed with the last one.
    ///   Other sources are kept: files, memfds, your own [`Source`](crate::Source), borrowed memory.
    /// * **When.** No worker frees memory, because a thread that holds the allocator's lock may touch a page
    ///   meanwhile. `populate`, `retry_failed` and the drop of the region free its sources that wait; a
    ///   thread of the pool frees those of all regions once they have 4 MiB. With a
    ///   [`Manual`](crate::Manual), the thread that has filled the last page frees a source at once.
    /// * **Destructors** of owners run there. Like a source, they must not touch or drop a region of the
    ///   same server.
    /// * **Inline.** A signal handler frees no memory: [`populate`](crate::AnyRegion::populate) releases
    ///   the sources of its range. **Eager.** The build frees all sources, and no page is lost.
    /// * Not for adopted memory, and not with [`inherit_on_fork`](Self::inherit_on_fork).
    ///
    /// [`kept_source_bytes`](crate::AnyRegion::kept_source_bytes) tells how much is left, and
    /// [`Metrics::bytes_released`](crate::Metrics::bytes_released) how much was released. Both count sources
    /// that wait to be freed as released.
    ///
    /// ```
    /// # use pagestitch::source::Memory;
    /// # use pagestitch::{Pool, Region};
    /// let owner = Memory::new([7u8; 100_000]);                   // any owner, which may have a destructor
    /// let region = Region::builder().chunk(owner).release_sources().build(&Pool::new()?)?;
    /// assert_eq!(region.kept_source_bytes(), 100_000);
    /// region.populate(..)?;
    /// assert_eq!(region.kept_source_bytes(), 0);
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// [`Memory::new`]: crate::source::Memory::new
    pub fn release_sources(mut self) -> Self {
        self.options.release_sources = Some(true);
        self
    }

    /// Keeps all sources until the drop of the region, so that a page that the application discards or
    /// moves (`MADV_DONTNEED`, `mremap(2)`) is filled from its source again. Default: a read-only region
    /// [frees buffers](Self::release_sources) whose bytes it has. Of both options, the last one counts. An
    /// [`Eager`](crate::Eager) build frees all in any case, because no page is filled again.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).keep_sources().build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// assert_eq!(region.kept_source_bytes(), 100_000);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn keep_sources(mut self) -> Self {
        self.options.release_sources = Some(false);
        self
    }

    /// Has the kernel record which pages are written, for [`changes`](crate::AnyRegion::changes) and
    /// `save_changes`. Default: writes leave no record.
    ///
    /// * **Cost.** Pages arrive write-protected, by copies of small pages: whole blocks take more than
    ///   twice as long as without. The first write to a page after each
    ///   [`changes`](crate::AnyRegion::changes) takes about a microsecond more. No worker serves it.
    /// * **Holes** take memory when they are touched, because the kernel's zero page cannot be protected.
    /// * **Nothing in place.** Sealed memfds, immutable files and donated pages are copied, and
    ///   [copy-on-write](crate::Chunk::copy_on_write) chunks too. Memory to which others write (shared files,
    ///   aliases, physical memory, memfds that are filled later) is refused.
    /// * **Server**: a [`Pool`](crate::Pool), a [`Manual`](crate::Manual) or [`Inline`](crate::Inline), not
    ///   [`Eager`](crate::Eager). Not for adopted memory, and not with
    ///   [`inherit_on_fork`](Self::inherit_on_fork). The region is [`writable`](Self::writable).
    /// * Requires Linux 6.7, or 6.10 on arm64. Takes one more descriptor.
    /// * **With a [budget](Self::budget)** the region is built [`write_back`](Self::write_back) too, and faults
    ///   tell the first write to a page: the kernel keeps no record, and it is Linux 6.8.
    ///
    /// ```
    /// # use pagestitch::{Chunk, ErrorKind, Pool, Region};
    /// let builder = Region::builder().chunk(Chunk::hole(1 << 30)).writable().track_changes();
    /// let guest = match builder.build_shared(&Pool::new()?) {
    ///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),  // Linux before 6.7
    ///     built => built?,
    /// };
    /// guest.write_at(1 << 20, b"written")?;
    /// let mut diff = [0; 7];
    /// for run in guest.changes()? {
    ///     guest.read_at(run.start, &mut diff)?;
    /// }
    /// assert_eq!(&diff, b"written");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn track_changes(mut self) -> Self {
        self.options.serve_options.record_of_writes.add(RecordFor::Changes);
        self
    }

    /// Has written pages go back to their sources, by [`flush`](crate::AnyRegion::flush) and when the
    /// region is dropped. Default: writes stay in the region. Implies [`writable`](Self::writable).
    ///
    /// All chunks are [writable](crate::Chunk::writable). Nothing is written before a flush or the drop, so a
    /// program that ends without them loses its writes. End the region by
    /// [`finish`](crate::SharedRegion::finish), which returns the error of the last flush.
    ///
    /// The costs, the servers and the kernel are those of [`track_changes`](Self::track_changes), which may be
    /// asked for beside it: a flush and [`changes`](crate::AnyRegion::changes) each find every written page.
    ///
    /// ```
    /// # use pagestitch::source::{UnsealedMemfd, WritableFile};
    /// # use pagestitch::{Chunk, ErrorKind, Pool, Region, WriteBack};
    /// # use std::os::unix::fs::FileExt;
    /// # use std::sync::Arc;
    /// # let file = UnsealedMemfd::create("table", 1 << 20)?.file().try_clone()?;
    /// # let again = file.try_clone()?;
    /// let table = Arc::new(WritableFile::from_file(file, "table")?);
    /// let builder = Region::builder().chunk(Chunk::writable(table)).write_back(WriteBack::ToSource);
    /// let region = match builder.build_shared(&Pool::new()?) {
    ///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),  // Linux before 6.7
    ///     built => built?,
    /// };
    /// region.write_at(70_000, b"row")?;
    /// region.flush(65_536..131_072)?;                             // in the file, and synced
    /// # let mut row = [0; 3];
    /// # again.read_exact_at(&mut row, 70_000)?;
    /// # assert_eq!(&row, b"row");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_back(mut self, to: WriteBack) -> Self {
        let WriteBack::ToSource = to;
        self.options.access = Access::Writable;
        self.options.serve_options.record_of_writes.add(RecordFor::WriteBack);
        self
    }

    /// Limits the memory that the region's pages take, together with all other regions of the budget.
    /// Pages leave when it is used up, and come back from their sources when they are touched. Default:
    /// filled pages stay until the drop.
    ///
    /// * **The same bytes.** A page that comes back must not differ, because
    ///   [`as_slice`](Region::as_slice) shows it as a `&[u8]`. Memory, sealed memfds,
    ///   [immutable files](crate::source::ImmutableFile), [stable sources](crate::source::StableSource) and
    ///   holes cannot change. Of each page of another source, [`build`](Self::build) keeps a hash of its first
    ///   reading, and other bytes are an error of the page: a touch is SIGBUS
    ///   ([`FailureReason::Changed`](crate::source::FailureReason::Changed)). [`build_shared`](Self::build_shared) keeps no
    ///   hash, and shows the new bytes. The [plan](crate::AnyRegion::plan) tells which holds for each chunk. With
    ///   [`build`](Self::build), no chunk may have [`OnFailure::Zeros`](crate::OnFailure::Zeros).
    /// * **Pages in place** are page cache, which the kernel evicts; they do not count.
    /// * **populate** of more than the budget is an error. [`read_at`](crate::Region::read_at) of more
    ///   works. Of a prefetch or a [`replay`](Self::replay) of more, the first pages leave again.
    /// * **Server**: a [`Pool`](crate::Pool), a [`Manual`](crate::Manual) or [`Inline`](crate::Inline), not
    ///   [`Eager`](crate::Eager). `Inline` keeps no hashes.
    /// * **After the [scope](crate::scope()) of borrowed memory**, a touch of a page that has left is SIGBUS.
    /// * **Written pages** go back to their sources when they leave, if the region is built
    ///   [`write_back`](Self::write_back) and [`build_shared`](Self::build_shared): [`Budget`] tells how. Other
    ///   [`writable`](Self::writable) regions are refused.
    /// * **With a [`capacity`](Self::capacity)**, appended pages leave, too. A region with both cannot be written back.
    /// * Not for donated pages and adopted memory; and not with [`on_memfd`](Self::on_memfd),
    ///   [`inherit_on_fork`](Self::inherit_on_fork), [`record`](Self::record),
    ///   [`release_sources`](Self::release_sources) and [`report_discards`](Self::report_discards).
    ///
    /// A second call replaces the budget of the first.
    ///
    /// ```
    /// use pagestitch::{Budget, Pool, Region};
    ///
    /// let (pool, budget) = (Pool::builder().workers(2).start()?, Budget::bytes(16 << 20)?);
    /// let build = |byte| Region::builder().chunk(vec![byte; 32 << 20]).budget(&budget).build(&pool);
    /// let (ones, twos) = (build(1)?, build(2)?);
    /// for offset in (0..32 << 20).step_by(4096) {
    ///     assert_eq!((ones.as_slice()[offset], twos.as_slice()[offset]), (1, 2));
    /// }
    /// assert!(budget.resident_bytes() <= budget.limit());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn budget(mut self, budget: &Budget) -> Self {
        self.options.budget = Some(budget.clone());
        self
    }

    /// Reserves addresses for at least this many bytes, so that
    /// [`append`](crate::Region::append) can add chunks while threads read the region. Without chunks,
    /// the region begins empty.
    ///
    /// A reserved byte takes no memory before it is appended and touched: a capacity of 1 TiB costs
    /// address space alone. An access between the page of the last byte and the capacity is SIGSEGV.
    ///
    /// ```
    /// use pagestitch::{Pool, Region};
    ///
    /// let log = Region::builder().capacity(1 << 40).build(&Pool::new()?)?;
    /// assert_eq!(log.append("first line\n")?, 0..11);
    /// assert_eq!(log.append("second line\n")?, 11..23);
    /// assert_eq!(log.as_slice(), b"first line\nsecond line\n");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// Not for adopted memory, [`Eager`](crate::Eager),
    /// [`inherit_on_fork`](Self::inherit_on_fork), [`hardware_read_only`](Self::hardware_read_only),
    /// [`require_zero_copy`](Self::require_zero_copy), [`release_sources`](Self::release_sources), and
    /// recordings.
    pub fn capacity(mut self, bytes: u64) -> Self {
        self.options.capacity = Some(bytes);
        self
    }
}
