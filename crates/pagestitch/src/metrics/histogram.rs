//! A lock-free histogram for many recording threads. Each power of two has eight buckets, so a
//! value is known to within an eighth.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The histogram while threads record in it.
pub(crate) struct LatencyRecorder {
    counts: [AtomicU64; STEPS],
}

impl LatencyRecorder {
    pub(crate) fn new() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    pub(crate) fn record(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.counts[step_of(ns)].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Histogram {
        Histogram { counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect() }
    }
}

impl fmt::Debug for LatencyRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read().fmt(f)
    }
}

/// A distribution of durations, each known to within an eighth.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    /// The number of recorded durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The duration that a share of the recorded durations does not exceed; a `share` of 0.5 is the
    /// median. Zero if none was recorded.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = ((self.count() as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let step = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        step.map_or(Duration::ZERO, |step| Duration::from_nanos(end_of(step)))
    }

    /// The longest duration, to within an eighth.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).record_latency().build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// let resolve = region.meter().latency().expect("it is measured").resolve;
    /// println!("{} faults, the slowest took {:?}", resolve.count(), resolve.max());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn max(&self) -> Duration {
        self.quantile(1.0)
    }

    /// The non-empty buckets: the upper bound of each, and its number of durations.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).record_latency().build(&Pool::new()?)?;
    /// let fill = region.meter().latency().expect("it is measured").fill;
    /// for (bound, durations) in fill.steps() {
    ///     println!("{durations} fills took at most {bound:?}");
    /// }
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn steps(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let steps = self.counts.iter().enumerate().filter(|&(_, &count)| count > 0);
        steps.map(|(step, &count)| (Duration::from_nanos(end_of(step)), count))
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Histogram");
        shown
            .field("count", &self.count())
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99));
        shown.field("max", &self.max()).finish()
    }
}

fn step_of(ns: u64) -> usize {
    let power = u64::BITS - ns.leading_zeros();
    if power <= FINE {
        ns as usize
    } else {
        let shift = power - FINE;
        (shift as usize) * HALF + (ns >> shift) as usize
    }
}

/// The largest value of a bucket.
fn end_of(step: usize) -> u64 {
    if step < 2 * HALF {
        return step as u64;
    }
    let shift = step / HALF - 1;
    let first = (step % HALF + HALF) as u64;
    ((u128::from(first) + 1) << shift).saturating_sub(1).try_into().unwrap_or(u64::MAX)
}

/// Values of up to this many bits each have a bucket of their own.
const FINE: u32 = 4;
/// Buckets in each further power of two.
const HALF: usize = 1 << (FINE - 1);
const STEPS: usize = (u64::BITS - FINE) as usize * HALF + 2 * HALF;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_is_known_to_an_eighth(ns in prop_oneof![0..100u64, any::<u64>(), 0..10_000_000_000u64]) {
            let (step, end) = (step_of(ns), end_of(step_of(ns)));
            prop_assert!(ns <= end && end - ns <= ns / 8, "{ns} {step} {end}");
            prop_assert!(step == 0 || end_of(step - 1) < ns);
            prop_assert!(step < STEPS);
        }
    }

    #[test]
    fn quantiles_are_those_of_the_recorded_durations() {
        let recorder = LatencyRecorder::new();
        (1..=1000).for_each(|us| recorder.record(Duration::from_micros(us)));
        let histogram = recorder.read();
        assert_eq!(histogram.count(), 1000);
        for (share, us) in [(0.5, 500), (0.99, 990), (1.0, 1000)] {
            let (told, exact) = (histogram.quantile(share), Duration::from_micros(us));
            assert!(told >= exact && told <= exact + exact / 8, "{share}: {told:?}");
        }
        assert_eq!(LatencyRecorder::new().read().quantile(0.5), Duration::ZERO);
        assert_eq!(histogram.steps().map(|(_, count)| count).sum::<u64>(), 1000);
    }
}
