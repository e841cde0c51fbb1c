//! The pauses between two reads of a failing source.

use std::time::Duration;

/// Retries of a failing source: the pause doubles each time up to a cap. A random part, up to half
/// of it, is left out, so that requests that fail together do not return together.
///
/// ```
/// use pagestitch::Retry;
/// use std::time::Duration;
///
/// let patient = Retry::times(20).pause(Duration::from_millis(50), Duration::from_secs(5));
/// assert_ne!(patient, Retry::times(20));                      // 10 ms to a second
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    times: u32,
    first: Duration,
    most: Duration,
}

impl Retry {
    /// Retries `times` times; the first pause is 10 ms, the longest a second.
    #[must_use]
    pub const fn times(times: u32) -> Self {
        Self { times, first: Duration::from_millis(10), most: Duration::from_secs(1) }
    }

    /// Sets the first and the longest pause.
    #[must_use]
    pub const fn pause(self, first: Duration, most: Duration) -> Self {
        Self { first, most, ..self }
    }

    /// The pause after `failures` failures; `None` to give up. `random` decides how much of the
    /// pause is left out.
    pub(crate) fn after(self, failures: u32, random: u64) -> Option<Duration> {
        let pause = self.first.saturating_mul(1 << failures.saturating_sub(1).min(30)).min(self.most);
        let half = u64::try_from(pause.as_nanos() / 2).unwrap_or(u64::MAX);
        (failures <= self.times).then(|| pause - Duration::from_nanos(random % half.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_cap_and_end() {
        let retry = Retry::times(4).pause(Duration::from_millis(10), Duration::from_millis(35));
        let pauses: Vec<_> = (1..=5).map(|failures| retry.after(failures, 0)).collect();
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(pauses, [ms(10), ms(20), ms(35), ms(35), None]);
        for random in [1, 12_345, u64::MAX] {
            let pause = retry.after(1, random).unwrap();
            assert!(pause > Duration::from_millis(5) && pause <= Duration::from_millis(10), "{pause:?}");
        }
        assert_eq!(
            Retry::times(100).pause(Duration::ZERO, Duration::ZERO).after(90, 7),
            Some(Duration::ZERO)
        );
    }
}
