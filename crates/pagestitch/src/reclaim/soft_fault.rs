//! Brings a page back from the standby list, without a read of its source.

use crate::reclaim::places::Place;
use crate::reclaim::share::Share;
use crate::reclaim::state::{Standby, count, key_of};
use crate::space::Prepared;
use crate::space::page_table::{Claim, PageState};
use pagestitch_kernel::{AddressRange, Outcome, Page, Uffd};

impl Share {
    /// As [`Residence::prepare`](crate::space::Residence::prepare).
    pub(super) fn prepare(&self, claim: &mut Claim<'_>, range: AddressRange, uffd: &Uffd) -> Prepared {
        let (first, span) = (claim.span().first, claim.span().prefix(FILL_MAX));
        if let Place::Slot(slot) = self.places.get(first) {
            match self.bring_back(first, slot as usize, range, uffd) {
                Outcome::Done => {
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
        let is_filled = |page: &Page| !matches!(self.places.get(*page), Place::Slot(_));
        Prepared::Fill(span.prefix(1 + span.without_prefix(1).iter().take_while(is_filled).count()))
    }

    /// Moves the page of a slot back. [`Outcome::NotRegistered`] if the slot does not have it any more.
    fn bring_back(&self, page: Page, slot: usize, range: AddressRange, uffd: &Uffd) -> Outcome {
        let Some(Standby { arena, slots }) = &self.state.standby else { return Outcome::NotRegistered };
        let key = key_of(self.member, page);
        if !slots.begin_return(slot, key) {
            return Outcome::NotRegistered;
        }
        match arena.give_back(uffd, range, slot) {
            Outcome::Done => slots.returned(slot),
            Outcome::Changing => {
                slots.cancel_return(slot, key);
                return Outcome::Changing;
            }
            // Its frame is pinned.
            Outcome::Busy if arena.copy_back(uffd, range, slot) == Outcome::Done => {
                slots.abandon(slot);
                self.state.overrun(1);
            }
            refused => {
                slots.abandon(slot);
                return refused;
            }
        }
        self.places.set(page, Place::Resident);
        self.page_came(page, true);
        count(&self.state.tally.soft_faults, 1);
        Outcome::Done
    }
}

/// The most pages that are filled at once, so that a thread needs little room in the budget.
const FILL_MAX: usize = 64;
