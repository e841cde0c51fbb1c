//! The part that regions of all kinds share: queries, population, and the teardown in order.

use crate::api::PrefetchHandle;
use crate::error::Failure;
use crate::error::{BuildOption, Bytes, Error, ErrorKind};
use crate::fault::{PrefetchJob, let_write};
use crate::metrics::{Meter, Metrics};
use crate::policy::{FillRate, RateLimit, Recording};
use crate::serve::Served;
use crate::serve::fork::block_forks;
use crate::serve::{Attachment, fill_rest};
use crate::signals::NoSignals;
use crate::space::{Layout, Plan, Target};
use pagestitch_kernel::Span;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::FaultMode;
use std::fmt;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

/// The part that regions of all kinds share: [`Region`](crate::Region),
/// [`SharedRegion`](crate::SharedRegion) and [`AdoptedRegion`](crate::AdoptedRegion) dereference to
/// it, so that its methods are called on them.
///
/// A function that takes `&AnyRegion` accepts a region of any kind:
///
/// ```
/// use pagestitch::{AnyRegion, Error, Pool, Region};
///
/// fn warm_up(region: &AnyRegion) -> Result<u64, Error> {
///     region.populate(..)?;
///     Ok(region.metrics().pages_installed())
/// }
///
/// let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
/// assert_eq!(warm_up(&region)?, 3);
/// # Ok::<(), Error>(())
/// ```
pub struct AnyRegion {
    pub(super) served: Arc<Served>,
    pub(super) server: Box<dyn Attachment>,
}

impl AnyRegion {
    #[cfg(all(test, not(shuttle)))]
    pub(crate) const fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// The name given to the builder, for errors, logs and plans.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.served.name
    }

    /// The length of all chunks together, in bytes. Of adopted memory, this is the length of all
    /// ranges.
    #[must_use]
    pub fn len(&self) -> usize {
        // The length fits in usize, because it was reserved.
        self.served.len() as usize
    }

    /// False, because a region has at least one byte, unless it is built with a
    /// [`capacity`](crate::Builder::capacity) and without chunks.
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, Pool, Region};
    /// let region = Region::builder().chunk("one byte or more").build(&Pool::new()?)?;
    /// assert!(!region.is_empty());
    /// let error = Region::builder().build(&Pool::new()?).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::NoChunks);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of chunks, without padding.
    #[must_use]
    pub fn chunk_count(&self) -> usize {
        let layout = &self.served.layout;
        layout.number_of(self.served.chunks())
    }

    /// The byte offsets of each chunk in the region, in the order of the builder.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk("one").chunk("three").build(&Pool::new()?)?;
    /// assert!(region.chunk_ranges().eq([0..3, 3..8]));
    /// assert_eq!((region.chunk_count(), region.chunk_len(1)), (2, Some(5)));
    /// assert_eq!(region.chunk_range(1), Some(3..8));
    /// assert_eq!(region.chunk_slice(1), Some(&b"three"[..]));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn chunk_ranges(&self) -> impl ExactSizeIterator<Item = Range<u64>> {
        (0..self.chunk_count())
            .map(|chunk| self.chunk_range(chunk).expect("it is below the number of chunks"))
    }

    /// The byte offsets of a chunk in the region; chunks are numbered from 0. `None` if the region
    /// has fewer chunks.
    #[must_use]
    pub fn chunk_range(&self, chunk: usize) -> Option<Range<u64>> {
        let layout = &self.served.layout;
        let known = layout.chunk_of(chunk).filter(|&chunk| chunk < self.served.chunks());
        known.map(|chunk| layout.offsets_of(chunk))
    }

    /// The length of a chunk in bytes, numbered as in [`chunk_range`](Self::chunk_range).
    #[must_use]
    pub fn chunk_len(&self, chunk: usize) -> Option<u64> {
        self.chunk_range(chunk).map(|range| range.end - range.start)
    }

    /// The offset of a chunk's first byte, numbered as in [`chunk_range`](Self::chunk_range).
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![1u8; 100]).chunk(vec![2u8; 50]).build(&Pool::new()?)?;
    /// assert_eq!((region.offset_of(1), region.offset_of(2)), (Some(100), None));
    /// assert_eq!((region.chunk_at(99), region.chunk_at(100), region.chunk_at(150)), (Some(0), Some(1), None));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn offset_of(&self, chunk: usize) -> Option<u64> {
        self.chunk_range(chunk).map(|range| range.start)
    }

    /// The number of the chunk that holds the byte at `offset`, counted as in
    /// [`offset_of`](Self::offset_of). `None` past the end and in padding.
    #[must_use]
    pub fn chunk_at(&self, offset: u64) -> Option<usize> {
        if offset >= self.served.len() {
            return None;
        }
        let layout: &Layout = &self.served.layout;
        layout.number_if_any(layout.locate(offset))
    }

    /// True if system calls of this process can read and write absent pages.
    pub(super) fn fills_for_system_calls(&self) -> bool {
        let all = self.served.uffd.mode() == FaultMode::All;
        all && self.server.serves_system_calls()
    }

    /// Fills the absent pages of a range of byte offsets, on the calling thread. In adopted memory,
    /// pages that the owner has discarded stay absent.
    ///
    /// Pages of files that are mapped in place are read from the disk and mapped (Linux 5.14), as by
    /// `MAP_POPULATE`, and an unreadable one is an error. No page outside of the range is read, where a touch
    /// would have the kernel read ahead.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SourceFailed`] names the chunk whose source failed; the pages before the failed
    /// one are filled. [`ErrorKind::MemoryGone`] if the owner of adopted memory has ended.
    /// [`ErrorKind::OutOfRange`] if the range leaves the region. [`ErrorKind::LimitReached`] if the range is
    /// longer than the [budget](crate::Builder::budget) of the region.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// region.populate(4096..8192)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn populate(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.populate_while(range, || true)
    }

    /// As [`populate`](Self::populate), until `go_on` returns false, which is no error. Several
    /// threads call it, each before every block of 2 MiB.
    ///
    /// # Errors
    ///
    /// As [`populate`](Self::populate).
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    ///
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// let began = Instant::now();
    /// region.populate_while(.., || began.elapsed() < Duration::from_secs(5))?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn populate_while(
        &self,
        range: impl RangeBounds<u64>,
        go_on: impl Fn() -> bool + Sync,
    ) -> Result<(), Error> {
        let span = self.span(range)?;
        self.fits_its_budget(span)?;
        self.populate_span(span, &go_on)
    }

    pub(super) fn populate_pages(&self, span: Span) -> Result<(), Error> {
        self.populate_span(span, &|| true)
    }

    fn populate_span(&self, span: Span, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Error> {
        self.fill(span, go_on)?;
        self.served.populate_files(span, go_on).map_err(|(unread, errno)| self.unread(unread, errno))
    }

    /// Refuses to fill more pages than the region's budget has room for.
    fn fits_its_budget(&self, span: Span) -> Result<(), Error> {
        let Some(most) = self.served.residence.as_ref().map(|residence| residence.limit()) else {
            return Ok(());
        };
        if span.pages <= most {
            return Ok(());
        }
        let size = self.served.page_size();
        let (name, bytes, most) = (self.name(), size.bytes_of(span), most * size.bytes());
        let what = format!(
            "region {name}: {bytes} bytes are more than its budget has room for: populate {most} bytes at most"
        );
        Err(Error::new(ErrorKind::LimitReached, what).of_option(BuildOption::Budget))
    }

    fn fill(&self, span: Span, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Error> {
        if !self.server.is_of_this_process() {
            return self.touch(span);
        }
        // Pages in place outlive their server.
        if !self.served.in_place.next_gap(span).is_empty() {
            self.server.check_running(&self.served)?;
        }
        self.server.populate(&self.served, span, go_on).map_err(|failure| self.failed(failure))
    }

    /// Has the server fill the absent pages of a range of byte offsets ahead of their touch, and
    /// returns at once. Dropping the handle cancels the prefetch.
    ///
    /// * **After faults.** Idle workers of the [`Pool`](crate::Pool) fill the pages, about a millisecond
    ///   at a time, while no fault waits. They are all workers but one, and at least one. A
    ///   source that holds its workers up for 10 ms does not end the prefetches of other regions. A
    ///   [`Manual`](crate::Manual) fills them in its [`serve_ready`](crate::Manual::serve_ready).
    /// * **Failures** poison no page and repeat no read: the pages stay absent, and their touch reads
    ///   the source again. [`PrefetchProgress`](crate::PrefetchProgress) counts them.
    /// * **Whole units.** At both ends of the range, whole units of a source's
    ///   [`granularity`](crate::Source::granularity) are filled.
    /// * **Asynchronous sources** ([`Fetch`](crate::source::Fetch)) get 16 requests of a prefetch at
    ///   once, below the limits of the pool and the region, and no worker waits for them.
    /// * **Files in place** are read into the page cache, and no page outside of the range. Of a range of more than
    ///   4 MiB the kernel begins to read both ends, from where its readahead would reach outside (with the
    ///   default window of 128 KiB, the first 128 KiB and the last 512 KiB; where the window is not in sysfs,
    ///   as on btrfs and overlayfs, 4 MiB and 16 MiB). Workers then read and map the whole range, and wait
    ///   for the disk as they do in a source. The kernel begins a shorter range as a whole. An
    ///   [`Eager`](crate::Eager) region has no workers, so touches read the middle. Holes in files of a tmpfs
    ///   stay holes.
    ///   [`PrefetchProgress`](crate::PrefetchProgress) does not count these pages. One that cannot be read is no
    ///   error here: its first touch gets SIGBUS.
    /// * **Recordings** ([`record`](crate::Builder::record)) have no touch of a page that is filled
    ///   ahead.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::UnsuitableServer`] for a region that is served [`Inline`](crate::Inline), which has
    /// no idle worker: call [`populate`](Self::populate). [`ErrorKind::OutOfRange`] if the range leaves
    /// the region. [`ErrorKind::ForkedChild`] in a forked child, and [`ErrorKind::ServerStopped`] after
    /// the drop of the last `Manual`.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?;
    /// region.prefetch(..8192)?.detach();                     // in the background, until it is done
    /// let rest = region.prefetch(8192..)?;                   // until `rest` is dropped
    /// assert_eq!(rest.wait().pages_failed, 0);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn prefetch(&self, range: impl RangeBounds<u64>) -> Result<PrefetchHandle, Error> {
        let span = self.span(range)?;
        self.check_is_of_this_process("prefetch")?;
        // Before the workers, because the kernel's readahead stops at pages that the page cache has.
        let has_middle = self.served.begin_files(span);
        // No worker wakes up for an empty prefetch.
        let is_begun = !has_middle && self.served.in_place.next_gap(span).is_empty();
        let units = if is_begun { span.prefix(0) } else { self.served.with_read_units(span) };
        self.start("prefetch", PrefetchJob::new(units, self.block_pages()))
    }

    /// Has the server fill all absent pages while no fault waits, in the order of their addresses, and
    /// returns at once. Dropping the handle cancels the fill.
    ///
    /// This is a [`prefetch`](Self::prefetch) of the whole region, with these differences:
    ///
    /// * **Files in place** are not read, because none of their pages is absent.
    /// * **Rate.** It fills no more bytes a second than [`FillRate`] says.
    /// * **Faults first.** While threads fault in the region, it fills for 50 us in each millisecond.
    /// * **Recording first.** It begins when the pages of a [replayed](crate::Builder::replay) recording
    ///   are filled.
    /// * **Complete.** It waits for pages that other threads are filling. If
    ///   [`is_complete`](crate::PrefetchProgress::is_complete) is true at its end, no page is left to
    ///   fill: [`AdoptedRegion::finish`](crate::AdoptedRegion::finish) then releases the memory at once,
    ///   and its owner runs on without this process.
    ///
    /// In adopted memory, pages that the owner has discarded stay absent.
    ///
    /// # Errors
    ///
    /// As [`prefetch`](Self::prefetch).
    ///
    /// ```
    /// use pagestitch::{FillRate, Pool, Region};
    ///
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?;
    /// let fill = region.fill_in_background(FillRate::Unlimited)?;
    /// assert_eq!(region.as_slice()[50_000], 7);               // faults come first
    /// assert!(fill.wait().is_complete());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn fill_in_background(&self, rate: FillRate) -> Result<PrefetchHandle, Error> {
        let (all, block) = (self.served.all(), self.block_pages());
        // A unit of a source is read at once.
        let least = if self.served.layout.has_read_units() { block } else { 1 };
        let limit = RateLimit::new(rate, self.served.page_size(), least);
        self.start("fill_in_background", PrefetchJob::background(all, block, limit))
    }

    fn block_pages(&self) -> usize {
        HUGE / self.served.page_size().bytes()
    }

    fn start(&self, call: &str, job: PrefetchJob) -> Result<PrefetchHandle, Error> {
        self.check_is_of_this_process(call)?;
        let job = Arc::new(job);
        self.server.prefetch(&self.served, &job)?;
        Ok(PrefetchHandle::new(job))
    }

    fn check_is_of_this_process(&self, call: &str) -> Result<(), Error> {
        if !self.server.is_of_this_process() {
            let what = format!(
                "region {}: it belongs to the parent process: call {call}() there, or populate() in the forked child",
                self.name()
            );
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        Ok(())
    }

    /// Fills all absent pages of adopted memory until `go_on` returns false.
    pub(super) fn fill_rest(&self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Error> {
        fill_rest(&self.served, go_on).map_err(|failure| self.failed(failure))
    }

    /// Lets forked children inherit the range, if the region serves them.
    pub(super) fn show_to_children(&self) -> Result<(), Error> {
        match (&self.served.children, &self.served.target) {
            (Some(children), Target::Owned(reservation)) => {
                let inherited = reservation.inherit_on_fork(Arc::clone(children.window()));
                inherited.map_err(|errno| {
                    let name = self.name();
                    Error::refused(
                        format!("region {name}: cannot let forked children inherit its range"),
                        errno,
                    )
                })
            }
            _ => Ok(()),
        }
    }

    /// Populates in a forked child: touches the pages, because the server is in the parent process.
    fn touch(&self, span: Span) -> Result<(), Error> {
        if self.served.children.as_ref().is_some_and(|children| children.has_no_server())
            && !self.has_all(span)
        {
            let what = format!(
                "region {}: in a forked child whose parent has ended: the child's absent pages cannot be filled any more",
                self.name()
            );
            return Err(Error::new(ErrorKind::ServerStopped, what));
        }
        match &self.served.target {
            Target::Owned(reservation) if !span.is_empty() => reservation.populate_read(span).map_err(|errno| {
                let (kind, reason) = match self.served.children {
                    Some(_) => (ErrorKind::SourceFailed, "in a forked child: a source has failed, or the parent has dropped the region"),
                    None => (ErrorKind::ForkedChild, "a forked child has no addresses of its parent's region: build it in the child, or with inherit_on_fork()"),
                };
                Error::because(kind, format_args!("region {}: {reason}", self.name()), errno)
            }),
            _ => Ok(()),
        }
    }

    /// True if the kernel has all pages of a span.
    fn has_all(&self, span: Span) -> bool {
        let mut all = true;
        self.served.target.residency(span, |_, here| all &= here);
        all
    }

    /// Reads the poisoned pages of a range from their sources again. A page whose source succeeds
    /// is filled as if it had never failed, and touching it raises no signal any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SourceFailed`] names the first chunk whose source fails again; the pages before
    /// it are filled. Before Linux 6.6 a poisoned page cannot be filled again:
    /// [`ErrorKind::Unsupported`]. [`ErrorKind::OutOfRange`] if the range leaves the region.
    ///
    /// ```
    /// use pagestitch::{Chunk, ErrorKind, Pool, Region, Source};
    /// use std::io;
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicBool, Ordering};
    ///
    /// struct Disk {
    ///     works: AtomicBool,
    /// }
    /// impl Source for Disk {
    ///     fn size(&self) -> u64 {
    ///         8192
    ///     }
    ///     fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
    ///         into.fill(7);
    ///         if self.works.load(Ordering::Relaxed) { Ok(()) } else { Err(io::Error::other("unplugged")) }
    ///     }
    /// }
    /// let disk = Arc::new(Disk { works: AtomicBool::new(false) });
    /// let region = Region::builder().chunk(Chunk::source(Arc::clone(&disk))).build(&Pool::new()?)?;
    /// assert_eq!(region.populate(4096..).unwrap_err().kind(), ErrorKind::SourceFailed);
    /// assert_eq!(region.failures()[0].0, 4096);
    ///
    /// disk.works.store(true, Ordering::Relaxed);
    /// region.retry_failed(..)?;
    /// assert_eq!((region.as_slice()[4096], region.failures().len()), (7, 0));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn retry_failed(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        if !self.server.is_of_this_process() {
            // The uffd is the parent's: it installs pages in the parent's memory.
            let what = format!(
                "region {}: it belongs to the parent process: call retry_failed() there, not in a forked child",
                self.name()
            );
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        self.server.retry_failed(&self.served, self.span(range)?).map_err(|failure| self.failed(failure))
    }

    /// The poisoned pages: each page's byte offset in the region, and its failure.
    #[must_use]
    pub fn failures(&self) -> Vec<(u64, Arc<Failure>)> {
        let size = self.served.page_size();
        self.served
            .failures(self.served.all())
            .into_iter()
            .map(|(page, failure)| (size.offset_of(page), failure))
            .collect()
    }

    fn failed(&self, failure: Arc<Failure>) -> Error {
        Error::of_failure(self.name(), failure)
    }

    /// The pages of a range of offsets.
    pub(super) fn span(&self, range: impl RangeBounds<u64>) -> Result<Span, Error> {
        Ok(self.served.page_size().covering(&self.offsets(range)?))
    }

    /// A range of offsets, if it is inside the region.
    pub(super) fn offsets(&self, range: impl RangeBounds<u64>) -> Result<Range<u64>, Error> {
        let start = match range.start_bound() {
            Bound::Included(&start) => Some(start),
            Bound::Excluded(&before) => before.checked_add(1),
            Bound::Unbounded => Some(0),
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.checked_add(1),
            Bound::Excluded(&end) => Some(end),
            Bound::Unbounded => Some(self.len() as u64),
        };
        self.inside(start.unwrap_or(u64::MAX), end)
    }

    /// The method by which each run of chunks is installed, with the reason.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Method, Pool, Region};
    /// let region = Region::builder().chunk(vec![1u8; 8192]).chunk(Chunk::hole(8192)).build(&Pool::new()?)?;
    /// println!("{}", region.plan());                              // a table for people
    /// let methods: Vec<_> = region.plan().runs().iter().map(|run| run.method).collect();
    /// assert_eq!(methods, [Method::Copy, Method::Zero]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan::of(&self.served)
    }

    /// The number of bytes that the sources in memory keep allocated, besides the region itself.
    /// Falls when sources are [released](crate::Builder::release_sources).
    ///
    /// Counts the whole length of each `Vec`, `Bytes` and other owner, also if the region shows only a
    /// part of it. Borrowed and static memory does not count.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Pool, Region};
    /// let part = Chunk::from(vec![7u8; 10_000]).range(0..5_000);
    /// let region = Region::builder().chunk(part).chunk("static").build(&Pool::new()?)?;
    /// assert_eq!(region.kept_source_bytes(), 10_000);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn kept_source_bytes(&self) -> u64 {
        self.served.layout.kept_bytes()
    }

    /// The region's counters so far. The region's `close` returns their final values.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// let metrics = region.metrics();
    /// assert_eq!((metrics.faults, metrics.pages_installed(), metrics.bytes_copied), (0, 3, 12_288));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.served.counters.read()
    }

    /// The order in which pages were first touched so far; `None` unless the region
    /// [records](crate::Builder::record).
    #[must_use]
    pub fn recording(&self) -> Option<Recording> {
        let served = &self.served;
        Some(served.recorder.as_ref()?.read(served.page_size(), served.layout.total()))
    }

    /// A handle to the same counters that can be read by any thread, also after the region's drop.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// let meter = region.meter();                                 // for the thread that reports
    /// region.populate(4096..)?;
    /// let parts = meter.coverage(3);
    /// assert_eq!(parts.iter().map(|part| part.present).collect::<Vec<_>>(), [0, 1, 1]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn meter(&self) -> Meter {
        Meter::new(Arc::clone(&self.served.counters), self.server.presence(&self.served))
    }

    pub(super) fn finish(self) -> Result<Metrics, Error> {
        let flushed = self.flush_to_finish();
        let metrics = self.close();
        flushed.map(|()| metrics)
    }

    pub(super) fn close(self) -> Metrics {
        self.flush_at_end();
        self.server.detach(&self.served);
        self.served.close();
        self.metrics()
    }

    /// Fills the absent pages of `bytes` bytes from `offset` on. Returns their range of offsets.
    pub(super) fn filled(&self, offset: u64, bytes: usize) -> Result<Range<u64>, Error> {
        let range = self.inside_of(offset, bytes)?;
        let span = self.span(range.clone())?;
        // Pages beyond the budget would leave before they are read: the reader faults them in.
        let most = self.served.residence.as_ref().map_or(span.pages, |residence| residence.limit());
        self.fill(span.prefix(most), &|| true)?;
        Ok(range)
    }

    /// An error if the bytes are not inside the region.
    pub(super) fn inside_of(&self, offset: u64, bytes: usize) -> Result<Range<u64>, Error> {
        self.inside(offset, offset.checked_add(bytes as u64))
    }

    /// Lets the present pages of a range be written without a fault, if written pages go back from a budget.
    pub(super) fn let_write(&self, range: &Range<u64>) {
        let mut rest = self.served.page_size().covering(range);
        while self.served.written_back().is_some() && !rest.is_empty() {
            self.served.residence.iter().for_each(|residence| residence.throttle());
            // A signal handler that writes to one of the pages would wait for the claim of its own thread.
            let quiet = NoSignals::until_dropped();
            // A page that has left is let be written by its fault.
            let pages = let_write(&self.served, rest.prefix(LET_AT_ONCE)).unwrap_or(1);
            drop(quiet);
            rest = rest.without_prefix(pages);
        }
    }

    /// The error of a write to a region that is only read.
    pub(super) fn read_only(&self) -> Error {
        let what = format!("region {} is read-only: build it writable() to write to it", self.name());
        Error::new(ErrorKind::ReadOnly, what)
    }

    pub(super) fn describe(&self, kind: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(kind).field("name", &self.name()).field("len", &self.len()).finish_non_exhaustive()
    }

    /// The range from `start` to `end`, if it is inside the region. An `end` of `None` is past
    /// 2^64.
    fn inside(&self, start: u64, end: Option<u64>) -> Result<Range<u64>, Error> {
        let len = self.len() as u64;
        match end {
            Some(end) if start <= end && end <= len => Ok(start..end),
            _ => {
                let end = end.map_or_else(|| String::from("2^64"), |end| end.to_string());
                let (name, len) = (self.name(), Bytes(len));
                let what = format!("bytes {start}..{end} are not inside region {name} of {len}");
                Err(Error::new(ErrorKind::OutOfRange, what))
            }
        }
    }
}

impl fmt::Debug for AnyRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.describe("AnyRegion", f)
    }
}

/// Teardown. Closing the uffd comes last, because a thread that waits in a fault then reads
/// **zeros**:
///
/// 0. Flush written pages, if they go back to their sources.
///    End inheritance: later forks do not inherit the region; forks in progress are still served.
/// 1. Stop intake: no worker reads this uffd any more, and no signal handler serves this range.
/// 2. Join: wait for the threads at work for the region; no source is called from here on. Forked
///    children are torn down in the same way; their absent pages are poisoned.
/// 3. Fence: the whole range becomes inaccessible (in adopted memory, absent pages are poisoned).
/// 4. Wake: the waiting threads fault again and meet the fence.
/// 5. Close the uffds, or keep them for other regions, and unmap, when the last `Arc` is dropped. If a
///    thread waited at step 3, the addresses stay fenced for a second
///    ([`ranges`](pagestitch_kernel::ranges)): the thread may run after all of this, and must not meet
///    another mapping there.
impl Drop for AnyRegion {
    fn drop(&mut self) {
        if !self.server.is_of_this_process() {
            // A forked child lacks the range, and its server belongs to the parent.
            return;
        }
        self.flush_at_end();
        block_forks(&self.served);
        // When this returns, every child whose event the fork reader has read is deferred to a
        // worker.
        self.server.stop_reading(&self.served);
        self.server.detach(&self.served);
        self.served.close();
        self.server.detach_children(&self.served);
        log!(debug, region = self.name(), metrics = ?self.metrics(), "region dropped");
        if self.served.end_service() {
            self.served.retire_uffds();
        }
    }
}

/// The pages that a call lets be written at once. Others may have to go back to their sources before the next ones.
const LET_AT_ONCE: usize = 64;
