//! A prefetch that the application has requested: the pages that are left, and the progress.
//!
//! ```text
//!   rest:   | taken by workers ... | blocks that no worker has taken yet |
//!   later:  parts of taken blocks that met a limit, or a memory map that was changing
//! ```
//!
//! Workers take its blocks one by one. It is over when no page is left and the steps of workers
//! and the fetches have ended, or when it is cancelled.

use crate::guard::{discard, quietly};
use pagestitch_kernel::Span;
use pagestitch_kernel::sync::EventCount;
use parking_lot::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Poll, Waker};

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
}

#[derive(Debug)]
struct State {
    rest: Span,
    later: Vec<Span>,
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
    Pause,
    /// It is over, in the queue, or goes on when a fetch ends.
    None,
}

impl PrefetchJob {
    /// A job for a span, in blocks of `block` pages.
    pub(crate) fn new(span: Span, block: usize) -> Self {
        let state = State {
            rest: span,
            later: Vec::with_capacity(LATER),
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
        let block = state.later.pop().unwrap_or_else(|| {
            let block = state.rest.prefix(self.block - state.rest.first.0 % self.block);
            state.rest = state.rest.without_prefix(block.pages);
            block
        });
        self.left.fetch_sub(block.pages as u64, Ordering::SeqCst);
        state.steps += 1;
        state.is_queued = self.can_go_on(&state);
        Some((block, state.is_queued))
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
        if is_limited && self.can_go_on(&state) {
            // Also if it is queued: the next worker that takes it would meet the same limit.
            state.is_timed = true;
            return NextStep::Pause;
        }
        self.next_step(state)
    }

    /// Called by the timed task of a [`NextStep`]. True if the caller has to queue it.
    pub(crate) fn resume(&self) -> bool {
        let mut state = self.state.lock();
        state.is_timed = false;
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
        if state.is_queued || !self.can_go_on(&state) {
            self.end_if_over(&state);
            return NextStep::None;
        }
        state.is_timed = true;
        NextStep::Resume
    }

    fn can_go_on(&self, state: &State) -> bool {
        state.has_pages() && !state.is_timed && state.fetches < FETCHES_MAX && !self.is_cancelled()
    }

    fn end_if_over(&self, state: &State) {
        let is_idle = state.steps == 0 && state.fetches == 0;
        if is_idle && (self.is_cancelled() || !state.has_pages()) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use pagestitch_kernel::Page;

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
        assert_eq!(job.step_ended(block.without_prefix(40), true), NextStep::Pause);
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
    fn a_cancelled_job_is_over_after_the_steps_in_progress() {
        let job = job(0, 2000);
        let (block, _) = job.take().unwrap();
        job.cancel();
        assert_eq!((taken(&job), job.is_over()), (None, false));
        assert_eq!(job.step_ended(block, true), NextStep::None);
        assert!(job.is_over());
    }
}
