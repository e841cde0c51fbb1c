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
    /// Whether there ever was one.
    any: AtomicBool,
}

/// Why pages were poisoned, for one thread at a time. No signal handler interrupts that thread: the
/// worker that serves what a handler touches may need them, too.
pub(super) struct LockedFailures<'s> {
    // The lock is left first.
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

/// Whom to tell of a page that is bad: its offset, and why.
#[derive(Clone)]
pub(crate) struct FailureCallback(pub(crate) Arc<Callback>);

type Callback = dyn Fn(u64, &Failure) + Send + Sync;

impl fmt::Debug for FailureCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FailureCallback")
    }
}
