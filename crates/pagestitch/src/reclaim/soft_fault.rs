//! Brings a page back from the standby list, without a read of its source.

use crate::policy::PageKey;
use crate::reclaim::blocks::BLOCK_PAGES;
use crate::reclaim::places::Place;
use crate::reclaim::share::Share;
use crate::reclaim::slots::Frame;
use crate::reclaim::state::{Standby, count, key_of};
use crate::space::Prepared;
use crate::space::page_table::{Claim, PageState};
use pagestitch_kernel::uffd::Arrival;
use pagestitch_kernel::{AddressRange, Outcome, Page, Span, Uffd};

/// The answer to a thread that brings a page back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Return {
    /// The page is in its region.
    Done,
    /// The page waits still: try again.
    Changing,
    /// The page waits still, is modified, and has no place any more: the application has unmapped it, or has
    /// mapped other memory over it.
    Unmapped,
    /// The slot does not have the page any more, or its source has the same bytes.
    Gone,
}

impl Share {
    /// As [`Residence::prepare`](crate::space::Residence::prepare).
    #[inline(always)] // a signal handler has a small stack
    pub(super) fn prepare(
        &self,
        claim: &mut Claim<'_>,
        range: AddressRange,
        uffd: &Uffd,
        writes: Option<Page>,
    ) -> Prepared {
        let first = claim.span().first;
        if let Place::Slot(slot) = self.places.get(first) {
            match self.bring_back(first, slot as usize, range, uffd, writes == Some(first)) {
                Return::Done => {
                    count(&self.state.tally.soft_faults, 1);
                    claim.settle(1, PageState::Present);
                    return Prepared::Returned;
                }
                Return::Changing | Return::Unmapped => return Prepared::Changing,
                // The page is filled from its source. A signal handler of this thread may have it back
                // already, so that its place is another one.
                Return::Gone => {
                    self.places.exchange(first, Place::Slot(slot), Place::Gone);
                }
            }
        }
        Prepared::Fill(self.pages_to_fill(claim.span().prefix(BLOCK_PAGES), writes))
    }

    /// The pages at the start of a span that are filled at once, of which one is written perhaps.
    ///
    /// Not a part of its caller, because a signal handler has a small stack.
    #[inline(never)]
    fn pages_to_fill(&self, span: Span, writes: Option<Page>) -> Span {
        let (first, span) = (span.first, if self.has_blocks { span } else { span.prefix(FILL_MAX) });
        let is_filled = |page: &Page| !matches!(self.places.get(*page), Place::Slot(_));
        let pages = 1 + span.without_prefix(1).iter().take_while(is_filled).count();
        let is_block = pages == BLOCK_PAGES && first.0 % BLOCK_PAGES == 0 && self.has_blocks;
        let filled = span.prefix(if is_block { pages } else { pages.min(FILL_MAX) });
        let is_written = |page: &Page| filled.contains(*page);
        if let (Some(dirty), Some(page)) = (&self.dirty, writes.filter(is_written)) {
            dirty.mark(page);
        }
        filled
    }

    /// As [`Residence::return_beside`](crate::space::Residence::return_beside).
    #[cold]
    pub(super) fn return_beside(&self, page: Page, range: AddressRange, uffd: &Uffd) -> bool {
        let Place::Slot(slot) = self.places.get(page) else { return false };
        let back = self.bring_back(page, slot as usize, range, uffd, false);
        matches!(back, Return::Done | Return::Changing)
    }

    /// Brings the page of a slot back. The page is claimed.
    pub(super) fn bring_back(
        &self,
        page: Page,
        slot: usize,
        range: AddressRange,
        uffd: &Uffd,
        is_written: bool,
    ) -> Return {
        let Some(standby) = &self.state.standby else { return Return::Gone };
        let key = key_of(self.member, page);
        let Some(frame) = standby.slots.begin_return(slot, key) else { return Return::Gone };
        if let Some(dirty) = self.dirty.as_ref().filter(|_| is_written || frame == Frame::Modified) {
            // Before the page can be written.
            dirty.mark(page);
        }
        // A page that moves can be written without a fault.
        let protects = self.dirty.as_ref().is_some_and(|dirty| !dirty.is_dirty(page));
        let back = match protects {
            true => self.copy_back(standby, (slot, frame), (range, uffd), Arrival::Protected),
            false => self.move_back(standby, (slot, frame), (range, uffd)),
        };
        match back {
            Ok(left) => self.returned(standby, page, slot, left),
            Err(refused) => not_returned(standby, (slot, frame), key, refused),
        }
    }

    /// The page of a slot is in its region.
    fn returned(&self, standby: &Standby, page: Page, slot: usize, left: Left) -> Return {
        // A worker that fills the page for a signal handler is not alone: the thread with the claim runs on once
        // the page is there. That thread counts the page then, and may even evict it, but not to this slot, because
        // the slot is taken until now.
        match self.places.exchange(page, Place::Slot(slot as u32), Place::Resident) {
            true => self.page_came(page, true),
            false => self.state.release(1),
        }
        match left {
            Left::Frame => standby.slots.abandon(slot),
            Left::Nothing => standby.slots.returned(slot),
        }
        Return::Done
    }

    /// Moves the page of a slot to its region, or copies it: its frame may be pinned, or the memory of the region
    /// may be locked since, into which no unlocked page moves.
    #[inline(always)] // a signal handler has a small stack
    fn move_back(
        &self,
        standby: &Standby,
        (slot, frame): (usize, Frame),
        (range, uffd): (AddressRange, &Uffd),
    ) -> Result<Left, Outcome> {
        match standby.arena.give_back(uffd, range, slot) {
            Outcome::Done => Ok(Left::Nothing),
            Outcome::Changing => Err(Outcome::Changing),
            _ => self.copy_back(standby, (slot, frame), (range, uffd), Arrival::Writable),
        }
    }

    /// Copies the page of a slot to its region.
    fn copy_back(
        &self,
        Standby { arena, .. }: &Standby,
        (slot, frame): (usize, Frame),
        (range, uffd): (AddressRange, &Uffd),
        arrival: Arrival,
    ) -> Result<Left, Outcome> {
        let has_room = self.state.try_reserve(1);
        let copied = match arena.copy_back(uffd, range, slot..slot + 1, arrival) {
            // No thread but that with the claim brings a modified page back: its copy has come before.
            Outcome::AlreadyThere if frame == Frame::Modified => Outcome::Done,
            outcome => outcome,
        };
        match copied {
            Outcome::Done if has_room => Ok(Left::Frame),
            // The new frame takes the place of the old one in the budget.
            Outcome::Done if arena.empty(slot..slot + 1).is_ok() => Ok(Left::Nothing),
            Outcome::Done => {
                self.state.overrun(1);
                Ok(Left::Frame)
            }
            _ => {
                self.state.release(usize::from(has_room));
                Err(copied)
            }
        }
    }
}

/// The page of a slot is not in its region.
#[cold]
fn not_returned(
    Standby { slots, .. }: &Standby,
    (slot, frame): (usize, Frame),
    key: PageKey,
    refused: Outcome,
) -> Return {
    // A modified page has its bytes nowhere else.
    if refused != Outcome::Changing && frame == Frame::Clean {
        slots.abandon(slot);
        return Return::Gone;
    }
    slots.cancel_return(slot, key, frame);
    if refused == Outcome::NotRegistered { Return::Unmapped } else { Return::Changing }
}

/// What is left in the slot of a page that has come back.
#[derive(Debug)]
enum Left {
    Nothing,
    /// The old frame, which waits for the end of the slot.
    Frame,
}

/// The most pages that are filled at once, so that a thread needs little room in the budget.
const FILL_MAX: usize = 64;
