//! Pages that the application discards (`MADV_DONTNEED`): how the server of a mapping learns of them.
//!
//! | | told | seen |
//! |---|---|---|
//! | the kernel | reports each discard (`EVENT_REMOVE`) | reports none |
//! | the discarding thread | waits until a worker has read the report | does not wait |
//! | fills of other pages | are refused meanwhile (`EAGAIN`) | go on |
//! | the page table | makes the page absent when the report is read | keeps the page as present, or poisoned |
//! | a missing fault on a page that is present in the table | is late, or its report is unread | is late, or the page was discarded |
//!
//! A fault is late if it was queued before the page came. In both kinds the kernel tells which it is
//! (`mincore(2)`), and a discarded page is filled again.

use super::Target;
use pagestitch_kernel::Features;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How the server of a mapping learns that pages were discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Discards {
    /// The kernel reports each discard.
    Told,
    /// The kernel reports none: a discard is seen when its page is touched, or looked for.
    Seen,
}

impl Discards {
    /// The kind of a mapping with these features of its userfaultfds.
    pub(super) fn of(target: &Target, features: Features) -> Self {
        // Foreign memory is its owner's, and so are the events that it has asked for. A stand-in for a
        // userfaultfd has no feature, and the region no faults.
        let is_told = target.foreign().is_some() || features.contains(Features::EVENT_REMOVE);
        if is_told { Self::Told } else { Self::Seen }
    }
}

/// Tells whether a page of a mapping may have been discarded, if the kernel reports discards.
///
/// The discarding thread continues when its event is *read*, and a caller may ask before the reader
/// notes it. So a reader that is at work counts as a discard. The kernel takes the page out at any time
/// after the read, so a noted discard counts for ever.
#[derive(Debug, Default)]
pub(crate) struct DiscardNotice {
    readers: AtomicUsize,
    noted: AtomicBool,
}

impl DiscardNotice {
    /// The caller holds it from before the read of events until these are noted.
    pub(crate) fn reading(&self) -> ReadingEvents<'_> {
        self.readers.fetch_add(1, Ordering::SeqCst);
        ReadingEvents(self)
    }

    /// Notes an event of discarded, unmapped or moved pages.
    pub(crate) fn note(&self) {
        self.noted.store(true, Ordering::SeqCst);
    }

    /// False if no discard has ended before the call.
    pub(super) fn is_possible(&self) -> bool {
        // The readers first: one that ends between the two loads has noted its events.
        self.readers.load(Ordering::SeqCst) > 0 || self.noted.load(Ordering::SeqCst)
    }
}

/// A thread that reads events.
pub(crate) struct ReadingEvents<'n>(&'n DiscardNotice);

impl Drop for ReadingEvents<'_> {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_discard_is_possible_while_events_are_read_and_for_ever_after_one() {
        let notice = DiscardNotice::default();
        assert!(!notice.is_possible());
        let reading = notice.reading();
        assert!(notice.is_possible());
        drop(reading);
        assert!(!notice.is_possible());
        notice.note();
        assert!(notice.is_possible());
    }
}
