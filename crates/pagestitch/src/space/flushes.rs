//! The flushes of a region whose written pages go back to their sources.

use crate::error::Failure;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What earlier flushes leave for later ones.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    /// The offsets of flushes whose sync has failed, with the failures. Locked by each flush.
    pub(crate) failed_syncs: Mutex<Vec<(Range<u64>, Arc<Failure>)>>,
    /// True once the last flush, at the end of the region, has begun.
    pub(crate) is_ended: AtomicBool,
}
