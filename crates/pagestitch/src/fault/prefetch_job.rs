//! A prefetch that the application has requested: the pages that are left, and the progress.
//!
//! ```text
//!   rest:   | taken by workers ... | blocks that no worker has taken yet |
//!   later:  parts of taken blocks that met a limit, or a memory map that was changing
//!   others: pages that another thread is filling, in a background fill
//! ```
//!
//! Workers take its blocks one by one. It is over when no page is left and the steps of workers
//! and the fetches have ended, or when it is cancelled.
//!
//! A background fill is a job for a whole region. One with a rate has one step at a time, and a
//! timed task goes on with it when the next page is due. When only pages of other threads are left,
//! a timed task looks at them again, so that no page is missing at its end.

use crate::guard::{discard, quietly};
use crate::policy::RateLimit;
use pagestitch_kernel::Span;
use pagestitch_kernel::sync::EventCount;
use parking_lot::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// The pages of a requested prefetch, shared by its handle, its workers and its fetches.
#[derive(Debug)]
pub(crate) struct PrefetchJob {
    state: Mutex<State>,
    /// Not under the lock: in a forked child, a thread that the child lacks may hold the lock.
    is_cancelled: AtomicBool,
    is_over: AtomicBool,
    /// Notified when it is over.
    over: EventCount,
    filled: AtomicU64,
    failed: AtomicU64,
    skipped: AtomicU64,
    /// The pages that no worker has taken.
    left: AtomicU64,
    /// The pages of a block.
    block: usize,
    /// The most pages of a step.
    step: usize,
    /// True for a background fill: it waits for the pages that other threads are filling, and gives way
    /// to faults.
    is_background: bool,
    /// The faults of the region at the end of the last step of a background fill.
    faults: AtomicU64,
    /// True if there were faults during the last step, or since the step before.
    gives_way: AtomicBool,
    /// True if it has a rate.
    is_limited: bool,
}

#[derive(Debug)]
struct State {
    rest: Span,
    later: Vec<Span>,
    /// Pages that other threads are filling, until they are looked at again.
    others: Vec<Span>,
    limit: Option<RateLimit>,
    /// The steps of workers and the fetches that have not ended.
    steps: usize,
    fetches: usize,
    /// True if it is in the queue of its server.
    is_queued: bool,
    /// True if a timed task will resume it.
    is_timed: bool,
    waker: Option<Waker>,
}

/// The use of a job after a step or a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// [Resume](PrefetchJob::resume) it at once.
    Resume,
    /// Resume it after a pause.
    Pause(Duration),
    /// It is over, in the queue, or goes on when a fetch ends.
    None,
}

impl PrefetchJob {
    /// A job for a span, in blocks of `block` pages.
    pub(crate) fn new(span: Span, block: usize) -> Self {
        Self::of(span, block, false, None)
    }

    /// A background fill of a span, in blocks of `block` pages.
    pub(crate) fn background(span: Span, block: usize, limit: Option<RateLimit>) -> Self {
        Self::of(span, block, true, limit)
    }

    fn of(span: Span, block: usize, is_background: bool, limit: Option<RateLimit>) -> Self {
        let is_limited = limit.is_some();
        let step = limit.as_ref().map_or(block, |limit| limit.step_pages().min(block));
        let state = State {
            rest: span,
            later: Vec::with_capacity(LATER),
            others: Vec::with_capacity(LATER),
            limit,
            steps: 0,
            fetches: 0,
            is_queued: true,
            is_timed: false,
            waker: None,
        };
        Self {
            state: Mutex::new(state),
            is_cancelled: AtomicBool::new(false),
            is_over: AtomicBool::new(span.is_empty()),
            over: EventCount::new(),
            filled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            left: AtomicU64::new(span.pages as u64),
            block,
            step,
            is_background,
            faults: AtomicU64::new(0),
            gives_way: AtomicBool::new(false),
            is_limited,
        }
    }

    /// Ends it after the steps and fetches in progress.
    pub(crate) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::SeqCst)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// Blocks until it is over.
    pub(crate) fn wait(&self) {
        self.over.wait_while(|| !self.is_over());
    }

    /// Ready when it is over; otherwise the waker is woken then.
    pub(crate) fn poll(&self, waker: &Waker) -> Poll<()> {
        // Before the lock: a foreign clone may take long, and workers need the lock.
        let waker = waker.clone();
        let mut state = self.state.lock();
        if self.is_over() {
            return Poll::Ready(());
        }
        let before = state.waker.replace(waker);
        drop(state);
        drop(before);
        Poll::Pending
    }

    /// The pages that it has filled, that have failed, that it has left to other threads, and that
    /// no worker has taken yet.
    pub(crate) fn counts(&self) -> [u64; 4] {
        [&self.filled, &self.failed, &self.skipped, &self.left].map(|count| count.load(Ordering::SeqCst))
    }

    /// Takes the next block, for a worker that is about to fill it. The flag tells whether other
    /// workers may take more at the same time. `None`: it leaves its queue, and the caller
    /// [wakes](Self::wake) its task.
    pub(crate) fn take(&self) -> Option<(Span, bool)> {
        let mut state = self.state.lock();
        if !self.can_go_on(&state) {
            state.is_queued = false;
            self.end_if_over(&state);
            return None;
        }
        let block = self.next_block(&mut state);
        self.left.fetch_sub(block.pages as u64, Ordering::SeqCst);
        state.steps += 1;
        // With a rate, the end of this step decides when the next one comes.
        state.is_queued = !self.is_limited && self.can_go_on(&state);
        Some((block, state.is_queued))
    }

    pub(super) const fn is_background(&self) -> bool {
        self.is_background
    }

    /// Called at the end of a step of a background fill, with the number of all faults of the region.
    /// The next step comes after a pause if there were new ones: their threads, and the workers that
    /// serve them, need the processor.
    pub(super) fn note_faults(&self, faults: u64) {
        if self.faults.swap(faults, Ordering::SeqCst) != faults {
            self.gives_way.store(true, Ordering::SeqCst);
        }
    }

    fn next_block(&self, state: &mut State) -> Span {
        if let Some(later) = state.later.pop() {
            let (block, rest) = (later.prefix(self.step), later.without_prefix(self.step));
            state.later.extend(Some(rest).filter(|rest| !rest.is_empty()));
            return block;
        }
        let block = state.rest.prefix(self.block - state.rest.first.0 % self.block).prefix(self.step);
        state.rest = state.rest.without_prefix(block.pages);
        block
    }

    /// Ends a step that leaves some pages for later. `is_limited`: they met a limit, so the next
    /// step comes after a pause.
    pub(crate) fn step_ended(&self, left: Span, is_limited: bool) -> NextStep {
        let mut state = self.state.lock();
        state.steps -= 1;
        if !left.is_empty() {
            self.left.fetch_add(left.pages as u64, Ordering::SeqCst);
            state.later.push(left);
        }
        let gives_way = self.gives_way.swap(false, Ordering::SeqCst);
        let pause = if is_limited { Some(LIMITED) } else { gives_way.then_some(GIVEN_WAY) };
        if let Some(pause) = pause.filter(|_| self.can_go_on(&state)) {
            // Also if it is queued: the next worker that takes it would meet the same limit.
            state.is_timed = true;
            return NextStep::Pause(self.pause(&mut state).max(pause));
        }
        self.next_step(state)
    }

    /// Called by the timed task of a [`NextStep`]. True if the caller has to queue it.
    pub(crate) fn resume(&self) -> bool {
        let mut state = self.state.lock();
        state.is_timed = false;
        let State { rest, later, others, .. } = &mut *state;
        if rest.is_empty() && later.is_empty() {
            later.append(others);
        }
        if state.is_queued || !self.can_go_on(&state) {
            self.end_if_over(&state);
            return false;
        }
        state.is_queued = true;
        true
    }

    pub(super) fn fetch_begins(&self) {
        self.state.lock().fetches += 1;
    }

    pub(super) fn fetch_ended(&self) -> NextStep {
        let mut state = self.state.lock();
        state.fetches -= 1;
        self.next_step(state)
    }

    pub(super) fn add_filled(&self, pages: usize) {
        self.filled.fetch_add(pages as u64, Ordering::SeqCst);
    }

    pub(super) fn add_failed(&self, pages: usize) {
        self.failed.fetch_add(pages as u64, Ordering::SeqCst);
    }

    /// Leaves a span to another thread that is filling it.
    pub(super) fn leave_to_other(&self, span: Span) {
        if !self.is_background {
            return self.add_skipped(span.pages);
        }
        self.left.fetch_add(span.pages as u64, Ordering::SeqCst);
        self.state.lock().others.push(span);
    }

    pub(super) fn add_skipped(&self, pages: usize) {
        self.skipped.fetch_add(pages as u64, Ordering::SeqCst);
    }

    /// Ends it at once, because its region is not served any more.
    pub(crate) fn end(&self) {
        self.cancel();
        self.set_over(&self.state.lock());
        self.wake();
    }

    /// Wakes the task that polls it, if it is over. Called after each step that may end it, by a thread
    /// that holds no lock and is inside no region: a task may run at once, in the thread that wakes
    /// it, and its waker may own the region.
    pub(crate) fn wake(&self) {
        let waker = if self.is_over() { self.state.lock().waker.take() } else { None };
        if let Some(waker) = waker {
            quietly(|| waker.wake_by_ref());
            discard(waker);
        }
    }

    /// Ends it at once, because all of its pages are present but those that `poisoned` counts.
    pub(crate) fn end_present(&self, poisoned: impl Fn(Span) -> usize) {
        let rest = self.state.lock().rest;
        self.add_skipped(poisoned(rest));
        self.left.store(0, Ordering::SeqCst);
        self.end();
    }

    fn next_step(&self, mut state: MutexGuard<'_, State>) -> NextStep {
        if self.has_others_only(&state) {
            state.is_timed = true;
            return NextStep::Pause(LIMITED);
        }
        if state.is_queued || !self.can_go_on(&state) {
            self.end_if_over(&state);
            return NextStep::None;
        }
        state.is_timed = true;
        if self.is_limited { NextStep::Pause(self.pause(&mut state)) } else { NextStep::Resume }
    }

    /// The pause that the rate asks for.
    fn pause(&self, state: &mut State) -> Duration {
        let filled = self.filled.load(Ordering::SeqCst);
        state.limit.as_mut().map_or(Duration::ZERO, |limit| limit.charge(filled, Instant::now()))
    }

    /// True if no worker can do more before other threads have filled their pages.
    fn has_others_only(&self, state: &State) -> bool {
        let is_idle = state.steps == 0 && state.fetches == 0 && !state.is_timed;
        is_idle && !state.has_pages() && !state.others.is_empty() && !self.is_cancelled()
    }

    fn can_go_on(&self, state: &State) -> bool {
        state.has_pages() && !state.is_timed && state.fetches < FETCHES_MAX && !self.is_cancelled()
    }

    fn end_if_over(&self, state: &State) {
        let is_idle = state.steps == 0 && state.fetches == 0;
        let has_pages = state.has_pages() || !state.others.is_empty();
        if is_idle && (self.is_cancelled() || !has_pages) {
            self.set_over(state);
        }
    }

    fn set_over(&self, _state: &State) {
        self.is_over.store(true, Ordering::SeqCst);
        self.over.notify_all();
    }
}

impl State {
    fn has_pages(&self) -> bool {
        !self.rest.is_empty() || !self.later.is_empty()
    }
}

/// The most fetches of a job at once.
pub(crate) const FETCHES_MAX: usize = 16;
/// The parts for later before their list has to grow.
const LATER: usize = 16;
/// The pause of a background fill after a step with faults.
const GIVEN_WAY: Duration = Duration::from_millis(1);
/// The pause of a job that has met a limit, or waits for other threads.
const LIMITED: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::FillRate;
    use pagestitch_kernel::{Page, PageSize};
    use std::num::NonZeroU64;

    fn job(first: usize, pages: usize) -> PrefetchJob {
        PrefetchJob::new(Span { first: Page(first), pages }, 512)
    }

    fn taken(job: &PrefetchJob) -> Option<(usize, usize, bool)> {
        job.take().map(|(span, more)| (span.first.0, span.pages, more))
    }

    const NO_PAGES: Span = Span { first: Page(0), pages: 0 };

    #[test]
    fn a_job_is_taken_in_aligned_blocks_and_is_over_after_the_last_step() {
        let job = job(500, 600);
        assert_eq!(taken(&job), Some((500, 12, true)));
        assert_eq!(taken(&job), Some((512, 512, true)));
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None, "it is queued");
        assert_eq!(taken(&job), Some((1024, 76, false)));
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None);
        assert!(!job.is_over());
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None);
        assert!(job.is_over() && taken(&job).is_none());
    }

    #[test]
    fn a_job_waits_for_its_fetches() {
        let job = job(0, 1024);
        taken(&job).unwrap();
        (0..FETCHES_MAX).for_each(|_| job.fetch_begins());
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None);
        assert_eq!(taken(&job), None, "it leaves the queue");
        assert_eq!(job.fetch_ended(), NextStep::Resume);
        assert_eq!(job.fetch_ended(), NextStep::None, "a timed task will resume it");
        assert!(job.resume());
        assert_eq!(taken(&job), Some((512, 512, false)));
        job.step_ended(NO_PAGES, false);
        (2..FETCHES_MAX).for_each(|_| assert_eq!(job.fetch_ended(), NextStep::None));
        assert!(job.is_over());
    }

    #[test]
    fn a_job_pauses_at_a_limit_and_takes_the_same_pages_again() {
        let job = job(0, 100);
        let (block, _) = job.take().unwrap();
        assert_eq!(job.step_ended(block.without_prefix(40), true), NextStep::Pause(LIMITED));
        assert_eq!((taken(&job), job.is_over()), (None, false));
        assert!(job.resume());
        assert_eq!(taken(&job), Some((40, 60, false)));
        job.fetch_begins();
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None);
        assert!(!job.resume());
        job.fetch_ended();
        assert!(job.is_over());
    }

    #[test]
    fn a_background_fill_looks_again_at_pages_of_other_threads_when_it_has_no_others() {
        let job = PrefetchJob::background(Span { first: Page(0), pages: 1024 }, 512, None);
        taken(&job).unwrap();
        job.leave_to_other(Page(7).span());
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None, "it is queued");
        assert_eq!(taken(&job), Some((512, 512, false)));
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::Pause(LIMITED));
        assert_eq!((taken(&job), job.is_over(), job.counts()), (None, false, [0, 0, 0, 1]));
        assert!(job.resume());
        assert_eq!(taken(&job), Some((7, 1, false)));
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None);
        assert!(job.is_over() && job.counts() == [0; 4]);
    }

    #[test]
    fn a_background_fill_pauses_after_faults() {
        let job = PrefetchJob::background(Span { first: Page(0), pages: 2048 }, 512, None);
        let step = |faults| {
            taken(&job).unwrap();
            job.note_faults(faults);
            job.step_ended(NO_PAGES, false)
        };
        assert_eq!(step(0), NextStep::None, "it is queued");
        assert_eq!(step(3), NextStep::Pause(GIVEN_WAY));
        assert_eq!(taken(&job), None, "a timed task will resume it");
        assert!(job.resume());
        assert_eq!(step(3), NextStep::None, "it is queued");
        assert_eq!(step(4), NextStep::None);
        assert!(job.is_over());
    }

    #[test]
    fn a_job_with_a_rate_has_one_step_at_a_time_and_a_pause_after_it() {
        let rate = FillRate::BytesPerSecond(NonZeroU64::new(100 << 20).unwrap());
        let limit = RateLimit::new(rate, PageSize::new(4096).unwrap(), 1);
        let job = PrefetchJob::background(Span { first: Page(0), pages: 1000 }, 512, limit);
        assert_eq!(taken(&job), Some((0, 256, false)));
        job.add_filled(256);
        let NextStep::Pause(pause) = job.step_ended(NO_PAGES, false) else { panic!("it is not over") };
        assert!(pause <= Duration::from_millis(10));
        assert_eq!(taken(&job), None, "a timed task will resume it");
        assert!(job.resume());
        assert_eq!(taken(&job), Some((256, 256, false)));
        job.cancel();
        assert_eq!(job.step_ended(NO_PAGES, false), NextStep::None);
        assert!(job.is_over());
    }

    #[test]
    fn a_cancelled_job_is_over_after_the_steps_in_progress() {
        let job = job(0, 2000);
        let (block, _) = job.take().unwrap();
        job.cancel();
        assert_eq!((taken(&job), job.is_over()), (None, false));
        assert_eq!(job.step_ended(block, true), NextStep::None);
        assert!(job.is_over());
    }
}
