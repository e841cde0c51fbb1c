//! The kinds of sources of a region that its fault path treats in their own ways.

use crate::source::Backing;
use std::sync::atomic::{AtomicBool, Ordering};

/// The kinds of sources that a region has, or had: the fault path looks for none of another kind.
#[derive(Debug, Default)]
pub(crate) struct SourceKinds {
    has_fetched: AtomicBool,
    has_direct: AtomicBool,
    has_user: AtomicBool,
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
        add(&self.has_direct, source.direct_file().is_some());
        add(&self.has_user, source.is_of_user());
    }

    /// True if a source answers later.
    pub(crate) fn has_fetched(&self) -> bool {
        self.has_fetched.load(Ordering::Relaxed)
    }

    /// True if a source is a file that is read around the page cache.
    pub(crate) fn has_direct(&self) -> bool {
        self.has_direct.load(Ordering::Relaxed)
    }

    /// True if code of the user, or another process, decides how long a read of a source takes.
    pub(crate) fn has_user(&self) -> bool {
        self.has_user.load(Ordering::Relaxed)
    }
}
