//! The standby list: a ring of slots that are filled and emptied in the same order.
//!
//! ```text
//!        emptied ──▶ tail                          head ──▶ taken
//!   |  free  |  empty  | full | full | hole | full |  taken  |  free  |
//!                        a page that came back leaves a hole
//! ```
//!
//! ```text
//!             ┌─fill_dirty─▶ Modified ─written─┐
//!   Free ─take─▶ Taken ─fill─▶ Full ◀──────────┘─begin_empty──▶ Emptying ─finish_empty─▶ Free
//!                  │            │ ▲                  ▲
//!                  │  begin_return cancel_return     │       (also from and to Modified)
//!                  │            ▼ │                  │
//!                  │         Returning ─returned─▶ Hole, or ─abandon─▶ Orphan
//!                  └──────────skip───────────────▶ Hole
//! ```
//!
//! The slots in `Modified` are the modified list: their frames have bytes that are not in their sources
//! yet, so they are not emptied.

use crate::policy::PageKey;
use pagestitch_kernel::Errno;
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use std::num::NonZeroUsize;
use std::ops::Range;

/// The states of the slots. The ends of the ring are in [`Ends`], under the lock of the budget.
#[derive(Debug)]
pub(super) struct Slots {
    states: AtomicTable,
    /// The number of slots that have a frame.
    full: AtomicUsize,
    /// Those of them whose frame is not written back yet.
    modified: AtomicUsize,
}

/// The frame of a slot, compared with the bytes of its page in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// The same bytes.
    Clean,
    /// Written bytes, which are not in the source yet.
    Modified,
}

/// Both ends of the ring, as counts that only grow.
#[derive(Debug, Default)]
pub(super) struct Ends {
    head: usize,
    tail: usize,
}

/// A run of slots that are being emptied: one at least. They are out of use until its caller has
/// [finished](Slots::finish_empty) it.
#[derive(Debug)]
#[must_use]
pub(super) struct Emptying {
    first: usize,
    slots: usize,
    /// The number of frames that they have.
    pub(super) frames: usize,
}

/// A slot without a frame and without a thread.
const FREE: u64 = 0;
/// A thread moves a page there.
const TAKEN: u64 = 1;
/// Its page has come back, or never came.
const HOLE: u64 = 2;
/// A thread empties it.
const EMPTYING: u64 = 3;
/// It has a frame that no page wants.
const ORPHAN: u64 = 4;
/// It has the frame of a page, whose key is above the tag.
const FULL: u64 = 5;
/// A thread moves its frame back to its page.
const RETURNING: u64 = 6;
/// It has the frame of a page that is not written back yet.
const MODIFIED: u64 = 7;
const TAG_BITS: u32 = 3;

const fn full(page: PageKey) -> u64 {
    page << TAG_BITS | FULL
}

const fn modified(page: PageKey) -> u64 {
    page << TAG_BITS | MODIFIED
}

const fn returning(page: PageKey) -> u64 {
    page << TAG_BITS | RETURNING
}

impl Slots {
    pub(super) fn new(slots: NonZeroUsize) -> Result<Self, Errno> {
        let (full, modified) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Ok(Self { states: AtomicTable::new(slots)?, full, modified })
    }

    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    /// The number of slots that have a frame.
    pub(super) fn full(&self) -> usize {
        self.full.load(Ordering::SeqCst)
    }

    /// The number of slots whose frame is not written back yet.
    pub(super) fn modified(&self) -> usize {
        self.modified.load(Ordering::SeqCst)
    }

    /// The number of slots between both ends.
    pub(super) const fn used(&self, ends: &Ends) -> usize {
        ends.head - ends.tail
    }

    /// Takes up to `most` free slots in the order of the ring. Returns the first one, and their number.
    pub(super) fn take(&self, ends: &mut Ends, most: usize) -> (usize, usize) {
        let first = ends.head;
        let most = most.min(self.len() - self.used(ends));
        // Slots before the tail may not be emptied yet.
        let is_free = |at: &usize| self.state(*at) == FREE;
        let taken = (first..first + most).take_while(is_free).inspect(|at| self.set(*at, TAKEN)).count();
        ends.head += taken;
        (first % self.len(), taken)
    }

    /// As [`take`](Self::take), without slots behind the end of the ring.
    pub(super) fn take_in_a_row(&self, ends: &mut Ends, most: usize) -> (usize, usize) {
        let most = most.min(self.len() - ends.head % self.len());
        self.take(ends, most)
    }

    /// The slot that follows a slot by `steps`.
    pub(super) fn after(&self, slot: usize, steps: usize) -> usize {
        (slot + steps) % self.len()
    }

    /// A page has moved to a taken slot.
    pub(super) fn fill(&self, slot: usize, page: PageKey) {
        self.full.fetch_add(1, Ordering::SeqCst);
        self.set(slot, full(page));
    }

    /// A page that is not written back yet has moved to a taken slot.
    pub(super) fn fill_dirty(&self, slot: usize, page: PageKey) {
        self.full.fetch_add(1, Ordering::SeqCst);
        self.modified.fetch_add(1, Ordering::SeqCst);
        self.set(slot, modified(page));
    }

    /// The bytes of the slot are in the source. False if the page has come back meanwhile.
    pub(super) fn written(&self, slot: usize, page: PageKey) -> bool {
        let is_clean = self.exchange(slot, modified(page), full(page));
        self.modified.fetch_sub(usize::from(is_clean), Ordering::SeqCst);
        is_clean
    }

    /// True if the slot has a page that is not written back yet.
    pub(super) fn is_modified(&self, slot: usize, page: PageKey) -> bool {
        self.state(slot) == modified(page)
    }

    /// True if a thread brings the page of the slot back at this moment. Its attempt may end in vain.
    pub(super) fn is_returning(&self, slot: usize, page: PageKey) -> bool {
        self.state(slot) == returning(page)
    }

    /// No page has moved to a taken slot.
    pub(super) fn skip(&self, slot: usize) {
        self.set(slot, HOLE);
    }

    /// Begins to move the frame of a slot back. `None` if the slot does not have the page any more.
    pub(super) fn begin_return(&self, slot: usize, page: PageKey) -> Option<Frame> {
        // A modified page becomes clean meanwhile perhaps, and never the other way round.
        if self.exchange(slot, modified(page), returning(page)) {
            self.modified.fetch_sub(1, Ordering::SeqCst);
            return Some(Frame::Modified);
        }
        self.exchange(slot, full(page), returning(page)).then_some(Frame::Clean)
    }

    /// The frame of the slot has moved back.
    pub(super) fn returned(&self, slot: usize) {
        self.full.fetch_sub(1, Ordering::SeqCst);
        self.set(slot, HOLE);
    }

    /// The frame of the slot cannot move back now.
    pub(super) fn cancel_return(&self, slot: usize, page: PageKey, frame: Frame) {
        if frame == Frame::Modified {
            self.modified.fetch_add(1, Ordering::SeqCst);
            return self.set(slot, modified(page));
        }
        self.set(slot, full(page));
    }

    /// The page has its bytes from elsewhere: the frame of the slot is freed when the slot is emptied.
    pub(super) fn abandon(&self, slot: usize) {
        self.set(slot, ORPHAN);
    }

    /// Takes slots off the tail to be emptied, until they have `frames` frames. Calls `dropped` with the
    /// page of each. Stops at a slot that a thread fills, moves back or writes back. The run does not wrap
    /// around. `None` if there is no such slot.
    pub(super) fn begin_empty(
        &self,
        ends: &mut Ends,
        frames: usize,
        mut dropped: impl FnMut(PageKey),
    ) -> Option<Emptying> {
        let mut run = Emptying { first: ends.tail % self.len(), slots: 0, frames: 0 };
        while ends.tail < ends.head && run.frames < frames && run.first + run.slots < self.len() {
            let before = self.state(ends.tail);
            match before & TAG {
                FULL if self.exchange(ends.tail, before, EMPTYING) => {
                    dropped(before >> TAG_BITS);
                    run.frames += 1;
                }
                // A thread has begun to move it back meanwhile.
                FULL | TAKEN | RETURNING | MODIFIED => break,
                ORPHAN => {
                    self.set(ends.tail, EMPTYING);
                    run.frames += 1;
                }
                _ => self.set(ends.tail, EMPTYING),
            }
            run.slots += 1;
            ends.tail += 1;
        }
        (run.slots > 0).then_some(run)
    }

    /// The memory of the slots is free: they can be taken again.
    pub(super) fn finish_empty(&self, run: Emptying) {
        self.full.fetch_sub(run.frames, Ordering::SeqCst);
        run.slots().for_each(|slot| self.set(slot, FREE));
    }

    fn state(&self, at: usize) -> u64 {
        self.states[at % self.len()].load(Ordering::SeqCst)
    }

    fn set(&self, at: usize, state: u64) {
        self.states[at % self.len()].store(state, Ordering::SeqCst);
    }

    fn exchange(&self, at: usize, from: u64, to: u64) -> bool {
        let state = &self.states[at % self.len()];
        state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

impl Emptying {
    pub(super) const fn slots(&self) -> Range<usize> {
        self.first..self.first + self.slots
    }
}

const TAG: u64 = (1 << TAG_BITS) - 1;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn slots(len: usize) -> (Slots, Ends) {
        (Slots::new(NonZeroUsize::new(len).unwrap()).unwrap(), Ends::default())
    }

    #[test]
    fn slots_are_emptied_in_the_order_in_which_they_were_taken() {
        let (slots, mut ends) = slots(4);
        assert_eq!(slots.take(&mut ends, 3), (0, 3));
        [0, 2].into_iter().for_each(|slot| slots.fill(slot, 10 + slot as u64));
        slots.skip(1);
        let mut dropped = Vec::new();
        let run = slots.begin_empty(&mut ends, 2, |page| dropped.push(page)).unwrap();
        assert_eq!((run.slots(), run.frames, dropped), (0..3, 2, vec![10, 12]));
        assert_eq!(slots.take(&mut ends, 4), (3, 1), "slots that are not emptied yet are not free");
        slots.finish_empty(run);
        assert_eq!((slots.take(&mut ends, 4), slots.full()), ((0, 3), 0));
    }

    #[test]
    fn a_page_that_comes_back_leaves_a_hole() {
        let (slots, mut ends) = slots(4);
        slots.take(&mut ends, 3);
        (0..3).for_each(|slot| slots.fill(slot, slot as u64));
        assert_eq!(slots.begin_return(1, 1), Some(Frame::Clean));
        assert_eq!((slots.begin_return(1, 1), slots.begin_return(0, 1)), (None, None));
        let run = slots.begin_empty(&mut ends, 4, |_| {}).unwrap();
        assert_eq!((run.slots(), run.frames), (0..1, 1), "up to the slot that is being moved back");
        slots.returned(1);
        assert!(slots.begin_return(2, 2).is_some());
        slots.abandon(2);
        let mut dropped = Vec::new();
        let rest = slots.begin_empty(&mut ends, 4, |page| dropped.push(page)).unwrap();
        assert_eq!((rest.slots(), rest.frames, dropped), (1..3, 1, vec![]));
    }

    #[test]
    fn slots_whose_pages_have_all_come_back_are_emptied_and_free_again() {
        let (slots, mut ends) = slots(4);
        slots.take(&mut ends, 4);
        for slot in 0..4 {
            slots.fill(slot, slot as u64);
            assert!(slots.begin_return(slot, slot as u64).is_some());
            slots.returned(slot);
        }
        let run = slots.begin_empty(&mut ends, 4, |_| {}).unwrap();
        assert_eq!((run.slots(), run.frames), (0..4, 0));
        slots.finish_empty(run);
        assert_eq!(slots.take(&mut ends, 4), (0, 4));
    }

    #[test]
    fn a_dirty_page_is_not_emptied_before_it_is_written() {
        let (slots, mut ends) = slots(4);
        slots.take(&mut ends, 3);
        (0..3).for_each(|slot| slots.fill_dirty(slot, 10 + slot as u64));
        assert_eq!((slots.full(), slots.modified()), (3, 3));
        assert!(slots.begin_empty(&mut ends, 4, |_| {}).is_none());
        assert!(slots.written(0, 10) && !slots.written(0, 10));
        assert_eq!(slots.begin_return(1, 11), Some(Frame::Modified));
        slots.cancel_return(1, 11, Frame::Modified);
        assert_eq!(slots.begin_empty(&mut ends, 4, |_| {}).unwrap().slots(), 0..1);
        assert_eq!(slots.begin_return(1, 11), Some(Frame::Modified));
        assert!(!slots.written(1, 11), "it has come back");
        slots.returned(1);
        assert!(slots.written(2, 12));
        assert_eq!((slots.begin_empty(&mut ends, 4, |_| {}).unwrap().slots(), slots.modified()), (1..3, 0));
    }

    #[test]
    fn a_run_ends_at_the_end_of_the_ring() {
        let (slots, mut ends) = slots(3);
        slots.take(&mut ends, 2);
        (0..2).for_each(|slot| slots.fill(slot, 7));
        let run = slots.begin_empty(&mut ends, 2, |_| {}).unwrap();
        slots.finish_empty(run);
        assert_eq!(slots.take(&mut ends, 3), (2, 3));
        [2, 0, 1].into_iter().for_each(|slot| slots.fill(slot, 7));
        assert_eq!(slots.begin_empty(&mut ends, 3, |_| {}).unwrap().slots(), 2..3);
        assert_eq!(slots.begin_empty(&mut ends, 3, |_| {}).unwrap().slots(), 0..2);
    }
}
