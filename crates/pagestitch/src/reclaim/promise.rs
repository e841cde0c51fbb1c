//! The promise under which pages of a region are taken away.

use pagestitch_kernel::{Evictable, Reservation};
use std::sync::Arc;

/// Lets pages of a region leave. The build pipeline calls it after its checks: the region is read-only, and
/// a page that comes back has the same bytes, or the region is a `SharedRegion`, which gives out no slice.
pub(crate) fn evictable(reservation: &Arc<Reservation>) -> Evictable {
    // SAFETY: `Builder::build` gives a budget to no source that is replaced by zeros if a read fails. Either
    // the bytes of a source cannot change, so that a page is filled with the same bytes again; or each
    // page has the hash of its first reading, which `fault/install.rs` compares before it installs the
    // page (`fingerprints`). `Builder::build_shared` gives a view that is not stable. No code writes to
    // the first, because `Options::check_budget` refuses it writable. A written page of the second leaves
    // by a move, with all of its bytes, because `State::take_away` drops no page of a region with
    // `DirtyPages`.
    #[expect(unsafe_code, reason = "the promise that Evictable asks for")]
    unsafe {
        Evictable::new(Arc::clone(reservation))
    }
}
