//! A region as its server has it: the mapping, and what serving it takes.

use crate::fault::{Host, Permit, Permits, Request};
use crate::serve::berths::Berths;
use crate::serve::door::Door;
use crate::serve::fork::strays::{Rest, Strays};
use crate::serve::fork::{Family, refuse_births};
use crate::serve::later::{Later, What};
use crate::serve::leave::abandon;
use crate::serve::pace::{Pace, Reading};
use crate::serve::worker::Handed;
use crate::space::page_table::Wake;
use crate::space::{Mapping, Target};
use pagestitch_kernel::Batch;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// A mapping that is served.
#[derive(Debug)]
pub(crate) struct Served {
    mapping: Mapping,
    pub(crate) pace: Pace,
    /// How many faults may be served at once, and those that wait for that.
    pub(crate) limit: Option<(usize, Berths<Request>)>,
    /// How many fetches its pool may have under way, where there is a limit.
    pub(crate) permits: OnceLock<Arc<Permits>>,
    /// Where what is to be done in a moment is kept.
    pub(crate) later: OnceLock<Arc<Later>>,
    /// Its forked children, where they are served.
    pub(crate) family: Option<Arc<Family>>,
    /// What nobody serves, until it has been seen to.
    pub(crate) strays: Strays,
    /// What its server keeps of it.
    door: OnceLock<Arc<Door>>,
}

impl Served {
    /// At most so many faults are served at once, where there is a limit.
    pub(crate) fn new(mapping: Mapping, max_in_flight: Option<usize>, family: Option<Arc<Family>>) -> Self {
        Self {
            mapping,
            pace: Pace::default(),
            permits: OnceLock::new(),
            later: OnceLock::new(),
            limit: max_in_flight.map(|most| (most, Berths::new(ROOM))),
            strays: Strays::new(family.is_none()),
            family,
            door: OnceLock::new(),
        }
    }

    /// The way in, for its server to keep.
    pub(crate) fn door(self: &Arc<Self>) -> &Arc<Door> {
        self.door.get_or_init(|| Arc::new(Door::new(self.gate(), self)))
    }

    /// The right to read what the kernel has to tell, if nobody has it who will.
    pub(crate) fn turn(&self) -> Option<Reading<'_>> {
        match &self.target {
            Target::Owned(_) => Some(Reading::free()),
            Target::Foreign(_) => self.pace.turn(),
        }
    }

    /// Nobody serves any more: who waits in the region, and who touches it, gets a signal.
    ///
    /// For a region of our own: **fence**, so that the whole range is inaccessible, then wake whoever waits, who tries again and
    /// meets the fenced range. Of adopted memory, what is missing is poisoned instead.
    pub(crate) fn shut(&self) {
        match &self.target {
            Target::Owned(reservation) => {
                if let Err(errno) = reservation.fence() {
                    // Going on would show zeros for bytes, or leave them to hang. Not known to happen.
                    eprintln!("pagestitch: cannot fence region {} ({errno}): aborting", self.name);
                    std::process::abort();
                }
                // No thread begins to wait any more. One that waits runs on when it is woken, which may be after the drop.
                if self.uffd.has_waiters() {
                    reservation.linger();
                }
            }
            Target::Foreign(adopted) => abandon(self, adopted),
        }
        self.wake(self.target.all());
        if self.target.foreign().is_some() {
            refuse_births(self);
        }
        let began = Instant::now();
        while self.close_strays() != Rest::None {
            // An owner that moves or forks without end is ended, where it is known.
            let is_stuck = || self.target.foreign().is_some() && began.elapsed() > STRAYS_MAX;
            if is_stuck() && self.target.revoke(self.target.all()).is_ok() {
                break;
            }
            self.read_events(&mut Batch::with_capacity(STRAY_EVENTS), &mut |news| self.hear(news));
            thread::yield_now();
        }
    }
}

impl Deref for Served {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

impl Host for Served {
    // Where there is a limit on faults, or something to be done about failures, sources are waited for.
    fn may_fetch(&self) -> Option<Option<Permit>> {
        if self.limit.is_some() || !self.layout.only_poisons() {
            return None;
        }
        match self.permits.get() {
            Some(permits) => permits.take().map(Some),
            None => Some(None),
        }
    }

    fn handle_later(self: &Arc<Self>, request: Request, wait: Duration) -> bool {
        let again = Handed::new(self, request);
        self.later.get().is_some_and(|later| later.add(What::Serve(again), wait).is_ok())
    }

    fn took(&self, ns: u64) {
        self.pace.took(ns);
    }
}

/// How long what the owner of adopted memory leaves behind may keep a region from its end.
const STRAYS_MAX: Duration = Duration::from_secs(5);
/// Events read at once, while what nobody serves is seen to.
const STRAY_EVENTS: usize = 16;
/// Faults that may wait for a berth before room has to be made.
const ROOM: usize = 256;
