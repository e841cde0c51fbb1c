//! An estimate of how long the faults of a region take.

use pagestitch_kernel::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A moving average of the recent faults of a region.
#[derive(Debug, Default)]
pub(crate) struct LatencyEstimate {
    /// In nanoseconds; 0 before the first fault.
    average: AtomicU64,
}

impl LatencyEstimate {
    /// Adds the duration of a fault, in nanoseconds.
    pub(crate) fn record(&self, ns: u64) {
        let before = self.average.load(Ordering::Relaxed);
        let after = if before == 0 { ns.max(1) } else { before - before / 8 + ns / 8 };
        // Of two stores at once, one may be lost: the average stays good enough.
        self.average.store(after, Ordering::Relaxed);
    }

    /// True if a fault takes a millisecond at most, so that its worker is soon free again. False
    /// before the first fault.
    pub(crate) fn is_fast(&self) -> bool {
        (1..=FAST_MAX).contains(&self.average.load(Ordering::Relaxed))
    }
}

/// A longer average makes a region slow: its faults may occupy only some of the workers.
const FAST_MAX: u64 = Duration::from_millis(1).as_nanos() as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_fast_after_fast_faults_and_slow_after_a_slow_one() {
        let latency = LatencyEstimate::default();
        assert!(!latency.is_fast(), "no fault yet");
        latency.record(1_000);
        assert!(latency.is_fast());
        latency.record(50_000_000);
        assert!(!latency.is_fast());
        (0..20).for_each(|_| latency.record(1_000));
        assert!(latency.is_fast());
    }
}
