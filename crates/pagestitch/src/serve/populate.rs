//! Populate: the same steps for pages that no thread has touched yet, in the caller's thread.
//! Helper threads join in for large ranges.

use crate::error::{Failure, FailureReason};
use crate::fault::callers::{self, FillingCaller};
use crate::fault::error::failure_at;
use crate::fault::fill::{Buffers, Filled};
use crate::fault::recovery::{Attempts, Sources};
use crate::fault::{BLOCK_PAGES, Filler, InstallError, Unfilled, Wanted, journey};
use crate::guard::discard;
use crate::signals::NoSignals;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState, Unclaimed};
use pagestitch_kernel::Span;
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Fills the absent pages of a span as long as `go_on` returns true. Stops at the first page whose
/// source fails; the pages before it are filled. Frees released sources.
pub(crate) fn populate(
    region: &Mapping,
    span: Span,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<(), Arc<Failure>> {
    let filled = fill_span(region, span, go_on);
    region.free_released();
    filled
}

fn fill_span(region: &Mapping, span: Span, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Arc<Failure>> {
    let extent = Extent { go_on, ends_at_failure: true };
    fill_blocks(region, span, extent)?;
    // Only once more: a swapped-out page looks like a discarded page here, and is found present
    // when it is filled.
    if region.lacks_any(span) && go_on() {
        fill_blocks(region, span, extent)?;
    }
    // A signal handler that has filled pages of an inline region cannot free their sources.
    region.release_sources(span);
    Ok(())
}

/// Fills all absent pages of a region that can be filled, as long as `go_on` returns true. The
/// error is the first page that cannot be filled.
pub(crate) fn fill_rest(region: &Mapping, go_on: &(dyn Fn() -> bool + Sync)) -> Result<(), Arc<Failure>> {
    fill_blocks(region, region.target.all(), Extent { go_on, ends_at_failure: false })
}

fn fill_blocks(region: &Mapping, span: Span, extent: Extent<'_>) -> Result<(), Arc<Failure>> {
    let work = Work { region, extent, rest: Mutex::new(Remainder { span, failed: None }) };
    // The number of CPUs takes several system calls, so a small span does not ask for it.
    match span.pages >= PARALLEL_PAGES && threads(region) > 1 {
        true => work.help_in_threads(),
        false => work.help(),
    }
    work.rest.into_inner().failed.map_or(Ok(()), |(_, failure)| Err(failure))
}

/// The number of threads that fill a large span.
fn threads(region: &Mapping) -> usize {
    let by_default = || thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX);
    region.populate_threads.unwrap_or_else(by_default)
}

/// The part of a span that is filled: until this function returns false.
#[derive(Clone, Copy)]
struct Extent<'a> {
    go_on: &'a (dyn Fn() -> bool + Sync),
    /// True: the pages before the first one that cannot be filled. False: each page that can be
    /// filled.
    ends_at_failure: bool,
}

impl Extent<'_> {
    /// True if the thread waits longer for a memory map that has been changing since `since`.
    fn waits(self, since: &Instant) -> bool {
        (self.go_on)() && (self.ends_at_failure || since.elapsed() < CHANGING_MAX)
    }

    /// True if a failure ends the work. It always does after the owner has ended, which needs no
    /// page.
    fn ends_at_failure(self, region: &Mapping) -> bool {
        self.ends_at_failure || region.owner_has_ended()
    }
}

/// A span that several threads fill, block by block from its start.
struct Work<'r> {
    region: &'r Mapping,
    extent: Extent<'r>,
    rest: Mutex<Remainder>,
}

struct Remainder {
    span: Span,
    /// The first block in which a source has failed.
    failed: Option<(Span, Arc<Failure>)>,
}

impl Work<'_> {
    fn help_in_threads(&self) {
        thread::scope(|scope| {
            let quiet = NoSignals::until_dropped();
            for index in 1..threads(self.region) {
                let named = thread::Builder::new().name(format!("populate/{index}"));
                // A thread that cannot start is one helper fewer.
                let _ = named.spawn_scoped(scope, || self.help());
            }
            drop(quiet);
            self.help();
        });
    }

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
        if !(self.extent.go_on)() {
            return None;
        }
        let mut rest = self.rest.lock();
        let ended = rest.failed.is_some() && self.extent.ends_at_failure(self.region);
        if ended || rest.span.is_empty() {
            return None;
        }
        // A unit of a source is read at once, so it is not split between threads.
        let end = self.region.with_read_units(self.region.first_block(rest.span).0).end();
        let pages = end.0 - rest.span.first.0;
        let block = rest.span.prefix(pages);
        rest.span = rest.span.without_prefix(pages);
        Some(block)
    }
}

/// Fills the absent pages of a span in this thread, and waits for pages that other threads are
/// filling. The error is the first page that cannot be filled.
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
            RunOutcome::Filled(0) => 0,
            RunOutcome::Filled(pages) => {
                changing = None;
                pages
            }
            RunOutcome::Changing if extent.waits(changing.get_or_insert_with(Instant::now)) => {
                thread::yield_now();
                0
            }
            // The caller needs the rest no longer.
            RunOutcome::Changing if !(extent.go_on)() => return first,
            RunOutcome::Changing => return first.and_then(|()| Err(no_rest(region, rest))),
            RunOutcome::Failed(failure, _) if extent.ends_at_failure(region) => return Err(failure),
            RunOutcome::Failed(failure, pages) => {
                first = first.and(Err(failure));
                pages
            }
        };
        rest = rest.without_prefix(pages);
    }
}

/// The outcome for a run of pages.
enum RunOutcome {
    /// This number of pages is filled, now or before. 0: look at the first page again.
    Filled(usize),
    /// The memory map is changing.
    Changing,
    /// A page cannot be filled. The caller skips this number of pages.
    Failed(Arc<Failure>, usize),
}

/// Fills the first pages of a gap, or waits for the thread that is filling them.
fn fill_run(region: &Mapping, gap: Span, buffers: &mut Option<Buffers>) -> Result<RunOutcome, Arc<Failure>> {
    if region.pages.state(gap.first) == PageState::Present {
        return Ok(RunOutcome::Filled(1));
    }
    let block = gap.prefix(BLOCK_PAGES - gap.first.0 % BLOCK_PAGES);
    // As a fault does: whole units of the source, so that each unit is read once.
    let units = region.with_read_units(block);
    let wanted = gap.prefix(units.end().0 - gap.first.0);
    let filling = FillingCaller::new(region, units);
    // A thread that finds every page present needs no buffers.
    let buffers = match buffers {
        Some(buffers) => buffers,
        None => {
            buffers.insert(Buffers::new().map_err(|errno| Arc::new(failure_at(region, gap, errno.into())))?)
        }
    };
    let sources = Sources::new(region, buffers, Attempts::default());
    let mut populate = Populate { sources, units, wanted: wanted.prefix(0) };
    let end = match journey(region, Wanted::Absent(wanted), &mut populate) {
        Ok(()) => return Ok(RunOutcome::Filled(populate.wanted.pages)),
        Err(end) => end,
    };
    drop(filling);
    match end {
        Unfilled::Changing | Unfilled::Later | Unfilled::GivenBack => Ok(RunOutcome::Changing),
        // Skips no page: the next look finds the failed page.
        Unfilled::Failed(failure) => Ok(RunOutcome::Failed(failure, 0)),
        Unfilled::Unclaimed(Unclaimed::Resident) => Ok(RunOutcome::Filled(1)),
        Unfilled::Unclaimed(Unclaimed::Poisoned) if region.lacks_marker(gap.first) => {
            Ok(RunOutcome::Filled(0))
        }
        // If no failure is recorded, the page was discarded meanwhile: look again.
        Unfilled::Unclaimed(Unclaimed::Poisoned) => {
            let failure = region.failure(gap.first);
            Ok(failure.map_or(RunOutcome::Filled(0), |failure| RunOutcome::Failed(failure, 1)))
        }
        Unfilled::Unclaimed(Unclaimed::Filling) => wait_for_other(region, gap),
    }
}

/// Waits for the thread that is filling the first page of a gap.
fn wait_for_other(region: &Mapping, gap: Span) -> Result<RunOutcome, Arc<Failure>> {
    if callers::fills(callers::this_thread(), region, gap.first) {
        return Err(Arc::new(failure_at(region, gap, FailureReason::Nested.error(NESTED))));
    }
    region.pages.wait_while_filling(gap.first);
    Ok(RunOutcome::Filled(0))
}

struct Populate<'a> {
    sources: Sources<'a>,
    /// The pages that may be read with the wanted ones.
    units: Span,
    /// The pages of the claim that the caller wants.
    wanted: Span,
}

impl Filler for Populate<'_> {
    fn claimed(&mut self, claim: &mut Claim<'_>) {
        self.wanted = claim.span();
        claim.grow_within(self.units);
    }

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        self.sources.fill(span)
    }

    fn installed(&mut self, pages: usize) {
        self.sources.installed(pages);
    }

    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        // A page that the caller does not want may have failed: without them, the read is repeated.
        if !matches!(error, InstallError::Changing) && claim.shrink_within(self.wanted) {
            discard(error);
            return Ok(());
        }
        self.sources.wait_or_fail(claim, error)
    }
}

/// The failure if the owner of adopted memory discards pages without a pause: the kernel fills no
/// page meanwhile.
fn no_rest(region: &Mapping, rest: Span) -> Arc<Failure> {
    let reason = "the process that owns the memory discards or moves pages all the time, and the kernel fills none meanwhile";
    Arc::new(failure_at(region, rest, FailureReason::TimedOut.error(reason)))
}

const NESTED: &str = "this thread is filling the page already, below a signal handler or a source that has called for it: let it \
                      return first";

/// From this size on, helper threads join in. For less, starting a thread costs more than it saves.
const PARALLEL_PAGES: usize = 16 * BLOCK_PAGES;
/// The most threads by default. More would only wait for memory.
const THREADS_MAX: usize = 4;
/// The longest time to wait for a memory map that changes without a pause, when the memory is left
/// to its owner.
const CHANGING_MAX: Duration = Duration::from_secs(5);
