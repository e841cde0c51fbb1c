//! Pages leave in the signal handler of a thread that needs the room for its own page.
//!
//! The handler evicts a few pages before and after its journey, and before it lets a present page be written, where its
//! small stack is free. The steps are
//! those of other threads, with less on the stack, and obey the rules of a signal handler:
//!
//! * **No lock** that the interrupted thread may hold. The right to choose is only tried for. Each thread
//!   with that right has blocked signals and touches no region, so no handler runs above it.
//! * **No wait for the interrupted thread.** Pages that are claimed are passed over, and so is a region that
//!   ends. A page whose file has refused it goes back, after a wait for other threads alone. A wait for another thread's right to choose ends after some tries; the page is an overrun then.
//! * **No allocation.** Queues, ghosts, slots and places have their memory since the budget or the region
//!   was made. A region is entered by its gate, so that its last reference is never dropped here.
//! * **No code of a source.** Written pages go to [files](super::write_in_handler) alone. Other pages, and those of
//!   a source that has failed, stay for a thread of the [budget](super::evictor). No page that comes back is hashed
//!   here, because hashes take more stack: the builder refuses such regions.
//! * **No other signal.** The handler runs with signals blocked, so it does not block them.

use crate::policy::PageKey;
use crate::reclaim::evict::{block_at, leading_run};
use crate::reclaim::share::{Quiet, Share, State, TRIES};
use crate::reclaim::slots::Emptying;
use crate::reclaim::state::{Chooser, Standby, member_of, page_of};
use crate::reclaim::write_back::Writer;
use crate::reclaim::write_in_handler::HandlerWrites;
use crate::space::Mapping;
use pagestitch_kernel::Span;
use pagestitch_kernel::sync::atomic::Ordering;
use pagestitch_kernel::sync::{MutexGuard, yield_now};
use std::thread;
use std::time::{Duration, Instant};

impl State {
    /// As [`Residence::make_room`](crate::space::Residence::make_room), in a signal handler.
    pub(super) fn reserve_in_handler(&self, pages: usize) -> bool {
        self.try_reserve(pages) || self.overrun_by_permit(pages)
    }

    /// As [`Residence::free_in_handler`](crate::space::Residence::free_in_handler).
    pub(super) fn free_in_handler(&self) {
        if self.is_full() && self.handlers_write() {
            let began = Instant::now();
            self.free_a_page();
            self.stalled_since(began);
        }
    }

    /// As [`Residence::tidy_in_handler`](crate::space::Residence::tidy_in_handler).
    pub(super) fn tidy_in_handler(&self) {
        if !self.is_full() {
            // A handler that found no room did without it.
            self.permits.store(0, Ordering::SeqCst);
        }
        if !self.is_due() || self.evict_in_handler() {
            return;
        }
        if let Some(requests) = self.evictor.requests() {
            requests.ask();
        }
    }

    /// Has a few pages leave for the next faults, unless another thread does. False if they stay, or are for the
    /// thread of the budget.
    #[inline(always)] // a signal handler has a small stack
    pub(super) fn evict_in_handler(&self) -> bool {
        if !self.handlers_write() {
            return false;
        }
        match self.try_choose() {
            Some(chooser) => self.take_away_few(chooser, Need::Later),
            None => true,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.frames() >= self.limit - self.lowered()
    }

    /// Frees memory, or permits a page above the limit if nothing can leave: a thread of the budget has to find
    /// that, if there is one.
    #[cold]
    #[inline(never)]
    fn free_a_page(&self) {
        let has_thread = self.evictor.requests().is_some();
        let (most_in_vain, most_waits) = if has_thread { (1, YIELDS) } else { (TRIES, WAITS) };
        let (mut in_vain, mut waits) = (0, 0);
        while self.is_full() && self.handlers_write() {
            if in_vain == most_in_vain || waits == most_waits {
                self.permits.fetch_add(usize::from(!has_thread), Ordering::SeqCst);
                return;
            }
            match self.try_choose().map(|chooser| self.take_away_few(chooser, Need::Now)) {
                Some(true) => {}
                // Slots of other handlers keep older ones from being emptied.
                Some(false) if self.are_leaving() => {
                    waits += 1;
                    pause(waits);
                }
                // The last pages may be on their way out.
                Some(false) => {
                    in_vain += 1;
                    yield_now();
                }
                None => {
                    waits += 1;
                    pause(waits);
                }
            }
        }
    }

    /// Has a few pages leave, or frees the memory of such. False if there is none.
    #[inline(never)]
    fn take_away_few(&self, chooser: MutexGuard<'_, Chooser>, need: Need) -> bool {
        let mut keys = [0; FEW];
        self.leaving.fetch_add(1, Ordering::SeqCst);
        let mut chosen = self.choose_few(chooser, need, &mut keys);
        let is_empty = self.empty_chosen(chosen.emptied.take());
        let has_left = self.take_away_chosen(&keys, &mut chosen);
        // Before the wait for a claim, whose thread may wait for room.
        self.leaving.fetch_sub(1, Ordering::SeqCst);
        if let Some(writes) = &chosen.writes {
            self.end_writes(&keys, writes);
        }
        is_empty | has_left
    }

    /// True if handlers of other threads have pages leave at the moment.
    pub(super) fn are_leaving(&self) -> bool {
        self.leaving.load(Ordering::SeqCst) > 0
    }

    /// Leaves pages to the thread of the budget that this one could not write.
    fn end_writes(&self, keys: &[PageKey; FEW], writes: &HandlerWrites) {
        if writes.refused != 0 {
            self.put_refused_back(keys, writes);
        }
        if let Some(requests) = self.evictor.requests().filter(|_| writes.has_left_some()) {
            requests.ask();
        }
    }

    /// Frees the memory of chosen slots. False if there are none.
    fn empty_chosen(&self, emptied: Option<Emptying>) -> bool {
        let (Some(standby), Some(run)) = (&self.standby, emptied) else { return false };
        self.empty(standby, run);
        true
    }

    /// Has chosen pages leave. False if all of them stay.
    #[inline(always)] // a signal handler has a small stack
    fn take_away_chosen(&self, keys: &[PageKey; FEW], chosen: &mut Chosen) -> bool {
        if chosen.is_block {
            self.drop_run(keys[0], block_at(keys[0]));
        }
        let victims = &keys[..chosen.victims];
        let left = match &mut chosen.writes {
            Some(writes) => self.move_few(victims, writes) - writes.refused.count_ones() as usize,
            None => self.drop_few(victims),
        };
        chosen.is_block || left > 0
    }

    /// Moves pages to slots. Returns the number of those that have moved.
    fn move_few(&self, victims: &[PageKey], writes: &mut HandlerWrites) -> usize {
        let (mut done, mut left) = (0, 0);
        while done < victims.len() {
            let run = leading_run(&victims[done..]);
            let (now, gone) = self.move_run(victims[done], run, writes.first_slot + done, writes);
            done += now;
            left += gone;
        }
        left
    }

    /// Drops pages. Returns the number of those that are dropped.
    fn drop_few(&self, victims: &[PageKey]) -> usize {
        let mut dropped = 0;
        for group in victims.chunk_by(|one, two| member_of(*one) == member_of(*two)) {
            let last = group[group.len() - 1];
            self.enter_region(last, &mut |share, region| dropped += share.drop_pages::<FEW>(region, group));
        }
        dropped
    }

    /// Chooses a few pages, in the order of their regions and addresses, or a block by its first page.
    #[inline(never)]
    fn choose_few(
        &self,
        mut chooser: MutexGuard<'_, Chooser>,
        need: Need,
        keys: &mut [PageKey; FEW],
    ) -> Chosen {
        chooser.take_note(&self.arrivals);
        let mut chosen = Chosen { emptied: None, is_block: false, writes: None, victims: 0 };
        let mut block = chooser.blocks.victim();
        if block.is_none() {
            if let Some((_, run)) = self.begin_shortening(&mut chooser) {
                chosen.emptied = Some(run);
                return chosen;
            }
            let of_batch = match need {
                Need::Now => self.standby.as_ref().map(|list| (list, list.begin_empty(&mut chooser, 0))),
                Need::Later => self.standby_of_batch(&mut chooser),
            };
            let (standby, emptied) = of_batch.unzip();
            chosen.emptied = emptied.flatten();
            // Written pages leave by a move only.
            let moves = need == Need::Later || self.writes.regions.load(Ordering::Relaxed) > 0;
            match (need, standby.filter(|_| moves)) {
                (Need::Now, _) if chosen.emptied.is_some() => return chosen,
                (_, Some(standby)) => {
                    let (slot, taken) = standby.take_in_a_row(&mut chooser.ends, FEW);
                    chosen.victims = chooser.victims(&mut keys[..taken]).len();
                    standby.skip(slot + chosen.victims, taken - chosen.victims);
                    chosen.writes = Some(HandlerWrites::new(slot));
                }
                _ => chosen.victims = chooser.victims_to_drop(keys).len(),
            }
        }
        if block.is_none() && chosen.victims == 0 && need == Need::Now {
            block = chooser.blocks.last_resort();
        }
        if let Some(first) = block {
            (keys[0], chosen.is_block) = (first, true);
        }
        chosen
    }

    /// Moves the first pages of a run to slots. Returns the number of pages that are done, and that of those
    /// that have moved.
    #[inline(always)] // a signal handler has a small stack
    fn move_run(&self, first: PageKey, run: Span, slot: usize, writes: &mut HandlerWrites) -> (usize, usize) {
        let Some(standby) = &self.standby else { return (run.pages, 0) };
        let mut moved = None;
        let mut work = |share: &Share, region: &Mapping| {
            moved = Some(share.move_first(region, standby, (run, slot), writes))
        };
        self.enter_region(last_of(first, run), &mut work);
        moved.unwrap_or_else(|| {
            // The region ends, and its pages with it.
            standby.skip(slot, run.pages);
            (run.pages, 0)
        })
    }

    #[inline(never)]
    fn drop_run(&self, first: PageKey, run: Span) -> usize {
        let mut dropped = 0;
        self.enter_region(last_of(first, run), &mut |share, region| dropped = share.drop_span(region, run));
        dropped
    }

    /// Calls `work` with the region of a run of pages, of which the last one is given, unless the region ends.
    pub(super) fn enter_region(&self, last: PageKey, work: &mut dyn FnMut(&Share, &Mapping)) {
        let members = self.members.read();
        if let Some(Some(share)) = members.value().and_then(|members| members.get(member_of(last))) {
            if share.has(page_of(last)) {
                share.enter(&mut |region| work(share, region));
            }
        }
    }

    /// Reserves memory above the limit, if a handler has found that nothing can leave.
    fn overrun_by_permit(&self, pages: usize) -> bool {
        let one_less = |permits: usize| permits.checked_sub(1);
        let is_permitted = self.permits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok();
        if is_permitted && !self.try_reserve_above_mark(pages) {
            self.overrun(pages);
        }
        is_permitted
    }
}

impl Share {
    /// Moves the first pages of a run to slots, and writes the dirty ones. Returns the number of pages that are
    /// done, and that of those that have moved.
    fn move_first(
        &self,
        region: &Mapping,
        standby: &Standby,
        (run, slot): (Span, usize),
        writes: &mut HandlerWrites,
    ) -> (usize, usize) {
        let quiet = Quiet(region);
        match region.pages.claim_present(run, &quiet) {
            Ok(claim) => self.move_leading(region, claim, standby, slot, &mut Writer::Handler(writes)),
            Err(state) => {
                standby.slots.skip(slot);
                self.forget_absent(region, run.first, state);
                (1, 0)
            }
        }
    }
}

/// How urgent it is that pages leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// The budget is used up.
    Now,
    /// The next faults need free memory.
    Later,
}

/// The pages that a handler takes away.
struct Chosen {
    /// Slots whose frames are freed.
    emptied: Option<Emptying>,
    /// True for a whole block in the place of single pages.
    is_block: bool,
    /// The slots for the pages, and the writes of the dirty ones. `None`: the pages are dropped.
    writes: Option<HandlerWrites>,
    victims: usize,
}

const fn last_of(first: PageKey, run: Span) -> PageKey {
    first + run.pages as u64 - 1
}

/// Lets the thread with the right to choose run: it may need this CPU, or sleep.
fn pause(waits: usize) {
    if waits <= YIELDS {
        yield_now();
    } else {
        thread::sleep(MOMENT);
    }
}

/// The pages that leave at once, whose keys are on the stack.
const FEW: usize = 16;
/// How often a handler gives its CPU away before it sleeps.
const YIELDS: usize = 64;
const MOMENT: Duration = Duration::from_micros(500);
/// How often a handler waits for the right to choose before its page exceeds the budget.
const WAITS: usize = 4096;
