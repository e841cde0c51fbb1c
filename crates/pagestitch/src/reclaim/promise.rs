//! The promise under which pages of a region are taken away.

use pagestitch_kernel::{Evictable, Reservation};
use std::sync::Arc;

/// Lets pages of a region leave. The build pipeline calls it after its checks: the region is read-only,
/// and either all of its sources are stable or it is a `SharedRegion`, which gives out no slice.
pub(crate) fn evictable(reservation: &Arc<Reservation>) -> Evictable {
    // SAFETY: `Builder::build` accepts a budget for sources whose bytes cannot change, and that are not
    // replaced by zeros if a read fails, so that a page is filled with the same bytes again. `Builder::build_shared` gives a view that is not stable. No code
    // writes to either, because `Options::check_target` refuses a budget for a writable region.
    #[expect(unsafe_code, reason = "the promise that Evictable asks for")]
    unsafe {
        Evictable::new(Arc::clone(reservation))
    }
}
