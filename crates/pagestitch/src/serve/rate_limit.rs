//! Log lines that something else has the power to cause: once a second at most, with how many were left out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A line that is told seldom.
#[derive(Debug, Default)]
pub(crate) struct RateLimit {
    last: Mutex<Option<Instant>>,
    untold: AtomicU64,
}

impl RateLimit {
    /// Whether it is to be told now; and if so, how often it was not since it was told last.
    pub(crate) fn again(&self) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < ONCE) {
            self.untold.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        *last = Some(Instant::now());
        Some(self.untold.swap(0, Ordering::Relaxed))
    }
}

const ONCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_told_once_a_second() {
        let line = RateLimit::default();
        assert_eq!((line.again(), line.again(), line.again()), (Some(0), None, None));
        *line.last.lock().unwrap() = Instant::now().checked_sub(ONCE);
        assert_eq!((line.again(), line.again()), (Some(2), None));
    }
}
