//! The flushes of a region whose written pages go back to their sources.

use crate::error::Failure;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What earlier flushes leave for later ones.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    /// Locked by each flush.
    pub(crate) failed_syncs: Mutex<FailedSyncs>,
    /// True once the last flush, at the end of the region, has begun.
    pub(crate) is_ended: AtomicBool,
}

/// The offsets whose bytes a failed sync may have lost, with the failures.
#[derive(Debug, Default)]
pub(crate) struct FailedSyncs(Vec<(Range<u64>, Arc<Failure>)>);

impl FailedSyncs {
    /// Notes a failure. A caller that flushes a range again and again does not fill the memory.
    pub(crate) fn note(&mut self, offsets: Range<u64>, failure: &Arc<Failure>) {
        if self.0.iter().all(|(known, _)| *known != offsets) {
            self.0.push((offsets, Arc::clone(failure)));
        }
    }

    /// The first failure that meets these offsets.
    pub(crate) fn find(&self, offsets: &Range<u64>) -> Option<&Arc<Failure>> {
        let meets = |range: &Range<u64>| range.start < offsets.end && offsets.start < range.end;
        self.0.iter().find(|(range, _)| meets(range)).map(|(_, failure)| failure)
    }
}
