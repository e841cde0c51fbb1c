//! Pages that leave or stay because the application asks for it.

use crate::policy::PageKey;
use crate::reclaim::places::Place;
use crate::reclaim::share::{Share, State, without_handlers};
use crate::reclaim::state::{BATCH, SPARE_SLOTS, key_of, member_of, page_of};
use pagestitch_kernel::{Page, Span};
use std::sync::PoisonError;

impl Share {
    /// Has the resident pages of a span leave, except for pinned and locked ones. Returns their number.
    pub(super) fn evict(&self, span: Span) -> usize {
        let _quiet = without_handlers();
        self.unlist(span);
        let (mut rest, mut left, mut room) = (span, 0, [0; BATCH]);
        while !rest.is_empty() {
            let (chosen, passed) = self.resident(rest, &mut room);
            rest = rest.without_prefix(passed);
            left += match &self.dirty {
                // They wait in slots until their bytes are in their sources.
                Some(_) => self.state.evict_these(&room[..chosen]),
                None => self.state.drop_pages(&room[..chosen]),
            };
        }
        left
    }

    /// Pins a span. Its pages that are filled from now on do not leave. False if the budget has no room for
    /// as many pinned pages.
    pub(super) fn pin(&self, span: Span) -> bool {
        let _alone = self.pins.counting.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = span.pages - span.iter().filter(|page| self.pins.has(*page)).count();
        let is_reserved = self.state.reserve_pinned(wanted);
        if is_reserved {
            self.state.release_pinned(wanted.saturating_sub(self.pins.add(span)));
        }
        is_reserved
    }

    /// Ends the pins of a span: its pages can leave again.
    pub(super) fn unpin(&self, span: Span) {
        let alone = self.pins.counting.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.release_pinned(self.pins.remove(span));
        drop(alone);
        let _quiet = without_handlers();
        // A page that was chosen while it was pinned is in no queue of the policy.
        self.unlist(span);
        let was_listed = |page: &Page| matches!(self.places.get(*page), Place::Resident | Place::Listed);
        span.iter().filter(was_listed).for_each(|page| self.page_stays(page));
    }

    /// Has the policy forget the pages of a span.
    fn unlist(&self, span: Span) {
        let mut chooser = self.state.choose();
        chooser.take_note(&self.state.arrivals);
        chooser.forget(&|key| member_of(key) == self.member && span.contains(page_of(key)));
    }

    /// Finds a batch of resident pages, after [`unlist`](Self::unlist). Returns their number, and that of the pages that it has looked at.
    fn resident(&self, span: Span, room: &mut [PageKey; BATCH]) -> (usize, usize) {
        let mut chosen = 0;
        for (passed, page) in span.iter().enumerate() {
            if chosen == BATCH {
                return (chosen, passed);
            }
            match self.places.get(page) {
                Place::Resident => {
                    room[chosen] = key_of(self.member, page);
                    chosen += 1;
                }
                Place::Listed => self.page_stays(page),
                Place::Nowhere | Place::Gone | Place::Slot(_) => {}
            }
        }
        (chosen, span.pages)
    }
}

impl State {
    /// Has pages leave, which are in the order of their regions and addresses. Returns their number.
    pub(super) fn evict_these(&self, pages: &[PageKey]) -> usize {
        let Some(standby) = &self.standby else { return self.drop_pages(pages) };
        let (mut rest, mut left) = (pages, 0);
        for _ in 0..TRIES {
            if rest.is_empty() {
                break;
            }
            let mut chooser = self.choose();
            // All slots, because these pages do not tell how many pages come back.
            let run = standby.begin_empty(&mut chooser, standby.slots.len().saturating_sub(SPARE_SLOTS));
            let (slot, most) = standby.slots.take(&mut chooser.ends, rest.len());
            chooser.sampling.note_requested(most);
            drop(chooser);
            if let Some(run) = run {
                self.empty(standby, run);
            }
            if most == 0 {
                // Another thread empties the slots.
                std::thread::yield_now();
            }
            left += self.move_out(standby, &rest[..most], slot);
            rest = &rest[most..];
        }
        rest.iter().for_each(|page| {
            self.arrivals.add(*page, true);
        });
        left
    }
}

/// How often the thread looks for empty slots.
const TRIES: usize = 32;
