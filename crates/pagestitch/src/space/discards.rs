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
