//! Moves pages out, drops them, and empties slots.

use crate::policy::PageKey;
use crate::reclaim::blocks::BLOCK_PAGES;
use crate::reclaim::places::Place;
use crate::reclaim::share::{Quiet, Share, State};
use crate::reclaim::slots::Emptying;
use crate::reclaim::state::{BATCH, Chooser, SPARE_SLOTS, Standby, count, key_of, member_of, page_of};
use crate::reclaim::write_back::{Batch, Writer};
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState};
use pagestitch_kernel::arena::Runs;
use pagestitch_kernel::sync::MutexGuard;
use pagestitch_kernel::sync::atomic::Ordering;
use pagestitch_kernel::{Outcome, Page, Span};
use std::sync::Arc;
use std::thread;

impl State {
    /// Moves a batch of pages to the standby list, and empties slots for the next batch; or drops the batch; or
    /// shortens a list that is too long. Passes over its turn, and returns false, if another thread is choosing,
    /// there is no page, or all stay.
    pub(super) fn evict(&self) -> bool {
        let mut room = [0; BATCH];
        let Some(mut chooser) = self.try_choose() else { return false };
        chooser.take_note(&self.arrivals);
        if let Some(first) = chooser.blocks.victim() {
            drop(chooser);
            self.drop_block(first);
            return true;
        }
        if let Some((standby, run)) = self.begin_shortening(&mut chooser) {
            drop(chooser);
            self.empty(standby, run);
            return true;
        }
        let Some((standby, run)) = self.standby_of_batch(&mut chooser) else {
            let victims = chooser.victims_to_drop(&mut room);
            drop(chooser);
            return self.drop_pages(victims) > 0;
        };
        let (slot, most) = standby.take(&mut chooser.ends, BATCH);
        let victims = chooser.victims(&mut room[..most]);
        drop(chooser);
        let is_shorter = run.is_some();
        if let Some(run) = run {
            self.empty(standby, run);
        }
        let chosen = victims.len();
        let moved = self.move_out(standby, victims, slot);
        standby.skip(slot + chosen, most - chosen);
        is_shorter || moved > 0
    }

    /// The standby list, if the next batch of pages passes through it, and its oldest slots, to be emptied, if it
    /// is nearly full. All written pages pass through it. Others leave at once where a thread holds up the end of
    /// a full list.
    pub(super) fn standby_of_batch(&self, chooser: &mut Chooser) -> Option<(&Standby, Option<Emptying>)> {
        let standby = self.standby.as_ref()?;
        let has_writes = self.writes.regions.load(Ordering::Relaxed) > 0;
        let sampling = &mut chooser.sampling;
        let takes = sampling.takes_next(self.tally.soft_faults.load(Ordering::Relaxed));
        standby.set_waiting(if has_writes { standby.slots.len() } else { sampling.waiting() });
        if !takes && !has_writes {
            return None;
        }
        let run = standby.begin_empty(chooser, standby.room().saturating_sub(SPARE_SLOTS));
        let is_held_up = run.is_none() && standby.free(&chooser.ends) == 0;
        (has_writes || !is_held_up).then_some((standby, run))
    }

    /// Begins to empty slots of a standby list that is longer than it may be.
    pub(super) fn begin_shortening(&self, chooser: &mut Chooser) -> Option<(&Standby, Emptying)> {
        let standby = self.standby.as_ref()?;
        Some((standby, standby.begin_empty(chooser, standby.room())?))
    }

    /// Frees memory: that of the oldest slots; if there is none, that of resident pages. False if there is
    /// none either.
    pub(super) fn free_some(&self, mut chooser: MutexGuard<'_, Chooser>) -> bool {
        chooser.take_note(&self.arrivals);
        if let Some(first) = chooser.blocks.victim() {
            drop(chooser);
            // A block whose pages have left already is progress, too.
            self.drop_block(first);
            return true;
        }
        let mut taken = (0, 0);
        if let Some(standby) = &self.standby {
            if let Some(run) = standby.begin_empty(&mut chooser, 0) {
                drop(chooser);
                self.empty(standby, run);
                return true;
            }
            if self.writes.regions.load(Ordering::Relaxed) > 0 {
                taken = standby.slots.take(&mut chooser.ends, BATCH);
            }
        }
        let mut room = [0; BATCH];
        // Pages for slots are not gone yet.
        let victims = match taken {
            (_, 0) => chooser.victims_to_drop(&mut room),
            _ => chooser.victims(&mut room),
        };
        let block = if victims.is_empty() { chooser.blocks.last_resort() } else { None };
        drop(chooser);
        self.take_away(victims, taken) || block.is_some_and(|first| self.drop_block(first))
    }

    /// Drops the pages of a block. False if all stay.
    fn drop_block(&self, first: PageKey) -> bool {
        let mut dropped = 0;
        self.each_region(&[first], |share, _| {
            if let Some(share) = share.filter(|share| share.has(Page(page_of(first).0 + BLOCK_PAGES - 1))) {
                share.enter(&mut |region| dropped += share.drop_span(region, block_at(first)));
            }
        });
        dropped > 0
    }

    /// Drops pages; those that go back to their sources move to taken slots, as far as there are any.
    /// False if all stay.
    fn take_away(&self, victims: &[PageKey], (slot, slots): (usize, usize)) -> bool {
        let (mut used, mut gone) = (0, 0);
        self.each_region(victims, |share, group| {
            let Some(share) = share else { return };
            let Some(standby) = self.standby.as_ref().filter(|_| share.dirty.is_some()) else {
                share.enter(&mut |region| gone += share.drop_pages::<RUNS>(region, group));
                return;
            };
            let (now, rest) = group.split_at(group.len().min(slots - used));
            rest.iter().for_each(|page| share.page_stays(page_of(*page)));
            let at = standby.slots.after(slot, used);
            used += now.len();
            if !share.enter(&mut |region| gone += share.move_out(region, standby, now, at)) {
                standby.skip(at, now.len());
            }
        });
        self.standby.iter().for_each(|standby| standby.skip(slot + used, slots - used));
        gone > 0
    }

    pub(super) fn empty(&self, standby: &Standby, run: Emptying) {
        if run.frames > 0 && standby.arena.empty(run.slots()).is_err() {
            // Not known to happen. The slots stay out of use.
            return;
        }
        let frames = run.frames;
        standby.slots.finish_empty(run);
        self.release(frames);
    }

    /// Moves pages to taken slots, from `slot` on. Returns the number of those that have moved.
    pub(super) fn move_out(&self, standby: &Standby, victims: &[PageKey], slot: usize) -> usize {
        let (mut slot, mut moved) = (slot, 0);
        self.each_region(victims, |share, group| {
            let mut out = |share: &Share| {
                share.enter(&mut |region| moved += share.move_out(region, standby, group, slot))
            };
            if !share.is_some_and(&mut out) {
                // The region ends, and its pages with it.
                standby.skip(slot, group.len());
            }
            slot = standby.slots.after(slot, group.len());
        });
        moved
    }

    /// Drops pages. Returns their number.
    pub(super) fn drop_pages(&self, victims: &[PageKey]) -> usize {
        let mut dropped = 0;
        self.each_region(victims, |share, group| {
            if let Some(share) = share {
                share.enter(&mut |region| dropped += share.drop_pages::<RUNS>(region, group));
            }
        });
        dropped
    }

    /// Calls `each` with the pages of each region, and the region's share if it has not ended.
    fn each_region(&self, victims: &[PageKey], mut each: impl FnMut(Option<&Share>, &[PageKey])) {
        for group in victims.chunk_by(|one, two| member_of(*one) == member_of(*two)) {
            let members = self.members.read();
            let share = members.value().and_then(|members| members.get(member_of(group[0]))?.as_ref());
            let has_all = |share: &&Arc<Share>| group.iter().all(|page| share.has(page_of(*page)));
            let share = share.filter(has_all);
            match share {
                // A region that joins or ends must not wait for the write of a page.
                Some(share) if share.dirty.is_some() => {
                    let share = Arc::clone(share);
                    drop(members);
                    each(Some(&share), group);
                }
                share => each(share.map(|share| &**share), group),
            }
        }
    }
}

impl Share {
    /// False for pages of an ended region that was longer and had the number of this one: a thread chooses
    /// pages before it enters their region.
    pub(super) fn has(&self, page: Page) -> bool {
        page.0 < self.evictable.reservation().pages()
    }

    /// A batch for the dirty pages of the region, if it has such; `None` without a buffer.
    fn begin_batch(&self) -> Option<Option<Batch<'_>>> {
        match &self.dirty {
            Some(_) => Batch::new(&self.state).map(Some),
            None => Some(None),
        }
    }

    /// Moves pages, in the order of their addresses, to taken slots from `first` on; writes dirty ones to
    /// their sources. Returns the number of pages that have moved.
    fn move_out(&self, region: &Mapping, standby: &Standby, pages: &[PageKey], first: usize) -> usize {
        let quiet = Quiet(region);
        let Some(mut batch) = self.begin_batch() else {
            // Another thread has the last buffer, and the kernel has no memory for one.
            pages.iter().for_each(|page| self.page_stays(page_of(*page)));
            standby.skip(first, pages.len());
            thread::yield_now();
            return 0;
        };
        let (mut done, mut all_moved) = (0, 0);
        while done < pages.len() {
            let slot = standby.slots.after(first, done);
            // The slots of a run do not wrap around.
            let rest = &pages[done..pages.len().min(done + standby.slots.len() - slot)];
            let run = leading_run(rest);
            let (now, moved) = match region.pages.claim_present(run, &quiet) {
                Ok(claim) => {
                    self.move_leading(region, claim, standby, slot, &mut Writer::Batch(batch.as_mut()))
                }
                Err(state) => {
                    standby.slots.skip(slot);
                    self.forget_absent(region, run.first, state);
                    (1, 0)
                }
            };
            all_moved += moved;
            done += now;
        }
        if let (Some(dirty), Some(batch)) = (&self.dirty, &mut batch) {
            self.write_batch(region, dirty, standby, batch);
        }
        all_moved
    }

    /// Moves the leading pages of a claim, or keeps them; the others stay. Returns the number of pages that are
    /// done, and that of those that have moved.
    #[inline(always)] // a signal handler has a small stack
    pub(super) fn move_leading(
        &self,
        region: &Mapping,
        mut claim: Claim<'_>,
        standby: &Standby,
        slot: usize,
        writer: &mut Writer<'_, '_>,
    ) -> (usize, usize) {
        let (alike, stay) = self.leading_alike(region, claim.span(), writer);
        let mut part = claim.split_off(alike);
        claim.settle(claim.span().pages, PageState::Present);
        if stay {
            return (self.keep(&mut part, standby, slot), 0);
        }
        let moved = self.move_run(region, &mut part, (standby, slot), writer);
        (moved.max(1), moved)
    }

    /// The number of leading pages of a claimed span that all stay, or all leave.
    fn leading_alike(&self, region: &Mapping, span: Span, writer: &Writer<'_, '_>) -> (usize, bool) {
        let Some(dirty) = &self.dirty else { return (span.pages, false) };
        let pauses = dirty.backoff.pauses();
        let stays = |step: usize| {
            let page = Page(span.first.0 + step);
            dirty.writing.get(page.0)
                || dirty.is_dirty(page) && (pauses || writer.refuses(region, dirty, page))
        };
        let (first, mut alike) = (stays(0), 1);
        // Not an iterator, because a signal handler has a small stack.
        while alike < span.pages && stays(alike) == first {
            alike += 1;
        }
        (alike, first)
    }

    /// The pages of a claim stay: their bytes are being written, or cannot be written.
    #[cold]
    fn keep(&self, claim: &mut Claim<'_>, standby: &Standby, slot: usize) -> usize {
        let pages = claim.span().pages;
        claim.span().iter().for_each(|page| self.page_stays(page));
        claim.settle(pages, PageState::Present);
        standby.skip(slot, pages);
        pages
    }

    /// Moves the first pages of a claim; the others stay. Returns the number of pages that have moved. If it
    /// is 0, the first page is done. `writer` gets the dirty ones, if the region has any.
    fn move_run(
        &self,
        region: &Mapping,
        claim: &mut Claim<'_>,
        (standby, slot): (&Standby, usize),
        writer: &mut Writer<'_, '_>,
    ) -> usize {
        let Standby { arena, slots, .. } = standby;
        let span = self.pins.free_prefix(claim.span());
        if span.is_empty() {
            slots.skip(slot);
            claim.settle(claim.span().pages, PageState::Present);
            return 0;
        }
        let outcome = arena.take_in(&self.evictable, span, slot);
        let moved = match outcome {
            Outcome::Done => span.pages,
            Outcome::Partial { bytes } => bytes / self.evictable.reservation().page_size().bytes(),
            _ => 0,
        };
        self.note_moved(standby, span.prefix(moved), slot, writer);
        if let Writer::Handler(writes) = writer {
            self.write_moved(region, standby, (span.prefix(moved), slot), writes);
        }
        self.pages_left(moved);
        count(&self.state.tally.evictions, moved);
        claim.settle(moved, PageState::Absent);
        if moved == 0 {
            slots.skip(slot);
            self.not_moved(claim, outcome);
        }
        claim.settle(claim.span().pages, PageState::Present);
        moved
    }

    /// Pages have moved to slots, from `slot` on. The move has ended all writes, so that each written page has
    /// its mark by now.
    fn note_moved(&self, standby: &Standby, span: Span, slot: usize, writer: &mut Writer<'_, '_>) {
        let slots = &standby.slots;
        for (step, page) in span.iter().enumerate() {
            let key = key_of(self.member, page);
            match self.begins_writing(page) {
                true => {
                    slots.fill_dirty(slot + step, key);
                    if let Writer::Batch(Some(batch)) = writer {
                        batch.add(standby, page, slot + step);
                    }
                }
                false => slots.fill(slot + step, key),
            }
            self.places.set(page, Place::Slot((slot + step) as u32));
        }
    }

    fn begins_writing(&self, page: Page) -> bool {
        self.dirty.as_ref().is_some_and(|dirty| dirty.begin_writing(page))
    }

    /// The first page of a claim has not moved.
    #[cold]
    fn not_moved(&self, claim: &mut Claim<'_>, outcome: Outcome) {
        let page = claim.span().first;
        if outcome == Outcome::NotRegistered {
            // The application has discarded it: it takes no memory, and has no bytes for its source.
            self.uncount_discarded(page);
            return claim.settle(1, PageState::Absent);
        }
        if outcome != Outcome::Changing {
            count(&self.state.tally.refused, 1);
        }
        self.page_stays(page);
        claim.settle(1, PageState::Present);
    }

    /// A chosen page is not present: it is being filled, or the application has discarded it.
    #[cold]
    pub(super) fn forget_absent(&self, region: &Mapping, page: Page, state: PageState) {
        let quiet = Quiet(region);
        // The claim of a claimed page belongs to another thread: an exchange of its state for the same
        // one would take the claim away.
        let claim =
            if state.is_claimed() { Err(state) } else { region.pages.claim_from(page, state, &quiet) };
        let Ok(mut claim) = claim else { return self.page_stays(page) };
        if self.looks_absent(page, state) {
            self.page_stays(page);
            return claim.settle(1, PageState::Present);
        }
        // A page that is swapped out may look absent: it is dropped, so that no uncounted page stays.
        match self.places.get(page) {
            Place::Resident if self.evictable.discard(page.span()).is_ok() => self.uncount_discarded(page),
            // It is locked, and leaves later.
            Place::Resident => self.page_stays(page),
            Place::Listed => {
                self.places.set(page, Place::Nowhere);
            }
            Place::Nowhere | Place::Gone | Place::Slot(_) => {}
        }
        claim.settle(1, state);
    }

    /// True for an absent page that may be swapped out, with written bytes that are nowhere else. The next
    /// move of it tells.
    pub(super) fn looks_absent(&self, page: Page, state: PageState) -> bool {
        self.dirty.is_some() && state == PageState::Absent && self.places.get(page) == Place::Resident
    }

    /// A resident page takes no memory any more, and has no bytes for its source.
    fn uncount_discarded(&self, page: Page) {
        if let Some(dirty) = &self.dirty {
            dirty.unmark(page);
        }
        self.uncount(page, Place::Nowhere);
    }

    /// A resident page takes no memory any more: `after` is its place.
    pub(super) fn uncount(&self, page: Page, after: Place) {
        self.places.set(page, after);
        self.left_memory(1);
    }

    /// Drops pages, in the order of their addresses, `N` runs at a time. Returns their number. Pages of a region
    /// whose written pages go back stay: the region may have taken the number of an ended one since its pages
    /// were chosen.
    pub(super) fn drop_pages<const N: usize>(&self, region: &Mapping, pages: &[PageKey]) -> usize {
        if self.dirty.is_some() {
            pages.iter().for_each(|page| self.page_stays(page_of(*page)));
            return 0;
        }
        let (mut rest, mut dropped) = (pages, 0);
        while !rest.is_empty() {
            let mut runs = Runs::<N>::of(&self.evictable);
            while !rest.is_empty() && !runs.is_full() {
                let (done, claimed) = self.claim_to_drop(region, leading_run(rest));
                if claimed {
                    runs.push(leading_run(rest).prefix(done));
                }
                rest = &rest[done..];
            }
            dropped += self.drop_runs(region, &runs);
        }
        dropped
    }

    /// Claims the first pages of a run. Returns the number of pages that are done, and true if these are
    /// claimed.
    #[inline(never)] // a signal handler has a small stack
    fn claim_to_drop(&self, region: &Mapping, run: Span) -> (usize, bool) {
        let quiet = Quiet(region);
        let free = run.prefix(self.pins.free_prefix(run).pages.max(1));
        match region.pages.claim_present(free, &quiet) {
            Ok(mut claim) if self.pins.free_prefix(claim.span()) != claim.span() => {
                // A later page may have been pinned since: then the run is claimed again.
                claim.settle(claim.span().pages, PageState::Present);
                (usize::from(self.pins.has(run.first)), false)
            }
            Ok(claim) => (claim.keep().pages, true),
            Err(state) => {
                self.forget_absent(region, run.first, state);
                (1, false)
            }
        }
    }

    /// Drops the pages of a span that are present and not pinned. Returns their number. As in
    /// [`drop_pages`](Self::drop_pages), pages stay whose written bytes go back: they come in no blocks.
    pub(super) fn drop_span(&self, region: &Mapping, span: Span) -> usize {
        if self.dirty.is_some() {
            return 0;
        }
        let (quiet, mut dropped, mut rest) = (Quiet(region), 0, span);
        while !rest.is_empty() {
            let run = self.pins.free_prefix(rest);
            let mut done = 1;
            if !run.is_empty() {
                match region.pages.claim_present(run, &quiet) {
                    Ok(mut claim) if self.pins.free_prefix(claim.span()) != claim.span() => {
                        claim.settle(claim.span().pages, PageState::Present);
                        done = 0;
                    }
                    Ok(claim) => {
                        let mut runs = Runs::<1>::of(&self.evictable);
                        runs.push(claim.keep());
                        dropped += self.drop_runs(region, &runs);
                        done = runs.get(0).pages;
                    }
                    Err(state) => self.forget_absent(region, run.first, state),
                }
            }
            rest = rest.without_prefix(done);
        }
        dropped
    }

    /// Drops claimed runs. Returns the number of their pages.
    fn drop_runs<const N: usize>(&self, region: &Mapping, runs: &Runs<'_, N>) -> usize {
        let (mut done, mut dropped) = (0, 0);
        while done < runs.len() {
            let gone = self.state.discards.discard(runs, done);
            dropped += (done..done + gone).map(|run| self.settle_gone(region, runs.get(run))).sum::<usize>();
            done += gone;
            if done < runs.len() {
                // Some of its pages may be locked. The kernel stops at the first of these.
                dropped += runs.get(done).iter().map(|page| self.drop_page(region, page)).sum::<usize>();
                done += 1;
            }
        }
        dropped
    }

    /// Drops a claimed page, unless the kernel refuses it. Returns the number of pages that are dropped.
    fn drop_page(&self, region: &Mapping, page: Page) -> usize {
        let span = page.span();
        if self.evictable.discard(span).is_ok() {
            return self.settle_gone(region, span);
        }
        count(&self.state.tally.refused, 1);
        self.page_stays(page);
        region.pages.resume(span, &Quiet(region)).settle(1, PageState::Present);
        0
    }

    /// The pages of a claimed run are dropped. Returns their number.
    #[inline(never)]
    fn settle_gone(&self, region: &Mapping, run: Span) -> usize {
        run.iter().for_each(|page| {
            self.places.set(page, Place::Gone);
        });
        self.left_memory(run.pages);
        count(&self.state.tally.evictions, run.pages);
        region.pages.resume(run, &Quiet(region)).settle(run.pages, PageState::Absent);
        run.pages
    }

    /// Resident pages take no memory any more.
    fn left_memory(&self, pages: usize) {
        self.pages_left(pages);
        self.state.release(pages);
    }
}

/// The runs that are dropped at once: a batch of pages that do not follow each other.
const RUNS: usize = BATCH;

/// The pages of the block that begins with a page.
pub(super) const fn block_at(first: PageKey) -> Span {
    Span { first: page_of(first), pages: BLOCK_PAGES }
}

/// The pages that follow each other at the start of a sorted list.
pub(super) fn leading_run(pages: &[PageKey]) -> Span {
    let next = pages.windows(2).take_while(|pair| pair[1] == pair[0] + 1).count();
    Span { first: page_of(pages[0]), pages: 1 + next }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::policy::Replacement;
    use crate::reclaim::slots::Slots;
    use crate::reclaim::state::{key_of, room_for};
    use crate::source::{UnsealedMemfd, WritableFile};
    use crate::{Budget, Chunk, ErrorKind, Pool, Region, WriteBack};
    use pagestitch_kernel::PageSize;
    use pagestitch_kernel::arena::Arena;
    use std::num::NonZeroUsize;

    #[test]
    fn slots_without_a_frame_can_be_taken_again_after_a_search_for_memory() {
        let number = NonZeroUsize::new(8).unwrap();
        // Before Linux 6.8 there is no standby list.
        let Ok(arena) = Arena::new(number) else { return };
        let standby = Some(Standby::new(arena, Slots::new(number).unwrap()));
        let state = State::new(1024, standby, Replacement::S3Fifo.policy(room_for(1024))).unwrap();
        let slots = &state.standby.as_ref().unwrap().slots;
        for _ in 0..2 {
            assert_eq!(slots.take(&mut state.try_choose().unwrap().ends, 8), (0, 8));
            (0..8).for_each(|slot| slots.skip(slot));
            state.free_some(state.choose());
        }
    }

    const PAGES: usize = 16;

    /// The number of pages that are dropped of the first pages of the only region of a budget.
    fn dropped(budget: &Budget) -> usize {
        let pages: Vec<_> = (0..PAGES).map(|page| key_of(0, Page(page))).collect();
        budget.state.drop_pages(&pages)
    }

    /// A region may end after a thread has chosen its pages, and another region may take its number before the
    /// thread drops them.
    #[test]
    fn pages_of_a_region_with_write_back_are_never_dropped() {
        let bytes = PageSize::system().bytes() * PAGES;
        let (budget, pool) = (Budget::bytes(64 << 20).unwrap(), Pool::new().unwrap());
        let region = Region::builder().chunk(vec![7; bytes]).budget(&budget).build(&pool).unwrap();
        region.populate(..).unwrap();
        assert_eq!(dropped(&budget), PAGES, "pages that are only read");
        drop((region, budget));
        let file = UnsealedMemfd::create("table", bytes as u64).unwrap().file().try_clone().unwrap();
        let chunk = Chunk::writable(Arc::new(WritableFile::from_file(file, "table").unwrap()));
        let budget = Budget::bytes(64 << 20).unwrap();
        let builder = Region::builder().chunk(chunk).budget(&budget).write_back(WriteBack::ToSource);
        let region = match builder.build_shared(&pool) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return println!("SKIPPED: {error}"),
            built => built.unwrap(),
        };
        region.write_at(0, &vec![7; bytes]).unwrap();
        assert_eq!(dropped(&budget), 0);
        let mut read = vec![0; bytes];
        region.read_at(0, &mut read).unwrap();
        assert!(read == vec![7; bytes]);
    }
}
