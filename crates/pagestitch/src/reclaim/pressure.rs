//! A budget that shares memory with other programs gives some of it up while the kernel reports memory
//! pressure.
//!
//! ```text
//!   report in a window of 2 s ──▶ the marks fall by an eighth, and pages leave until the budget is below
//!   10 s without a report     ──▶ the marks rise by an eighth
//! ```
//!
//! A thread of the budget waits for the reports. It exists only for `Budget::share_of_cgroup()`, and only
//! where the kernel takes a trigger; with all marks at the limit, it runs only when there is a report.

use crate::reclaim::share::State;
use crate::reclaim::state::BATCH;
use crate::signals::NoSignals;
use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch_kernel::pressure::{Pressure, PressureTrigger};
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// Has a budget follow the reports of the kernel. Without them, its marks stay at the limit.
pub(super) fn watch(state: &Arc<State>) {
    if let Err(error) = try_to_watch(state) {
        log!(debug, %error, "the budget does not follow memory pressure");
    }
}

fn try_to_watch(state: &Arc<State>) -> io::Result<()> {
    let trigger = PressureTrigger::open()?;
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(Arc::new)?;
    let (watched, woken) = (Arc::downgrade(state), Arc::clone(&wake));
    let next = move |is_lowered: bool| trigger.wait(woken.as_fd(), is_lowered.then_some(CALM));
    let quiet = NoSignals::until_dropped();
    thread::Builder::new().name(String::from("pagestitch/psi")).spawn(move || follow(&watched, next))?;
    drop(quiet);
    state.marks.watched(wake);
    Ok(())
}

/// Follows the reports that `next` returns, until the budget is gone. `next` gets whether marks are lowered.
fn follow(state: &Weak<State>, mut next: impl FnMut(bool) -> Pressure) {
    let mut is_lowered = false;
    loop {
        let news = next(is_lowered);
        let Some(state) = state.upgrade() else { return };
        state.heed(news);
        is_lowered = state.marks.lowered() > 0;
        if news == Pressure::Ended {
            return;
        }
    }
}

impl State {
    fn heed(&self, news: Pressure) {
        match news {
            Pressure::Stalled => self.give_up(),
            Pressure::Quiet => self.marks.raise(),
            Pressure::Woken => {}
            Pressure::Ended => self.marks.reset(),
        }
    }

    /// Lowers the marks, and has pages leave until the budget is below.
    fn give_up(&self) {
        self.marks.lower();
        // Other threads fill pages meanwhile, so the number of batches is limited.
        for _ in 0..self.limit.div_ceil(BATCH) {
            if self.frames() <= self.limit - self.lowered() || !self.free_some(self.choose()) {
                return;
            }
        }
    }
}

/// The marks rise after this time without a report.
const CALM: Duration = Duration::from_secs(10);

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::{Budget, Pool, Region};

    const MIB: u64 = 1 << 20;

    fn report(budget: &Budget, news: Pressure, times: usize) {
        (0..times).for_each(|_| budget.state.heed(news));
    }

    fn bounded(budget: &Budget) -> Region {
        let pool = Pool::builder().workers(1).start().unwrap();
        let bytes: Vec<u8> = (0..32 * MIB).map(|at| (at / 4096 % 251) as u8).collect();
        Region::builder().chunk(bytes).budget(budget).build(&pool).unwrap()
    }

    fn read(region: &Region) {
        for (page, bytes) in region.as_slice().chunks(4096).enumerate() {
            assert!(bytes == [(page % 251) as u8; 4096], "page {page}");
        }
    }

    #[test]
    fn a_budget_gives_memory_up_under_pressure_and_takes_it_back() {
        let budget = Budget::bytes(16 * MIB).unwrap();
        let region = bounded(&budget);
        read(&region);
        assert!(budget.resident_bytes() > 12 * MIB, "{:?}", budget.metrics());
        report(&budget, Pressure::Stalled, 1);
        assert_eq!((budget.metrics().lowered_bytes, budget.limit()), (2 * MIB, 16 * MIB));
        assert!(budget.resident_bytes() <= 14 * MIB, "{:?}", budget.metrics());
        report(&budget, Pressure::Stalled, 9);
        assert_eq!(budget.metrics().lowered_bytes, 8 * MIB);
        // All pages come, and as many leave.
        for _ in 0..2 {
            assert!(budget.resident_bytes() <= 8 * MIB, "{:?}", budget.metrics());
            read(&region);
        }
        report(&budget, Pressure::Quiet, 3);
        report(&budget, Pressure::Woken, 3);
        assert_eq!(budget.metrics().lowered_bytes, 2 * MIB);
        report(&budget, Pressure::Ended, 1);
        assert_eq!(budget.metrics().lowered_bytes, 0);
        read(&region);
        assert!(budget.resident_bytes() > 12 * MIB, "{:?}", budget.metrics());
        assert!(budget.metrics().pressure_reports == 10 && budget.overruns() == 0, "{:?}", budget.metrics());
    }

    #[test]
    fn pinned_pages_stay_under_pressure_and_leave_room_for_others() {
        let budget = Budget::bytes(16 * MIB).unwrap();
        let region = bounded(&budget);
        region.pin(..4 * MIB).unwrap();
        report(&budget, Pressure::Stalled, 9);
        assert_eq!(budget.metrics().lowered_bytes, 4 * MIB);
        read(&region);
        assert!(budget.resident_bytes() <= 12 * MIB && budget.overruns() == 0, "{:?}", budget.metrics());
        let seen = region.meter().coverage(8)[0];
        assert_eq!((seen.present, seen.returned), (seen.pages, 0), "no pinned page has left");
        region.pin(4 * MIB..8 * MIB).unwrap();
        assert_eq!(budget.metrics().lowered_bytes, 0);
        read(&region);
        region.unpin(..8 * MIB).unwrap();
        assert_eq!((budget.metrics().lowered_bytes, budget.overruns()), (8 * MIB, 0));
    }

    #[test]
    fn pages_for_which_no_other_can_leave_come_above_a_lowered_mark() {
        let budget = Budget::bytes(16 * MIB).unwrap();
        let state = &budget.state;
        report(&budget, Pressure::Stalled, 9);
        assert!(state.try_reserve(2048) && !state.try_reserve(1));
        assert!(state.try_reserve_above_mark(2048) && !state.try_reserve_above_mark(1));
        report(&budget, Pressure::Ended, 1);
        state.release(4096);
        assert!(state.try_reserve(4096) && !state.try_reserve_above_mark(1));
        state.release(4096);
    }

    #[test]
    fn reports_are_followed_until_the_budget_or_the_kernel_ends_them() {
        let budget = Budget::bytes(16 * MIB).unwrap();
        let state = Arc::downgrade(&budget.state);
        let mut news = [Pressure::Stalled, Pressure::Stalled, Pressure::Quiet, Pressure::Ended].into_iter();
        let mut lowered = Vec::new();
        follow(&state, |is_lowered| {
            lowered.push((is_lowered, budget.metrics().lowered_bytes / MIB));
            news.next().expect("the end is the last one")
        });
        assert_eq!(lowered, [(false, 0), (true, 2), (true, 4), (true, 2)]);
        assert_eq!(budget.metrics().lowered_bytes, 0);
        let mut budget = Some(budget);
        follow(&state, |_| {
            drop(budget.take().expect("it ends with the budget"));
            Pressure::Woken
        });
    }

    #[test]
    fn the_thread_of_a_budget_ends_with_the_budget() {
        let budget = Budget::bytes(8 * MIB).unwrap();
        if let Err(error) = try_to_watch(&budget.state) {
            return println!("SKIPPED the_thread_of_a_budget_ends_with_the_budget: {error}");
        }
        let watches = || {
            let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let mut names = threads.map(|thread| std::fs::read_to_string(thread.path().join("comm")));
            names.any(|name| name.is_ok_and(|name| name.trim() == "pagestitch/psi"))
        };
        while !watches() {
            thread::yield_now();
        }
        drop(budget);
        while watches() {
            thread::yield_now();
        }
    }
}
