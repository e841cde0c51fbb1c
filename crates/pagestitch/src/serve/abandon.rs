//! The end of a region of adopted memory: its absent pages are poisoned, and the memory is left to
//! its owner.

use crate::serve::Served;
use crate::space::OnUnavailable;
use crate::space::page_table::PageState;
use crate::space::target::Foreign;
use pagestitch_kernel::{Batch, Errno, Outcome, Page, Span};
use std::thread;
use std::time::{Duration, Instant};

/// The last step before the uffd of adopted memory is closed, when no worker serves the region any
/// more. It poisons the unfilled pages, because they would read as zeros. Pages that the owner has
/// discarded are zeros, and stay so.
///
/// False if the owner has to keep its registration, because missing pages would read as zeros.
pub(crate) fn abandon(region: &Served, adopted: &Foreign) -> bool {
    if adopted.has_ended() {
        return true;
    }
    let (mut rest, mut lost) = (region.target.all(), 0);
    let mut progress = Instant::now();
    while let Some(absent) = next_absent(region, adopted, rest) {
        // The owner ends before it meets a poisoned page.
        if adopted.on_unavailable == OnUnavailable::Kill {
            return kill_owner(region, adopted, Outcome::Refused(Errno::ENODATA));
        }
        rest = rest.without_prefix(absent.first.0 - rest.first.0);
        match poison_missing(region, adopted, adopted.contiguous(absent)) {
            Ok((0, _)) if progress.elapsed() > CHANGING_MAX => {
                return kill_owner(region, adopted, Outcome::Changing);
            }
            Ok((0, _)) => {}
            Ok((pages, bad)) => {
                lost += bad;
                (rest, progress) = (rest.without_prefix(pages), Instant::now());
            }
            Err(outcome) => return kill_owner(region, adopted, outcome),
        }
    }
    if lost > 0 {
        log!(warn, region = region.name, pages = lost, "abandoned before it was filled: poisoned");
    }
    release(region, adopted);
    true
}

/// The next pages of a span that are absent and not discarded, as many as one call poisons.
fn next_absent(region: &Served, adopted: &Foreign, span: Span) -> Option<Span> {
    let mut rest = span;
    while !rest.is_empty() {
        // Looks at no more pages than one call poisons: looking at the whole rest each time would
        // take far too long in a large guest.
        let window = rest.prefix(POISON_PAGES);
        let kept = adopted.next_kept(window);
        let absent = if kept.is_empty() { kept } else { first_absent(region, kept) };
        if !absent.is_empty() {
            return Some(absent);
        }
        let seen = if kept.is_empty() { window } else { kept };
        rest = rest.without_prefix(seen.end().0 - rest.first.0);
    }
    None
}

/// Ends the registration. Otherwise an owner that holds the uffd too would wait forever for events
/// that no thread reads.
fn release(region: &Served, adopted: &Foreign) {
    for part in &adopted.parts {
        // A refusal means that the range is unmapped, or that its owner has ended.
        let _ = region.uffd.unregister(adopted.addresses(part.span));
    }
    // An owner that has begun to discard pages waits until that event is read. The kernel fills no page
    // meanwhile, and may queue the event a moment later.
    let (began, first) = (Instant::now(), adopted.addresses(region.target.all().prefix(1)));
    loop {
        region.read_without_serving(&mut Batch::with_capacity(POISON_PAGES));
        let is_changing = region.uffd.get(0).continue_pages(first) == Outcome::Changing;
        if !is_changing || began.elapsed() > CHANGING_MAX {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// The first run of absent pages in a span.
fn first_absent(region: &Served, span: Span) -> Span {
    let here = |page: &Page| matches!(region.pages.state(*page), PageState::Present | PageState::Poisoned);
    let before = span.iter().take_while(here).count();
    let rest = span.without_prefix(before);
    rest.prefix(rest.iter().take_while(|page| !here(page)).count())
}

/// Poisons the absent pages of a span. Returns the number of pages that it has looked at, and the
/// number of pages that it has poisoned.
fn poison_missing(region: &Served, adopted: &Foreign, span: Span) -> Result<(usize, usize), Outcome> {
    match region.uffd.get(0).poison_protected(adopted.addresses(span)) {
        Outcome::Done => Ok((span.pages, span.pages)),
        Outcome::Partial { bytes } => Ok((bytes / adopted.page.bytes(), bytes / adopted.page.bytes())),
        Outcome::AlreadyThere => Ok((1, 0)),
        Outcome::Changing => {
            // The owner is discarding pages, and waits until that event is read.
            region.read_without_serving(&mut Batch::with_capacity(POISON_PAGES));
            thread::yield_now();
            Ok((0, 0))
        }
        // The page was unmapped: no thread can touch it.
        Outcome::NotRegistered => Ok((1, 0)),
        outcome => Err(outcome),
    }
}

/// Kills the owner if pages cannot be poisoned, or must not be: it would read zeros or wait
/// forever. False if it cannot be killed.
fn kill_owner(region: &Served, adopted: &Foreign, reason: Outcome) -> bool {
    if reason == Outcome::ProcessGone {
        return true;
    }
    match adopted.kill_owner() {
        Ok(()) => {
            log!(warn, region = region.name, ?reason, "abandoned before it was filled: its owner was killed");
            true
        }
        Err(errno) => {
            log!(error, region = region.name, ?reason, %errno, "abandoned, and its owner cannot be killed: it may wait forever");
            // The uffd stays open, because closing it would show zeros to the owner; it waits
            // instead.
            region.keep_open();
            false
        }
    }
}

/// The most pages that one call poisons.
const POISON_PAGES: usize = 512;
/// An owner that discards pages for this long without a pause, so that none can be poisoned, is
/// killed. At the end, its last discard is waited for as long.
const CHANGING_MAX: Duration = Duration::from_secs(1);
