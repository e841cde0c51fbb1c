//! Tell: what has happened in a region, as numbers with one meaning each.
//!
//! | file | what |
//! |---|---|
//! | `coverage` | which parts of a region are there |
//! | `in_flight` | the faults that have been read and are not settled |
//! | `facade` | the numbers for the `metrics` crate |
//! | `histogram` | how long faults took, where that is asked for |
//!
//! Threads that count at the same time do so in different cache lines: which, their stacks decide.

mod coverage;
#[cfg(feature = "metrics")]
mod facade;
mod histogram;
mod in_flight;

pub use coverage::Coverage;
pub(crate) use coverage::Presence;
pub use histogram::Histogram;
use histogram::Recorder;
use in_flight::InFlight;
pub(crate) use in_flight::{InFlightFault, Overdue};
use pagestitch_kernel::striped::Striped;
use pagestitch_kernel::{Page, PageSize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A region's numbers at one moment. They only grow, and may lag: a thread runs on as soon as the kernel has
        /// its page, which is a moment before the page is counted.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics { $($(#[$doc])* pub $name: u64,)* }

        /// The numbers as one thread counts them.
        #[derive(Debug, Default)]
        pub(crate) struct Counted { $(pub(crate) $name: Counter,)* }

        impl Counters {
            pub(crate) fn read(&self) -> Metrics {
                let sum = |of: fn(&Counted) -> &Counter| {
                    self.striped.iter().map(|counted| of(counted).0.load(Ordering::Relaxed)).sum()
                };
                Metrics { $($name: sum(|counted| &counted.$name),)* }.bounded()
            }
        }

        /// A number each.
        impl Meter {
            $($(#[$doc])* #[must_use] pub fn $name(&self) -> u64 { self.metrics().$name })*
        }

        impl Metrics {
            /// All numbers by their names, as they are called here.
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
    pages: usize,
    striped: Striped<Counted>,
    in_flight: InFlight,
    timings: Option<Box<Timings>>,
}

/// How long the parts of a fault took.
#[derive(Debug)]
struct Timings {
    queue: Recorder,
    fill: Recorder,
    resolve: Recorder,
}

/// A part of a fault.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Fill,
    Resolve,
}

impl Counters {
    /// `quiet`: faults are read by a thread that may not allocate.
    pub(crate) fn new(
        region: String,
        (page, pages): (PageSize, usize),
        record_latency: bool,
        quiet: bool,
    ) -> Self {
        let timings = || Timings { queue: Recorder::new(), fill: Recorder::new(), resolve: Recorder::new() };
        let timings = record_latency.then(|| Box::new(timings()));
        let in_flight = if quiet { InFlight::fixed() } else { InFlight::new() };
        Self { region, page, pages, striped: Striped::default(), in_flight, timings }
    }

    /// A fault was read from the kernel at a moment: it is in flight from now on. Its place, if there is one left.
    pub(crate) fn begin(&self, page: Page, thread: u32, read: Instant) -> Option<usize> {
        self.in_flight.begin(page, thread, read)
    }

    /// A fault that has begun is served from now on, until the flight is dropped.
    pub(crate) fn take_up(&self, place: Option<usize>, read: Instant) -> Option<InFlightFault<'_>> {
        self.local().faults.add(1);
        if let Some(timings) = &self.timings {
            timings.queue.record(read.elapsed());
        }
        self.take_up_again(place)
    }

    /// The same for a fault that was served before, and has been waiting for a time.
    pub(crate) fn take_up_again(&self, place: Option<usize>) -> Option<InFlightFault<'_>> {
        place.map(|place| self.in_flight.flight(place))
    }

    /// Faults that have been watched for so long, `passed` after the last call.
    pub(crate) fn watch(&self, passed: Duration, limit: Duration) -> impl Iterator<Item = Overdue> {
        self.in_flight.watch(passed, limit)
    }

    /// There is no room in a queue for a fault.
    pub(crate) fn leave(&self, place: usize) {
        self.in_flight.leave(place);
    }

    /// The faults that were left: their pages, the threads that wait, and their places.
    pub(crate) fn take_left(&self) -> impl Iterator<Item = (Page, u32, usize)> {
        self.in_flight.take_left()
    }

    /// No fault is served any more.
    pub(crate) fn finish_all(&self) {
        self.in_flight.finish_all();
    }

    /// True once for each fault.
    pub(crate) fn tell_once(&self, fault: &Overdue) -> bool {
        self.in_flight.first(fault, in_flight::TOLD)
    }

    /// True once for each fault.
    pub(crate) fn give_up_once(&self, fault: &Overdue) -> bool {
        self.in_flight.first(fault, in_flight::GIVEN_UP)
    }

    /// Takes back that a fault was given up.
    pub(crate) fn keep_on(&self, fault: &Overdue) {
        self.in_flight.undo(fault, in_flight::GIVEN_UP);
    }

    /// Ends a flight that was kept.
    pub(crate) fn finish(&self, place: Option<usize>) {
        if let Some(place) = place {
            self.in_flight.finish(place);
        }
    }

    /// The time, where parts are timed.
    pub(crate) fn clock(&self) -> Option<Instant> {
        self.timings.as_ref().map(|_| Instant::now())
    }

    /// A part that began at a time has come to its end.
    pub(crate) fn took(&self, part: Part, began: Option<Instant>) {
        if let (Some(timings), Some(began)) = (&self.timings, began) {
            match part {
                Part::Fill => timings.fill.record(began.elapsed()),
                Part::Resolve => timings.resolve.record(began.elapsed()),
            }
        }
    }

    /// Where the calling thread counts.
    pub(crate) fn local(&self) -> &Counted {
        self.striped.local()
    }
}

metrics! {
    /// Faults taken from the kernel, one for each page and batch. More than pages, where threads meet in a page.
    faults,
    /// Of these, faults of writers.
    faults_writing,
    /// Of these, faults on pages that a file's page cache has, and that are not mapped yet.
    faults_minor,
    /// Faults that took longer than they may, and were told of: see [`PoolBuilder::warn_after`](crate::PoolBuilder::warn_after).
    faults_overdue,
    /// Of these, faults whose pages were made bad for it: see [`PoolBuilder::fault_timeout`](crate::PoolBuilder::fault_timeout).
    faults_given_up,
    /// Forked children that were served from then on: see [`Builder::inherit_on_fork`](crate::Builder::inherit_on_fork).
    children,
    /// Faults on a page that was there by the time they were looked at.
    late,
    /// Pages shown in place when the region was built: no copy, no fault.
    pages_in_place,
    /// Pages copied straight from a source's own memory.
    pages_copied,
    /// Pages read into staging from one source, and copied from there.
    pages_buffered,
    /// Pages gathered in staging from several chunks, and copied from there.
    pages_gathered,
    /// Pages of whole blocks, filled in a huge page of staging that was then moved in: copied once.
    pages_staged,
    /// Donated pages that were moved in: not copied.
    pages_moved,
    /// Pages of a memfd that is filled later, shown when it had them: not copied.
    pages_continued,
    /// Pages of zeros.
    pages_zeroed,
    /// Pages that a source could not fill: poisoned.
    pages_poisoned,
    /// Poisoned pages that were filled after all, by `retry_failed`.
    pages_recovered,
    /// Of the pages above, those that were filled ahead of a sequential reader.
    pages_ahead,
    /// Of these, those that a reader has passed by: it came to the page that follows them. The rest was for nothing, or is still to be
    /// read; only a fault tells of a touch.
    pages_ahead_used,
    /// Bytes copied into the region.
    bytes_copied,
    /// Times that a source was asked and failed, also ahead of a reader, where that loses nothing.
    source_errors,
    /// Times that a source was asked again, as it was declared.
    source_retries,
    /// Pages in which bytes are zeros because their source failed, as it was declared.
    pages_given_up,
    /// Fills that met a change of the memory map and were given back to be tried again.
    retries,
}

impl Metrics {
    /// Pages installed on a fault or by populating, in whichever way.
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

/// A region's current numbers: a handle to clone freely and to hand to a reporter. It outlives the region, and keeps nothing of it but
/// its numbers.
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

/// How long the parts of faults took. Where several pages were filled for one fault, all of that counts as its own.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latency {
    /// From when a worker read the fault to when it was taken up. What went before, only the kernel knows.
    pub queue: Histogram,
    /// The source saying what the bytes are.
    pub fill: Histogram,
    /// The kernel installing them.
    pub resolve: Histogram,
}

impl Metrics {
    /// A reader that is faster than readahead passes more pages than were filled ahead.
    fn bounded(self) -> Self {
        Self { pages_ahead_used: self.pages_ahead_used.min(self.pages_ahead), ..self }
    }
}

impl Meter {
    pub(crate) const fn new(counters: Arc<Counters>, presence: Arc<dyn Presence>) -> Self {
        Self { counters, presence }
    }

    /// The region in so many parts, as equal as can be, in its order, and how much of each is there; no more parts than pages. For
    /// each page, this looks at half a byte.
    #[must_use]
    pub fn coverage(&self, parts: usize) -> Vec<Coverage> {
        coverage::parts(self.presence.as_ref(), self.counters.pages, parts.min(self.counters.pages))
    }

    /// The region's name.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.counters.region
    }

    /// All numbers at one moment.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.counters.read()
    }

    /// Bytes that were moved in: of donated pages, and of whole blocks that were filled in staging.
    #[must_use]
    pub fn bytes_moved(&self) -> u64 {
        let metrics = self.metrics();
        (metrics.pages_moved + metrics.pages_staged) * self.counters.page.bytes() as u64
    }

    /// Bytes shown in place: when the region was built, or when a memfd had them.
    #[must_use]
    pub fn bytes_mapped(&self) -> u64 {
        let metrics = self.metrics();
        (metrics.pages_in_place + metrics.pages_continued) * self.counters.page.bytes() as u64
    }

    /// Pages that were filled ahead, and that no reader is known to have passed by.
    #[must_use]
    pub fn pages_ahead_unused(&self) -> u64 {
        let metrics = self.metrics();
        metrics.pages_ahead.saturating_sub(metrics.pages_ahead_used)
    }

    /// How many faults have been read and are not settled at this moment: those that are served, and those that wait for a worker.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.counters.in_flight.count()
    }

    /// The oldest of these: the offset of its page in the region, and how long ago it was read.
    #[must_use]
    pub fn oldest(&self) -> Option<(u64, Duration)> {
        let (page, age) = self.counters.in_flight.oldest()?;
        Some((self.counters.page.offset_of(page), age))
    }

    /// How long the parts of faults took, of a region that [records it](crate::Builder::record_latency).
    #[must_use]
    pub fn latency(&self) -> Option<Latency> {
        let Timings { queue, fill, resolve } = self.counters.timings.as_deref()?;
        Some(Latency { queue: queue.read(), fill: fill.read(), resolve: resolve.read() })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
}
