//! Populate: the same steps for pages that no thread has touched yet, in the caller's thread, and
//! in more threads where there is much to fill.

use crate::error::{Failure, FailureReason};
use crate::fault::callers::{self, Mark};
use crate::fault::error::failure_at;
use crate::fault::fill::{Buffers, Filled};
use crate::fault::recovery::{Attempts, Sources};
use crate::fault::{BLOCK_PAGES, Filler, InstallError, Unfilled, Wanted, journey};
use crate::signals::NoSignals;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState, Unclaimed};
use pagestitch_kernel::Span;
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Fills the absent pages of a span. Stops at the first page whose source fails; the pages before it are filled.
pub(crate) fn populate(region: &Mapping, span: Span) -> Result<(), Arc<Failure>> {
    populate_once(region, span)?;
    // Only once more: a page that was swapped out looks like a discarded one, and turns out to be
    // present.
    if region.lacks_any(span) { populate_once(region, span) } else { Ok(()) }
}

/// Fills all that is absent of a region, also behind pages that cannot be filled; asks now and then whether to go on. The first
/// page that could not be filled is the error.
pub(crate) fn fill_rest(region: &Mapping, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Arc<Failure>> {
    fill_blocks(region, region.target.all(), Extent::All(go_on))
}

fn populate_once(region: &Mapping, span: Span) -> Result<(), Arc<Failure>> {
    if span.pages < PARALLEL_PAGES {
        return fill_absent(region, span, &mut None, Extent::ToFailure);
    }
    fill_blocks(region, span, Extent::ToFailure)
}

fn fill_blocks(region: &Mapping, span: Span, extent: Extent<'_>) -> Result<(), Arc<Failure>> {
    let work = Work { region, extent, rest: Mutex::new(Rest { span, failed: None }) };
    thread::scope(|scope| {
        let quiet = NoSignals::until_dropped();
        let helpers = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX) - 1;
        for index in 0..helpers {
            let named = thread::Builder::new().name(format!("populate/{index}"));
            // A thread that cannot start is one helper fewer.
            let _ = named.spawn_scoped(scope, || work.help());
        }
        drop(quiet);
        work.help();
    });
    work.rest.into_inner().failed.map_or(Ok(()), |(_, failure)| Err(failure))
}

/// How much of a span is filled.
#[derive(Clone, Copy)]
enum Extent<'a> {
    /// The pages before the first one that cannot be filled.
    ToFailure,
    /// Each page that can be, as long as this says so.
    All(&'a (dyn Fn() -> bool + Sync)),
}

impl Extent<'_> {
    fn goes_on(self) -> bool {
        match self {
            Self::ToFailure => true,
            Self::All(go_on) => go_on(),
        }
    }

    /// Whether to wait for a map that has been changing since then.
    fn waits(self, since: &Instant) -> bool {
        matches!(self, Self::ToFailure) || self.goes_on() && since.elapsed() < CHANGING_MAX
    }

    /// Whether a failure ends it: a process that has ended needs no page any more.
    fn ends_at_failure(self, region: &Mapping) -> bool {
        matches!(self, Self::ToFailure) || region.owner_has_ended()
    }
}

/// A span that several threads fill, block by block from its start.
struct Work<'r> {
    region: &'r Mapping,
    extent: Extent<'r>,
    rest: Mutex<Rest>,
}

struct Rest {
    span: Span,
    /// The first block in which a source has failed.
    failed: Option<(Span, Arc<Failure>)>,
}

impl Work<'_> {
    fn help(&self) {
        let mut buffers = None;
        while let Some(block) = self.next_block() {
            if let Err(failure) = fill_absent(self.region, block, &mut buffers, self.extent) {
                let failed = &mut self.rest.lock().failed;
                if failed.as_ref().is_none_or(|(other, _)| block.first < other.first) {
                    *failed = Some((block, failure));
                }
            }
        }
    }

    /// The next block; none after a failure that ends the work. The blocks before the failed one
    /// are taken already, and the threads that took them fill them.
    fn next_block(&self) -> Option<Span> {
        if !self.extent.goes_on() {
            return None;
        }
        let mut rest = self.rest.lock();
        let ended = rest.failed.is_some() && self.extent.ends_at_failure(self.region);
        if ended || rest.span.is_empty() {
            return None;
        }
        let (block, later) = self.region.first_block(rest.span);
        rest.span = later;
        Some(block)
    }
}

/// Fills the absent pages of a span in this thread, and waits for those that others are filling. The first page that cannot be
/// filled is the error.
fn fill_absent(
    region: &Mapping,
    span: Span,
    buffers: &mut Option<Buffers>,
    extent: Extent<'_>,
) -> Result<(), Arc<Failure>> {
    let (mut rest, mut first, mut changing) = (span, Ok(()), None);
    loop {
        let gap = region.next_gap(rest);
        if gap.is_empty() {
            return first;
        }
        rest = rest.without_prefix(gap.first.0 - rest.first.0);
        let pages = match fill_run(region, gap, buffers)? {
            Run::Filled(0) => 0,
            Run::Filled(pages) => {
                changing = None;
                pages
            }
            Run::Changing if extent.waits(changing.get_or_insert_with(Instant::now)) => {
                thread::yield_now();
                0
            }
            Run::Changing => return first.and_then(|()| Err(no_rest(region, rest))),
            Run::Failed(failure, _) if extent.ends_at_failure(region) => return Err(failure),
            Run::Failed(failure, pages) => {
                first = first.and(Err(failure));
                pages
            }
        };
        rest = rest.without_prefix(pages);
    }
}

/// The outcome for a run of pages.
enum Run {
    /// So many are filled, or were before; none: look again.
    Filled(usize),
    /// The map is changing.
    Changing,
    /// One of them cannot be filled; the caller passes over so many.
    Failed(Arc<Failure>, usize),
}

/// Fills the first pages of a gap, or waits for the thread that is filling them.
fn fill_run(region: &Mapping, gap: Span, buffers: &mut Option<Buffers>) -> Result<Run, Arc<Failure>> {
    if region.pages.state(gap.first) == PageState::Present {
        return Ok(Run::Filled(1));
    }
    let wanted = gap.prefix(BLOCK_PAGES - gap.first.0 % BLOCK_PAGES);
    let mark = Mark::new(region, wanted);
    // A thread that finds every page present needs no buffers.
    let buffers = match buffers {
        Some(buffers) => buffers,
        None => {
            buffers.insert(Buffers::new().map_err(|errno| Arc::new(failure_at(region, gap, errno.into())))?)
        }
    };
    let mut populate = Populate { sources: Sources::new(region, buffers, Attempts::default()), claimed: 0 };
    let end = match journey(region, Wanted::Absent(wanted), &mut populate) {
        Ok(()) => return Ok(Run::Filled(populate.claimed)),
        Err(end) => end,
    };
    drop(mark);
    match end {
        Unfilled::Changing | Unfilled::Later | Unfilled::GivenBack => Ok(Run::Changing),
        // It is found when the gap is looked at again.
        Unfilled::Failed(failure) => Ok(Run::Failed(failure, 0)),
        Unfilled::Unclaimed(Unclaimed::Resident) => Ok(Run::Filled(1)),
        // Without a failure on record, the page was discarded between the two looks: look again.
        Unfilled::Unclaimed(Unclaimed::Poisoned) => {
            let failure = region.failure(gap.first);
            Ok(failure.map_or(Run::Filled(0), |failure| Run::Failed(failure, 1)))
        }
        Unfilled::Unclaimed(Unclaimed::Filling) => wait_for_other(region, gap),
    }
}

/// Waits for the thread that is filling the first page of a gap.
fn wait_for_other(region: &Mapping, gap: Span) -> Result<Run, Arc<Failure>> {
    if callers::fills(callers::this_thread(), region, gap.first) {
        return Err(Arc::new(failure_at(region, gap, FailureReason::Nested.error(NESTED))));
    }
    region.pages.wait_while_filling(gap.first);
    Ok(Run::Filled(0))
}

struct Populate<'a> {
    sources: Sources<'a>,
    /// The pages of the claim.
    claimed: usize,
}

impl Filler for Populate<'_> {
    fn claimed(&mut self, claim: &mut Claim<'_>) {
        self.claimed = claim.span().pages;
    }

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        self.sources.fill(span)
    }

    fn installed(&mut self, _: usize) {
        self.sources.installed();
    }

    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        self.sources.wait_or_fail(claim, error)
    }
}

/// The failure where the owner of adopted memory discards pages without end, because the kernel
/// fills none meanwhile.
fn no_rest(region: &Mapping, rest: Span) -> Arc<Failure> {
    let why = "the process that owns the memory discards or moves pages all the time, and the kernel fills none meanwhile";
    Arc::new(failure_at(region, rest, FailureReason::TimedOut.error(why)))
}

const NESTED: &str = "this thread is filling the page already, below a signal handler or a source that has called for it: let it \
                      return first";

/// From this size on, other threads help: below it, starting one is not worth its cost.
const PARALLEL_PAGES: usize = 16 * BLOCK_PAGES;
/// More threads would only wait for memory.
const THREADS_MAX: usize = 4;
/// How long the map of memory that is left to its owner may be changing without a page that can be filled.
const CHANGING_MAX: Duration = Duration::from_secs(5);
