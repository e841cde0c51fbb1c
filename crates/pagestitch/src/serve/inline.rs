//! Inline: the thread that touches a page fills it, in a signal handler, without another thread, a
//! wake-up or an event.
//!
//! The journey is that of all pages, one page at a time. The code here takes no lock, allocates
//! nothing and calls no code of a source, because the signal may interrupt any code. Hence it
//! serves only sources whose bytes lie at a stable address, files, and mapped sources.

use crate::error::{BuildOption, Error, ErrorKind};
use crate::fault::PrefetchJob;
use crate::fault::callers;
use crate::fault::fill::{Filled, fill_inline, gather_inline};
use crate::fault::{
    Filler, InstallError, Mode, Unfilled, Wanted, fill_beside, journey, let_write, let_write_beside,
};
use crate::method::Method;
use crate::serve::Served;
use crate::serve::contract::{Attachment, Demands, FaultServer, INLINE};
use crate::source::Backing;
use crate::space::page_table::{Claim, PageState, Unclaimed};
use crate::space::{Chunk, Mapping, Plan, PlanRun};
use pagestitch_kernel::Features;
use pagestitch_kernel::event::Touch;
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::sigbus::{FaultHandler, Registration};
use pagestitch_kernel::striped::{STRIPES, Stripe, own_stripe};
use pagestitch_kernel::{Page, Span};
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::{fmt, hint, thread};

/// The thread that touches a page fills it itself, in a SIGBUS handler. This takes about half the
/// time, because no thread is woken. Linux 4.14.
///
/// * **Sources**: memory at a stable address ([`Memory`](crate::source::Memory), sealed memfds,
///   donated pages, holes), files ([`FileSource`](crate::source::FileSource),
///   [`ImmutableFile`](crate::source::ImmutableFile), [`WritableFile`](crate::source::WritableFile)) and mapped
///   sources. `build` refuses other sources ([`ErrorKind::UnsuitableServer`]): their code must not run in a
///   signal handler. A wrapper around a `FileSource` is such a source.
/// * **Files** are read by one `pread(2)` for each page. The signals of the thread wait for the disk. A
///   read that fails, or a file that has become too short, raises SIGBUS, also if the chunk has another
///   [policy](crate::OnFailure): `populate` applies the policy, and tells the reason.
/// * **System calls** that touch an absent page fail with `EFAULT`: call
///   [`populate`](crate::AnyRegion::populate) before.
/// * **Many threads**: the kernel delivers all signals of a process under one lock. With more than about
///   four threads that fault all the time, the throughput does not grow further: a pool serves more.
/// * **A [`Budget`](crate::Budget)**: the thread evicts pages in its handler. No slice of a file that may change.
/// * **[Write-back](crate::Builder::write_back)** goes to a [`WritableFile`](crate::source::WritableFile). With a
///   budget, the first write to a page that was read is a second fault, and a system call that writes to such a
///   page fails with `EFAULT`: use [`write_at`](crate::SharedRegion::write_at). The touch that needs the room writes
///   a few other pages to the file, into the page cache; beyond `RLIMIT_FSIZE` that is SIGXFSZ, as of `write(2)`.
///   After a failure a thread of the budget (`pagestitch/wb`) writes them, and a touch without room waits for it. If
///   sources take no bytes back for three seconds, the touch raises SIGBUS, and
///   [`flush`](crate::AnyRegion::flush) tells the reason.
/// * **Readahead**: none. A fault fills one page; `populate` pages that are read in any case.
/// * **SIGBUS handlers** of the application that are installed before the first inline region: our
///   handler calls them for the signals of other memory, with the mask that they were installed
///   with.
/// * **SIGBUS handlers that are installed later**, often by a runtime (Go, a JVM, a sanitizer), get
///   the faults of regions first. They must pass foreign signals to the previous handler, with
///   `SA_SIGINFO`, and without unblocking signals. Better load such a runtime before the first
///   inline region.
/// * A thread that blocks SIGBUS cannot touch absent pages.
/// * **Stack**: the handler runs on the alternate stack of a thread that has one
///   (`sigaltstack(2)`), and takes less than 4 KiB of it in addition to the kernel's frame. If the
///   previous handler was installed without `SA_ONSTACK`, it runs on the thread's own stack.
/// * **Signal handlers** of the application may touch a region. All signals wait while a page is
///   filled. A handler that interrupts `populate` or `read_at` also gets the pages that its thread
///   is filling, except donated pages: touching one of these raises SIGBUS.
/// * A touch of a page whose bytes are unavailable raises SIGBUS, as with every server. A fault of
///   the handler itself does so too, and writes a line to standard error: the memory of a source
///   must not be a region that is served inline.
///
/// ```
/// use pagestitch::{Inline, Region};
///
/// let region = Region::builder().chunk(vec![7u8; 100_000]).build(Inline)?;
/// assert_eq!(region.as_slice()[50_000], 7);
/// assert_eq!(region.metrics().pages_copied, 1);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Inline;

impl FaultServer for Inline {
    fn noun(&self) -> &'static str {
        "Inline"
    }

    fn number(&self) -> usize {
        INLINE
    }

    fn is_of_this_process(&self) -> bool {
        true
    }

    fn features(&self) -> Features {
        Features::SIGBUS
    }

    fn is_in_handler(&self) -> bool {
        true
    }

    fn check_features(&self, given: Features) -> Result<(), Error> {
        if given.contains(Features::SIGBUS) {
            return Ok(());
        }
        not_inline(None, "this kernel cannot serve faults inline (Linux 4.14): use a pool")
    }

    fn check(&self, demands: &Demands) -> Result<(), Error> {
        let Demands {
            adopted,
            children,
            recording,
            readahead,
            limit,
            shards,
            report_discards,
            timed,
            tracked: _,
            growth: _,
            on_memfd: _,
        } = demands;
        let refused = [
            (
                adopted,
                None,
                "adopted memory cannot be served inline: its owner has registered it for events; use a pool",
            ),
            (
                children,
                Some(BuildOption::InheritOnFork),
                "an inline region serves no forked children: use a pool",
            ),
            (&recording.is_some(), *recording, "only workers can record or replay: use a pool"),
            (
                readahead,
                Some(BuildOption::Readahead),
                "a signal handler fills one page and none ahead: leave out readahead(), or use a pool",
            ),
            (
                limit,
                Some(BuildOption::MaxInFlight),
                "each thread fills its own page, so faults cannot be limited: leave out max_in_flight(), or use a pool",
            ),
            (
                shards,
                Some(BuildOption::Shards),
                "no thread waits at the userfaultfd of an inline region, so more of them do not help: leave out shards(), or use a pool",
            ),
            (
                report_discards,
                Some(BuildOption::ReportDiscards),
                "no thread reads the reports of an inline region, so the discarding thread would wait for ever: leave out report_discards(), or use a pool",
            ),
            (
                timed,
                Some(BuildOption::RecordLatency),
                "a signal handler reads no clock: leave out record_latency(), or use a pool",
            ),
        ];
        let first = refused.into_iter().find(|(is, ..)| **is);
        first.map_or(Ok(()), |(_, option, what)| not_inline(option, what))
    }

    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
        refuse_what_blocks(region)?;
        let range = region.target.addresses(region.target.all());
        // The kernel does not know the threads in the signal handler, so they may touch their page
        // again after the drop.
        if !region.uffd.is_stand_in() {
            region.linger();
        }
        let registration =
            Registration::new(range, Arc::new(Handler { region: Arc::clone(region), buffers: buffers() }))
                .map_err(|errno| {
                    let what = format!("region {}: cannot install a SIGBUS handler", region.name);
                    Error::refused(what, errno)
                })?;
        Ok(Box::new(Attached {
            registration: Mutex::new(Some(registration)),
            generation: ForkGeneration::current(),
        }))
    }
}

fn not_inline(option: Option<BuildOption>, what: &str) -> Result<(), Error> {
    let error = Error::new(ErrorKind::UnsuitableServer, what);
    Err(match option {
        Some(option) => error.of_option(option),
        None => error,
    })
}

/// A region's registration with the SIGBUS handler.
struct Attached {
    registration: Mutex<Option<Registration>>,
    generation: ForkGeneration,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inline")
    }
}

impl Attachment for Attached {
    fn is_of_this_process(&self) -> bool {
        self.generation.is_current()
    }

    fn serves_system_calls(&self) -> bool {
        false
    }

    fn check_chunk(&self, region: &Mapping, chunk: &Chunk) -> Result<(), Error> {
        let is_served = match chunk.backing() {
            Backing::Memory(_) | Backing::Memfd(_) | Backing::Hole(_) => true,
            other => other.file().is_some(),
        };
        if is_served {
            return Ok(());
        }
        let number = region.layout.next_number();
        let (name, is_written) = (chunk.backing().source().name(), chunk.backing().writer().is_some());
        Err(cannot_serve(number, &name, is_written).inside(&region.name))
    }

    fn prefetch(&self, region: &Arc<Served>, _job: &Arc<PrefetchJob>) -> Result<(), Error> {
        let what = format!(
            "region {}: it is served inline, so no idle worker fills pages ahead: call populate(), or use a pool",
            region.name
        );
        Err(Error::new(ErrorKind::UnsuitableServer, what))
    }

    fn detach(&self, _region: &Served) {
        drop(self.registration.lock().take());
    }
}

/// Refuses chunks that a signal handler cannot fill.
fn refuse_what_blocks(region: &Served) -> Result<(), Error> {
    let refused = |what: String| Error::new(ErrorKind::UnsuitableServer, what).inside(&region.name);
    if region.page_size().bytes() != PAGE {
        return Err(refused(format!(
            "pages of {} are too large to gather on a stack: use a pool",
            region.page_size()
        )));
    }
    let blocking = Plan::of(region)
        .runs()
        .iter()
        .find_map(|run| Some((first_blocking(region, run)?, run.source.clone())));
    let Some((chunk, source)) = blocking else { return Ok(()) };
    let is_written = backing(region, chunk).is_some_and(|backing| backing.writer().is_some());
    Err(cannot_serve(chunk, &source, is_written).inside(&region.name))
}

/// `is_written`: written pages go back to the source.
fn cannot_serve(chunk: usize, source: &str, is_written: bool) -> Error {
    let instead = if is_written { "a WritableFile" } else { "read it into memory first" };
    let what = format!(
        "chunk {chunk} ({source}) cannot be served inline, as a signal handler must not read it: use a pool, or {instead}"
    );
    Error::new(ErrorKind::UnsuitableServer, what).of_chunk(chunk)
}

/// The source of a chunk, by its number.
fn backing(region: &Served, number: usize) -> Option<&Backing> {
    region.layout.chunk_of(number).map(|chunk| region.layout.backing_of(chunk))
}

/// The first chunk of a run that a signal handler cannot fill.
fn first_blocking(region: &Served, run: &PlanRun) -> Option<usize> {
    let is_file = |number| backing(region, number).is_some_and(|backing| backing.file().is_some());
    match run.method {
        Method::Buffered => run.chunks.clone().find(|&number| !is_file(number)),
        Method::Continue => Some(run.chunks.start),
        _ => None,
    }
}

struct Handler {
    region: Arc<Served>,
    buffers: &'static [Buffer],
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
        if touch == Touch::Denied {
            throttle(&self.region);
            if lets_write(&self.region, page) {
                self.region.counters.local().faults.add(1);
                return true;
            }
        }
        free_page(&self.region);
        let mut outcome = serve(self, page, touch);
        if outcome == Outcome::WithoutRoom {
            outcome = wait_for_room(&self.region, page);
        }
        tidy(&self.region);
        outcome != Outcome::Failed
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

/// Waits for the room that a page lacks, unless the page has come meanwhile.
#[cold]
#[inline(never)]
fn wait_for_room(region: &Mapping, page: Page) -> Outcome {
    let has_room = region.residence.as_ref().is_none_or(|residence| residence.wait_for_room_in_handler());
    let is_there = || region.pages.state(page) == PageState::Present;
    if has_room || is_there() { Outcome::TouchAgain } else { Outcome::Failed }
}

/// The next step of a thread that has touched a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The access succeeds, or comes here again.
    TouchAgain,
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

/// Not a part of its caller, which evicts pages before and after it, and needs the stack for that.
#[inline(never)]
fn serve(owner: &Handler, page: Page, touch: Touch) -> Outcome {
    let region = owner.region.as_ref();
    let before = region.pages.state(page);
    if before == PageState::Poisoned {
        return Outcome::Failed;
    }
    region.counters.local().faults.add(1);
    let mut handler = InHandler { owner, touch, before, buffer: None };
    if before.is_claimed() {
        // Not a journey: its claim would ask the other thread for a wake, and no thread sleeps.
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

/// A page is present, or another thread is about to poison it.
#[cold]
#[inline(never)]
fn touch_again(region: &Mapping, page: Page, touch: Touch, reason: Unclaimed) {
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
    touch: Touch,
    /// The state of the page before the fault.
    before: PageState,
    /// Not on the stack, because it may be a small one.
    buffer: Option<MutexGuard<'static, PageBuffer>>,
}

impl InHandler<'_> {
    /// Handles a page that is being filled. Returns as [`serve`].
    #[cold]
    fn share(&mut self, page: Page) -> Outcome {
        if callers::fills_itself(self.owner.region.as_ref(), page) {
            // A handler of the application has interrupted this thread while it fills the page.
            let is_there = fill_beside(&self.owner.region, page, self);
            if is_there && self.touch != Touch::Read {
                let_write_beside(&self.owner.region, page.span());
            }
            return if is_there { Outcome::TouchAgain } else { Outcome::Failed };
        }
        self.wait_a_moment(page);
        Outcome::TouchAgain
    }

    /// Waits for the thread that fills a page, but not to the end: the return from the signal takes as long
    /// as the rest of a fill. After a longer wait both threads go on at once, and meet again at the next
    /// page.
    fn wait_a_moment(&self, page: Page) {
        let region = &self.owner.region;
        for _ in 0..SPINS {
            if !region.pages.state(page).is_claimed() {
                return;
            }
            hint::spin_loop();
        }
        // The filling thread may need this CPU. Not each time, because a yield takes longer than the wait.
        if region.counters.local().faults.get() % YIELD_EVERY == 0 {
            thread::yield_now();
        }
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
        (self.touch != Touch::Read).then_some(claimed.first)
    }

    fn fill(&mut self, span: Span) -> Result<Filled<'_>, InstallError> {
        if let Some(content) = fill_inline(&self.owner.region, span.first) {
            return Ok(Filled { pages: 1, content });
        }
        self.gather(span.first)
    }

    fn failed(&mut self, _: &mut Claim<'_>, error: InstallError) -> Result<(), Unfilled> {
        match error {
            InstallError::Changing => Err(Unfilled::Changing),
            // The thread frees memory, or waits for it, and touches the page again.
            InstallError::NoRoom => Err(Unfilled::Later),
            // The bytes are gone, but the page may have come meanwhile, and be swapped out: the thread
            // touches it again, and it is absent by then.
            InstallError::Gone if self.before == PageState::Present => Err(Unfilled::Changing),
            _ => Err(Unfilled::GivenBack),
        }
    }
}

const PAGE: usize = 4096;
/// The turns of a wait for another thread: about half of a fill.
const SPINS: usize = 32;
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
    use crate::{Chunk, Inline as Server, Region};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, alarm, fork};
    use std::sync::mpsc;
    use std::time::Duration;

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
        builder.chunks([vec![8u8; 1000], vec![9u8; PAGE - 1000]]).build(Server).unwrap()
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
                (0..3).for_each(|page| done.send(serve(&serves, Page(page), Touch::Read)).unwrap())
            });
            for page in 0..3 {
                let outcome = is_done.recv_timeout(Duration::from_secs(20));
                assert_eq!(outcome, Ok(Outcome::TouchAgain), "page {page}");
            }
            drop(busy);
        });
    }
}
