//! The limit on concurrent fetches.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Limits the concurrent fetches over all regions of a pool.
#[derive(Debug)]
pub(crate) struct FetchSemaphore {
    left: AtomicUsize,
}

/// The permit of one fetch, until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<FetchSemaphore>);

impl FetchSemaphore {
    pub(crate) const fn new(most: usize) -> Self {
        Self { left: AtomicUsize::new(most) }
    }

    /// Takes a permit; `None` at the limit.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Permit> {
        let one_less = |left: usize| left.checked_sub(1);
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        taken.is_ok().then(|| Permit(Arc::clone(self)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_semaphore_has_at_most_its_permits() {
        let permits = Arc::new(FetchSemaphore::new(2));
        let both = (permits.take().unwrap(), permits.take().unwrap());
        assert!(permits.take().is_none());
        drop(both);
        assert!(permits.take().is_some());
    }
}
