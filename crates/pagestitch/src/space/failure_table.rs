//! The reason of each poisoned page, and the callback for pages that fail.

use crate::error::Failure;
use crate::signals::NoSignals;
use pagestitch_kernel::Page;
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An entry for each page that has failed.
#[derive(Debug, Default)]
pub(super) struct Failures {
    pages: Mutex<BTreeMap<Page, Arc<Failure>>>,
    /// True if an entry was ever added.
    any: AtomicBool,
}

/// The locked table. Signals of the thread are blocked meanwhile, because the worker that serves a
/// page touched by a signal handler may need the table too.
pub(super) struct LockedFailures<'s> {
    // Dropped first: the lock is released before signals are unblocked.
    failures: MutexGuard<'s, BTreeMap<Page, Arc<Failure>>>,
    _quiet: NoSignals,
}

impl Deref for LockedFailures<'_> {
    type Target = BTreeMap<Page, Arc<Failure>>;

    fn deref(&self) -> &Self::Target {
        &self.failures
    }
}

impl DerefMut for LockedFailures<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.failures
    }
}

impl Failures {
    pub(super) fn locked(&self) -> LockedFailures<'_> {
        let quiet = NoSignals::until_dropped();
        LockedFailures { failures: self.pages.lock(), _quiet: quiet }
    }

    /// True if no page has ever failed: then no lock is taken.
    pub(super) fn is_unused(&self) -> bool {
        !self.any.load(Ordering::SeqCst)
    }

    pub(super) fn keep(&self, page: Page, failure: Arc<Failure>) {
        self.any.store(true, Ordering::SeqCst);
        self.locked().insert(page, failure);
    }
}

/// The callback of `on_page_failure`: called with the page's offset and the failure.
#[derive(Clone)]
pub(crate) struct FailureCallback(pub(crate) Arc<Callback>);

type Callback = dyn Fn(u64, &Failure) + Send + Sync;

impl fmt::Debug for FailureCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FailureCallback")
    }
}
