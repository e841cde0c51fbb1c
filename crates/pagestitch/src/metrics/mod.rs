//! The counters of a region, each with one meaning.
//!
//! | file | content |
//! |---|---|
//! | `coverage` | the present share of each part of a region |
//! | `in_flight` | the faults that are read and not settled |
//! | `facade` | the counters for the `metrics` crate |
//! | `histogram` | the distribution of latencies, if they are recorded |
//!
//! Threads count in different cache lines at the same time; each thread has its stripe.

mod coverage;
mod description;
#[cfg(feature = "metrics")]
mod facade;
mod histogram;
mod in_flight;

pub use coverage::Coverage;
pub(crate) use coverage::Presence;
pub use histogram::Histogram;
use histogram::LatencyRecorder;
use in_flight::InFlight;
pub(crate) use in_flight::{InFlightFault, Overdue};
use pagestitch_kernel::cache::prefetch;
use pagestitch_kernel::striped::Striped;
use pagestitch_kernel::{Page, PageSize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A region's counters at one moment. They only grow. They may lag: a faulting thread runs
        /// on as soon as the kernel has its page, a moment before the page is counted.
        ///
        /// `Debug` and `Display` show the counters that are not zero.
        ///
        /// ```
        /// # use pagestitch::{Pool, Region};
        /// let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
        /// region.populate(..)?;
        /// println!("{}", region.close());                     // pages copied 3, bytes copied 12288
        /// # Ok::<(), pagestitch::Error>(())
        /// ```
        #[derive(Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics { $($(#[$doc])* pub $name: u64,)* }

        /// The counters of one stripe of threads.
        #[derive(Debug, Default)]
        pub(crate) struct Counted { $(pub(crate) $name: Counter,)* }

        impl Counters {
            fn sums(&self) -> Metrics {
                let sum = |of: fn(&Counted) -> &Counter| {
                    self.striped.iter().map(|counted| of(counted).get()).sum()
                };
                Metrics { $($name: sum(|counted| &counted.$name),)* }
            }
        }

        /// A number each.
        impl Meter {
            $($(#[$doc])* #[must_use] pub fn $name(&self) -> u64 { self.metrics().$name })*
        }

        impl Metrics {
            /// All counters with their field names.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

/// The counters of a region. [`Metrics`] is a copy of them at one moment.
#[derive(Debug)]
pub(crate) struct Counters {
    region: String,
    page: PageSize,
    pages: AtomicUsize,
    striped: Striped<Counted>,
    in_flight: InFlight,
    timings: Option<Box<Timings>>,
}

/// The latencies of the parts of faults.
#[derive(Debug)]
struct Timings {
    queue: LatencyRecorder,
    fill: LatencyRecorder,
    resolve: LatencyRecorder,
}

/// A part of a fault.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FaultPart {
    Fill,
    Resolve,
}

impl Counters {
    /// `quiet`: the thread that reads faults may not allocate.
    pub(crate) fn new(
        region: String,
        (page, pages): (PageSize, usize),
        record_latency: bool,
        quiet: bool,
    ) -> Self {
        let timings = || Timings {
            queue: LatencyRecorder::new(),
            fill: LatencyRecorder::new(),
            resolve: LatencyRecorder::new(),
        };
        let timings = record_latency.then(|| Box::new(timings()));
        let in_flight = if quiet { InFlight::fixed() } else { InFlight::new() };
        // A region of few pages has few faults to count.
        let striped = Striped::new(pages / PAGES_PER_STRIPE);
        Self { region, page, pages: AtomicUsize::new(pages), striped, in_flight, timings }
    }

    /// Notes the number of pages of a region that grows.
    pub(crate) fn set_pages(&self, pages: usize) {
        self.pages.store(pages, Ordering::Relaxed);
    }

    /// The number of faults so far.
    pub(crate) fn faults(&self) -> u64 {
        self.striped.iter().map(|counted| counted.faults.get()).sum()
    }

    /// Puts a fault that was read at `read` in flight. Returns its slot, if one is left.
    pub(crate) fn begin(&self, page: Page, thread: u32, read: Instant) -> Option<usize> {
        self.in_flight.begin(page, thread, read)
    }

    /// Starts to serve a fault that is in flight, until the guard is dropped.
    pub(crate) fn take_up(&self, slot: Option<usize>, read: Instant) -> Option<InFlightFault<'_>> {
        self.local().faults.add(1);
        if let Some(timings) = &self.timings {
            timings.queue.record(read.elapsed());
        }
        self.take_up_again(slot)
    }

    /// As [`take_up`](Self::take_up), for a fault that is served again after a pause.
    pub(crate) fn take_up_again(&self, slot: Option<usize>) -> Option<InFlightFault<'_>> {
        slot.map(|slot| self.in_flight.flight(slot))
    }

    /// The faults that have been watched for `limit` or longer; `passed` is the time since the last
    /// call.
    pub(crate) fn watch(&self, passed: Duration, limit: Duration) -> impl Iterator<Item = Overdue> {
        self.in_flight.watch(passed, limit)
    }

    /// Sets a fault aside for the watchdog, because its queue is full.
    pub(crate) fn set_aside(&self, slot: usize) {
        self.in_flight.set_aside(slot);
    }

    /// Takes the faults that were set aside: their pages, threads and slots.
    pub(crate) fn take_set_aside(&self) -> impl Iterator<Item = (Page, u32, usize)> {
        self.in_flight.take_set_aside()
    }

    /// Frees all slots, because no fault is served any more. True if there were some.
    pub(crate) fn finish_all(&self) -> bool {
        self.in_flight.finish_all()
    }

    /// True if a fault is in flight.
    pub(crate) fn has_in_flight(&self) -> bool {
        self.in_flight.has_any()
    }

    /// True at the first call for a fault.
    pub(crate) fn warn_once(&self, fault: &Overdue) -> bool {
        self.in_flight.first(fault, in_flight::WARNED)
    }

    /// True at the first call for a fault.
    pub(crate) fn give_up_once(&self, fault: &Overdue) -> bool {
        self.in_flight.first(fault, in_flight::GIVEN_UP)
    }

    /// Undoes that a fault was given up.
    pub(crate) fn undo_give_up(&self, fault: &Overdue) {
        self.in_flight.undo(fault, in_flight::GIVEN_UP);
    }

    /// Frees the slot of a fault that was kept in flight.
    pub(crate) fn finish(&self, slot: Option<usize>) {
        if let Some(slot) = slot {
            self.in_flight.finish(slot);
        }
    }

    /// The current time, if latencies are recorded.
    pub(crate) fn clock(&self) -> Option<Instant> {
        self.timings.as_ref().map(|_| Instant::now())
    }

    /// Records the time of a part that began at `began`.
    pub(crate) fn record_time(&self, part: FaultPart, began: Option<Instant>) {
        if let (Some(timings), Some(began)) = (&self.timings, began) {
            match part {
                FaultPart::Fill => timings.fill.record(began.elapsed()),
                FaultPart::Resolve => timings.resolve.record(began.elapsed()),
            }
        }
    }

    /// The sums of all stripes at one moment.
    pub(crate) fn read(&self) -> Metrics {
        let sums = self.sums();
        // The bytes follow from the pages, so a fault has one counter less to write to.
        let copied = sums.pages_copied + sums.pages_buffered + sums.pages_gathered + sums.pages_staged;
        Metrics { bytes_copied: copied * self.page.bytes() as u64, ..sums }.bounded()
    }

    /// Prefetches the parts that a fault of the calling thread changes.
    pub(crate) fn prefetch(&self) {
        prefetch(self);
        prefetch(self.local());
        self.in_flight.prefetch();
    }

    /// The counters of the calling thread's stripe.
    pub(crate) fn local(&self) -> &Counted {
        self.striped.local()
    }
}

metrics! {
    /// Faults read from the kernel, one for each page and batch. More than pages if several threads
    /// touch one page.
    faults,
    /// Of these, faults of writers.
    faults_writing,
    /// Of these, minor faults: the page cache of a file has the page, and it is not mapped yet.
    faults_minor,
    /// Faults reported for taking too long: see
    /// [`PoolBuilder::warn_after`](crate::PoolBuilder::warn_after).
    faults_overdue,
    /// Of these, faults that timed out, so that their pages were poisoned: see
    /// [`PoolBuilder::fault_timeout`](crate::PoolBuilder::fault_timeout).
    faults_timed_out,
    /// Forked children that inherited the region: see
    /// [`Builder::inherit_on_fork`](crate::Builder::inherit_on_fork).
    children,
    /// Faults whose page was present by the time they were served.
    faults_spurious,
    /// Pages mapped in place by the build: no copy, no fault.
    pages_in_place,
    /// Pages copied from the source's own memory, without a buffer.
    pages_copied,
    /// Pages read from one source into a buffer, and copied from there.
    pages_buffered,
    /// Pages gathered from several chunks in a buffer, and copied from there.
    pages_gathered,
    /// Pages of whole blocks that were filled in a staged huge page and moved in: copied once.
    pages_staged,
    /// Donated pages that moved in: not copied.
    pages_moved,
    /// Pages of a memfd that is filled later, mapped after their fill: not copied.
    pages_continued,
    /// Pages of zeros.
    pages_zeroed,
    /// Pages poisoned because a source failed.
    pages_poisoned,
    /// Poisoned pages that `retry_failed` has filled.
    pages_recovered,
    /// Of the pages above, those filled ahead of their first touch.
    pages_ahead,
    /// Of these, those that a reader has passed: it touched the page after them. The rest is not
    /// read yet, or never will be; only a fault reveals a touch.
    pages_ahead_used,
    /// Bytes copied into the region.
    bytes_copied,
    /// Bytes of sources that were [released](crate::Builder::release_sources).
    bytes_released,
    /// Failed reads of a source, including reads ahead, which poison no page.
    source_errors,
    /// Reads repeated by [`OnFailure::Retry`](crate::OnFailure::Retry), and requests sent again by
    /// [`Reply::retry_after`](crate::source::Reply::retry_after).
    source_retries,
    /// Pages with zeros for bytes of a failed source, by
    /// [`OnFailure::Zeros`](crate::OnFailure::Zeros).
    pages_zeroed_on_failure,
    /// Fills that met a change of the memory map or a lack of memory, and were repeated.
    retries,
}

impl Metrics {
    /// Pages installed by faults or by populating, with any method.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// let metrics = region.close();
    /// assert_eq!(metrics.pages_installed(), 3);
    /// for (name, value) in metrics.all().filter(|(_, value)| *value > 0) {
    ///     println!("{name} {value}");
    /// }
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub const fn pages_installed(&self) -> u64 {
        self.pages_copied
            + self.pages_buffered
            + self.pages_gathered
            + self.pages_staged
            + self.pages_moved
            + self.pages_continued
            + self.pages_zeroed
    }
}

/// A handle to a region's counters, to clone freely and to give to a reporter. It outlives the
/// region, of which it keeps only the counters and the page table.
///
/// ```
/// use pagestitch::{Pool, Region};
///
/// let region = Region::builder().chunk(vec![7u8; 100_000]).record_latency().build(&Pool::new()?)?;
/// let meter = region.meter();
/// assert_eq!(region.as_slice()[50_000], 7);
/// assert!(region.close().pages_copied >= 1);
/// assert!(meter.faults() >= 1 && meter.in_flight() == 0);
/// let latency = meter.latency().expect("it is timed");
/// println!("99 of 100 fills took no more than {:?}", latency.fill.quantile(0.99));
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Meter {
    counters: Arc<Counters>,
    presence: Arc<dyn Presence>,
}

/// The latencies of the parts of faults. The time of all pages that are filled for a fault counts
/// as the fault's.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latency {
    /// From the read of the fault to the start of its service. The time before the read is unknown.
    pub queue: Histogram,
    /// Finding the bytes: reading sources, or waiting for them.
    pub fill: Histogram,
    /// Installing the bytes by the kernel.
    pub resolve: Histogram,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Metrics");
        self.non_zero().for_each(|(name, count)| {
            shown.field(name, &count);
        });
        shown.finish()
    }
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counters = self.non_zero().enumerate();
        counters.try_for_each(|(nth, (name, count))| {
            let separator = if nth > 0 { ", " } else { "" };
            write!(f, "{separator}{} {count}", name.replace('_', " "))
        })
    }
}

impl Metrics {
    /// The counters that are not zero, because a line with all of them is hard to read.
    fn non_zero(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.all().filter(|(_, count)| *count > 0)
    }

    /// A reader that is faster than readahead passes more pages than were filled ahead.
    fn bounded(self) -> Self {
        Self { pages_ahead_used: self.pages_ahead_used.min(self.pages_ahead), ..self }
    }
}

impl Meter {
    pub(crate) const fn new(counters: Arc<Counters>, presence: Arc<dyn Presence>) -> Self {
        Self { counters, presence }
    }

    /// Divides the region into `parts` parts of nearly equal size, at most one a page, and returns
    /// the coverage of each in order. Reads half a byte for each page, and four bytes more in a region with a
    /// [budget](crate::Budget).
    #[must_use]
    pub fn coverage(&self, parts: usize) -> Vec<Coverage> {
        let pages = self.counters.pages.load(Ordering::Relaxed);
        coverage::parts(self.presence.as_ref(), pages, parts.min(pages))
    }

    /// The region's name.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.counters.region
    }

    /// All counters at one moment.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.counters.read()
    }

    /// Bytes that moved in: those of donated pages, and of whole blocks filled in staging.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 8 << 20]).build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// let (meter, copied) = (region.meter(), region.metrics().bytes_copied);
    /// println!("{copied} bytes copied, {} moved, {} mapped", meter.bytes_moved(), meter.bytes_mapped());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn bytes_moved(&self) -> u64 {
        let metrics = self.metrics();
        (metrics.pages_moved + metrics.pages_staged) * self.counters.page.bytes() as u64
    }

    /// Bytes mapped in place, by the build or after a memfd was filled.
    #[must_use]
    pub fn bytes_mapped(&self) -> u64 {
        let metrics = self.metrics();
        (metrics.pages_in_place + metrics.pages_continued) * self.counters.page.bytes() as u64
    }

    /// Pages that were filled ahead and that no reader is known to have passed.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 1 << 20]).build(&Pool::new()?)?;
    /// assert!(region.as_slice().iter().all(|&byte| byte == 7));        // a sequential reader
    /// let meter = region.meter();
    /// println!("{} pages ahead, {} of them in vain so far", meter.pages_ahead(), meter.pages_ahead_unused());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn pages_ahead_unused(&self) -> u64 {
        let metrics = self.metrics();
        metrics.pages_ahead.saturating_sub(metrics.pages_ahead_used)
    }

    /// The number of faults in flight: those being served, and those that wait for a worker.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.counters.in_flight.count()
    }

    /// The oldest fault in flight: the byte offset of its page in the region, and the time since it
    /// was read.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # use std::time::Duration;
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// let meter = region.meter();
    /// if let Some((offset, age)) = meter.oldest().filter(|(_, age)| *age > Duration::from_secs(1)) {
    ///     eprintln!("{}: a thread waits for byte {offset} since {age:?}", meter.region());
    /// }
    /// assert_eq!((meter.pages_poisoned(), meter.source_errors()), (0, 0));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn oldest(&self) -> Option<(u64, Duration)> {
        let (page, age) = self.counters.in_flight.oldest()?;
        Some((self.counters.page.offset_of(page), age))
    }

    /// The latencies of faults; `None` unless the region
    /// [records them](crate::Builder::record_latency).
    #[must_use]
    pub fn latency(&self) -> Option<Latency> {
        let Timings { queue, fill, resolve } = self.counters.timings.as_deref()?;
        Some(Latency { queue: queue.read(), fill: fill.read(), resolve: resolve.read() })
    }
}

/// A region has at most one stripe of counters for so many pages.
const PAGES_PER_STRIPE: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Most faults add 0 to several counters, and a branch costs less than an atomic addition.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        if n > 0 {
            self.0.fetch_add(n, Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
