//! Brings a page back from the standby list, without a read of its source.

use crate::reclaim::blocks::BLOCK_PAGES;
use crate::reclaim::places::Place;
use crate::reclaim::share::Share;
use crate::reclaim::slots::Frame;
use crate::reclaim::state::{Standby, count, key_of};
use crate::space::Prepared;
use crate::space::page_table::{Claim, PageState};
use pagestitch_kernel::uffd::Arrival;
use pagestitch_kernel::{AddressRange, Outcome, Page, Uffd};

impl Share {
    /// As [`Residence::prepare`](crate::space::Residence::prepare).
    pub(super) fn prepare(
        &self,
        claim: &mut Claim<'_>,
        range: AddressRange,
        uffd: &Uffd,
        writes: Option<Page>,
    ) -> Prepared {
        let (first, span) = (claim.span().first, claim.span().prefix(BLOCK_PAGES));
        if let Place::Slot(slot) = self.places.get(first) {
            match self.bring_back(first, slot as usize, range, uffd, writes == Some(first)) {
                Outcome::Done => {
                    count(&self.state.tally.soft_faults, 1);
                    claim.settle(1, PageState::Present);
                    return Prepared::Returned;
                }
                Outcome::Changing => return Prepared::Changing,
                // The page is filled from its source.
                _ => {
                    self.places.set(first, Place::Gone);
                }
            }
        }
        let span = if self.has_blocks { span } else { span.prefix(FILL_MAX) };
        let is_filled = |page: &Page| !matches!(self.places.get(*page), Place::Slot(_));
        let pages = 1 + span.without_prefix(1).iter().take_while(is_filled).count();
        let is_block = pages == BLOCK_PAGES && first.0 % BLOCK_PAGES == 0 && self.has_blocks;
        let filled = span.prefix(if is_block { pages } else { pages.min(FILL_MAX) });
        let is_written = |page: &Page| filled.contains(*page);
        if let (Some(dirty), Some(page)) = (&self.dirty, writes.filter(is_written)) {
            dirty.mark(page);
        }
        Prepared::Fill(filled)
    }

    /// As [`Residence::return_beside`](crate::space::Residence::return_beside).
    #[cold]
    pub(super) fn return_beside(&self, page: Page, range: AddressRange, uffd: &Uffd) -> bool {
        let Place::Slot(slot) = self.places.get(page) else { return false };
        let back = self.bring_back(page, slot as usize, range, uffd, false);
        matches!(back, Outcome::Done | Outcome::Changing)
    }

    /// Brings the page of a slot back. [`Outcome::NotRegistered`] if the slot does not have it any more.
    /// The page is claimed.
    pub(super) fn bring_back(
        &self,
        page: Page,
        slot: usize,
        range: AddressRange,
        uffd: &Uffd,
        is_written: bool,
    ) -> Outcome {
        let Some(standby) = &self.state.standby else { return Outcome::NotRegistered };
        let key = key_of(self.member, page);
        let Some(frame) = standby.slots.begin_return(slot, key) else { return Outcome::NotRegistered };
        if let Some(dirty) = self.dirty.as_ref().filter(|_| is_written || frame == Frame::Modified) {
            // Before the page can be written.
            dirty.mark(page);
        }
        // A page that moves can be written without a fault.
        let protects = self.dirty.as_ref().is_some_and(|dirty| !dirty.is_dirty(page));
        let back = match protects {
            true => self.copy_back(standby, slot, (range, uffd), Arrival::Protected),
            false => match standby.arena.give_back(uffd, range, slot) {
                // Its frame is pinned.
                Outcome::Busy => self.copy_back(standby, slot, (range, uffd), Arrival::Writable),
                moved => {
                    if moved == Outcome::Done {
                        standby.slots.returned(slot);
                    }
                    moved
                }
            },
        };
        match back {
            Outcome::Done => {}
            // A modified page has its bytes nowhere else.
            outcome if outcome == Outcome::Changing || frame == Frame::Modified => {
                standby.slots.cancel_return(slot, key, frame);
                return Outcome::Changing;
            }
            refused => {
                standby.slots.abandon(slot);
                return refused;
            }
        }
        self.places.set(page, Place::Resident);
        self.page_came(page, true);
        Outcome::Done
    }

    /// Copies the page of a slot. The old frame is free then, or waits for the end of the slot.
    fn copy_back(
        &self,
        Standby { arena, slots }: &Standby,
        slot: usize,
        (range, uffd): (AddressRange, &Uffd),
        arrival: Arrival,
    ) -> Outcome {
        let has_room = self.state.try_reserve(1);
        let copied = arena.copy_back(uffd, range, slot..slot + 1, arrival);
        match copied {
            Outcome::Done if has_room => slots.abandon(slot),
            // The new frame takes the place of the old one in the budget.
            Outcome::Done if arena.empty(slot..slot + 1).is_ok() => slots.returned(slot),
            Outcome::Done => {
                slots.abandon(slot);
                self.state.overrun(1);
            }
            _ => self.state.release(usize::from(has_room)),
        }
        copied
    }
}

/// The most pages that are filled at once, so that a thread needs little room in the budget.
const FILL_MAX: usize = 64;
