//! Callers' threads that fill pages themselves, in `populate`, `read_at` and `retry_failed`: which pages each is at.
//!
//! A signal handler of the application may interrupt such a thread, and touch a page that the thread has claimed: the claim then
//! waits for the handler, and the handler's access for the claim. Whoever serves the access finds that out here, and installs the page
//! beside the claim. A handler reads it, too: it takes no lock, and needs no thread-local storage.

use crate::space::Mapping;
use nix::unistd::gettid;
use pagestitch_kernel::{Page, Span};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Pages that a thread is at, until it is dropped.
pub(crate) struct Mark(Option<&'static Slot>);

struct Slot {
    /// Its number, or 0.
    thread: AtomicU32,
    region: AtomicUsize,
    first: AtomicUsize,
    pages: AtomicUsize,
}

impl Mark {
    /// Made before pages are claimed: a signal may come in the very moment that they are. Where so many threads are at it that there
    /// is no room, none is made, and a handler that touches these pages waits for ever.
    pub(crate) fn new(region: &Mapping, span: Span) -> Self {
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

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            // First, so that it never stands for pages of another mark.
            slot.pages.store(0, Ordering::SeqCst);
            slot.thread.store(0, Ordering::SeqCst);
        }
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

/// Whether a thread has called for a page, and fills it.
pub(crate) fn fills(thread: u32, region: &Mapping, page: Page) -> bool {
    SLOTS.iter().any(|slot| slot.holds(thread, region, page))
}

/// The kernel's number of this thread. A system call, which a signal handler may make.
pub(crate) fn this_thread() -> u32 {
    gettid().as_raw().cast_unsigned()
}

static SLOTS: [Slot; 256] = [const { Slot::free() }; 256];
