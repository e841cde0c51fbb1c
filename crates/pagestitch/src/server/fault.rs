//! The journey of a fault. Read this page first.

use crate::region::Served;
use crate::region::page_table::{Claim, State, Wake};
use crate::server::resolve::{Stopped, fail, install, poison};
use crate::source::{Failure, fill};
use pagestitch_kernel::{Page, Span};
use std::sync::Arc;
use std::thread;

/// Serves a fault. When it returns, whoever waits for the page runs, with its bytes or with a signal, or has been
/// woken to fault again. Says which pages to fill ahead, if whoever it is seems to read on.
pub(super) fn serve(region: &Served, page: Page, staging: &mut [u8]) -> Option<Span> {
    region.counters.faults.add(1);
    let claim = claim_block(region, page).or_else(|| claim(region, page))?;
    if let Err(Stopped::Changing) = supply(region, claim, staging) {
        // The map is changing: let who changes it finish. The page was given back and comes as a new fault.
        thread::yield_now();
    }
    region.streams.as_ref()?.widen(page)
}

/// Fills absent pages of a span before anybody asks for them. Stops where a source fails: that page is nobody's yet,
/// and asked for again when it is touched.
pub(super) fn fill_ahead(region: &Served, span: Span, staging: &mut [u8]) {
    let mut rest = span;
    loop {
        let gap = region.in_place.next_gap(rest);
        if gap.is_empty() {
            return;
        }
        rest = rest.without_prefix(gap.first.0 - rest.first.0);
        // Somebody was quicker where there is no claim to be had.
        let Ok(mut claim) = region.pages.claim_run(gap.prefix(STAGING_PAGES), region) else {
            rest = rest.without_prefix(1);
            continue;
        };
        rest = rest.without_prefix(claim.span().pages);
        while !claim.span().is_empty() {
            let Ok(filled) = fill(region, claim.span(), staging) else { return };
            if install(region, &mut claim, &filled).is_err() {
                return;
            }
            region.counters.pages_ahead.add(filled.pages as u64);
        }
    }
}

/// Fills and installs every page of a claim. On an early return the dropped claim gives back what is left and
/// wakes its waiters.
fn supply(region: &Served, mut claim: Claim<'_>, staging: &mut [u8]) -> Result<(), Stopped> {
    while !claim.span().is_empty() {
        match fill(region, claim.span(), staging) {
            Ok(filled) => install(region, &mut claim, &filled)?,
            Err(failure) => return Err(fail(region, &mut claim, failure)),
        }
    }
    Ok(())
}

/// Claims the whole block around a page whose pages can all move as one.
fn claim_block(region: &Served, page: Page) -> Option<Claim<'_>> {
    let block = region.movable_block(page)?;
    let claim = region.pages.claim_run(block, region).ok()?;
    // Dropped, it gives back what it has.
    (claim.span().pages == block.pages).then_some(claim)
}

/// Claims the page of a fault. `None`: somebody else fills it, or it is there, and the waiter was or will be woken.
fn claim(region: &Served, page: Page) -> Option<Claim<'_>> {
    loop {
        match region.pages.claim(page, region) {
            Ok(claim) => return Some(claim),
            // Whoever fills it wakes everybody when it is settled; if that has just been, look again.
            Err(claimed) if claimed.is_claimed() && region.pages.want(page) => return None,
            Err(State::Filling | State::Wanted | State::Forgotten | State::Absent) => {}
            Err(State::Present) if region.is_resident(page) => {
                region.counters.late.add(1);
                region.wake(page.span());
                return None;
            }
            // It was filled, and the kernel has let go of it since, without having told us yet. Just to wake
            // would make the waiter fault for ever.
            Err(State::Present) => {
                if let Ok(claim) = region.pages.claim_from(page, State::Present, region) {
                    return Some(claim);
                }
            }
            Err(State::Poisoned) => {
                // The thread had been queued by then. Poisoning once more wakes it into its signal, and is right
                // also where the mark was let go since.
                let _ = poison(region, page.span());
                return None;
            }
        }
    }
}

/// Fills the absent pages of a span in the calling thread. Stops at the first page whose source fails.
pub(crate) fn populate(region: &Served, span: Span) -> Result<(), Arc<Failure>> {
    let mut staging = vec![0; STAGING_PAGES * region.page_size().bytes()];
    populate_absent(region, span, &mut staging)?;
    // Not again and again: a page that was swapped out looks as if it had been let go, and is found to be there.
    if region.forget_let_go(span) {
        populate_absent(region, span, &mut staging)?;
    }
    Ok(())
}

fn populate_absent(region: &Served, span: Span, staging: &mut [u8]) -> Result<(), Arc<Failure>> {
    let mut rest = span;
    loop {
        let gap = region.in_place.next_gap(rest);
        if gap.is_empty() {
            return Ok(());
        }
        rest = rest.without_prefix(gap.first.0 - rest.first.0);
        match region.pages.claim_run(gap.prefix(RUN_PAGES), region) {
            Ok(claim) => {
                let pages = claim.span().pages;
                match supply(region, claim, staging) {
                    Ok(()) => rest = rest.without_prefix(pages),
                    Err(Stopped::Changing) => thread::yield_now(),
                    Err(Stopped::Failed(failure)) => return Err(failure),
                }
            }
            Err(State::Present) => rest = rest.without_prefix(1),
            // Without a failure on record it was let go between the two looks: look again.
            Err(State::Poisoned) => region.failure(rest.first).map_or(Ok(()), Err)?,
            Err(State::Absent) => {}
            Err(State::Filling | State::Wanted | State::Forgotten) => {
                region.pages.wait_while_filling(rest.first);
            }
        }
    }
}

/// What one read of a source can fill.
pub(super) const STAGING_PAGES: usize = 64;
/// What populate claims at once: the 2 MiB at which the kernel's cost of a call no longer shows.
const RUN_PAGES: usize = 512;
