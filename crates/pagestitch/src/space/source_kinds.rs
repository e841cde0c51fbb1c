//! The kinds of sources of a region that its fault path treats in their own ways.

use crate::source::Backing;
use pagestitch_kernel::direct_read::DirectFile;
use std::sync::atomic::{AtomicBool, Ordering};

/// The kinds of sources that a region has, or had: the fault path looks for none of another kind.
#[derive(Debug, Default)]
pub(crate) struct SourceKinds {
    has_fetched: AtomicBool,
    has_direct: AtomicBool,
    may_hang: AtomicBool,
}

impl SourceKinds {
    /// Adds the kind of a source.
    pub(crate) fn note(&self, source: &Backing) {
        let add = |kind: &AtomicBool, is_of_kind: bool| {
            if is_of_kind {
                kind.store(true, Ordering::Relaxed);
            }
        };
        add(&self.has_fetched, matches!(source, Backing::Fetched(_)));
        add(&self.has_direct, source.direct_file().is_some_and(DirectFile::is_on_disk));
        add(&self.may_hang, source.may_hang());
    }

    /// True if a source answers later.
    pub(crate) fn has_fetched(&self) -> bool {
        self.has_fetched.load(Ordering::Relaxed)
    }

    /// True if a source is a file on a disk that is read around the page cache.
    pub(crate) fn has_direct(&self) -> bool {
        self.has_direct.load(Ordering::Relaxed)
    }

    /// True if a read of a source may hang.
    pub(crate) fn may_hang(&self) -> bool {
        self.may_hang.load(Ordering::Relaxed)
    }
}
