//! The end of a region's service.

use crate::serve::Served;
use crate::serve::fork::block_forks;
use crate::serve::fork::orphans::Rest;
use crate::serve::leave::abandon;
use crate::space::Target;
use crate::space::page_table::Wake;
use pagestitch_kernel::Batch;
use std::thread;
use std::time::{Duration, Instant};

impl Served {
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
            block_forks(self);
        }
        let began = Instant::now();
        while self.close_orphans() != Rest::None {
            // An owner that moves or forks without end is ended, where it is known.
            let is_stuck = || self.target.foreign().is_some() && began.elapsed() > STRAYS_MAX;
            if is_stuck() && self.target.revoke(self.target.all()).is_ok() {
                break;
            }
            self.read_events(&mut Batch::with_capacity(ORPHAN_EVENTS), &mut |news| {
                self.handle_deferred(news)
            });
            thread::yield_now();
        }
    }
}

/// How long what the owner of adopted memory leaves behind may keep a region from its end.
const STRAYS_MAX: Duration = Duration::from_secs(5);
/// Events read at once, while what nobody serves is seen to.
const ORPHAN_EVENTS: usize = 16;
