//! Describing a region. What is built of it, `build` tells.

use crate::api::build::{Ground, build};
use crate::api::options::Options;
use crate::api::{AdoptedRegion, Region, SharedRegion};
use crate::error::{Error, ErrorKind, Failure};
use crate::policy::{Readahead, Recording};
use crate::serve::Server;
use crate::space::{AdoptedMemory, Chunk, FailureCallback, Layout};
use pagestitch_kernel::{Access, PageSize};
use std::sync::Arc;

/// Describes a region. Made by [`Region::builder`]; nothing is reserved before [`build`](Builder::build).
///
/// An option that a region of a kind, or its server, cannot have is an error of `build`, which says why.
#[derive(Debug)]
pub struct Builder {
    options: Options,
    aligned: bool,
    /// The layout so far, or the first chunk that could not be laid.
    layout: Result<Layout, Error>,
}

impl Default for Builder {
    fn default() -> Self {
        Self { options: Options::default(), aligned: false, layout: Ok(Layout::default()) }
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
        self.options.name = Some(name.into());
        self
    }

    /// Lets [`Region::as_mut_slice`] write to the region. By default it is read-only.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.options.access = Access::Writable;
        self
    }

    /// Has the hardware stop stray writes to a region that is not [writable](Self::writable). The kernel moves pages only
    /// between mappings that can be written to, so that whole blocks of such a region are copied in, page by page, which
    /// takes more than twice as long. Not for donated pages, which have to move.
    ///
    /// Safe code never writes to such a region, guarded or not.
    #[must_use]
    pub fn hardware_read_only(mut self) -> Self {
        self.options.hardware_read_only = true;
        self
    }

    /// Includes the region in core dumps of the process. By default it is left out: the kernel walks all addresses of what it dumps, which
    /// takes half a minute for a tebibyte of absent pages, and the bytes are in the sources.
    #[must_use]
    pub fn dumped(mut self) -> Self {
        self.options.dumped = true;
        self
    }

    /// How far ahead of a sequential reader pages are filled. By default [`Readahead::Adaptive`].
    #[must_use]
    pub fn readahead(mut self, readahead: Readahead) -> Self {
        self.options.readahead = Some(readahead);
        self
    }

    /// Makes it an error if a byte would have to be copied: [`ErrorKind::NotZeroCopy`] names the chunk and the reason.
    #[must_use]
    pub fn require_zero_copy(mut self) -> Self {
        self.options.zero_copy = true;
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
        self.options.max_mappings = Some(most);
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
        self.options.manner.max_in_flight = Some(most);
        self
    }

    /// Records the order in which pages are first touched, for [`Region::recording`]. Only a fault reveals a touch, so the region
    /// fills nothing ahead meanwhile. `build` refuses a region that also [replays](Self::replay).
    #[must_use]
    pub fn record(mut self) -> Self {
        self.options.manner.record = true;
        self
    }

    /// Fills the pages of a recording, in its order, from when the region is built: by workers that are awake, after faults. What
    /// cannot be filled is asked for again when it is touched.
    #[must_use]
    pub fn replay(mut self, recording: &Recording) -> Self {
        self.options.manner.replay = Some(recording.clone());
        self
    }

    /// Has whoever is told know of each page whose bytes cannot be had, by its offset in the region, when that is found: in the thread
    /// that serves, which must not touch the region, or in the one that gives faults up, which gives up no other one until `tell` returns.
    /// [`Region::failures`] lists those that there are.
    #[must_use]
    pub fn on_page_failure(mut self, tell: impl Fn(u64, &Failure) + Send + Sync + 'static) -> Self {
        self.options.manner.reporter = Some(FailureCallback(Arc::new(tell)));
        self
    }

    /// Takes the time of the parts of each fault, for [`Meter::latency`](crate::Meter::latency): some five looks at the clock a
    /// fault. By default faults are only counted.
    #[must_use]
    pub fn record_latency(mut self) -> Self {
        self.options.manner.record_latency = true;
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
        self.options.inherit_on_fork = true;
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
            let name = self.options.name();
            let what =
                format!("region {name}: others may change {shared}: build_shared() it, or seal or copy it");
            return Err(Error::new(ErrorKind::Shared, what));
        }
        let (view, core) = build(self.options, self.layout, Ground::Own, &server.into())?;
        let view = view.expect("own ground has a view").into_stable();
        let view = view.expect("only what others may change makes a view unstable");
        Ok(Region::new(view, core))
    }

    /// As [`build`](Self::build), for a region of which others may change parts: files, unsealed memfds, aliases,
    /// physical memory.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build); a file that cannot be shown as [`writable`](Self::writable).
    pub fn build_shared(self, server: impl Into<Server>) -> Result<SharedRegion, Error> {
        let (view, core) = build(self.options, self.layout, Ground::Own, &server.into())?;
        Ok(SharedRegion::new(view.expect("own ground has a view"), core))
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
        let (_, core) = build(self.options, self.layout, Ground::Adopted(memory), &server.into())?;
        Ok(AdoptedRegion::new(core))
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
