//! Resolve and settle: tell the kernel what a page is, and read its answer. The one place where an [`Outcome`]
//! is interpreted.

use crate::region::Served;
use crate::region::page_table::{Claim, State, Wake};
use crate::source::{Content, Failure, Filled};
use pagestitch_kernel::support::Features;
use pagestitch_kernel::{Errno, Outcome, Span};
use std::io;
use std::sync::Arc;

/// Why a claim was not settled to its end.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The memory map is changing: events have to be read first.
    Changing,
    /// Its first page has failed, and was poisoned.
    Failed(Arc<Failure>),
}

/// Installs what was filled in the first pages of the claim, and settles them.
pub(super) fn install(region: &Served, claim: &mut Claim<'_>, filled: &Filled<'_>) -> Result<(), Stopped> {
    let page_bytes = region.page_size().bytes();
    let mut done = 0;
    while done < filled.pages {
        let span = claim.span().prefix(filled.pages - done);
        let range = region.reservation.addresses(span);
        let outcome = match filled.content.bytes() {
            Some(bytes) => region.uffd.copy(range, &bytes[done * page_bytes..][..range.bytes()]),
            None => region.uffd.zero(range),
        };
        let pages = match outcome {
            Outcome::Done => span.pages,
            Outcome::Partial { bytes } => bytes / page_bytes,
            Outcome::AlreadyThere => {
                // The kernel wakes nobody then, and the waiter may have come before the page.
                region.wake(span.prefix(1));
                1
            }
            Outcome::Changing => {
                region.counters.retries.add(1);
                return Err(Stopped::Changing);
            }
            refused => return Err(fail(region, claim, refusal(region, span, refused))),
        };
        claim.settle(pages, State::Present);
        tell(region, span.prefix(pages), &filled.content);
        done += pages;
    }
    Ok(())
}

/// Poisons the claim's first page and keeps the reason. Never zeros for bytes.
pub(super) fn fail(region: &Served, claim: &mut Claim<'_>, failure: Failure) -> Stopped {
    let page = claim.span().first;
    let failure = Arc::new(failure);
    // Kept first: who finds the page poisoned finds the reason.
    region.keep_failure(page, Arc::clone(&failure));
    if let Err(stopped) = poison(region, page.span()) {
        return stopped;
    }
    claim.settle(1, State::Poisoned);
    region.counters.pages_poisoned.add(1);
    tracing::warn!(region = region.name, page = page.0, %failure, "page poisoned");
    Stopped::Failed(failure)
}

/// Makes a span bad: who waits there, or touches it later, gets SIGBUS. Doing it twice does no harm.
pub(super) fn poison(region: &Served, span: Span) -> Result<(), Stopped> {
    if region.uffd.features().contains(Features::POISON) {
        match region.uffd.poison(region.reservation.addresses(span)) {
            Outcome::Changing => return Err(Stopped::Changing),
            Outcome::Done | Outcome::AlreadyThere => {
                region.wake(span);
                return Ok(());
            }
            // No memory for the mark, or no such mapping: fall through to what needs neither.
            _ => {}
        }
    }
    if let Err(errno) = region.reservation.revoke(span) {
        // The waiter can neither be given bytes nor a signal: what is left is zeros or a hang.
        eprintln!("pagestitch: region {}: cannot take a failed page away ({errno}): aborting", region.name);
        std::process::abort();
    }
    region.wake(span);
    Ok(())
}

/// A refusal of the kernel, as the failure of the page it concerns.
fn refusal(region: &Served, span: Span, outcome: Outcome) -> Failure {
    let error = match outcome {
        Outcome::NotRegistered | Outcome::ProcessGone => {
            io::Error::other("the page is not mapped any more: somebody unmapped or moved part of the region")
        }
        Outcome::SourceUnreadable => io::Error::other(
            "the source's memory cannot be read: unmapped, or past a truncated file's end (EFAULT)",
        ),
        Outcome::NoMemory => Errno::ENOMEM.into(),
        Outcome::Busy => Errno::EBUSY.into(),
        Outcome::Refused(errno) => errno.into(),
        Outcome::Done | Outcome::Partial { .. } | Outcome::AlreadyThere | Outcome::Changing => {
            unreachable!("{outcome:?} is not a refusal")
        }
    };
    let offsets = region.page_size().offsets(span);
    region.layout.piece_at(offsets.start, offsets.end).failed(error)
}

fn tell(region: &Served, span: Span, content: &Content<'_>) {
    let counters = &region.counters;
    let (pages, bytes) = (span.pages as u64, region.page_size().bytes_of(span) as u64);
    let (how, counter) = match content {
        Content::Straight(..) => ("copied", &counters.pages_copied),
        Content::Read(_) => ("read", &counters.pages_read),
        Content::Gathered(_) => ("gathered", &counters.pages_gathered),
        Content::Zero => ("zeroed", &counters.pages_zeroed),
    };
    counter.add(pages);
    if content.bytes().is_some() {
        counters.bytes_copied.add(bytes);
    }
    tracing::trace!(region = region.name, page = span.first.0, pages, how, "installed");
}
