//! Evictions by the [thread](super::evictor) of a budget for signal handlers, and the wait of a handler for them.

use crate::reclaim::evictor::Requests;
use crate::reclaim::share::{State, TRIES};
use crate::reclaim::state::PATIENCE;
use pagestitch_kernel::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use std::{mem, thread};

impl State {
    /// Has pages leave until none is due. Tells the handlers of each attempt, and of one at least.
    pub(super) fn evict_for_handlers(&self, requests: &Requests) {
        // First, because the failure is told, and handlers leave pages to this thread from then on.
        requests.take_refused().iter().for_each(|page| _ = self.evict_these(&[*page]));
        loop {
            let has_evicted = self.try_to_evict();
            requests.tried(has_evicted);
            if !has_evicted || !self.should_evict() && !self.is_full() {
                return;
            }
        }
    }

    /// True if pages should leave before the budget is used up.
    fn should_evict(&self) -> bool {
        self.is_due() || self.has_too_many_dirty()
    }

    /// False if no page leaves.
    fn try_to_evict(&self) -> bool {
        if !self.is_full() {
            return self.should_evict() && self.evict();
        }
        let steps = self.writes.steps();
        let has_freed = self.free_some(self.choose());
        if !has_freed {
            // The last pages may be on their way to their sources, by another thread.
            self.writes.wait_for_next(steps);
        }
        has_freed
    }

    /// As [`Residence::wait_for_room_in_handler`](crate::space::Residence::wait_for_room_in_handler).
    pub(super) fn wait_for_room_in_handler(&self) -> bool {
        let Some(requests) = self.evictor.requests() else { return true };
        let began = Instant::now();
        let has_room = self.wait_for_evictor(requests);
        self.stalled_since(began);
        has_room
    }

    /// Waits until the budget has room. Permits a page above its limit if nothing can leave; but false if that
    /// is because written pages cannot go back to their sources.
    fn wait_for_evictor(&self, requests: &Requests) -> bool {
        let (mut begun, mut in_vain) = (Instant::now(), requests.in_vain());
        let mut written = self.tally.write_backs.load(Ordering::Relaxed);
        while self.is_full() {
            if requests.in_vain().wrapping_sub(in_vain) > TRIES {
                // Read first, because a success is counted before its source fails no more.
                let is_failing = self.writes.failing() > 0;
                let now = self.tally.write_backs.load(Ordering::Relaxed);
                if mem::replace(&mut written, now) != now {
                    (begun, in_vain) = (Instant::now(), requests.in_vain());
                } else if !is_failing && self.are_leaving() && begun.elapsed() < PATIENCE {
                    // Pages are on their way out, but their thread lacks a CPU, or waits for a disk.
                    in_vain = requests.in_vain();
                } else if !is_failing || self.lowered() > 0 && self.frames() < self.limit {
                    self.permits.fetch_add(1, Ordering::SeqCst);
                    return true;
                } else if begun.elapsed() > PATIENCE {
                    return false;
                }
                thread::sleep(MOMENT);
            }
            requests.ask_and_wait();
        }
        true
    }
}

/// A pause of a handler while sources fail.
const MOMENT: Duration = Duration::from_millis(5);
