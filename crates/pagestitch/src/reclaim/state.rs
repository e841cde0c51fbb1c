//! The counts of a budget, and the choice of pages that leave.

use crate::policy::{PageKey, ReplacementPolicy};
use crate::reclaim::arrivals::Arrivals;
use crate::reclaim::blocks::{BLOCK_PAGES, Blocks};
use crate::reclaim::dirty::Writes;
use crate::reclaim::evictor::Evictor;
use crate::reclaim::marks::Marks;
use crate::reclaim::sampling::Sampling;
use crate::reclaim::slots::{Emptying, Ends, Slots};
use crate::signals::NoSignals;
use pagestitch_kernel::arena::{Arena, Discards};
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::mapped_buffer::MappedBuffer;
use pagestitch_kernel::rcu::Rcu;
use pagestitch_kernel::striped::Stripe;
use pagestitch_kernel::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use pagestitch_kernel::sync::{Mutex, MutexGuard};
use pagestitch_kernel::{Errno, Page};
use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use std::{fmt, mem};

/// The state of a budget, shared by its regions, of which each has a share `S`.
pub(super) struct State<S> {
    /// The most pages of memory.
    pub(super) limit: usize,
    pub(super) marks: Marks,
    /// The pages of memory in regions and in slots, and those that are reserved for pages to come.
    frames: Stripe<AtomicUsize>,
    /// The pages of memory in tables of hashes, a part of `frames`.
    hashes: AtomicUsize,
    /// The number of pinned pages.
    pinned: AtomicUsize,
    pub(super) arrivals: Arrivals,
    /// None on a kernel that cannot move pages: pages are dropped at once.
    pub(super) standby: Option<Standby>,
    pub(super) discards: Discards,
    chooser: Mutex<Chooser>,
    /// Pages that signal handlers may fill above the limit, because nothing could leave.
    pub(super) permits: AtomicUsize,
    /// The number of signal handlers that have pages leave.
    pub(super) leaving: AtomicUsize,
    pub(super) writes: Writes,
    /// Evicts pages that signal handlers must not write.
    pub(super) evictor: Evictor,
    /// Buffers of threads that write pages back: one for each that has done so at the same time. A thread that
    /// takes one may serve the thread that holds the lock of the allocator, so none is of the allocator's memory.
    buffers: Mutex<Vec<MappedBuffer>>,
    /// The regions, by their number.
    pub(super) members: Rcu<Vec<Option<Arc<S>>>>,
    pub(super) tally: Tally,
    pub(super) generation: ForkGeneration,
}

/// Pages that have left their regions, and are in memory still.
#[derive(Debug)]
pub(super) struct Standby {
    pub(super) arena: Arena,
    pub(super) slots: Slots,
    /// The slots that are in use at most. More are, while the list becomes shorter.
    room: AtomicUsize,
}

/// Chooses the pages that leave, and their slots.
#[derive(Debug)]
pub(super) struct Chooser {
    pub(super) policy: Box<dyn ReplacementPolicy>,
    pub(super) blocks: Blocks,
    pub(super) ends: Ends,
    pub(super) sampling: Sampling,
}

/// The events of a budget since it was made.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Pages that have left their regions.
    pub(super) evictions: AtomicU64,
    /// Pages that have come back from standby.
    pub(super) soft_faults: AtomicU64,
    /// Pages that had left, and were filled from their source again.
    pub(super) refaults: AtomicU64,
    /// Pages for which there was no room in the budget, because nothing could leave.
    pub(super) overruns: AtomicU64,
    /// The nanoseconds that threads have taken to free memory before they could fill a page.
    pub(super) stalled_ns: AtomicU64,
    /// Pages that were chosen, and that the kernel did not let go: pinned, or locked.
    pub(super) refused: AtomicU64,
    /// Written pages whose bytes went to their source.
    pub(super) write_backs: AtomicU64,
    /// Writes to sources that have failed.
    pub(super) write_failures: AtomicU64,
}

impl<S: Send + Sync> State<S> {
    pub(super) fn new(
        limit: usize,
        standby: Option<Standby>,
        policy: Box<dyn ReplacementPolicy>,
    ) -> Result<Self, Errno> {
        let slots = standby.as_ref().map_or(0, |standby| standby.slots.len());
        let sampling = Sampling::new(slots.saturating_sub(SPARE_SLOTS));
        let room = NonZeroUsize::new(room_for(limit)).expect("a budget has pages");
        Ok(Self {
            limit,
            marks: Marks::new(limit),
            frames: Stripe(AtomicUsize::new(0)),
            hashes: AtomicUsize::new(0),
            pinned: AtomicUsize::new(0),
            arrivals: Arrivals::new(room)?,
            standby,
            discards: Discards::new(),
            chooser: Mutex::new(Chooser {
                policy,
                blocks: Blocks::new(limit),
                ends: Ends::default(),
                sampling,
            }),
            permits: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            writes: Writes::default(),
            evictor: Evictor::default(),
            buffers: Mutex::new(Vec::with_capacity(BUFFERS)),
            members: Rcu::empty(),
            tally: Tally::default(),
            generation: ForkGeneration::current(),
        })
    }

    /// Has pages leave by another policy, which gets the pages of the one before in the order of their leaving.
    pub(super) fn set_policy(&self, mut policy: Box<dyn ReplacementPolicy>) {
        // A handler that touches a page of the budget may wait for the thread that has the lock.
        let quiet = NoSignals::until_dropped();
        let mut chooser = self.choose();
        while let Some(page) = chooser.policy.victim() {
            policy.admit(page, false);
        }
        mem::swap(&mut chooser.policy, &mut policy);
        drop(chooser);
        drop(quiet);
        // The other policy is freed without the lock, because no worker may wait for the allocator.
        drop(policy);
    }

    /// The pages of memory in use or reserved.
    pub(super) fn frames(&self) -> usize {
        self.frames.load(Ordering::SeqCst)
    }

    /// The pages of memory in slots.
    pub(super) fn standby_pages(&self) -> usize {
        self.standby.as_ref().map_or(0, |standby| standby.slots.full())
    }

    /// The pages of memory in slots that are not written back yet.
    pub(super) fn modified_pages(&self) -> usize {
        self.standby.as_ref().map_or(0, |standby| standby.slots.modified())
    }

    /// Reserves memory for pages. False, and nothing is changed, if the budget has no room.
    pub(super) fn try_reserve(&self, pages: usize) -> bool {
        add_up_to(&self.frames, pages, self.limit - self.lowered())
    }

    /// As [`try_reserve`](Self::try_reserve), up to the limit of a budget whose marks are lowered. For pages
    /// for which no other page can leave.
    pub(super) fn try_reserve_above_mark(&self, pages: usize) -> bool {
        self.lowered() > 0 && add_up_to(&self.frames, pages, self.limit)
    }

    /// The pages that the budget has given up for a while. Pinned pages stay, so they count for it.
    pub(super) fn lowered(&self) -> usize {
        match self.marks.lowered() {
            0 => 0,
            lowered => lowered.min(self.pinned_max().saturating_sub(self.pinned.load(Ordering::SeqCst))),
        }
    }

    /// The most pages of memory in tables of hashes.
    pub(super) const fn hashes_max(&self) -> usize {
        self.limit / HASHES_SHARE
    }

    /// Counts pages for a table of hashes. False, and nothing is changed, if there are too many.
    pub(super) fn reserve_hashes(&self, pages: usize) -> bool {
        add_up_to(&self.hashes, pages, self.hashes_max())
    }

    /// A table of hashes is gone.
    pub(super) fn release_hashes(&self, pages: usize) {
        self.hashes.fetch_sub(pages, Ordering::SeqCst);
    }

    /// The most pages that can be pinned.
    pub(super) const fn pinned_max(&self) -> usize {
        self.limit / PINNED_SHARE
    }

    /// Counts pages that are pinned. False, and nothing is changed, if there are too many.
    pub(super) fn reserve_pinned(&self, pages: usize) -> bool {
        add_up_to(&self.pinned, pages, self.pinned_max())
    }

    /// Pages are pinned no more.
    pub(super) fn release_pinned(&self, pages: usize) {
        self.pinned.fetch_sub(pages, Ordering::SeqCst);
    }

    /// Reserves memory above the limit.
    pub(super) fn overrun(&self, pages: usize) {
        self.frames.fetch_add(pages, Ordering::SeqCst);
        count(&self.tally.overruns, pages);
    }

    /// Memory of so many pages is free, or not used after all.
    pub(super) fn release(&self, pages: usize) {
        if pages > 0 {
            self.frames.fetch_sub(pages, Ordering::SeqCst);
        }
    }

    /// True if pages may come in whole blocks.
    pub(super) const fn has_blocks(&self) -> bool {
        self.standby.is_some() && self.limit >= BLOCKS_LEAST
    }

    /// True if pages should leave: some memory is free at rest, so that a fault seldom has to wait for it.
    pub(super) fn is_due(&self) -> bool {
        let resident = self.frames().saturating_sub(self.standby_pages().min(self.standby_room()));
        resident > self.resident_at_rest()
    }

    /// The most pages in regions at rest.
    pub(super) fn resident_at_rest(&self) -> usize {
        self.limit - self.standby_room() - free_at_rest(self.limit) - self.lowered()
    }

    fn standby_room(&self) -> usize {
        self.standby.as_ref().map_or(0, Standby::room)
    }

    /// The right to choose; `None` if a thread has it, and the caller cannot wait for that thread.
    pub(super) fn try_choose(&self) -> Option<MutexGuard<'_, Chooser>> {
        match self.chooser.try_lock() {
            Ok(chooser) => Some(chooser),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The right to choose, after a wait. Not in a signal handler.
    pub(super) fn choose(&self) -> MutexGuard<'_, Chooser> {
        self.chooser.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a buffer in store, so that a thread gets one although the kernel has no memory.
    pub(super) fn store_buffer(&self) -> Result<(), Errno> {
        self.take_buffer().map(|buffer| self.keep_buffer(buffer))
    }

    /// A buffer for a batch of pages. Fails only while other threads have all that there are.
    pub(super) fn take_buffer(&self) -> Result<MappedBuffer, Errno> {
        const PAGES: NonZeroUsize = NonZeroUsize::new(BATCH).expect("a batch has pages");
        let kept = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(|| MappedBuffer::new(PAGES), Ok)
    }

    /// Keeps a buffer for later batches.
    pub(super) fn keep_buffer(&self, buffer: MappedBuffer) {
        let mut kept = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < kept.capacity() {
            kept.push(buffer);
        }
    }

    /// Counts the time of a thread that had to free memory before it could fill a page.
    pub(super) fn stalled_since(&self, began: Instant) {
        count(&self.tally.stalled_ns, usize::try_from(began.elapsed().as_nanos()).unwrap_or(0));
    }
}

impl Standby {
    pub(super) fn new(arena: Arena, slots: Slots) -> Self {
        let room = AtomicUsize::new(slots.len());
        Self { arena, slots, room }
    }

    /// The slots that may be in use.
    pub(super) fn room(&self) -> usize {
        self.room.load(Ordering::Relaxed)
    }

    /// Lets so many pages wait.
    pub(super) fn set_waiting(&self, pages: usize) {
        let room = (pages + SPARE_SLOTS).min(self.slots.len());
        // Not each time, because the signal handlers of all threads read it.
        if self.room() != room {
            self.room.store(room, Ordering::Relaxed);
        }
    }

    /// The slots that may be taken.
    pub(super) fn free(&self, ends: &Ends) -> usize {
        self.room().saturating_sub(self.slots.used(ends))
    }

    /// Takes up to `most` free slots in the order of the ring. Returns the first one, and their number.
    pub(super) fn take(&self, ends: &mut Ends, most: usize) -> (usize, usize) {
        self.slots.take(ends, most.min(self.free(ends)))
    }

    /// As [`take`](Self::take), without slots behind the end of the ring.
    pub(super) fn take_in_a_row(&self, ends: &mut Ends, most: usize) -> (usize, usize) {
        self.slots.take_in_a_row(ends, most.min(self.free(ends)))
    }

    /// Begins to empty the oldest slots if more than `most` are in use.
    pub(super) fn begin_empty(&self, chooser: &mut Chooser, most: usize) -> Option<Emptying> {
        let Chooser { policy, ends, .. } = chooser;
        let is_longer = self.slots.used(ends) > most;
        if is_longer { self.slots.begin_empty(ends, BATCH, |page| policy.dropped(page)) } else { None }
    }

    /// No pages have moved to taken slots, from `slot` on.
    pub(super) fn skip(&self, slot: usize, slots: usize) {
        (0..slots).for_each(|step| self.slots.skip(self.slots.after(slot, step)));
    }
}

impl Chooser {
    /// Tells the policy of the pages that have come.
    pub(super) fn take_note(&mut self, arrivals: &Arrivals) {
        let Self { policy, blocks, .. } = self;
        arrivals.take(|key, returned| match block_of(key) {
            None => policy.admit(key, returned),
            Some(first) if blocks.add(first) => {}
            Some(first) => (first..first + BLOCK_PAGES as u64).for_each(|page| policy.admit(page, returned)),
        });
    }

    /// Forgets pages.
    pub(super) fn forget(&mut self, is_gone: &dyn Fn(PageKey) -> bool) {
        self.policy.forget(is_gone);
        // A block of which some pages are left stays, because no other list has them.
        self.blocks.forget(&|first| is_gone(first) && is_gone(first + BLOCK_PAGES as u64 - 1));
    }

    /// Chooses pages that leave at once, in the order of their regions and addresses.
    pub(super) fn victims_to_drop<'v>(&mut self, room: &'v mut [PageKey]) -> &'v mut [PageKey] {
        let victims = self.victims(room);
        victims.iter().for_each(|page| self.policy.dropped(*page));
        victims
    }

    /// Chooses pages that leave, in the order of their regions and addresses.
    pub(super) fn victims<'v>(&mut self, room: &'v mut [PageKey]) -> &'v mut [PageKey] {
        let mut chosen = 0;
        for place in room.iter_mut() {
            let Some(page) = self.policy.victim() else { break };
            *place = page;
            chosen += 1;
        }
        self.sampling.note_chosen(chosen);
        let victims = &mut room[..chosen];
        sort(victims);
        victims
    }
}

impl<S: Send + Sync> fmt::Debug for State<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("limit", &self.limit)
            .field("frames", &self.frames())
            .finish_non_exhaustive()
    }
}

/// Sorts a few keys by insertion, because a sort of the standard library needs more stack than a signal
/// handler has.
fn sort(keys: &mut [PageKey]) {
    for end in 1..keys.len() {
        let mut at = end;
        while at > 0 && keys[at - 1] > keys[at] {
            keys.swap(at - 1, at);
            at -= 1;
        }
    }
}

/// Adds pages to a counter. False, and nothing is changed, if there would be more than `most`.
fn add_up_to(counter: &AtomicUsize, pages: usize, most: usize) -> bool {
    let more = |now: usize| Some(now + pages).filter(|&sum| sum <= most);
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
}

/// Adds to a counter.
pub(super) fn count(counter: &AtomicU64, pages: usize) {
    counter.fetch_add(pages as u64, Ordering::Relaxed);
}

/// The key of a page of a region.
pub(super) const fn key_of(member: usize, page: Page) -> PageKey {
    (member as u64) << PAGE_BITS | page.0 as u64
}

/// The key of the block that begins with a page.
pub(super) const fn block_key(member: usize, first: Page) -> PageKey {
    key_of(member, first) | BLOCK
}

/// The first page of a block; `None` for the key of a page.
const fn block_of(key: PageKey) -> Option<PageKey> {
    if key & BLOCK == 0 { None } else { Some(key & !BLOCK) }
}

/// The pages that are free at rest: two batches, and two blocks where pages come in blocks.
const fn free_at_rest(limit: usize) -> usize {
    if limit >= BLOCKS_LEAST { 2 * BLOCK_PAGES } else { 2 * BATCH }
}

/// The region of a key.
pub(super) const fn member_of(key: PageKey) -> usize {
    (key >> PAGE_BITS) as usize
}

/// The page of a key.
pub(super) const fn page_of(key: PageKey) -> Page {
    Page((key & ((1 << PAGE_BITS) - 1)) as usize)
}

/// The pages for which queues have room: those of the budget, and some that are above it.
pub(super) const fn room_for(limit: usize) -> usize {
    limit + limit / 4 + 64 * BATCH
}

/// The patience of a fault without room: with sources that take no page back, and with handlers that have pages leave.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// The pages that leave at once.
pub(super) const BATCH: usize = 64;
/// The most buffers for batches that a budget keeps.
const BUFFERS: usize = 256;
/// The slots that are free at rest, so that the next batches find room in the list.
pub(super) const SPARE_SLOTS: usize = 2 * BATCH;
/// Pinned pages have at most this share of a budget.
const PINNED_SHARE: usize = 2;
/// Tables of hashes have at most this share of a budget.
const HASHES_SHARE: usize = 8;
/// The bit of a block in a key, above the bits of the region.
const BLOCK: u64 = 1 << 60;
/// The least budget whose pages come in blocks.
pub(super) const BLOCKS_LEAST: usize = 32 * BLOCK_PAGES;
/// The bits of a page's number in a key. A region has at most 2^40 pages.
const PAGE_BITS: u32 = 40;
/// The most regions of a budget, because a key has 60 bits.
pub(super) const MEMBERS_MAX: usize = 1 << 20;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::policy::Replacement;

    #[test]
    fn a_block_of_which_some_pages_are_forgotten_still_leaves() {
        let policy = Replacement::S3Fifo.policy(room_for(BLOCKS_LEAST));
        let state = State::<()>::new(BLOCKS_LEAST, None, policy).unwrap();
        let mut chooser = state.try_choose().unwrap();
        for (pages, left) in [(1, Some(512)), (511, Some(512)), (512, None)] {
            state.arrivals.add(block_key(0, Page(512)), false);
            chooser.take_note(&state.arrivals);
            chooser.forget(&|key| (512..512 + pages).contains(&page_of(key).0));
            assert_eq!(chooser.blocks.last_resort(), left);
        }
    }
}
