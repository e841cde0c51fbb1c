//! Leaving: what was not filled is made bad, and the memory is its owner's again.

use crate::serve::Served;
use crate::space::OnUnavailable;
use crate::space::page_table::State;
use crate::space::target::Foreign;
use pagestitch_kernel::{Batch, Errno, Outcome, Page, Span};
use std::thread;
use std::time::{Duration, Instant};

/// The last act before the uffd of adopted memory is closed, when nobody works for the region any more: what was not filled
/// is made bad, as it would be zeros. What the owner let go of is zeros, and is left.
pub(crate) fn abandon(region: &Served, adopted: &Foreign) {
    if adopted.has_ended() {
        return;
    }
    let (mut rest, mut lost) = (region.target.all(), 0);
    let mut progress = Instant::now();
    while let Some(absent) = next_absent(region, adopted, rest) {
        // Before it meets a page that is bad.
        if adopted.on_unavailable == OnUnavailable::Kill {
            return end(region, adopted, Outcome::Refused(Errno::ENODATA));
        }
        rest = rest.without_prefix(absent.first.0 - rest.first.0);
        match lose(region, adopted, adopted.contiguous(absent)) {
            Ok((0, _)) if progress.elapsed() > CHANGING_MAX => {
                return end(region, adopted, Outcome::Changing);
            }
            Ok((0, _)) => {}
            Ok((pages, bad)) => {
                lost += bad;
                (rest, progress) = (rest.without_prefix(pages), Instant::now());
            }
            Err(outcome) => return end(region, adopted, outcome),
        }
    }
    if lost > 0 {
        log!(warn, region = region.name, pages = lost, "abandoned before it was filled: poisoned");
    }
    release(region, adopted);
}

/// The next pages of a span that are to have bytes and have none, as many as are marked at once.
fn next_absent(region: &Served, adopted: &Foreign, span: Span) -> Option<Span> {
    let mut rest = span;
    while !rest.is_empty() {
        // No farther than it is used: who looks at all that is left each time looks for ever in a large guest.
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

/// Ends the registration: its owner may hold the uffd, too, and would wait for ever for what nobody reads from it.
fn release(region: &Served, adopted: &Foreign) {
    for part in &adopted.parts {
        // What is refused was unmapped, or its owner has ended.
        let _ = region.uffd.unregister(adopted.addresses(part.span));
    }
    // Who was on the way to let go of something waits until that is read.
    for _ in 0..2 {
        read_without_serving(region);
        thread::sleep(Duration::from_millis(1));
    }
}

fn read_without_serving(region: &Served) {
    region.read_events(&mut Batch::with_capacity(POISON_PAGES), &mut |news| region.handle_deferred(news));
}

/// The absent pages of a span up to the next that is not.
fn first_absent(region: &Served, span: Span) -> Span {
    let here = |page: &Page| matches!(region.pages.state(*page), State::Present | State::Poisoned);
    let before = span.iter().take_while(here).count();
    let rest = span.without_prefix(before);
    rest.prefix(rest.iter().take_while(|page| !here(page)).count())
}

/// Makes pages bad that are missing: how many were looked at, and how many of these were.
fn lose(region: &Served, adopted: &Foreign, span: Span) -> Result<(usize, usize), Outcome> {
    match region.uffd.poison(adopted.addresses(span)) {
        Outcome::Done => Ok((span.pages, span.pages)),
        Outcome::Partial { bytes } => Ok((bytes / adopted.page.bytes(), bytes / adopted.page.bytes())),
        Outcome::AlreadyThere => Ok((1, 0)),
        Outcome::Changing => {
            // The owner lets go of something, and waits for us to know.
            read_without_serving(region);
            thread::yield_now();
            Ok((0, 0))
        }
        // Unmapped since: nobody can touch it.
        Outcome::NotRegistered => Ok((1, 0)),
        outcome => Err(outcome),
    }
}

/// There is no way to mark pages: the owner has to end, or it would read zeros or wait for ever.
fn end(region: &Served, adopted: &Foreign, why: Outcome) {
    if why == Outcome::ProcessGone {
        return;
    }
    match adopted.end_owner() {
        Ok(()) => {
            log!(warn, region = region.name, ?why, "abandoned before it was filled: its owner was ended")
        }
        Err(errno) => {
            log!(error, region = region.name, ?why, %errno, "abandoned, and its owner cannot be ended: it may wait for ever");
            // Closing would show it zeros: better that it waits.
            region.keep_open();
        }
    }
}

/// Pages marked at once.
const POISON_PAGES: usize = 512;
/// How long an owner may discard pages without end, which nothing can be marked under, before it is ended.
const CHANGING_MAX: Duration = Duration::from_secs(1);
