//! The journey of a fault: locate, claim, fill, install, settle, record. Read this page first.
//!
//! [`journey`] is the only function that claims pages, fills them and installs them. Two pages are
//! installed beside it, without a claim: one that a signal handler touches during its own fill
//! (`beside`), and one that the kernel has unmapped (`owner`). A region that its build fills
//! (`serve/eager`) makes no journey: no thread can touch it before. The callers of the journey differ in
//! the pages that they want, in the place of the bytes, and in their reaction to a failure. Each
//! caller is a [`Filler`]:
//!
//! | caller | file | pages | bytes | on a failure |
//! |---|---|---|---|---|
//! | a worker, for a fault | `on_fault` | the page, or its block | sources | the policy of the chunk; a pause is queued |
//! | a worker, ahead of faults | `prefetch` | absent pages | sources | the page stays absent |
//! | a fetch that answers | `fetch`, `page_reads` | the pages of the fetch | the answer | as for the fault, or as for the prefetch |
//! | `populate`, `read_at` | `serve/populate` | absent pages | sources | the policy of the chunk; the caller sleeps through a pause |
//! | `retry_failed` | `serve/retry_failed` | a poisoned page | sources | the page stays poisoned |
//! | a signal handler | `serve/in_handler` | the page, or a later one while that is in work | memory, files | the page stays absent, and the thread gets its signal |

mod beside;
pub(crate) mod callers;
mod claim;
pub(crate) mod error;
mod fetch;
pub(crate) mod fill;
mod held;
mod install;
mod on_fault;
pub(crate) mod owner;
mod page_reads;
pub(crate) mod poison;
mod prefetch;
mod prefetch_job;
pub(crate) mod recovery;
mod request;
mod write_protect;

pub(crate) use beside::fill_beside;
pub(crate) use claim::Wanted;
pub(crate) use error::{InstallError, Unfilled};
pub(crate) use on_fault::{AfterFault, serve};
pub(crate) use page_reads::PageReads;
pub(crate) use prefetch::{fill_ahead, fill_requested, replay};
pub(crate) use prefetch_job::{NextStep, PrefetchJob};
pub(crate) use request::{FaultRequest, Host};
pub(crate) use write_protect::{let_write, let_write_beside};

use crate::signals::NoSignals;
use crate::space::page_table::{Claim, Wake};
use crate::space::{Mapping, Prepared, Residence};
use claim::claim;
use fill::Filled;
use install::install;
pub(crate) use install::{Mode, count};
use pagestitch_kernel::{Page, Span};

/// Claims pages, fills them and installs them. Afterwards each page is present or poisoned, or it is
/// absent and its waiting threads were woken, unless the error tells otherwise.
pub(crate) fn journey<F: Filler>(region: &Mapping, wanted: Wanted, filler: &mut F) -> Result<(), Unfilled> {
    let quiet = Quiet(region);
    let waker: &dyn Wake = if F::MODE.is_quiet() { &quiet } else { region };
    let mut claim = match claim(region, wanted, waker, F::MODE) {
        Ok(claim) => claim,
        Err(reason) => return Err(Unfilled::Unclaimed(reason)),
    };
    filler.claimed(&mut claim);
    let claimed = claim.span();
    let mut end = Ok(());
    while end.is_ok() && !claim.span().is_empty() {
        let Some(span) = bounded(region, &mut claim, filler, &mut end) else { continue };
        if filler.fetches(&mut claim) {
            continue;
        }
        let installed = match filler.fill(span) {
            // The install settles and records the pages. The bytes are passed by reference, because
            // a signal handler has a small stack.
            Ok(ref mut filled) => install(region, &mut claim, filled, F::MODE),
            Err(error) => Err(error),
        };
        end = match installed {
            Ok(pages) => {
                filler.installed(pages);
                Ok(())
            }
            Err(error) => filler.failed(&mut claim, error),
        };
    }
    drop(claim);
    if !F::MODE.is_quiet() {
        if let Some(residence) = &region.residence {
            residence.tidy();
        }
        // A source whose bytes are all installed is dropped with no claim held.
        region.release_sources(claimed);
    }
    end
}

/// The next pages of a claim to fill; `None` as [`in_budget`].
#[inline]
fn bounded<F: Filler>(
    region: &Mapping,
    claim: &mut Claim<'_>,
    filler: &mut F,
    end: &mut Result<(), Unfilled>,
) -> Option<Span> {
    match region.residence.as_deref().filter(|_| F::HAS_NO_BYTES) {
        Some(residence) => in_budget(region, residence, claim, filler, end),
        None => Some(claim.span()),
    }
}

/// As [`bounded`], in a region with a budget. There, a page that waits in standby comes back instead: `None`,
/// and `end` tells whether the journey goes on.
///
/// Not a part of its caller, because a signal handler has a small stack.
#[inline(never)]
fn in_budget<F: Filler>(
    region: &Mapping,
    residence: &dyn Residence,
    claim: &mut Claim<'_>,
    filler: &mut F,
    end: &mut Result<(), Unfilled>,
) -> Option<Span> {
    let writes = filler.writes(claim.span());
    // A signal handler that touches a page of its thread's claim must find the written bytes either in
    // standby or in the region.
    let prepared = match region.written_back().is_some() && callers::fills_itself(region, claim.span().first)
    {
        true => prepare_without_handlers(region, residence, claim, writes),
        false => prepare(region, residence, claim, writes),
    };
    match prepared {
        Prepared::Fill(span) => Some(span),
        Prepared::Returned => {
            filler.installed(1);
            None
        }
        Prepared::Changing => {
            retry(claim, filler, end);
            None
        }
    }
}

/// The first page of a claim is still absent, because the memory map is changing.
#[cold]
#[inline(never)]
fn retry<F: Filler>(claim: &mut Claim<'_>, filler: &mut F, end: &mut Result<(), Unfilled>) {
    *end = filler.failed(claim, InstallError::Changing);
}

#[inline(always)] // a signal handler has a small stack
fn prepare(
    region: &Mapping,
    residence: &dyn Residence,
    claim: &mut Claim<'_>,
    writes: Option<Page>,
) -> Prepared {
    let range = region.target.addresses(claim.span().prefix(1));
    residence.prepare(claim, range, region.uffd.of(range), writes)
}

/// Not a part of its caller, because a signal mask takes much of a small stack.
#[cold]
#[inline(never)]
fn prepare_without_handlers(
    region: &Mapping,
    residence: &dyn Residence,
    claim: &mut Claim<'_>,
    writes: Option<Page>,
) -> Prepared {
    let _quiet = NoSignals::until_dropped();
    prepare(region, residence, claim, writes)
}

/// The caller of a [`journey`]: the place of the bytes, and the reaction to a failure.
pub(crate) trait Filler {
    const MODE: Mode = Mode::Timed;
    /// False if the filler has the bytes of all pages before the journey begins.
    const HAS_NO_BYTES: bool = true;

    /// The page of a claimed span that a thread is about to write.
    fn writes(&self, _claimed: Span) -> Option<Page> {
        None
    }

    /// Called once, with the claim.
    fn claimed(&mut self, _claim: &mut Claim<'_>) {}

    /// Splits the first pages off the claim if their source answers later. False: fill them now.
    fn fetches(&mut self, _claim: &mut Claim<'_>) -> bool {
        false
    }

    /// Locates and fills the leading pages of a span that one method can install, at least one page.
    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError>;

    /// Called after so many pages are installed.
    fn installed(&mut self, _pages: usize) {}

    /// The reaction to an error of the claim's first page, or of its first pages at once: try again,
    /// or end the journey. The end gives the pages that are left back and wakes their waiters.
    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled>;
}

/// Wakes without a log, because a log takes locks.
struct Quiet<'r>(&'r Mapping);

impl Wake for Quiet<'_> {
    fn wake(&self, span: Span) {
        self.0.wake_quietly(span);
    }
}

/// The most pages filled at once: those of a huge page, at which the cost of a system call is
/// negligible.
pub(crate) const BLOCK_PAGES: usize = 512;
