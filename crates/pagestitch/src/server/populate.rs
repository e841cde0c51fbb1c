//! Populate: the same steps for pages that nobody has touched yet, in the caller's thread, and in more of them where there
//! is much to fill.

use crate::region::Served;
use crate::region::page_table::State;
use crate::server::callers::{self, Mark};
use crate::server::fault::{BLOCK_PAGES, supply};
use crate::server::pool::NoSignals;
use crate::server::resolve::Stopped;
use crate::source::{Buffers, Failure};
use pagestitch_kernel::Span;
use parking_lot::Mutex;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

/// Fills the absent pages of a span. Stops at the first page whose source fails; the pages before it are filled.
pub(crate) fn populate(region: &Served, span: Span) -> Result<(), Arc<Failure>> {
    populate_once(region, span)?;
    // Not again and again: a page that was swapped out looks as if it had been let go, and is found to be there.
    if region.lacks_any(span) { populate_once(region, span) } else { Ok(()) }
}

fn populate_once(region: &Served, span: Span) -> Result<(), Arc<Failure>> {
    if span.pages < PARALLEL_PAGES {
        return fill_absent(region, span, &mut None);
    }
    let work = Work { region, rest: Mutex::new(Rest { span, failed: None }) };
    thread::scope(|scope| {
        let quiet = NoSignals::until_dropped();
        let helpers = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX) - 1;
        for index in 0..helpers {
            let named = thread::Builder::new().name(format!("populate/{index}"));
            // One that cannot be had is one fewer.
            let _ = named.spawn_scoped(scope, || work.help());
        }
        drop(quiet);
        work.help();
    });
    work.rest.into_inner().failed.map_or(Ok(()), |(_, failure)| Err(failure))
}

/// A span that several threads fill, block by block from its start.
struct Work<'r> {
    region: &'r Served,
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
            if let Err(failure) = fill_absent(self.region, block, &mut buffers) {
                let failed = &mut self.rest.lock().failed;
                if failed.as_ref().is_none_or(|(other, _)| block.first < other.first) {
                    *failed = Some((block, failure));
                }
            }
        }
    }

    /// None is taken after a failure; those before it have been, and whoever took them fills them.
    fn next_block(&self) -> Option<Span> {
        let mut rest = self.rest.lock();
        if rest.failed.is_some() || rest.span.is_empty() {
            return None;
        }
        let (block, later) = self.region.first_block(rest.span);
        rest.span = later;
        Some(block)
    }
}

/// Fills the absent pages of a span in this thread, and waits for those that others are filling.
fn fill_absent(region: &Served, span: Span, buffers: &mut Option<Buffers>) -> Result<(), Arc<Failure>> {
    let mut rest = span;
    loop {
        let gap = region.next_gap(rest);
        if gap.is_empty() {
            return Ok(());
        }
        rest = rest.without_prefix(gap.first.0 - rest.first.0);
        if region.pages.state(rest.first) == State::Present {
            rest = rest.without_prefix(1);
            continue;
        }
        let to_block_end = BLOCK_PAGES - rest.first.0 % BLOCK_PAGES;
        let wanted = gap.prefix(to_block_end);
        let mark = Mark::new(region, wanted);
        match region.pages.claim_run(wanted, region) {
            Ok(claim) => {
                let claimed = claim.span();
                // Who finds everything there needs none.
                let buffers = match buffers {
                    Some(buffers) => buffers,
                    None => buffers
                        .insert(Buffers::new().map_err(|errno| failure_of(region, rest, errno.into()))?),
                };
                match supply(region, claim, claimed, buffers) {
                    Ok(()) => rest = rest.without_prefix(claimed.pages),
                    Err(Stopped::Changing) => thread::yield_now(),
                    Err(Stopped::Failed(failure)) => return Err(failure),
                }
            }
            Err(State::Present) => rest = rest.without_prefix(1),
            // Without a failure on record it was let go between the two looks: look again.
            Err(State::Poisoned) => region.failure(rest.first).map_or(Ok(()), Err)?,
            Err(State::Absent) => {}
            Err(State::Filling | State::Wanted | State::Forgotten) => {
                drop(mark);
                if callers::fills(callers::this_thread(), region, rest.first) {
                    return Err(failure_of(region, rest, io::Error::new(io::ErrorKind::Deadlock, NESTED)));
                }
                region.pages.wait_while_filling(rest.first);
            }
        }
    }
}

fn failure_of(region: &Served, span: Span, error: io::Error) -> Arc<Failure> {
    let offsets = region.page_size().offsets(span);
    Arc::new(region.layout.piece_at(offsets.start, offsets.end).failed(error))
}

const NESTED: &str = "this thread is filling the page already, below a signal handler or a source that has called for it: let it \
                      return first";

/// From here on, other threads help: to start one has to be worth it.
const PARALLEL_PAGES: usize = 16 * BLOCK_PAGES;
/// Past it, memory is what is waited for.
const THREADS_MAX: usize = 4;
