//! The counts of a budget, as the user reads them.

use std::time::Duration;

/// The counts of a [`Budget`](crate::Budget) at one moment. They may lag, as those of a
/// [region](crate::Metrics) do.
///
/// A page that leaves comes back at most once until it leaves again, so evictions are at least soft faults
/// and refaults together. Many refaults tell that the budget is smaller than the pages in use.
///
/// ```
/// use pagestitch::{Budget, Pool, Region};
///
/// let budget = Budget::bytes(16 << 20)?;
/// let pool = Pool::builder().workers(1).start()?;
/// let region = Region::builder().chunk(vec![7u8; 32 << 20]).budget(&budget).build(&pool)?;
/// for _ in 0..2 {
///     assert!((0..32 << 20).step_by(4096).all(|offset| region.as_slice()[offset] == 7));
/// }
/// let metrics = budget.metrics();
/// assert!(metrics.evictions > 8_000 && metrics.refaults > 4_000);  // half of it had left before the second pass
/// assert!(metrics.resident_bytes <= budget.limit());
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BudgetMetrics {
    /// The bytes of memory in use: [`Budget::resident_bytes`](crate::Budget::resident_bytes).
    pub resident_bytes: u64,
    /// The bytes of memory of the standby list, a part of [`resident_bytes`](Self::resident_bytes).
    pub standby_bytes: u64,
    /// Pages that have left their regions.
    pub evictions: u64,
    /// Pages that have come back from the standby list, without a read of their source.
    pub soft_faults: u64,
    /// Pages that had left, and were filled from their source again.
    pub refaults: u64,
    /// Pages that should have left, and that the kernel kept: locked, pinned by a device, or shared with a
    /// forked child (`MADV_DOFORK`), also after its end, until they are written.
    pub kept: u64,
    /// Pages that were filled above the limit, because no page could leave.
    pub overruns: u64,
    /// The time that threads have taken to free memory before they could fill a page, or write to one, all of them together.
    /// Memory is freed ahead of faults, so much of it tells that pages come faster than others leave: the
    /// pages in use exceed the budget, or their sources are written slowly.
    pub stalled: Duration,
    /// The bytes of pages that were written and are not in their sources yet, a part of
    /// [`resident_bytes`](Self::resident_bytes).
    pub dirty_bytes: u64,
    /// Written pages whose bytes went to their sources, before their memory was used for other pages, or by
    /// a flush.
    pub write_backs: u64,
    /// Writes to sources that have failed. Their pages stay in memory.
    pub write_failures: u64,
    /// How often the kernel has reported memory pressure, so that pages left:
    /// [`Budget::share_of_cgroup`](crate::Budget::share_of_cgroup).
    pub pressure_reports: u64,
    /// The bytes that the budget does not use for now, because of these reports.
    pub lowered_bytes: u64,
}
