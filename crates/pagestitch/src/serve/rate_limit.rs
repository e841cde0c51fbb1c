//! Log lines that another process can cause: at most one a second, with the number of lines left
//! out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limits how often a line is logged.
#[derive(Debug, Default)]
pub(crate) struct RateLimit {
    last: Mutex<Option<Instant>>,
    suppressed: AtomicU64,
}

impl RateLimit {
    /// `Some` if the line may be logged now: the number of lines left out since the last one.
    /// `None` leaves this line out.
    pub(crate) fn permit(&self) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < ONCE) {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        *last = Some(Instant::now());
        Some(self.suppressed.swap(0, Ordering::Relaxed))
    }
}

const ONCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_logged_once_a_second() {
        let line = RateLimit::default();
        assert_eq!((line.permit(), line.permit(), line.permit()), (Some(0), None, None));
        *line.last.lock().unwrap() = Instant::now().checked_sub(ONCE);
        assert_eq!((line.permit(), line.permit()), (Some(2), None));
    }
}
