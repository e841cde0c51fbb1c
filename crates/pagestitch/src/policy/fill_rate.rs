//! The rate of a background fill.

use pagestitch_kernel::PageSize;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// The most bytes that a [background fill](crate::AnyRegion::fill_in_background) fills in a second.
///
/// A rate leaves memory bandwidth, the disk and the network to other work. After a pause, a fill
/// may be ahead of its rate by a tenth of a second.
///
/// ```
/// use pagestitch::FillRate;
/// use std::num::NonZeroU64;
///
/// let rate = FillRate::BytesPerSecond(NonZeroU64::new(64 << 20).expect("not zero"));
/// assert_ne!(rate, FillRate::Unlimited);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FillRate {
    /// As fast as idle workers fill. The default.
    #[default]
    Unlimited,
    /// This number of bytes a second.
    BytesPerSecond(NonZeroU64),
}

/// The pages that a job with a rate has filled, and the time at which it may go on.
#[derive(Debug)]
pub(crate) struct RateLimit {
    bytes_per_second: NonZeroU64,
    page: PageSize,
    /// The fewest pages of a step.
    least: usize,
    charged_pages: u64,
    due: Instant,
}

impl RateLimit {
    /// A limit for pages of this size, of which at least `least` are filled at once. `None` for an
    /// unlimited rate.
    pub(crate) fn new(rate: FillRate, page: PageSize, least: usize) -> Option<Self> {
        let FillRate::BytesPerSecond(bytes_per_second) = rate else { return None };
        Some(Self { bytes_per_second, page, least, charged_pages: 0, due: Instant::now() })
    }

    /// The pages that may be filled before the next look at the time: those of [`STEP`].
    pub(crate) fn step_pages(&self) -> usize {
        let bytes = self.bytes_per_second.get() / (1000 / STEP.as_millis() as u64);
        usize::try_from(bytes / self.page.bytes() as u64).unwrap_or(usize::MAX).max(self.least)
    }

    /// Charges the pages that are filled by now, `pages` in all. Returns the pause before the next
    /// page.
    pub(crate) fn charge(&mut self, pages: u64, now: Instant) -> Duration {
        let bytes = u128::from(pages - self.charged_pages) * self.page.bytes() as u128;
        self.charged_pages = pages;
        let cost = bytes * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        let from = now.checked_sub(BURST).map_or(self.due, |earliest| self.due.max(earliest));
        // A time that `Instant` cannot represent is far away: the pause is repeated until then.
        self.due = from.checked_add(cost).unwrap_or(now + Duration::from_secs(1 << 30));
        self.due.saturating_duration_since(now)
    }
}

/// A job fills the pages of this time at once.
const STEP: Duration = Duration::from_millis(10);
/// The time by which a job may be ahead of its rate after a pause.
const BURST: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes_per_second: u64) -> RateLimit {
        let rate = FillRate::BytesPerSecond(NonZeroU64::new(bytes_per_second).unwrap());
        RateLimit::new(rate, PageSize::new(4096).unwrap(), 1).unwrap()
    }

    #[test]
    fn a_rate_is_kept_over_steps_and_pauses() {
        let mut limit = limit(4096 * 1000);
        assert_eq!(limit.step_pages(), 10);
        let began = limit.due;
        assert_eq!(limit.charge(10, began), Duration::from_millis(10));
        assert_eq!(limit.charge(10, began), Duration::from_millis(10), "nothing was filled meanwhile");
        assert_eq!(limit.charge(30, began + Duration::from_millis(20)), Duration::from_millis(10));
        // After a pause of an hour, the job is ahead of its rate by a tenth of a second.
        let later = began + Duration::from_secs(3600);
        assert_eq!(limit.charge(130, later), Duration::ZERO);
        assert_eq!(limit.charge(230, later), Duration::from_millis(100));
    }

    #[test]
    fn extreme_rates_neither_overflow_nor_stop() {
        let mut slow = limit(1);
        assert_eq!((slow.step_pages(), slow.charge(1, slow.due)), (1, Duration::from_secs(4096)));
        assert!(slow.charge(u64::MAX, slow.due) > Duration::from_secs(1 << 20));
        let mut fast = limit(u64::MAX);
        assert!(fast.step_pages() > 1 << 40);
        assert_eq!(fast.charge(1 << 20, fast.due), Duration::ZERO);
        assert!(RateLimit::new(FillRate::Unlimited, PageSize::system(), 1).is_none());
    }
}
