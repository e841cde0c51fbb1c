//! The memory that a budget has given up for a while, because the kernel reports memory pressure.

use nix::sys::eventfd::EventFd;
use pagestitch_kernel::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// The marks of a budget, below its limit and its share for resident pages.
#[derive(Debug)]
pub(super) struct Marks {
    limit: usize,
    /// Both marks are lower by so many pages.
    lowered: AtomicUsize,
    /// The pages that the serving threads need at once. The marks stay above.
    needed: AtomicUsize,
    /// How often the kernel has reported pressure.
    pub(super) reports: AtomicU64,
    /// Present if a thread waits for reports.
    watcher: OnceLock<Watcher>,
}

/// Ends the thread that waits for reports.
#[derive(Debug)]
struct Watcher(Arc<EventFd>);

impl Marks {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            lowered: AtomicUsize::new(0),
            needed: AtomicUsize::new(0),
            reports: AtomicU64::new(0),
            watcher: OnceLock::new(),
        }
    }

    /// The pages that the budget has given up.
    pub(super) fn lowered(&self) -> usize {
        self.lowered.load(Ordering::Relaxed)
    }

    /// Keeps the marks above the pages that threads need.
    pub(super) fn need(&self, pages: usize) {
        self.needed.fetch_max(pages, Ordering::Relaxed);
    }

    /// Lowers the marks by a step, to half of the budget at most.
    pub(super) fn lower(&self) {
        let most = (self.limit / 2).min(self.limit.saturating_sub(self.needed.load(Ordering::Relaxed)));
        self.lowered.store((self.lowered() + self.step()).min(most), Ordering::Relaxed);
        self.reports.fetch_add(1, Ordering::Relaxed);
    }

    /// Raises the marks by a step.
    pub(super) fn raise(&self) {
        self.lowered.store(self.lowered().saturating_sub(self.step()), Ordering::Relaxed);
    }

    /// Raises the marks to the limit.
    pub(super) fn reset(&self) {
        self.lowered.store(0, Ordering::Relaxed);
    }

    /// A thread waits for reports, until the last handle to the budget is gone: then `wake` is written.
    pub(super) fn watched(&self, wake: Arc<EventFd>) {
        let _ = self.watcher.set(Watcher(wake));
    }

    const fn step(&self) -> usize {
        self.limit / STEPS
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // A full eventfd is readable, too.
        let _ = self.0.write(1);
    }
}

/// A step is this share of a budget.
const STEPS: usize = 8;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn the_marks_fall_to_half_of_the_budget_and_not_below_the_need_of_threads() {
        let marks = Marks::new(8000);
        let falls = |marks: &Marks| -> Vec<usize> {
            let fall = || {
                marks.lower();
                8000 - marks.lowered()
            };
            std::iter::repeat_with(fall).take(6).collect()
        };
        assert_eq!(falls(&marks), [7000, 6000, 5000, 4000, 4000, 4000]);
        marks.raise();
        assert_eq!((8000 - marks.lowered(), marks.lowered()), (5000, 3000));
        marks.reset();
        marks.need(6500);
        marks.need(10);
        assert_eq!(falls(&marks), [7000, 6500, 6500, 6500, 6500, 6500]);
        (0..3).for_each(|_| marks.raise());
        assert_eq!((8000 - marks.lowered(), marks.reports.load(Ordering::Relaxed)), (8000, 12));
        marks.need(9000);
        assert_eq!(falls(&marks), [8000; 6]);
    }
}
