//! The watchdog: tells of faults that take too long, once each, and gives them up where that was declared.
//!
//! Whoever serves such a fault is in a source that hangs, and cannot be called back. What the watchdog can do is to have the waiter
//! run: into a signal. Should the source answer after all, its bytes replace the mark.

use crate::metrics::Overdue;
use crate::region::Served;
use crate::server::pool::Shared;
use crate::server::resolve::poison;
use crate::source::Failure;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// How long a fault may take.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    /// Before it is told of.
    pub(super) overdue: Option<Duration>,
    /// Before its page is made bad.
    pub(super) hard: Option<Duration>,
}

impl Limits {
    /// Whether there is anything to watch for.
    pub(super) const fn any(self) -> bool {
        self.overdue.is_some() || self.hard.is_some()
    }

    /// Looks at all faults in flight now and then, until the pool stops.
    pub(super) fn watch(self, shared: &Shared) {
        let shortest = [self.overdue, self.hard].into_iter().flatten().min().unwrap_or(Duration::MAX);
        let tick = (shortest / 4).clamp(Duration::from_millis(5), Duration::from_secs(1));
        let wait = PollTimeout::try_from(tick).unwrap_or(PollTimeout::MAX);
        loop {
            let mut stop = [PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN)];
            if poll(&mut stop, wait).is_ok_and(|ready| ready > 0) {
                return;
            }
            shared.regions().iter().for_each(|region| self.look(region));
        }
    }

    fn look(self, region: &Arc<Served>) {
        // A region that is being dropped waits for its sources anyway.
        let Some(_visit) = region.enter() else { return };
        let shortest = [self.overdue, self.hard].into_iter().flatten().min().unwrap_or(Duration::MAX);
        for fault in region.counters.overdue(shortest) {
            if self.overdue.is_some_and(|limit| fault.age >= limit) && region.counters.tell_once(&fault) {
                let failure = failure(region, &fault);
                let Failure { chunk, source, .. } = &failure;
                let (offset, age, thread) =
                    (region.page_size().offset_of(fault.page), fault.age, fault.thread);
                tracing::warn!(
                    region = region.name,
                    offset,
                    chunk,
                    source,
                    ?age,
                    thread,
                    "a fault is overdue"
                );
                region.counters.here().faults_overdue.add(1);
            }
            if self.hard.is_some_and(|limit| fault.age >= limit) && region.counters.give_up_once(&fault) {
                give_up(region, &fault);
            }
        }
    }
}

/// Has the waiter run into a signal, and keeps the reason.
fn give_up(region: &Served, fault: &Overdue) {
    let failure = Arc::new(failure(region, fault));
    region.keep_failure(fault.page, Arc::clone(&failure));
    if poison(region, fault.page.span()).is_err() {
        // The map is changing: the waiter faults again, and is looked at again.
        return;
    }
    region.counters.here().faults_given_up.add(1);
    tracing::error!(region = region.name, %failure, thread = fault.thread, "a fault was given up: its page is bad");
    region.report(fault.page, &failure);
}

fn failure(region: &Served, fault: &Overdue) -> Failure {
    let offsets = region.page_size().offsets(fault.page.span());
    let why = format!("it has taken {:?} so far", fault.age);
    region.layout.piece_at(offsets.start, offsets.end).failed(io::Error::new(io::ErrorKind::TimedOut, why))
}
