//! The watchdog. It replaces workers that sources hold up. It reports each fault that takes too
//! long, once, and gives it up where a timeout is set.
//!
//! A source that hangs cannot be called back. The watchdog can start another worker for the other
//! faults, and end the wait of the faulting thread with a signal. If the source answers after all,
//! its bytes replace the poison marker.
//!
//! ```text
//!   no worker works ──▶ dozes ── a worker wakes up ──▶ looks every 10 ms ──▶ a worker in one step for 10 ms: another one at its post
//!                                                             │
//!                        as many as there may be: reads what no worker is left for, so that all faults are known, and have their limit
//! ```
//!
//! It counts time by its own looks, each for no longer than it meant to wait: a stopped process
//! loses no time.

use crate::error::Failure;
use crate::fault::FaultRequest;
use crate::fault::install::{FillError, fail_now, poison};
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
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a fault may take.
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

    /// How often to look at all faults in flight, where there is anything to watch for.
    fn tick(self) -> Option<Duration> {
        Some((self.shortest()? / 4).clamp(Duration::from_millis(5), Duration::from_secs(1)))
    }

    /// Checks the faults of a region. The time `passed` since the last look is added to their ages.
    fn look(self, region: &Served, passed: Duration) {
        let Some(shortest) = self.shortest() else { return };
        for fault in region.counters.watch(passed, shortest) {
            if self.overdue.is_some_and(|limit| fault.age >= limit) && region.counters.tell_once(&fault) {
                tell(region, &fault);
            }
            if self.hard.is_some_and(|limit| fault.age >= limit) && region.counters.give_up_once(&fault) {
                give_up(region, &fault);
            }
        }
    }
}

/// The thread.
pub(super) struct Watchdog {
    state: Arc<ServerState>,
    limits: Limits,
    seen: Vec<SeenWorker>,
    /// Looks in a row in which no worker did anything.
    quiet: u32,
    /// Since when time that the faults have is not counted yet.
    counted: Duration,
    /// No worker could be started where one was wanted.
    short: bool,
    batch: Batch,
    /// Faults that it has read and that do not fit into the channel.
    read: VecDeque<QueuedFault>,
}

impl Watchdog {
    pub(super) fn new(state: Arc<ServerState>, limits: Limits) -> Self {
        Self {
            state,
            limits,
            seen: Vec::new(),
            quiet: 0,
            counted: Duration::ZERO,
            short: false,
            batch: Batch::with_capacity(BATCH),
            read: VecDeque::new(),
        }
    }

    /// Looks after the workers until the pool stops.
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

    /// How long to wait before the next look.
    fn wait(&self) -> Option<Duration> {
        let (faults, workers) =
            (self.limits.tick(), (!self.state.workers.watchdog_is_asleep()).then_some(HELD_UP_AFTER));
        [faults, workers].into_iter().flatten().min()
    }

    fn look(&mut self, passed: Duration) {
        if !self.state.workers.watchdog_is_asleep() {
            self.look_at_workers(passed);
        }
        self.counted += passed;
        if self.limits.tick().is_some_and(|tick| self.counted >= tick) {
            for handle in self.state.regions() {
                // A region that is being dropped waits for its sources anyway.
                if let Some(region) = handle.enter() {
                    self.limits.look(&region, self.counted);
                }
            }
            self.counted = Duration::ZERO;
        }
    }

    fn look_at_workers(&mut self, passed: Duration) {
        let look = self.state.workers.observe(&mut self.seen, passed);
        self.quiet = if look.busy { 0 } else { self.quiet + 1 };
        let posts: Vec<_> = self.state.workers.abandoned(&self.seen).collect();
        let short = !posts.into_iter().all(|post| self.replace(post));
        self.tell_shortage(short, look);
        self.last_resort(look);
        let left = self.state.overflowed.swap(false, Ordering::SeqCst);
        if short || left || !self.read.is_empty() {
            self.read_all();
        } else if self.quiet >= QUIET && self.state.workers.try_sleep() {
            self.quiet = 0;
        }
    }

    /// Starts a worker at a post where none gets on. False if there can be no more.
    fn replace(&self, post: usize) -> bool {
        match ServerState::start_replacement(&self.state, post) {
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

    fn tell_shortage(&mut self, short: bool, Observation { held_up, .. }: Observation) {
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

    /// Where no more workers can be started and all but one are held up, the last one serves also slow regions that have none.
    fn last_resort(&self, Observation { held_up, waiting, .. }: Observation) {
        let workers = &self.state.workers;
        let last = (self.short || workers.working() >= workers.most()) && held_up + 1 >= workers.working();
        workers.last_resort.store(last, Ordering::Relaxed);
        // With none to answer, the bell would ring for all that time afterwards. A worker that hangs keeps a few faults for itself, and
        // may have been the one that was told of the time: without another worker at its post they wait for these that are free.
        if waiting > 0 && (self.state.slow_admission.has_waiters() || self.state.has_queued()) {
            self.state.wake_one();
        }
        if waiting > 0 && self.short {
            self.state.timers.rearm();
        }
    }

    /// Reads the faults of all regions, and queues them: where no worker is left to read them, they would not be known.
    fn read_all(&mut self) {
        for handle in self.state.regions() {
            let Some(region) = handle.enter() else { continue };
            if region.children.is_none() {
                self.read_one(&region);
            } else {
                // The fork reader has read its events.
                let read = Instant::now();
                let request = |(page, thread, place)| FaultRequest {
                    page,
                    read,
                    thread,
                    place: Some(place),
                    tries: 0,
                    failures: 0,
                };
                let left = region.counters.take_left().map(request);
                self.read.extend(left.map(|request| QueuedFault::new(&region, request)));
            }
        }
        // Children that are to be served, too, wait for a worker.
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

    fn read_one(&mut self, region: &Arc<Served>) {
        // It comes back at the next look: a watchdog that waits for one region watches none.
        let read = region.try_read_events(&mut self.batch, &mut |event| region.handle_deferred(event));
        let Ok(again) = read else { return };
        let read = Instant::now();
        let request = self.batch.faults().iter().filter_map(|fault| to_request(region, fault, read));
        self.read.extend(request.map(|request| QueuedFault::new(region, request)));
        if again || self.batch.is_full() {
            self.state.rearm(&self.state.epolls()[0], region);
        }
    }
}

fn tell(region: &Served, fault: &Overdue) {
    let Failure { chunk, source, .. } = &failure(region, fault);
    let (offset, age, thread) = (region.page_size().offset_of(fault.page), fault.age, fault.thread);
    log!(warn, region = region.name, offset, chunk, source, ?age, thread, "a fault is overdue");
    region.counters.local().faults_overdue.add(1);
}

/// Poisons the page, so that the waiter gets a signal, and keeps the reason.
fn give_up(region: &Served, fault: &Overdue) {
    let failure = failure(region, fault);
    let said = failure.to_string();
    let given_up = match region.pages.claim_touched(fault.page, &**region, || region.is_resident(fault.page))
    {
        // No worker has begun: the page is poisoned like any other that has failed.
        Ok(mut claim) => matches!(fail_now(region, &mut claim, failure), FillError::Failed(_)),
        Err(Unclaimed::Filling) => give_up_claimed(region, fault, failure),
        // The page is present or poisoned already, and only the queued fault is late.
        Err(Unclaimed::Resident) => return region.wake(fault.page.span()),
        Err(Unclaimed::Poisoned) => return drop(poison(region, fault.page.span())),
    };
    if !given_up {
        // The map is changing, or is held: the page is tried again at the next look.
        return region.counters.keep_on(fault);
    }
    region.counters.local().faults_given_up.add(1);
    log!(
        error,
        region = region.name,
        failure = said,
        thread = fault.thread,
        "a fault was given up: its page is bad"
    );
}

/// The same for a page that a worker is at.
fn give_up_claimed(region: &Served, fault: &Overdue, failure: Failure) -> bool {
    let failure = Arc::new(failure);
    region.record_failure(fault.page, Arc::clone(&failure));
    let poisoned = poison(region, fault.page.span()).is_ok();
    if poisoned {
        region.report(fault.page, &failure);
    }
    poisoned
}

fn failure(region: &Served, fault: &Overdue) -> Failure {
    let offsets = region.page_size().offsets(fault.page.span());
    let why = format!("it has taken {:?} so far", fault.age);
    region.layout.piece_at(offsets.start, offsets.end).failed(io::Error::new(io::ErrorKind::TimedOut, why))
}

/// Events read at once.
const BATCH: usize = 64;
/// After so many looks without any work it stops looking until a fault wakes it. Each such wake-up
/// costs the fault a system call.
const QUIET: u32 = 50;
