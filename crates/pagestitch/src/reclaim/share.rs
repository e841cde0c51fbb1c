//! A region's part in a budget.

use crate::error::Failure;
use crate::reclaim::dirty::DirtyPages;
use crate::reclaim::fingerprints::{Fingerprints, table_pages};
use crate::reclaim::pins::Pins;
use crate::reclaim::places::{Place, Places};
use crate::reclaim::state::{self, BATCH, MEMBERS_MAX, PATIENCE, block_key, count, key_of, member_of};
use crate::signals::NoSignals;
use crate::space::page_table::{Claim, Wake};
use crate::space::{ChangedPages, LeftPages, Mapping, Prepared, Residence, WrittenBack};
use pagestitch_kernel::arena::ArenaError;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::{AddressRange, Errno, Evictable, Page, Span, Uffd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

/// Enters a region for a thread that evicts its pages, and that serves another region perhaps.
pub(crate) trait EnterRegion: fmt::Debug + Send + Sync {
    /// Calls `work` with the region, inside of its gate. False if the region ends.
    fn enter_region(&self, work: &mut dyn FnMut(&Mapping)) -> bool;
}

/// The state of a budget.
pub(super) type State = state::State<Share>;

/// A region's part in a budget: the places of its pages.
#[derive(Debug)]
pub(crate) struct Share {
    pub(super) state: Arc<State>,
    /// Its number among the regions of the budget.
    pub(super) member: usize,
    pub(super) places: Arc<Places>,
    pub(super) pins: Pins,
    pub(super) evictable: Evictable,
    /// True if whole blocks may come at once.
    pub(super) has_blocks: bool,
    /// Present if pages come back from sources that may change.
    fingerprints: Option<Fingerprints>,
    /// The pages of memory that the budget counts for them.
    table_pages: usize,
    /// The region, once it is served.
    pub(super) region: OnceLock<Arc<dyn EnterRegion>>,
    /// The number of its pages that are resident.
    resident: AtomicUsize,
    /// The written pages, if they go back to their sources. Then a page arrives write-protected, and leaves
    /// by a move only.
    pub(super) dirty: Option<DirtyPages>,
    evicted: Evicted,
}

/// The membership of a mapping in a budget. Its drop ends it.
#[derive(Debug)]
pub(crate) struct Membership(Arc<Share>);

/// The way in which the pages of a region leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// Signal handlers fill its pages, and take pages of any region of the budget away.
    pub(crate) in_handlers: bool,
    /// Written pages go back to their sources, of which some run code that no signal handler may run.
    pub(crate) written_back: bool,
    /// The application asks which pages were written.
    pub(crate) tracks_changes: bool,
}

/// The reason why a region cannot join a budget.
#[derive(Debug)]
pub(crate) enum JoinError {
    /// No thread can be started that evicts pages for signal handlers.
    NoThread(io::Error),
    /// The budget has its most regions.
    Full,
    /// There is no memory for its table.
    NoTable(Errno),
    /// The hashes of its pages take so many pages, which are more than the budget keeps.
    Hashes(usize),
    /// Its written pages cannot move.
    NoMoves(ArenaError),
}

impl State {
    /// The pages that were written and are not in their sources yet.
    pub(super) fn dirty_pages(&self) -> usize {
        self.writes.dirty_pages() + self.modified_pages()
    }
}

impl Share {
    /// Joins a budget. A hash is kept for each page of `hashed`. `chunks`: the number of chunks of the region.
    pub(super) fn join(
        state: &Arc<State>,
        evictable: Evictable,
        hashed: Vec<Span>,
        (chunks, evicted, has_blocks): (usize, Evicted, bool),
    ) -> Result<Membership, JoinError> {
        let (page, pages) = (evictable.reservation().page_size(), evictable.reservation().pages());
        let places = Places::new(pages).map(Arc::new).map_err(JoinError::NoTable)?;
        let pins = Pins::new(pages).map_err(JoinError::NoTable)?;
        let count = state.writes.count_of_region();
        let dirty = evicted
            .written_back
            .then(|| DirtyPages::new(pages, chunks, BATCH, evicted.tracks_changes, count));
        let dirty = dirty.transpose().map_err(JoinError::NoMoves)?;
        if dirty.is_some() {
            state.store_buffer().map_err(JoinError::NoTable)?;
        }
        let table_pages = table_pages(&hashed, page);
        let fingerprints = (!hashed.is_empty()).then(|| Fingerprints::new(hashed, page));
        let fingerprints = fingerprints.transpose().map_err(JoinError::NoTable)?;
        if !state.reserve_hashes(table_pages) {
            return Err(JoinError::Hashes(table_pages));
        }
        // Before the lock of the regions, because the room may need the write of a page, and a source may wait
        // for a thread that ends a region.
        if !make_room(state, table_pages) {
            state.overrun(table_pages);
        }
        let mut writer = state.members.write();
        let mut members = writer.current().cloned().unwrap_or_default();
        let member = members.iter().position(Option::is_none).unwrap_or(members.len());
        let refused = match member >= MEMBERS_MAX {
            true => Some(JoinError::Full),
            false => start_evictor(state, &members, evicted).err().map(JoinError::NoThread),
        };
        if let Some(error) = refused {
            state.release(table_pages);
            state.release_hashes(table_pages);
            return Err(error);
        }
        let (state, region, resident) = (Arc::clone(state), OnceLock::new(), AtomicUsize::new(0));
        state.writes.regions.fetch_add(usize::from(dirty.is_some()), Ordering::Relaxed);
        let share = Self {
            state,
            member,
            places,
            pins,
            evictable,
            has_blocks,
            fingerprints,
            table_pages,
            region,
            resident,
            dirty,
            evicted,
        };
        let share = Arc::new(share);
        if member == members.len() {
            members.push(None);
        }
        members[member] = Some(Arc::clone(&share));
        writer.publish(members);
        Ok(Membership(share))
    }

    /// Calls `work` with the region, inside of its gate. False if the region ends.
    #[inline(always)] // a signal handler has a small stack
    pub(super) fn enter(&self, work: &mut dyn FnMut(&Mapping)) -> bool {
        match self.region.get() {
            Some(region) => region.enter_region(work),
            None => false,
        }
    }

    /// A page of the region takes memory that the budget counts: the policy gets it.
    pub(super) fn page_came(&self, page: Page, returned: bool) {
        self.resident.fetch_add(1, Ordering::Relaxed);
        self.state.arrivals.add(key_of(self.member, page), returned);
    }

    /// Pages of the region are not resident any more.
    pub(super) fn pages_left(&self, pages: usize) {
        self.resident.fetch_sub(pages, Ordering::Relaxed);
    }

    /// A chosen page stays: the policy gets it again.
    pub(super) fn page_stays(&self, page: Page) {
        self.state.arrivals.add(key_of(self.member, page), true);
    }

    /// Notes that a page is installed. The policy gets it, unless it has the page already, or gets the block
    /// of the page. Returns the number of pages of memory that it did not take.
    fn note_installed(&self, page: Page, is_in_block: bool) -> usize {
        let before = self.places.set(page, Place::Resident);
        match before {
            Place::Resident => return 1,
            // The page has its bytes from its source, and the slot has an outdated frame.
            Place::Slot(slot) => {
                self.drop_slot(page, slot);
                count(&self.state.tally.refaults, 1);
            }
            Place::Gone => count(&self.state.tally.refaults, 1),
            Place::Nowhere | Place::Listed => {}
        }
        match is_in_block || before == Place::Listed {
            true => {
                self.resident.fetch_add(1, Ordering::Relaxed);
            }
            false => self.page_came(page, false),
        }
        0
    }

    /// Notes that a page has no bytes any more. True if it was resident.
    fn note_discarded(&self, page: Page) -> bool {
        // A table that is only read takes no memory.
        let after = match self.places.get(page) {
            Place::Nowhere | Place::Listed => return false,
            Place::Slot(slot) => {
                self.drop_slot(page, slot);
                Place::Nowhere
            }
            Place::Gone => Place::Nowhere,
            // A page that is discarded again and again is in the lists of the policy once.
            Place::Resident => Place::Listed,
        };
        self.places.set(page, after) == Place::Resident
    }

    fn drop_slot(&self, page: Page, slot: u32) {
        let Some(standby) = &self.state.standby else { return };
        if standby.slots.begin_return(slot as usize, key_of(self.member, page)).is_some() {
            standby.slots.abandon(slot as usize);
        }
    }
}

impl Residence for Membership {
    fn prepare(
        &self,
        claim: &mut Claim<'_>,
        range: AddressRange,
        uffd: &Uffd,
        writes: Option<Page>,
    ) -> Prepared {
        self.0.prepare(claim, range, uffd, writes)
    }

    fn return_beside(&self, page: Page, range: AddressRange, uffd: &Uffd) -> bool {
        self.0.return_beside(page, range, uffd)
    }

    fn make_room(&self, pages: usize, quiet: bool) -> bool {
        if quiet { self.0.state.reserve_in_handler(pages) } else { make_room(&self.0.state, pages) }
    }

    fn installed(&self, span: Span, pages: usize, is_block: bool) {
        let is_listed = is_block && span.iter().all(|page| self.0.places.get(page) == Place::Listed);
        let note = |page| self.0.note_installed(page, is_block);
        let present = span.prefix(pages).iter().map(note).sum::<usize>();
        self.0.state.release(span.pages - pages + present);
        if is_block && !is_listed {
            self.0.state.arrivals.add(block_key(self.0.member, span.first), false);
        }
    }

    fn tidy(&self) {
        let state = &self.0.state;
        if !state.is_due() {
            return;
        }
        let _quiet = without_handlers();
        for _ in 0..TIDY_BATCHES {
            if !state.is_due() || !state.evict() {
                return;
            }
        }
    }

    fn free_in_handler(&self) {
        self.0.state.free_in_handler();
    }

    fn wait_for_room_in_handler(&self) -> bool {
        self.0.state.wait_for_room_in_handler()
    }

    fn tidy_in_handler(&self) {
        self.0.state.tidy_in_handler();
    }

    fn throttle(&self) {
        self.0.state.throttle();
    }

    fn throttle_in_handler(&self) {
        self.0.state.throttle_in_handler();
    }

    fn hashes(&self, page: Page) -> bool {
        self.0.fingerprints.as_ref().is_some_and(|fingerprints| fingerprints.has(page))
    }

    fn unchanged(&self, span: Span, bytes: &[u8]) -> usize {
        match &self.0.fingerprints {
            Some(fingerprints) => fingerprints.unchanged(span, bytes),
            None => span.pages,
        }
    }

    fn discarded(&self, span: Span) {
        let share = &self.0;
        let dropped = span.iter().filter(|page| share.note_discarded(*page)).count();
        share.pages_left(dropped);
        share.state.release(dropped);
        share.fingerprints.iter().for_each(|fingerprints| fingerprints.forget(span));
    }

    fn left_pages(&self) -> Arc<dyn LeftPages> {
        Arc::clone(&self.0.places) as Arc<dyn LeftPages>
    }

    fn limit(&self) -> usize {
        self.0.state.limit
    }

    fn written_back_pages(&self) -> u64 {
        self.0.state.tally.write_backs.load(Ordering::Relaxed)
    }

    fn evict(&self, span: Span) -> usize {
        self.0.evict(span)
    }

    fn pin(&self, span: Span) -> Result<(), usize> {
        if self.0.pin(span) { Ok(()) } else { Err(self.0.state.pinned_max()) }
    }

    fn unpin(&self, span: Span) {
        self.0.unpin(span);
    }

    fn evicts_written(&self) -> bool {
        self.0.state.writes.regions.load(Ordering::Relaxed) > 0
    }

    fn written_back(&self) -> Option<&dyn WrittenBack> {
        self.0.dirty.as_ref().map(|_| self as &dyn WrittenBack)
    }
}

impl WrittenBack for Membership {
    fn arrives_protected(&self, page: Page) -> bool {
        self.0.dirty.as_ref().is_some_and(|dirty| !dirty.is_dirty(page))
    }

    fn will_write(&self, page: Page) {
        self.0.dirty.iter().for_each(|dirty| dirty.mark(page));
    }

    fn flush(&self, span: Span, failed: &mut dyn FnMut(Page, Failure)) {
        let Some(dirty) = &self.0.dirty else { return };
        self.0.enter(&mut |region| self.0.flush(region, dirty, span, failed));
    }

    fn end(&self) {
        self.0.dirty.iter().for_each(DirtyPages::end);
    }

    fn changed(&self) -> Option<&dyn ChangedPages> {
        self.0.dirty.as_ref()?.changed_pages()
    }

    fn take_unsynced(&self, chunk: usize) -> bool {
        self.0.dirty.as_ref().is_some_and(|dirty| dirty.unsynced.clear(chunk))
    }
}

impl Membership {
    /// The region's part in the budget, for the builder.
    pub(crate) fn share(&self) -> Arc<Share> {
        Arc::clone(&self.0)
    }
}

impl Share {
    /// The region is served from now on, so its pages can leave.
    pub(crate) fn serve(&self, region: Arc<dyn EnterRegion>) {
        let _ = self.region.set(region);
    }
}

impl Drop for Membership {
    /// No thread is inside the region any more, so that none of its pages is claimed or comes.
    fn drop(&mut self) {
        let Share { state, member, resident, table_pages, dirty, .. } = &*self.0;
        // A forked child has neither the region nor the threads that hold locks.
        if !state.generation.is_current() {
            return;
        }
        let quiet = without_handlers();
        let mut chooser = state.choose();
        chooser.take_note(&state.arrivals);
        chooser.forget(&|key| member_of(key) == *member);
        drop(chooser);
        drop(quiet);
        state.release(resident.load(Ordering::Relaxed) + table_pages);
        state.release_hashes(*table_pages);
        state.release_pinned(self.0.pins.count());
        if let Some(dirty) = dirty {
            state.writes.regions.fetch_sub(1, Ordering::Relaxed);
            state.writes.succeeded(&dirty.backoff);
        }
        let mut writer = state.members.write();
        let mut members = writer.current().cloned().unwrap_or_default();
        members[*member] = None;
        writer.publish(members);
    }
}

/// Starts the thread that evicts pages for signal handlers if a budget with these regions and one more needs it.
fn start_evictor(state: &Arc<State>, members: &[Option<Arc<Share>>], joins: Evicted) -> io::Result<()> {
    let has = |kind: fn(Evicted) -> bool| {
        kind(joins) || members.iter().flatten().any(|member| kind(member.evicted))
    };
    match has(|evicted| evicted.in_handlers) && has(|evicted| evicted.written_back) {
        true => state.evictor.start(state, State::evict_for_handlers),
        false => Ok(()),
    }
}

/// Reserves memory for pages. Evicts others before, if the budget is used up. False if there is no room,
/// because written pages cannot go back to their sources.
fn make_room(state: &State, pages: usize) -> bool {
    if state.try_reserve(pages) {
        return true;
    }
    let began = Instant::now();
    let has_room = free_room(state, pages);
    state.stalled_since(began);
    has_room
}

/// As [`make_room`], in a budget that is used up.
#[cold]
fn free_room(state: &State, pages: usize) -> bool {
    let began = Instant::now();
    loop {
        let written = state.tally.write_backs.load(Ordering::Relaxed);
        if try_to_free(state, pages) {
            return true;
        }
        if state.writes.failing() == 0 {
            // A handler of another thread lacks a CPU, or waits for a disk.
            if state.are_leaving() && began.elapsed() < PATIENCE {
                thread::sleep(MOMENT);
                continue;
            }
            state.overrun(pages);
            return true;
        }
        // More pages would be dirty soon, too, so that no limit would hold. As long as some pages can be
        // written, others fail for a moment only.
        if state.tally.write_backs.load(Ordering::Relaxed) == written {
            return false;
        }
    }
}

/// Frees memory and reserves it, in a limited number of attempts.
fn try_to_free(state: &State, pages: usize) -> bool {
    for _ in 0..TRIES + pages / BATCH {
        let steps = state.writes.steps();
        let blocked = without_handlers();
        let has_freed = state.free_some(state.choose());
        drop(blocked);
        if state.try_reserve(pages) {
            return true;
        }
        if !has_freed && state.try_reserve_above_mark(pages) {
            return true;
        }
        if !has_freed {
            // No page leaves before another one is written.
            state.writes.wait_for_next(steps);
        }
    }
    false
}

/// Wakes without a log, because a log takes locks.
pub(super) struct Quiet<'r>(pub(super) &'r Mapping);

impl Wake for Quiet<'_> {
    fn wake(&self, span: Span) {
        self.0.wake_quietly(span);
    }
}

/// Blocks signals while the thread chooses and evicts pages, because a signal handler that touches such a
/// page would wait for its own thread.
pub(super) fn without_handlers() -> NoSignals {
    NoSignals::until_dropped()
}

/// The pause of a thread while handlers of others have pages leave.
const MOMENT: Duration = Duration::from_micros(500);
/// How often a thread frees memory before it exceeds the budget.
pub(super) const TRIES: usize = 32;
/// The most batches at the end of a journey: those of the pages of a block.
const TIDY_BATCHES: usize = 512 / BATCH;
