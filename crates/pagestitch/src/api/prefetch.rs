//! A prefetch in progress, as the application sees it.

use crate::fault::PrefetchJob;
use pagestitch_kernel::fork::ForkGeneration;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A prefetch in progress, which [`AnyRegion::prefetch`](crate::AnyRegion::prefetch) returns, or a
/// [background fill](crate::AnyRegion::fill_in_background).
///
/// **Dropping it cancels the prefetch**: no further page is begun, and the drop waits for nothing.
/// [`detach`](Self::detach) lets the prefetch go on without a handle.
///
/// It keeps nothing of its region alive. A drop of the region ends the prefetch. In a forked child it
/// is over, because the workers are the parent's.
///
/// It is a future, of any runtime, that is ready when the prefetch is over:
///
/// ```
/// # use pagestitch::{Pool, Region};
/// # async fn example() -> Result<(), pagestitch::Error> {
/// let region = Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?;
/// let progress = region.prefetch(..)?.await;
/// assert_eq!(progress.pages_filled, 25);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping it cancels the prefetch: keep it, or detach() it"]
pub struct PrefetchHandle {
    job: Arc<PrefetchJob>,
    generation: ForkGeneration,
    is_detached: bool,
}

/// The progress of a prefetch, in pages. Pages that were present before count nowhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefetchProgress {
    /// Pages that it has filled.
    pub pages_filled: u64,
    /// Pages that stay absent, because the read of their source has failed, or the kernel refused
    /// them. They are not poisoned: their touch reads the source again.
    pub pages_failed: u64,
    /// Pages that it has left as they were: they were poisoned, or another thread was filling them. A
    /// background fill waits for the latter.
    pub pages_skipped: u64,
    /// Pages that no worker has begun yet. None are left at the end, unless the region was dropped, or
    /// the owner of adopted memory has ended.
    pub pages_left: u64,
}

impl PrefetchProgress {
    /// True if no page was left out: none has failed, was skipped, or is left. After the end of a
    /// [background fill](crate::AnyRegion::fill_in_background), the region then has all of its pages.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?;
    /// assert!(region.prefetch(..8192)?.wait().is_complete());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.pages_failed == 0 && self.pages_skipped == 0 && self.pages_left == 0
    }
}

impl PrefetchHandle {
    pub(super) fn new(job: Arc<PrefetchJob>) -> Self {
        Self { job, generation: ForkGeneration::current(), is_detached: false }
    }

    /// True if the prefetch is over: each page of the range was present before, or is filled, failed or
    /// skipped; or the region was dropped. If a range has only pages of files in place, at most 4 MiB of each, they
    /// count as present while the kernel reads them.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?;
    /// let ahead = region.prefetch(..)?;
    /// while !ahead.is_done() {
    ///     // Work that needs no byte of the region.
    ///     std::thread::yield_now();
    /// }
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.job.is_over() || !self.generation.is_current()
    }

    /// The progress so far.
    #[must_use]
    pub fn progress(&self) -> PrefetchProgress {
        let [pages_filled, pages_failed, pages_skipped, pages_left] = self.job.counts();
        PrefetchProgress { pages_filled, pages_failed, pages_skipped, pages_left }
    }

    /// Blocks until the prefetch is over; returns its progress.
    ///
    /// The thread that serves the region as a [`Manual`](crate::Manual) would wait for itself.
    pub fn wait(&self) -> PrefetchProgress {
        if self.generation.is_current() {
            self.job.wait();
        }
        self.progress()
    }

    /// Lets the prefetch go on without a handle, until it is over or the region is dropped.
    pub fn detach(mut self) {
        self.is_detached = true;
    }
}

impl Future for PrefetchHandle {
    type Output = PrefetchProgress;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<PrefetchProgress> {
        // Without a lock in a forked child: a thread that the child lacks may hold it.
        let is_over = !self.generation.is_current() || self.job.poll(context.waker()).is_ready();
        if is_over { Poll::Ready(self.progress()) } else { Poll::Pending }
    }
}

impl Drop for PrefetchHandle {
    fn drop(&mut self) {
        if !self.is_detached {
            self.job.cancel();
        }
    }
}
