//! The watchdog. It replaces workers that sources hold up, reports each fault that takes too long,
//! once, and poisons the page of a fault that exceeds the timeout.
//!
//! A call of a source that hangs cannot be interrupted. The watchdog can start another worker for
//! the other faults, and end the wait of the faulting thread with a signal. If the source answers
//! after all, its bytes replace the poison marker.
//!
//! ```text
//!   sleeps, while no worker works
//!     │ a worker starts to work
//!     ▼
//!   looks every 10 ms ──▶ a worker is in one step for 10 ms ──▶ starts another worker at its post
//!                                                                 │ max_workers() is reached
//!                                                                 ▼
//!                         reads the faults itself, so that they are known and can time out
//! ```
//!
//! Where a disk holds up all workers, each for a short time, and the kernel has no ring for their reads, it starts
//! more workers, too. When they are not needed any more, they end one by one.
//!
//! It adds up the time between its looks, and counts each interval as no longer than the wait that
//! it has requested. So the time in which the process is stopped does not count.

use crate::error::{Failure, FailureReason};
use crate::fault::FaultRequest;
use crate::fault::Unfilled;
use crate::fault::error::failure_at;
use crate::fault::poison::{fail_now, poison, poison_again};
use crate::guard::AbortOnPanic;
use crate::metrics::Overdue;
use crate::serve::Served;
use crate::serve::events::to_request;
use crate::serve::served::QueuedFault;
use crate::serve::server_state::ServerState;
use crate::serve::worker_table::{HELD_UP_AFTER, Observation, SeenWorker};
use crate::space::page_table::{Unclaimed, Wake};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pagestitch_kernel::Batch;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The time limits of a fault.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    /// The age at which it is reported.
    pub(super) overdue: Option<Duration>,
    /// The age at which its page is poisoned.
    pub(super) hard: Option<Duration>,
}

impl Limits {
    fn shortest(self) -> Option<Duration> {
        [self.overdue, self.hard].into_iter().flatten().min()
    }

    /// The time between two looks at the faults in flight. `None` without a limit.
    fn tick(self) -> Option<Duration> {
        Some((self.shortest()? / 4).clamp(Duration::from_millis(5), Duration::from_secs(1)))
    }

    /// Checks the faults of a region. The time `passed` since the last look is added to their ages.
    fn look(self, region: &Served, passed: Duration) {
        let Some(shortest) = self.shortest() else { return };
        for fault in region.counters.watch(passed, shortest) {
            if self.overdue.is_some_and(|limit| fault.age >= limit) && region.counters.warn_once(&fault) {
                warn(region, &fault);
            }
            if self.hard.is_some_and(|limit| fault.age >= limit) && region.counters.give_up_once(&fault) {
                give_up(region, &fault);
            }
        }
    }
}

/// The state of the watchdog's thread.
pub(super) struct Watchdog {
    state: Arc<ServerState>,
    limits: Limits,
    seen: Vec<SeenWorker>,
    /// The number of looks in a row at which no worker worked.
    quiet: u32,
    /// The number of looks in a row at which all workers waited for disks.
    short_of_readers: u32,
    /// The number of looks at which there were enough workers, less ten for each at which one was held up.
    enough: u32,
    /// Time that has passed since the last look at the faults.
    uncounted: Duration,
    /// True if a worker is held up and none can be started in its place.
    short: bool,
    batch: Batch,
    /// Faults that it has read, and for which the queue has no room yet.
    read: VecDeque<QueuedFault>,
}

impl Watchdog {
    pub(super) fn new(state: Arc<ServerState>, limits: Limits) -> Self {
        Self {
            state,
            limits,
            seen: Vec::new(),
            quiet: 0,
            short_of_readers: 0,
            enough: 0,
            uncounted: Duration::ZERO,
            short: false,
            batch: Batch::with_capacity(BATCH),
            read: VecDeque::new(),
        }
    }

    /// Watches the workers and the faults until the pool stops.
    pub(super) fn run(mut self) {
        let _abort = AbortOnPanic::armed();
        loop {
            let (wait, began) = (self.wait(), Instant::now());
            let timeout = wait
                .map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX));
            let mut ends = [&self.state.stop, &self.state.workers.watchdog_fd]
                .map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN));
            let _ = poll(&mut ends, timeout);
            if ends[0].any().unwrap_or(false) {
                return;
            }
            if ends[1].any().unwrap_or(false) {
                let _ = self.state.workers.watchdog_fd.read();
            }
            self.look(began.elapsed().min(wait.unwrap_or(HELD_UP_AFTER)));
        }
    }

    /// The time until the next look. `None` while the watchdog sleeps.
    fn wait(&self) -> Option<Duration> {
        let (faults, workers) =
            (self.limits.tick(), (!self.state.workers.watchdog_is_asleep()).then_some(HELD_UP_AFTER));
        [faults, workers].into_iter().flatten().min()
    }

    fn look(&mut self, passed: Duration) {
        if !self.state.workers.watchdog_is_asleep() {
            self.look_at_workers(passed);
        }
        self.uncounted += passed;
        if self.limits.tick().is_some_and(|tick| self.uncounted >= tick) {
            for handle in self.state.regions() {
                // The drop of a region waits for its sources, so their faults need no limit.
                if let Some(region) = handle.enter() {
                    self.limits.look(&region, self.uncounted);
                }
            }
            self.uncounted = Duration::ZERO;
        }
    }

    fn look_at_workers(&mut self, passed: Duration) {
        let look = self.state.workers.observe(&mut self.seen, passed);
        self.quiet = if look.busy { 0 } else { self.quiet + 1 };
        let posts: Vec<_> = self.state.workers.abandoned(&self.seen).collect();
        let short = !posts.into_iter().all(|post| self.replace(post));
        self.note_shortage(short, look);
        if look.held_up > 0 {
            self.state.requested.note_held_up(|slot| self.seen[slot].is_held_up());
        }
        self.last_resort(look);
        self.adapt_workers(look);
        let overflowed = self.state.overflowed.swap(false, Ordering::SeqCst);
        if short || overflowed || !self.read.is_empty() {
            self.read_all();
        } else if self.quiet >= QUIET && self.state.workers.try_sleep() {
            self.quiet = 0;
        }
    }

    /// Starts a worker at a post where no worker makes progress. False if none can be started.
    fn replace(&self, post: usize) -> bool {
        match ServerState::start_another(&self.state, post) {
            Ok(()) => {
                self.state.workers.replacements.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                if !self.short {
                    log!(warn, %error, "a worker that a source holds up cannot be replaced");
                }
                false
            }
        }
    }

    /// Starts another worker while all of them wait for disks, and lets one end that is not needed any more,
    /// because many threads that wait for a disk cost more processor time than one with a ring.
    fn adapt_workers(&mut self, look: Observation) {
        let workers = &self.state.workers;
        let is_short = workers.take_waits_for_disk() && look.waiting == 0;
        self.short_of_readers = if is_short { self.short_of_readers + 1 } else { 0 };
        self.enough = match (is_short, look.held_up > 0) {
            (true, _) => 0,
            // On a loaded machine a worker without a CPU may look as if it were held up.
            (false, true) => self.enough.saturating_sub(10),
            (false, false) => self.enough.saturating_add(1),
        };
        let may_start = self.state.permits.is_none() && workers.working() < READERS_MAX;
        if self.short_of_readers >= SHORT && may_start {
            self.short_of_readers = 0;
            // Without another worker the faults take longer, and none is lost.
            let _ = ServerState::start_another(&self.state, workers.next_post());
        }
        if self.enough >= ENOUGH {
            workers.dismiss_one();
        }
    }

    /// Logs and counts the start of a shortage.
    fn note_shortage(&mut self, short: bool, Observation { held_up, .. }: Observation) {
        if short && !self.short {
            let workers = &self.state.workers;
            workers.shortages.fetch_add(1, Ordering::Relaxed);
            log!(
                error,
                pool = self.state.name,
                workers = workers.working(),
                held_up,
                "sources hold up workers that cannot be replaced: faults wait for an answer, or for fault_timeout(); see max_workers()"
            );
        }
        self.short = short;
    }

    /// If no worker can be started and all but one are held up, the last one also serves slow
    /// regions that occupy no worker.
    fn last_resort(&self, Observation { held_up, waiting, .. }: Observation) {
        let workers = &self.state.workers;
        let last = (self.short || workers.working() >= workers.most()) && held_up + 1 >= workers.working();
        workers.last_resort.store(last, Ordering::Relaxed);
        // A worker that hangs may have kept a few faults, or may have read the timer. Another
        // worker takes these over when it is woken. Without a waiting worker, nothing is written to
        // `wake_fd`, because each write would wake a worker later.
        if waiting > 0 && self.state.has_left_over() {
            self.state.wake_one();
        }
        if waiting > 0 && self.short {
            self.state.timers.rearm();
        }
    }

    /// Reads the faults of all regions and queues them. Called if no worker may be left to read
    /// them, because a fault that is not read cannot time out.
    fn read_all(&mut self) {
        for handle in self.state.regions() {
            let Some(region) = handle.enter() else { continue };
            if region.children.is_none() && !region.uffd.is_shared() {
                (0..region.uffd.count()).for_each(|shard| self.read_one(&region, shard));
            } else {
                // The fork reader, or a worker for a shared userfaultfd, has read its faults, and has
                // set aside those without room.
                let read = Instant::now();
                let request = |(page, thread, slot)| FaultRequest::new(page, read, thread, Some(slot));
                let aside = region.counters.take_set_aside().map(request);
                self.read.extend(aside.map(|request| QueuedFault::new(&region, request)));
            }
        }
        let Self { state, batch, read, .. } = self;
        for index in 0..state.shared_uffds.count() {
            state.read_shared(index, batch, |region, request| {
                read.push_back(QueuedFault::new(region, request));
            });
        }
        // Deferred events, such as new children, wait for a worker as well.
        self.state.handle_all_deferred();
        let mut queued = 0;
        while let Some(fault) = self.read.pop_front() {
            if let Err(fault) = self.state.enqueue(fault) {
                self.read.push_front(fault);
                break;
            }
            queued += 1;
        }
        self.state.wake_workers(queued);
    }

    fn read_one(&mut self, region: &Arc<Served>, shard: usize) {
        // The watchdog must not wait for one region, because it watches all: it reads at the next
        // look.
        let read = region.try_read_events(shard, &mut self.batch, &mut |event| region.handle_deferred(event));
        let Ok(again) = read else { return };
        let read = Instant::now();
        let request = self.batch.faults().iter().filter_map(|fault| to_request(region, fault, read));
        self.read.extend(request.map(|request| QueuedFault::new(region, request)));
        if again || self.batch.is_full() {
            self.state.rearm(0, region, shard);
        }
    }
}

fn warn(region: &Served, fault: &Overdue) {
    let Failure { chunk, source, .. } = &failure(region, fault);
    let (offset, age, thread) = (region.page_size().offset_of(fault.page), fault.age, fault.thread);
    log!(warn, region = region.name, offset, chunk, source, ?age, thread, "a fault is overdue");
    region.counters.local().faults_overdue.add(1);
}

/// Poisons the page of a fault, so that its waiter gets a signal, and records the failure.
fn give_up(region: &Served, fault: &Overdue) {
    let failure = failure(region, fault);
    let text = failure.to_string();
    let given_up = match region
        .pages
        .claim_touched(fault.page, fault.page.span(), &**region, || region.is_resident(fault.page))
    {
        // No worker serves the fault: the page is poisoned as after a failed source.
        Ok(mut claim) => matches!(fail_now(region, &mut claim, failure), Unfilled::Failed(_)),
        Err(Unclaimed::Filling) => give_up_claimed(region, fault, failure),
        // The page is present or poisoned already, and only the queued fault is late.
        Err(Unclaimed::Resident) => return region.wake(fault.page.span()),
        Err(Unclaimed::Poisoned) => return poison_again(region, fault.page.span()),
    };
    if !given_up {
        // The memory map is changing, or is locked: the next look tries again.
        return region.counters.undo_give_up(fault);
    }
    region.counters.local().faults_timed_out.add(1);
    log!(
        error,
        region = region.name,
        failure = text,
        thread = fault.thread,
        "a fault timed out: its page is poisoned"
    );
}

/// As [`give_up`], for a page that a worker has claimed.
fn give_up_claimed(region: &Served, fault: &Overdue, failure: Failure) -> bool {
    let failure = Arc::new(failure);
    region.record_failure(fault.page, Arc::clone(&failure));
    let poisoned = poison(region, fault.page.span()).is_ok();
    if poisoned {
        region.report(fault.page, &failure);
    }
    poisoned
}

/// The failure of a fault that takes too long.
fn failure(region: &Served, fault: &Overdue) -> Failure {
    let reason = format!("it has taken {:?} so far", fault.age);
    failure_at(region, fault.page.span(), FailureReason::TimedOut.error(reason))
}

/// Events read at once.
const BATCH: usize = 64;
/// After this many looks without work the watchdog sleeps until a worker wakes it, which costs a
/// fault one system call.
const QUIET: u32 = 50;
/// After this many looks at which all workers waited for disks, another one starts.
const SHORT: u32 = 3;
/// The most workers that start because others wait for disks.
const READERS_MAX: usize = 16;
/// After this many looks at which there were enough workers, one that replaces another may end: a second.
const ENOUGH: u32 = 100;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::serve::placement::WorkerCpus;
    use crate::serve::served::{FetchSemaphore, RegionHandle};

    /// The permit that comes back wakes a worker, and that worker hangs before it takes the waiting
    /// fault. No other worker would be woken.
    #[test]
    fn the_watchdog_wakes_a_worker_for_a_fault_that_waits_for_a_permit() {
        let mut state = ServerState::new(&WorkerCpus::anywhere(2), 2, String::new()).unwrap();
        let permits = Arc::new(FetchSemaphore::new(1, 4, Arc::clone(&state.wake_fd)));
        state.permits = Some(Arc::clone(&permits));
        let [hangs, waits] = [0, 1].map(|post| state.workers.add(post).unwrap());
        let mut watchdog = Watchdog::new(Arc::new(state), Limits::default());
        let state = Arc::clone(&watchdog.state);
        let is_woken = |watchdog: &mut Watchdog| {
            let observed = state.workers.observe(&mut watchdog.seen, HELD_UP_AFTER);
            watchdog.last_resort(observed);
            state.wake_fd.read().is_ok()
        };
        state.workers.mark_working(hangs);
        assert!(!is_woken(&mut watchdog), "nothing waits");
        let permit = permits.take().unwrap();
        permits.wait(QueuedFault::at(&RegionHandle::dangling()));
        assert!(!is_woken(&mut watchdog), "there is no permit");
        drop(permit);
        assert_eq!(state.wake_fd.read(), Ok(1), "the worker that hangs");
        assert!(is_woken(&mut watchdog) && is_woken(&mut watchdog));
        state.workers.mark_working(waits);
        assert!(!is_woken(&mut watchdog), "no worker waits");
    }
}
