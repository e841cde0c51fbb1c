//! Leaving: what was not filled is made bad, and the memory is its owner's again.

use super::memory::Loss;
use super::pages::Adopted;
use crate::region::Served;
use crate::region::page_table::State;
use pagestitch_kernel::{AddressRange, Batch, Errno, Event, Outcome, Page, PageSize, Span, Uffd};
use std::thread;
use std::time::Duration;

/// The last act before the uffd of adopted memory is closed, when nobody works for the region any more: what was not filled
/// is made bad, as it would be zeros. What the owner let go of is zeros, and is left.
pub(crate) fn abandon(region: &Served, adopted: &Adopted) {
    let mut rest = region.place.all();
    let mut lost = 0;
    while let Some(absent) = next_absent(region, adopted, rest) {
        // Before it meets a page that is bad.
        if adopted.loss == Loss::Kill {
            return end(region, adopted, Outcome::Refused(Errno::ENODATA));
        }
        rest = rest.without_prefix(absent.first.0 - rest.first.0);
        match lose(region, adopted, adopted.contiguous(absent)) {
            Ok((pages, bad)) => {
                lost += bad;
                rest = rest.without_prefix(pages);
            }
            Err(outcome) => return end(region, adopted, outcome),
        }
    }
    if lost > 0 {
        tracing::warn!(region = region.name, pages = lost, "abandoned before it was filled: poisoned");
    }
    release(region, adopted);
}

/// The next pages of a span that are to have bytes and have none, as many as are marked at once.
fn next_absent(region: &Served, adopted: &Adopted, span: Span) -> Option<Span> {
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

/// Addresses that somebody has moved part of a region to, with what of it is registered: they are not the region's any more.
#[derive(Debug)]
pub(crate) struct Stray {
    start: usize,
    bytes: usize,
    /// How many of them have been seen to.
    seen: usize,
}

impl Stray {
    pub(crate) const fn new(start: usize, bytes: usize) -> Self {
        Self { start, bytes, seen: 0 }
    }

    /// Makes what is missing there bad, and ends the registration, which wakes whoever waits. False: the map is changing, and
    /// it is to be tried again when events have been read.
    ///
    /// An error where there are no marks, and what is missing would be zeros.
    pub(crate) fn close(&mut self, uffd: &Uffd, page: PageSize) -> Result<bool, Outcome> {
        while self.seen < self.bytes {
            let bytes = (self.bytes - self.seen).min(POISON_PAGES * page.bytes());
            let part =
                AddressRange::new(self.start + self.seen, bytes, page).ok_or(Outcome::NotRegistered)?;
            self.seen += match uffd.poison(part) {
                Outcome::Done => bytes,
                Outcome::Partial { bytes } => bytes,
                // It is there; or nobody is.
                Outcome::AlreadyThere | Outcome::NotRegistered => page.bytes(),
                Outcome::Changing => return Ok(false),
                Outcome::ProcessGone => return Ok(true),
                refused => return Err(refused),
            };
        }
        let all = AddressRange::new(self.start, self.bytes, page).ok_or(Outcome::NotRegistered)?;
        // What is refused was unmapped, or its owner has ended.
        let _ = uffd.unregister(all);
        Ok(true)
    }
}

/// Makes bad what is missing of some addresses, and ends their registration: nobody reads this uffd.
pub(crate) fn forsake(uffd: &Uffd, start: usize, bytes: usize, page: PageSize) {
    let mut stray = Stray::new(start, bytes);
    let mut batch = Batch::with_capacity(POISON_PAGES);
    // Also where there is no memory for a mark: there may be some in a moment.
    while matches!(stray.close(uffd, page), Ok(false) | Err(Outcome::NoMemory)) {
        // Who changes the map waits until that is read.
        let _ = batch.read(uffd, page);
        for event in batch.take_events() {
            if let Event::Fork { child } = event {
                forsake(&child, start, bytes, page);
            }
        }
        thread::yield_now();
    }
}

/// Ends the registration: its owner may hold the uffd, too, and would wait for ever for what nobody reads from it.
fn release(region: &Served, adopted: &Adopted) {
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
    region.read_events(&mut Batch::with_capacity(POISON_PAGES), &mut |child| region.forsake_child(&child));
}

/// The absent pages of a span up to the next that is not.
fn first_absent(region: &Served, span: Span) -> Span {
    let here = |page: &Page| matches!(region.pages.state(*page), State::Present | State::Poisoned);
    let before = span.iter().take_while(here).count();
    let rest = span.without_prefix(before);
    rest.prefix(rest.iter().take_while(|page| !here(page)).count())
}

/// Makes pages bad that are missing: how many were looked at, and how many of these were.
fn lose(region: &Served, adopted: &Adopted, span: Span) -> Result<(usize, usize), Outcome> {
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
fn end(region: &Served, adopted: &Adopted, why: Outcome) {
    if why == Outcome::ProcessGone {
        return;
    }
    match adopted.end_owner() {
        Ok(()) => {
            tracing::warn!(region = region.name, ?why, "abandoned before it was filled: its owner was ended")
        }
        Err(errno) => {
            tracing::error!(region = region.name, ?why, %errno, "abandoned, and its owner cannot be ended: it may wait for ever");
            // Closing would show it zeros: better that it waits.
            region.keep_open();
        }
    }
}

/// Pages marked at once.
const POISON_PAGES: usize = 512;
