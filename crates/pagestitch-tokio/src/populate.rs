//! Populate as a future.

use pagestitch::{AnyRegion, Error};
use std::future;
use std::ops::{Bound, Deref, RangeBounds};
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::task::spawn_blocking;

/// Fills the absent pages of a range of byte offsets, as [`AnyRegion::populate`] does, without a
/// thread that waits for it.
///
/// First the idle workers of the region's server [prefetch](AnyRegion::prefetch) the pages, after its
/// faults, and a fetch of an [async source](crate::chunk) occupies no thread. Then the pages that are
/// left, because their source has failed or another thread was filling them, are populated on a
/// thread of the runtime for blocking calls. Most often there are none. A region that is served
/// [`Inline`](pagestitch::Inline) has no workers, so all of its pages are populated there.
///
/// **Dropping the future cancels it**: no further page is requested, and the drop waits for nothing.
/// A read in progress ends first; its thread holds the region until then. The last holder of a region
/// drops it, and that drop waits for the replies of sources: let it not be the only thread of the
/// runtime that delivers them.
///
/// The loop of a [`Manual`](pagestitch::Manual) must run meanwhile, for example in [`serve`](crate::serve).
///
/// # Errors
///
/// As [`AnyRegion::populate`]; but pages after the failed one may be filled, too.
///
/// # Panics
///
/// Outside of a tokio runtime, if pages are left.
///
/// ```
/// use pagestitch::{Pool, Region};
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let region = Arc::new(Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?);
/// pagestitch_tokio::populate(&region, ..4096).await?;
/// // At most five seconds for the rest.
/// tokio::time::timeout(Duration::from_secs(5), pagestitch_tokio::populate(&region, ..)).await??;
/// assert_eq!(region.metrics().faults, 0);
/// # Ok(())
/// # }
/// ```
pub async fn populate<R>(region: &Arc<R>, range: impl RangeBounds<u64>) -> Result<(), Error>
where
    R: Deref<Target = AnyRegion> + Send + Sync + 'static,
{
    let range = (range.start_bound().cloned(), range.end_bound().cloned());
    // Without workers, or out of range: `populate` fills the pages, or returns the error.
    if let Ok(prefetch) = region.prefetch(range) {
        let progress = prefetch.await;
        if (progress.pages_failed, progress.pages_skipped, progress.pages_left) == (0, 0, 0) {
            return Ok(());
        }
    }
    populate_rest(Arc::clone(region), range).await
}

/// Fills the pages that no worker has filled, on a thread for blocking calls.
async fn populate_rest<R>(region: Arc<R>, range: (Bound<u64>, Bound<u64>)) -> Result<(), Error>
where
    R: Deref<Target = AnyRegion> + Send + Sync + 'static,
{
    let is_cancelled = Arc::new(AtomicBool::new(false));
    let _cancel = SetOnDrop(Arc::clone(&is_cancelled));
    let blocking =
        spawn_blocking(move || region.populate_while(range, || !is_cancelled.load(Ordering::Relaxed)));
    match blocking.await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panicked) => panic::resume_unwind(panicked),
            // The runtime is shutting down, and drops this future, too.
            Err(_) => future::pending().await,
        },
    }
}

/// Sets a flag when it is dropped.
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
