//! The end of a region's service.

use crate::serve::Served;
use crate::serve::abandon::abandon;
use crate::serve::fork::block_forks;
use crate::serve::fork::orphans::Remaining;
use crate::space::Target;
use crate::space::page_table::Wake;
use pagestitch_kernel::Batch;
use std::thread;
use std::time::{Duration, Instant};

impl Served {
    /// Ends serving: a thread that waits in the region, or touches a missing page, gets a signal.
    ///
    /// An owned region is **fenced**: all pages that can be missing become inaccessible. Then all
    /// waiters are woken; they retry and meet the fenced range. Missing pages of adopted memory are poisoned
    /// instead.
    ///
    /// True if the target is fenced and no thread waited there.
    pub(crate) fn end_service(&self) -> bool {
        let (mut has_waiters, mut is_released) = (true, false);
        match &self.target {
            // No page of it is missing.
            Target::Owned(_) if self.uffd.is_stand_in() => {}
            Target::Owned(reservation) => {
                // The time of a fence depends on the present pages. No thread waits for those that
                // are mapped in place.
                let fenced = match self.in_place.few_gaps(self.target.all()) {
                    Some(gaps) => reservation.fence_spans(gaps),
                    None => reservation.fence(),
                };
                if let Err(errno) = fenced {
                    // Without the fence, waiters would read zeros or hang. A refusal is not known
                    // to happen.
                    eprintln!("pagestitch: cannot fence region {} ({errno}): aborting", self.name);
                    std::process::abort();
                }
                // No thread starts to wait any more. A woken waiter may run only after the drop.
                has_waiters = self.uffd.has_waiters() || self.has_stray_faults();
                if has_waiters {
                    reservation.linger();
                }
            }
            Target::Foreign(adopted) => is_released = abandon(self, adopted),
        }
        self.wake(self.target.all());
        if is_released {
            block_forks(self);
        }
        let began = Instant::now();
        while self.close_orphans() != Remaining::None {
            // An owner that moves or forks without end is killed, if its process is known.
            let is_stuck = || self.target.foreign().is_some() && began.elapsed() > ORPHANS_MAX;
            if is_stuck() && self.target.revoke(self.target.all()).is_ok() {
                break;
            }
            // Only a pool has shared userfaultfds, and its workers or its watchdog read them.
            if !self.uffd.is_shared() {
                self.read_without_serving(&mut Batch::with_capacity(ORPHAN_EVENTS));
            }
            thread::yield_now();
        }
        !has_waiters
    }

    /// Gives the userfaultfds of an owned region back, after the end of its service and without a close.
    /// Those with children, and those that may be registered elsewhere because a part was moved, are
    /// closed by the drop.
    pub(crate) fn retire_uffds(&self) {
        if self.target.foreign().is_none() && self.children.is_none() && !self.orphans.have_moved() {
            self.uffd.retire(self.target.addresses(self.target.all()));
        }
    }
}

/// Moved parts and children of an adopted region may delay its end for this long.
const ORPHANS_MAX: Duration = Duration::from_secs(5);
/// The most events read at once while orphaned memory is poisoned.
const ORPHAN_EVENTS: usize = 16;
