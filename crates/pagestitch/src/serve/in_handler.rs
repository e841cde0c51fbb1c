//! Serves a fault in the signal handler of the thread that took it: the journey of a page, and what a thread
//! does while another one fills its page.
//!
//! [`Handler::serve`](FaultHandler::serve) and its callees take no lock, allocate nothing and call no code of a
//! source, because the signal may interrupt any code.

use crate::fault::callers;
use crate::fault::fill::{Filled, fill_inline, gather_inline};
use crate::fault::{
    Filler, InstallError, Mode, Unfilled, Wanted, fill_beside, journey, let_write, let_write_beside,
};
use crate::serve::Served;
use crate::space::page_table::{Claim, PageState, Unclaimed};
use crate::space::{Mapping, Piece};
use pagestitch_kernel::event::Touch;
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::nap::nap;
use pagestitch_kernel::sigbus::FaultHandler;
use pagestitch_kernel::striped::{STRIPES, Stripe, own_stripe};
use pagestitch_kernel::{Page, Span};
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::time::Duration;
use std::{hint, ptr, thread};

/// Serves the faults of a region.
pub(super) struct Handler {
    region: Arc<Served>,
    buffers: &'static [Buffer],
}

impl Handler {
    pub(super) fn new(region: &Arc<Served>) -> Self {
        Self { region: Arc::clone(region), buffers: buffers() }
    }
}

// SAFETY: `serve` and its callees make system calls, and use atomics and immutable data. They
// allocate nothing: they make no `Failure`. They take no lock: buffers are only tried, claims wake
// by the futex of an event count, and a journey `InSignalHandler` does not log. The eviction of pages
// obeys the same rules, as `reclaim/in_handler.rs` shows.
#[expect(unsafe_code, reason = "the promise that it may run in a signal handler")]
unsafe impl FaultHandler for Handler {
    fn serve(&self, address: usize, touch: Touch) -> bool {
        // No gate guard: the thread that takes the registration back waits for the handlers that
        // run.
        let Some(page) = self.region.target.page_at(address) else { return false };
        if self.region.pages.state(page) == PageState::Poisoned {
            return false;
        }
        self.region.counters.local().faults.add(1);
        if touch == Touch::Denied {
            throttle(&self.region);
            if lets_write(&self.region, page) {
                return true;
            }
        }
        free_page(&self.region);
        let is_served = match fill_page(self, page, Some(touch)) {
            Outcome::TouchAgain => true,
            Outcome::InWork => {
                fill_meanwhile(self, page);
                true
            }
            Outcome::WithoutRoom => wait_for_room(&self.region, page),
            Outcome::Failed => false,
        };
        tidy(&self.region);
        is_served
    }

    fn may_wait(&self) -> bool {
        let layout = &self.region.layout;
        // A file may be appended later. A bounded region may wait for room.
        self.region.growth.is_some()
            || self.region.residence.is_some()
            || !self.region.uffd.is_stand_in()
                && (0..layout.chunks()).any(|chunk| layout.backing_of(chunk).file().is_some())
    }
}

/// True if a page may be written from now on. Not a part of its callers, for the sake of the stack.
#[inline(never)]
fn lets_write(region: &Mapping, page: Page) -> bool {
    let_write(region, page.span()).is_ok()
}

/// Has pages go back to their sources, if nearly all of the budget are dirty.
fn throttle(region: &Mapping) {
    if let Some(residence) = &region.residence {
        residence.throttle_in_handler();
    }
}

/// Frees memory for a page if the budget of the region is used up.
fn free_page(region: &Mapping) {
    if let Some(residence) = &region.residence {
        residence.free_in_handler();
    }
}

/// Waits for the room that a page lacks, unless the page has come meanwhile. False if there is none.
#[cold]
#[inline(never)]
fn wait_for_room(region: &Mapping, page: Page) -> bool {
    let has_room = region.residence.as_ref().is_none_or(|residence| residence.wait_for_room_in_handler());
    has_room || region.pages.state(page) == PageState::Present
}

/// The next step of a thread that has touched a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The access succeeds, or comes here again.
    TouchAgain,
    /// As `TouchAgain`, once the other thread that fills the page has done so.
    InWork,
    /// As `TouchAgain`, once the budget has room for the page.
    WithoutRoom,
    /// The access raises its signal.
    Failed,
}

/// Frees memory for the next pages if the budget of the region is nearly used up.
fn tidy(region: &Mapping) {
    if let Some(residence) = &region.residence {
        residence.tidy_in_handler();
    }
}

/// Fills a page. `touch`: that of this thread; `None` for a page that it has not touched.
///
/// Not a part of its caller, which evicts pages before and after it, and needs the stack for that.
#[inline(never)]
fn fill_page(owner: &Handler, page: Page, touch: Option<Touch>) -> Outcome {
    let region = owner.region.as_ref();
    let before = region.pages.state(page);
    let mut handler = InHandler { owner, touch, before, buffer: None };
    if before.is_claimed() {
        // Not a journey: its claim would ask the other thread for a wake, and no thread waits for one.
        return handler.share(page);
    }
    match journey(region, Wanted::Touched(page, page.span()), &mut handler) {
        // If the memory map is changing, the thread touches the page again.
        Ok(()) | Err(Unfilled::Changing) => Outcome::TouchAgain,
        Err(Unfilled::Unclaimed(Unclaimed::Filling)) => handler.share(page),
        Err(Unfilled::Unclaimed(reason)) => {
            touch_again(region, page, touch, reason);
            Outcome::TouchAgain
        }
        Err(Unfilled::Later) => Outcome::WithoutRoom,
        // The page is absent again: this access raises a signal, and `populate` will tell the
        // reason.
        Err(Unfilled::Failed(_) | Unfilled::GivenBack) => Outcome::Failed,
    }
}

/// Another thread fills a page. This one fills the next absent page meanwhile, because threads that touch the
/// same pages in the same order would otherwise do the work of one thread, each on a CPU of its own.
#[cold]
#[inline(never)]
fn fill_meanwhile(owner: &Handler, page: Page) {
    let next = absent_behind(&owner.region, page);
    let is_filled = next.is_some_and(|next| fill_page(owner, next, None) != Outcome::Failed);
    if !is_filled {
        wait_a_moment(&owner.region, page);
    }
}

/// The first absent page of the [`NEAR`] ones behind a page, if it is filled as quickly. None in a budget,
/// because the page may never be touched, and would take the place of one that was.
fn absent_behind(region: &Mapping, page: Page) -> Option<Page> {
    if region.residence.is_some() {
        return None;
    }
    let next = page.0 + 1;
    // Not the pages of a chunk that is being appended: they are closed, and the chunk may be taken back.
    let whole = (region.len() / PAGE as u64) as usize;
    let behind = Span { first: Page(next), pages: NEAR.min(whole.saturating_sub(next)) };
    let near = region.in_place.next_gap(behind);
    let mut pages = (near.first.0..near.end().0).map(Page);
    let absent = pages.find(|&page| region.pages.state(page) == PageState::Absent)?;
    is_as_quick(region, absent, page).then_some(absent)
}

/// True if the bytes of a page are in memory, or in the file of another page.
fn is_as_quick(region: &Mapping, page: Page, other: Page) -> bool {
    if fill_inline(region, page).is_some() {
        return true;
    }
    let (piece, other) = (piece_of(region, page), piece_of(region, other));
    let is_whole = piece.bytes == PAGE as u64;
    is_whole && ptr::eq(piece.backing, other.backing) && piece.backing.file().is_some()
}

/// The bytes of a page, up to the end of the chunk at its start.
fn piece_of(region: &Mapping, page: Page) -> Piece<'_> {
    let offsets = region.page_size().offsets(page.span());
    region.layout.piece_at(offsets.start, offsets.end)
}

/// Waits for the thread that fills a page, but not to the end.
fn wait_a_moment(region: &Mapping, page: Page) {
    // The return from the signal takes as long as the rest of a fill.
    for _ in 0..SPINS {
        if !region.pages.state(page).is_claimed() {
            return;
        }
        hint::spin_loop();
    }
    if piece_of(region, page).backing.file().is_some() {
        nap(MOMENT);
    } else if region.counters.local().faults.get() % YIELD_EVERY == 0 {
        // The filling thread may need this CPU. Not each time, because a yield takes longer than the wait.
        thread::yield_now();
    }
}

/// A page is present, or another thread is about to poison it.
#[cold]
#[inline(never)]
fn touch_again(region: &Mapping, page: Page, touch: Option<Touch>, reason: Unclaimed) {
    let Some(touch) = touch else { return };
    if reason == Unclaimed::Resident {
        region.counters.local().faults_spurious.add(1);
        if touch != Touch::Read && lets_write(region, page) {
            return;
        }
    }
    thread::yield_now();
}

/// Fills pages in a signal handler.
struct InHandler<'r> {
    owner: &'r Handler,
    /// That of the thread; `None` for a page that it has not touched.
    touch: Option<Touch>,
    /// The state of the page before the fault.
    before: PageState,
    /// Not on the stack, because it may be a small one.
    buffer: Option<MutexGuard<'static, PageBuffer>>,
}

impl InHandler<'_> {
    /// Handles a page that is being filled. Returns as [`fill_page`].
    #[cold]
    fn share(&mut self, page: Page) -> Outcome {
        if callers::fills_itself(self.owner.region.as_ref(), page) {
            // A handler of the application has interrupted this thread while it fills the page.
            let is_there = fill_beside(&self.owner.region, page, self);
            if is_there && self.is_write() {
                let_write_beside(&self.owner.region, page.span());
            }
            return if is_there { Outcome::TouchAgain } else { Outcome::Failed };
        }
        Outcome::InWork
    }

    fn is_write(&self) -> bool {
        self.touch.is_some_and(|touch| touch != Touch::Read)
    }

    fn gather(&mut self, page: Page) -> Result<Filled<'_>, InstallError> {
        self.buffer = free_buffer(self.owner.buffers);
        let Some(buffer) = &mut self.buffer else {
            // All buffers are in use for a moment: the thread touches the page again.
            thread::yield_now();
            return Err(InstallError::Changing);
        };
        match gather_inline(&self.owner.region, page, &mut buffer.0) {
            Some(content) => Ok(Filled { pages: 1, content }),
            None => Err(InstallError::Gone),
        }
    }
}

/// A free buffer; the thread's own one, unless another thread has it.
fn free_buffer(buffers: &'static [Buffer]) -> Option<MutexGuard<'static, PageBuffer>> {
    let own = own_stripe(STRIPES);
    buffers[own..].iter().chain(&buffers[..own]).find_map(|buffer| buffer.try_lock())
}

/// The buffers of this process. A forked child has others than its parent, because threads that it lacks
/// may hold the parent's for ever.
fn buffers() -> &'static [Buffer] {
    static LAST: Mutex<Option<(ForkGeneration, &[Buffer])>> = Mutex::new(None);
    let (mut last, process) = (LAST.lock(), ForkGeneration::current());
    let buffers = match *last {
        None => &BUFFERS,
        Some((of, buffers)) if of == process => buffers,
        // They live as long as the child.
        Some(_) => (0..STRIPES).map(|_| Stripe(Mutex::new(PageBuffer([0; PAGE])))).collect::<Vec<_>>().leak(),
    };
    *last = Some((process, buffers));
    buffers
}

impl Filler for InHandler<'_> {
    const MODE: Mode = Mode::InSignalHandler;

    fn writes(&self, claimed: Span) -> Option<Page> {
        self.is_write().then_some(claimed.first)
    }

    fn installed(&mut self, pages: usize) {
        if self.touch.is_none() {
            self.owner.region.counters.local().pages_ahead.add(pages as u64);
        }
    }

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        if let Some(content) = fill_inline(&self.owner.region, span.first) {
            return Ok(Filled { pages: 1, content });
        }
        self.gather(span.first)
    }

    fn failed(&mut self, claim: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        match error {
            InstallError::Changing => Err(Unfilled::Changing),
            // The thread frees memory, or waits for it, and touches the page again.
            InstallError::NoRoom => Err(Unfilled::Later),
            InstallError::Gone if has_come(&self.owner.region, claim) => Ok(()),
            // The page may have come meanwhile although the kernel does not read it: the thread touches it again, and
            // it is absent by then.
            InstallError::Gone if self.before == PageState::Present => Err(Unfilled::Changing),
            _ => Err(Unfilled::GivenBack),
        }
    }
}

/// Settles the first page of a claim whose bytes are gone, if that is because they have come into the region: another
/// thread has filled the page before this one has claimed it, and it was swapped out. False if it is missing.
#[cold]
#[inline(never)]
fn has_come(region: &Mapping, claim: &mut Claim<'_>) -> bool {
    let is_here = region.target.can_be_read(claim.span().first);
    if is_here {
        claim.settle(1, PageState::Present);
    }
    is_here
}

/// The bytes of each page that it fills.
pub(super) const PAGE: usize = 4096;
/// The pages behind a page in work among which a thread looks for an absent one.
const NEAR: usize = 16;
/// The turns of a wait for another thread: about half of a fill.
const SPINS: usize = 32;
/// A sleep while another thread reads a page of a file.
const MOMENT: Duration = Duration::from_micros(20);
/// A thread that finds its page in work gives the CPU away at one fault of so many.
const YIELD_EVERY: u64 = 16;
/// For a page in which chunks meet, or a page of a file. A thread only tries the lock, so it never
/// waits.
type Buffer = Stripe<Mutex<PageBuffer>>;
/// Aligned, so that the disk can write to it.
#[repr(align(4096))]
struct PageBuffer([u8; PAGE]);
static BUFFERS: [Buffer; STRIPES] = [const { Stripe(Mutex::new(PageBuffer([0; PAGE]))) }; STRIPES];

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::api::AnyRegion;
    use crate::source::{FileSource, Pages, UnsealedMemfd};
    use crate::{Budget, Chunk, Inline, Region};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, alarm, fork};
    use std::fs;
    use std::io::Write;
    use std::sync::mpsc;

    /// Held by each test that takes the buffers.
    static ALONE: Mutex<()> = Mutex::new(());

    /// The child lacks the threads that hold the buffers, so no thread gives them back.
    #[test]
    #[cfg_attr(sanitized = "thread", ignore = "the sanitizer may hold locks of its own at the fork")]
    fn a_forked_child_serves_a_region_of_its_own_although_all_buffers_were_in_use() {
        let _alone = ALONE.lock();
        let in_parent = region();
        let busy: Vec<_> = BUFFERS.iter().map(|buffer| buffer.lock()).collect();
        // SAFETY: the child has its own copy of this process's memory, and allocates, which the C library
        // allows after a fork.
        #[expect(unsafe_code, reason = "fork(2) limits its child")]
        let forked = unsafe { fork() }.unwrap();
        let ForkResult::Parent { child } = forked else {
            alarm::set(60);
            let is_right = region().as_slice()[2 * PAGE] == 8;
            // SAFETY: ends the process of the child, and touches no memory.
            #[expect(unsafe_code, reason = "exit(3) takes locks that another thread may have held")]
            unsafe {
                nix::libc::_exit(i32::from(!is_right))
            }
        };
        let ended = waitpid(child, None).unwrap();
        drop(busy);
        assert_eq!(ended, WaitStatus::Exited(child, 0));
        drop(in_parent);
    }

    /// A region with a page of each kind.
    fn region() -> Region {
        let builder = Region::builder().chunk(vec![7u8; PAGE]).chunk(Chunk::hole(PAGE as u64));
        builder.chunks([vec![8u8; 1000], vec![9u8; PAGE - 1000]]).build(Inline).unwrap()
    }

    #[test]
    fn a_thread_whose_page_another_one_fills_fills_the_next_absent_one() {
        let region = Region::builder().chunk(vec![7u8; 4 * PAGE]).build(Inline).unwrap();
        for (touched, filled) in [(0, &[1][..]), (0, &[1, 2]), (3, &[1, 2]), (0, &[1, 2, 3]), (0, &[1, 2, 3])]
        {
            touch_a_page_in_work(&region, touched);
            assert_eq!(present(&region), filled);
        }
        let metrics = region.metrics();
        assert_eq!((metrics.faults, metrics.pages_ahead, metrics.faults_spurious), (5, 3, 0));
        assert!(region.as_slice().iter().all(|&byte| byte == 7));
    }

    #[test]
    fn the_next_page_is_in_memory_or_in_the_same_file() {
        let _alone = ALONE.lock();
        let source = |byte| FileSource::from_file(file_of(2, byte), "of a test").unwrap();
        let (first, second) = (source(5), source(6));
        let chunks = [Chunk::from(first), Chunk::from(vec![7u8; PAGE]), Chunk::from(second)];
        let region = Region::builder().chunks(chunks).build_shared(Inline).unwrap();
        let steps = [(1, &[2][..]), (0, &[1, 2]), (2, &[1]), (3, &[1, 4])];
        for (touched, filled) in steps {
            region.served().pages.mark_absent(Page(touched));
            touch_a_page_in_work(&region, touched);
            assert_eq!(present(&region), filled);
        }
    }

    #[test]
    fn a_page_whose_file_has_become_shorter_is_tried_once() {
        let _alone = ALONE.lock();
        let file = file_of(3, 5);
        let region =
            Region::builder().chunk(FileSource::from_file(file.try_clone().unwrap(), "shorter").unwrap());
        let region = region.build_shared(Inline).unwrap();
        file.set_len(PAGE as u64).unwrap();
        touch_a_page_in_work(&region, 0);
        assert_eq!((present(&region), region.metrics().source_errors), (vec![], 1));
    }

    /// As a thread finds it whose fault comes late: another one has given the page back, because it was swapped out.
    #[test]
    fn a_donated_page_that_has_moved_is_not_asked_for_again() {
        let mut pages = Pages::new(2 * PAGE).unwrap();
        pages.fill(7);
        let region = Region::builder().chunk(pages).build(Inline).unwrap();
        region.populate(..).unwrap();
        let served = region.served();
        served.pages.mark_absent(Page(0));
        let handler = Handler::new(served);
        assert_eq!(fill_page(&handler, Page(0), Some(Touch::Read)), Outcome::TouchAgain);
        assert_eq!((present(&region), region.as_slice()[5]), (vec![0, 1], 7));
    }

    #[test]
    fn no_page_in_place_is_filled() {
        let memfd = UnsealedMemfd::create("in place", PAGE as u64).unwrap().seal().unwrap();
        let chunks = [Chunk::from(vec![7u8; PAGE]), Chunk::from(memfd), Chunk::from(vec![9u8; PAGE])];
        let region = Region::builder().chunks(chunks).build(Inline).unwrap();
        assert_eq!(region.metrics().pages_in_place, 1);
        touch_a_page_in_work(&region, 0);
        assert_eq!(present(&region), [2]);
    }

    #[test]
    fn no_page_of_a_chunk_is_filled_before_its_append_has_ended() {
        let growing =
            Region::builder().capacity(4 * PAGE as u64).chunk(vec![7u8; 100]).build(Inline).unwrap();
        let served = growing.served();
        let grown = served.layout.grown(4 * PAGE as u64);
        assert!(grown.append(0, &Chunk::from(vec![8u8; 2 * PAGE])));
        served.layout.replace(grown);
        touch_a_page_in_work(&growing, 0);
        assert_eq!(present(&growing), []);
    }

    #[test]
    fn no_page_is_filled_meanwhile_in_a_budget_or_behind_the_bytes() {
        let budget = Budget::bytes(64 << 20).unwrap();
        let bounded = Region::builder().chunk(vec![7u8; 4 * PAGE]).budget(&budget).build(Inline).unwrap();
        let growing =
            Region::builder().capacity(4 * PAGE as u64).chunk(vec![7u8; PAGE]).build(Inline).unwrap();
        for region in [bounded, growing] {
            touch_a_page_in_work(&region, 0);
            assert_eq!(present(&region), []);
        }
    }

    /// Touches a page on which another thread has a claim.
    fn touch_a_page_in_work(region: &AnyRegion, page: usize) {
        let served = region.served();
        let mapping: &Mapping = served;
        let _claim = served.pages.claim(Page(page), mapping).unwrap();
        let handler = Handler { region: Arc::clone(served), buffers: &BUFFERS };
        let address = served.target.addresses(Page(page).span()).start();
        assert!(handler.serve(address, Touch::Read), "the thread touches the page again");
    }

    fn present(region: &AnyRegion) -> Vec<usize> {
        let pages = &region.served().pages;
        let is_present = |&page: &usize| pages.state(Page(page)) == PageState::Present;
        (0..region.served().target.all().pages).filter(is_present).collect()
    }

    fn file_of(pages: usize, byte: u8) -> fs::File {
        let mut file = fs::File::from(memfd_create(c"inline", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(&vec![byte; pages * PAGE]).unwrap();
        file
    }

    #[test]
    fn a_fault_is_served_while_other_threads_hold_the_locks() {
        let _alone = ALONE.lock();
        let region = region();
        region.populate(..).unwrap();
        let served = Arc::clone(region.served());
        served.record_failure(
            Page(1),
            Arc::new(served.layout.piece_at(0, 1).failed(std::io::Error::other("once"))),
        );
        (0..3).for_each(|page| served.pages.mark_absent(Page(page)));
        let (done, is_done) = mpsc::channel();
        served.with_failures_locked(|| {
            let busy: Vec<_> = BUFFERS[1..].iter().map(|buffer| buffer.lock()).collect();
            let serves = Handler { region: Arc::clone(&served), buffers: &BUFFERS };
            thread::spawn(move || {
                (0..3).for_each(|page| done.send(fill_page(&serves, Page(page), Some(Touch::Read))).unwrap())
            });
            for page in 0..3 {
                let outcome = is_done.recv_timeout(Duration::from_secs(20));
                assert_eq!(outcome, Ok(Outcome::TouchAgain), "page {page}");
            }
            drop(busy);
        });
    }
}
