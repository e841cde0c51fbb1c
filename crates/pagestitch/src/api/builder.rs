//! The description of a region; `build` makes a region of it.

use crate::api::build::{TargetKind, build};
use crate::api::options::Options;
use crate::api::{AdoptedRegion, Region, SharedRegion};
use crate::error::{Error, ErrorKind, Failure};
use crate::policy::{Readahead, Recording};
use crate::serve::Server;
use crate::space::{AdoptedMemory, Chunk, FailureCallback, Layout};
use pagestitch_kernel::{Access, PageSize};
use std::sync::Arc;

/// Describes a region. [`Region::builder`] creates it; nothing is reserved before
/// [`build`](Builder::build).
///
/// `build` fails, and names the option, if an option does not apply to the kind of region or to its
/// server.
#[derive(Debug)]
#[must_use]
pub struct Builder {
    options: Options,
    aligned: bool,
    /// The layout so far, or the error of the first invalid chunk.
    layout: Result<Layout, Error>,
}

impl Default for Builder {
    fn default() -> Self {
        Self { options: Options::default(), aligned: false, layout: Ok(Layout::default()) }
    }
}

impl Region {
    /// Starts to describe a region.
    pub fn builder() -> Builder {
        Builder::default()
    }
}

impl SharedRegion {
    /// As [`Region::builder`]. Finish with [`build_shared`](Builder::build_shared).
    pub fn builder() -> Builder {
        Region::builder()
    }
}

impl Builder {
    /// Names the region in errors, logs and plans. Default: `"unnamed"`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = Some(name.into());
        self
    }

    /// Lets [`Region::as_mut_slice`] write to the region. Default: read-only.
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
    pub fn hardware_read_only(mut self) -> Self {
        self.options.hardware_read_only = true;
        self
    }

    /// Includes the region in core dumps of the process. Default: left out, because the kernel
    /// walks all addresses of a dumped mapping (half a minute for a tebibyte of absent pages), and
    /// the sources hold the bytes anyway.
    pub fn dumped(mut self) -> Self {
        self.options.dumped = true;
        self
    }

    /// Sets the pages that are filled ahead of their touch. Default: [`Readahead::Adaptive`].
    pub fn readahead(mut self, readahead: Readahead) -> Self {
        self.options.readahead = Some(readahead);
        self
    }

    /// Makes `build` fail if a byte would have to be copied. The error,
    /// [`ErrorKind::NotZeroCopy`], names the chunk and the reason.
    pub fn require_zero_copy(mut self) -> Self {
        self.options.zero_copy = true;
        self
    }

    /// Starts each later chunk in a page of its own, at the same offset within the page as in its
    /// source, so that it can be mapped in place. Padding with meaningless bytes fills the gaps;
    /// [`offset_of`](crate::AnyRegion::offset_of) returns where a chunk starts.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().page_aligned().chunk(vec![1u8; 5]).chunk(vec![2u8; 5]).build(&Pool::new()?)?;
    /// assert_eq!(region.offset_of(1), Some(4096));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn page_aligned(mut self) -> Self {
        self.aligned = true;
        self
    }

    /// Limits the mappings that the region uses to map pages in place; pages beyond the limit are
    /// copied. Default: half of the mappings that `vm.max_map_count` still allows this process,
    /// because the rest of the program needs some too.
    pub fn max_mappings(mut self, most: usize) -> Self {
        self.options.max_mappings = Some(most);
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
    pub fn max_in_flight(mut self, most: usize) -> Self {
        assert!(most > 0, "max_in_flight must be at least 1: no fault would be served");
        self.options.serve_options.max_in_flight = Some(most);
        self
    }

    /// Records the order in which pages are first touched;
    /// [`recording`](crate::AnyRegion::recording) returns it. Only a fault reveals a touch, so such
    /// a region fills nothing ahead. `build` fails if the region also [replays](Self::replay).
    pub fn record(mut self) -> Self {
        self.options.serve_options.record = true;
        self
    }

    /// Fills the pages of a recording in their order, from the build on. Workers do so while they
    /// are awake, after faults. A page whose source fails is not poisoned: its first touch reads
    /// the source again.
    pub fn replay(mut self, recording: &Recording) -> Self {
        self.options.serve_options.replay = Some(recording.clone());
        self
    }

    /// Calls `tell(offset, failure)` for each page that fails; `offset` is the page's byte offset
    /// in the region. It runs on the serving thread and must not touch the region. For a fault that
    /// times out it runs on the watchdog thread, and no other fault times out until it returns.
    /// [`failures`](crate::AnyRegion::failures) lists the failed pages.
    pub fn on_page_failure(mut self, tell: impl Fn(u64, &Failure) + Send + Sync + 'static) -> Self {
        self.options.serve_options.reporter = Some(FailureCallback(Arc::new(tell)));
        self
    }

    /// Measures the time of each part of a fault, for [`Meter::latency`](crate::Meter::latency).
    /// Costs about five clock reads a fault. Default: faults are only counted.
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
    ///   child blocks until the child ends, and `read_at` and `populate` fail. To make this
    ///   possible, children inherit a socket in which their userfaultfds are in flight. A child
    ///   that closes unknown descriptors (`close_range(2)`) reads zeros in that case, as does a
    ///   child that is being forked at the moment its parent is killed. A child that must not block
    ///   has to watch for its parent's end itself (`getppid(2)`, or a pidfd).
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

    /// Appends a chunk.
    pub fn chunk(mut self, chunk: impl Into<Chunk>) -> Self {
        self.push(chunk.into());
        self
    }

    /// Appends chunks, in order.
    pub fn chunks(mut self, chunks: impl IntoIterator<Item = impl Into<Chunk>>) -> Self {
        let chunks = chunks.into_iter();
        if let Ok(layout) = &mut self.layout {
            layout.reserve(chunks.size_hint().0);
        }
        chunks.for_each(|chunk| self.push(chunk.into()));
        self
    }

    /// Reserves the addresses and starts to serve their faults: by a pool (`&pool`),
    /// [inline](crate::Inline), or by the [caller's own loop](crate::Manual). Reads no source.
    ///
    /// # Errors
    ///
    /// Each error names the thing and the remedy:
    ///
    /// * [`InvalidChunk`](ErrorKind::InvalidChunk), [`TooLarge`](ErrorKind::TooLarge): the first
    ///   invalid chunk; [`NoChunks`](ErrorKind::NoChunks);
    /// * [`SharedSource`](ErrorKind::SharedSource): a chunk whose bytes other processes may change;
    /// * [`OptionConflict`](ErrorKind::OptionConflict): options that exclude each other;
    /// * [`UnsuitableServer`](ErrorKind::UnsuitableServer): the server cannot serve a chunk or an
    ///   option; [`NestedRegion`](ErrorKind::NestedRegion);
    /// * [`NoUserfaultfd`](ErrorKind::NoUserfaultfd), [`LimitReached`](ErrorKind::LimitReached),
    ///   [`OutOfMemory`](ErrorKind::OutOfMemory): the kernel or a limit of the process;
    /// * [`InvalidRecording`](ErrorKind::InvalidRecording): the recording is of another region;
    /// * [`ForkedChild`](ErrorKind::ForkedChild): the server was created before `fork(2)`.
    pub fn build(self, server: impl Into<Server>) -> Result<Region, Error> {
        if let Ok(layout) = &self.layout
            && let Some((chunk, source)) = layout.first_shared()
        {
            let what = format!(
                "region {}: other processes may change chunk {chunk} ({source}): use build_shared(), or seal or copy it",
                self.options.name()
            );
            return Err(Error::new(ErrorKind::SharedSource, what).of_chunk(chunk));
        }
        let (view, any) = build(self.options, self.layout, TargetKind::Own, &server.into())?;
        let view = view.expect("own target has a view").into_stable();
        let view = view.expect("only a shared source makes a view unstable, and the layout has none");
        Ok(Region::new(view, any))
    }

    /// As [`build`](Self::build), for a region with chunks whose bytes other processes may change:
    /// files, unsealed memfds, aliases, physical memory.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build), without [`ErrorKind::SharedSource`]; also
    /// [`ErrorKind::UnusableFile`] if a [`writable`](Self::writable) region maps a file that is
    /// open for reading only.
    pub fn build_shared(self, server: impl Into<Server>) -> Result<SharedRegion, Error> {
        let (view, any) = build(self.options, self.layout, TargetKind::Own, &server.into())?;
        Ok(SharedRegion::new(view.expect("own target has a view"), any))
    }

    /// As [`build`](Self::build), for memory that its owner has registered: another process, or
    /// another part of this program. The chunks must hold exactly as many bytes as the ranges of
    /// `memory`. All chunks are copied, whatever their source.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build); [`ErrorKind::InvalidOption`] for ranges that are not whole pages,
    /// overlap, or differ from the chunks in length; [`ErrorKind::UnsuitableServer`] for a server
    /// that is [`Inline`](crate::Inline).
    pub fn build_adopted(
        self,
        memory: AdoptedMemory,
        server: impl Into<Server>,
    ) -> Result<AdoptedRegion, Error> {
        let (_, any) = build(self.options, self.layout, TargetKind::Adopted(memory), &server.into())?;
        Ok(AdoptedRegion::new(any))
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
