//! Poison: the end of a page that cannot be filled. Its threads get a signal, never zeros.

use crate::error::Failure;
use crate::fault::error::Unfilled;
use crate::fault::held::{Changing, Held, held, held_now};
use crate::fault::install::count;
use crate::method::Method;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState, Wake};
use pagestitch_kernel::Features;
use pagestitch_kernel::{Errno, Outcome, Span};
use std::sync::Arc;
use std::thread;

/// Poisons the claim's first page and keeps the failure.
pub(crate) fn fail(region: &Mapping, claim: &mut Claim<'_>, failure: Failure) -> Unfilled {
    match held(region, claim.span().prefix(1)) {
        Ok(held) => fail_held(region, claim, failure, &held),
        Err(Changing) => Unfilled::Changing,
    }
}

/// As [`fail`], for a thread that must not block: [`Unfilled::Changing`] also if the lock for
/// discard events is taken.
pub(crate) fn fail_now(region: &Mapping, claim: &mut Claim<'_>, failure: Failure) -> Unfilled {
    match held_now(region, claim.span().prefix(1)) {
        Ok(held) => fail_held(region, claim, failure, &held),
        Err(Changing) => Unfilled::Changing,
    }
}

fn fail_held(region: &Mapping, claim: &mut Claim<'_>, failure: Failure, _: &Held<'_>) -> Unfilled {
    let page = claim.span().first;
    let failure = Arc::new(failure);
    if region.owner_has_ended() {
        // No thread can touch the pages of an ended owner, and there may be millions to report.
        return Unfilled::Failed(failure);
    }
    // The failure is kept first: a thread that finds the page poisoned then finds the reason.
    region.record_failure(page, Arc::clone(&failure));
    if let Some(adopted) = region.target.foreign() {
        adopted.note_unavailable(&region.name);
    }
    if let Err(end) = poison(region, page.span()) {
        return end;
    }
    settled(region, claim, &failure);
    Unfilled::Failed(failure)
}

/// Keeps the failure of the claim's first page, which is inaccessible already, and settles the page as
/// poisoned.
pub(crate) fn settle_poisoned(region: &Mapping, claim: &mut Claim<'_>, failure: Arc<Failure>) {
    region.record_failure(claim.span().first, Arc::clone(&failure));
    settled(region, claim, &failure);
}

fn settled(region: &Mapping, claim: &mut Claim<'_>, failure: &Arc<Failure>) {
    let page = claim.span().first;
    claim.settle(1, PageState::Poisoned);
    region.settle_failure(page, failure);
    count(region, page.span(), Method::Poison);
    log!(warn, region = region.name, page = page.0, %failure, "page poisoned");
    region.report(page, failure);
}

/// Poisons a span again for the threads that wait there. If the memory map is changing, these threads
/// are woken and fault again.
pub(crate) fn poison_again(region: &Mapping, span: Span) {
    if poison(region, span).is_err() {
        region.wake(span);
        // Let the thread that changes the map finish.
        thread::yield_now();
    }
}

/// Poisons a span: threads that wait there, or touch it later, get SIGBUS. Repeating it is
/// harmless.
pub(crate) fn poison(region: &Mapping, span: Span) -> Result<(), Unfilled> {
    if region.uffd.features().contains(Features::POISON) {
        let range = region.target.addresses(span);
        match region.uffd.of(range).poison(range) {
            Outcome::Changing => return Err(Unfilled::Changing),
            // Not registered: unmapped, moved, or revoked before. Another mapping may be there by
            // now, which must not change.
            Outcome::Done | Outcome::AlreadyThere | Outcome::NotRegistered => {
                region.wake(span);
                return Ok(());
            }
            // The process has ended, and its waiting threads with it.
            Outcome::ProcessGone if region.target.foreign().is_some() => return Ok(()),
            // No memory for the poison marker: fall through to revoking the page, which needs none.
            _ => {}
        }
    }
    if let Err(errno) = region.target.revoke(span) {
        if errno == Errno::EAGAIN && region.target.foreign().is_some() {
            // Memory without a known owner to kill, such as a forked child's: the waiting thread
            // faults again, when there may be memory for the poison marker.
            return Err(Unfilled::Changing);
        }
        if errno == Errno::ESRCH && region.target.foreign().is_some() {
            // The owner has ended meanwhile.
            return Ok(());
        }
        // The waiting thread can get neither bytes nor a signal: only zeros or a hang would be
        // left.
        eprintln!("pagestitch: region {}: cannot take a failed page away ({errno}): aborting", region.name);
        std::process::abort();
    }
    region.wake(span);
    Ok(())
}
