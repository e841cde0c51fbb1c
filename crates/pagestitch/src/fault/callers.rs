//! The pages that callers' threads fill themselves, in `populate`, `read_at` and `retry_failed`.
//!
//! A signal handler of the application may interrupt such a thread and touch a page that the thread
//! has claimed. The claim then waits for the handler, and the handler for the claim. The worker
//! that serves the handler's fault detects this here, and installs the page beside the claim.
//!
//! Limit: a source may make the worker wait for the interrupted thread, if both need one lock of the
//! source, one block of a `Cached` or one slot of a `Limited`. No page of such a source is promised to
//! the handler. The calls do not block signals, because a read of a source may take any time, and the
//! signals would wait with it.
//!
//! Signal handlers read this table too, so it takes no lock and needs no thread-local storage.

use crate::space::Mapping;
use nix::unistd::gettid;
use pagestitch_kernel::{Page, Span};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Announces the pages that this thread fills, until it is dropped.
pub(crate) struct FillingCaller(Option<&'static Slot>);

struct Slot {
    /// The kernel's number of the thread; 0 if the slot is free.
    thread: AtomicU32,
    region: AtomicUsize,
    first: AtomicUsize,
    pages: AtomicUsize,
}

impl FillingCaller {
    /// Create it before the pages are claimed, because a signal may arrive right after the claim.
    /// If all slots are taken, the pages are not announced, and a handler that touches them waits
    /// forever.
    pub(crate) fn new(region: &Mapping, span: Span) -> Self {
        // Before the slot is taken, because a signal may arrive right after that.
        ANNOUNCED.fetch_add(1, Ordering::SeqCst);
        let thread = this_thread();
        let start = thread as usize % SLOTS.len();
        let slot = SLOTS[start..]
            .iter()
            .chain(&SLOTS[..start])
            .find(|slot| slot.thread.compare_exchange(0, thread, Ordering::SeqCst, Ordering::SeqCst).is_ok());
        if let Some(slot) = slot {
            slot.region.store(ptr::from_ref(region).addr(), Ordering::SeqCst);
            slot.first.store(span.first.0, Ordering::SeqCst);
            slot.pages.store(span.pages, Ordering::SeqCst);
        }
        Self(slot)
    }
}

impl Drop for FillingCaller {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            // Before the thread: the slot's next owner must never have the pages of this one.
            slot.pages.store(0, Ordering::SeqCst);
            slot.thread.store(0, Ordering::SeqCst);
        }
        ANNOUNCED.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Slot {
    const fn free() -> Self {
        Self {
            thread: AtomicU32::new(0),
            region: AtomicUsize::new(0),
            first: AtomicUsize::new(0),
            pages: AtomicUsize::new(0),
        }
    }

    fn holds(&self, thread: u32, region: &Mapping, page: Page) -> bool {
        let first = self.first.load(Ordering::SeqCst);
        self.thread.load(Ordering::SeqCst) == thread
            && self.region.load(Ordering::SeqCst) == ptr::from_ref(region).addr()
            && page.0.checked_sub(first).is_some_and(|ahead| ahead < self.pages.load(Ordering::SeqCst))
    }
}

/// The number of fills of a page by a thread, each below the one before.
pub(crate) fn fillings(thread: u32, region: &Mapping, page: Page) -> usize {
    SLOTS.iter().filter(|slot| slot.holds(thread, region, page)).count()
}

/// Whether a thread is filling a page itself.
pub(crate) fn fills(thread: u32, region: &Mapping, page: Page) -> bool {
    SLOTS.iter().any(|slot| slot.holds(thread, region, page))
}

/// Whether the calling thread is filling a page itself. Costs one load while no caller fills pages.
pub(crate) fn fills_itself(region: &Mapping, page: Page) -> bool {
    ANNOUNCED.load(Ordering::SeqCst) > 0 && fills(this_thread(), region, page)
}

/// The kernel's number of this thread. Async-signal-safe: a plain system call.
pub(crate) fn this_thread() -> u32 {
    gettid().as_raw() as u32
}

/// The number of callers that fill pages, also of those without a slot.
static ANNOUNCED: AtomicUsize = AtomicUsize::new(0);
static SLOTS: [Slot; 256] = [const { Slot::free() }; 256];
