//! The flushes of a region whose written pages go back to their sources.

use crate::error::Failure;
use parking_lot::Mutex;
use std::collections::BTreeMap;
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
///
/// Invariant: ranges that neither overlap nor touch, each by its start with its end.
#[derive(Debug, Default)]
pub(crate) struct FailedSyncs(BTreeMap<u64, (u64, Arc<Failure>)>);

impl FailedSyncs {
    /// Notes a failure. Ranges that overlap or touch become one, with the failure of the first of them, so that a
    /// caller that flushes again and again does not fill the memory.
    pub(crate) fn note(&mut self, offsets: Range<u64>, failure: &Arc<Failure>) {
        let (mut start, mut end, mut first) = (offsets.start, offsets.end, Arc::clone(failure));
        while let Some((&known, _)) = self.0.range(..=end).next_back().filter(|(_, (last, _))| *last >= start)
        {
            let Some((last, failure)) = self.0.remove(&known) else { break };
            (start, end, first) = (start.min(known), end.max(last), failure);
        }
        self.0.insert(start, (end, first));
    }

    /// A failure that meets these offsets.
    pub(crate) fn find(&self, offsets: &Range<u64>) -> Option<&Arc<Failure>> {
        let (_, (end, failure)) = self.0.range(..offsets.end).next_back()?;
        (*end > offsets.start).then_some(failure)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn ranges_that_touch_become_one() {
        let failure =
            |chunk| Arc::new(Failure::new(chunk, String::from("disk"), 0, io::Error::other("lost")));
        let mut failed = FailedSyncs::default();
        for (chunk, range) in [20..30, 40..50, 0..10, 30..35, 5..8, 34..41].into_iter().enumerate() {
            failed.note(range, &failure(chunk));
        }
        let ranges: Vec<_> = failed.0.iter().map(|(start, (end, _))| *start..*end).collect();
        assert_eq!(ranges, [0..10, 20..50]);
        let found = |range| failed.find(&range).map(|failure| failure.chunk());
        assert_eq!((found(10..20), found(50..60), found(9..20)), (None, None, Some(2)));
        assert!(found(0..100).is_some() && found(19..21).is_some() && found(49..99).is_some());
    }
}
