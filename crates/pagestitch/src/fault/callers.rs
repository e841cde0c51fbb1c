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
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::{iter, ptr};

/// Announces the pages that this thread fills, until it is dropped.
pub(crate) struct FillingCaller(&'static Slot);

/// Some slots, and the table of further ones. It is made when all slots are taken, and never freed,
/// because signal handlers read it.
struct Table {
    slots: [Slot; SLOTS],
    more: OnceLock<Box<Self>>,
}

struct Slot {
    /// The kernel's number of the thread; 0 if the slot is free.
    thread: AtomicU32,
    region: AtomicUsize,
    first: AtomicUsize,
    pages: AtomicUsize,
}

impl FillingCaller {
    /// Create it before the pages are claimed, because a signal may arrive right after the claim.
    pub(crate) fn new(region: &Mapping, span: Span) -> Self {
        // Before the slot is taken, because a signal may arrive right after that.
        ANNOUNCED.fetch_add(1, Ordering::SeqCst);
        let thread = this_thread();
        let mut table = &FIRST;
        let slot = loop {
            match table.take(thread) {
                Some(slot) => break slot,
                None => table = table.more.get_or_init(|| Box::new(Table::new())),
            }
        };
        slot.region.store(ptr::from_ref(region).addr(), Ordering::SeqCst);
        slot.first.store(span.first.0, Ordering::SeqCst);
        slot.pages.store(span.pages, Ordering::SeqCst);
        Self(slot)
    }
}

impl Drop for FillingCaller {
    fn drop(&mut self) {
        // Before the thread: the slot's next owner must never have the pages of this one.
        self.0.pages.store(0, Ordering::SeqCst);
        self.0.thread.store(0, Ordering::SeqCst);
        ANNOUNCED.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Table {
    const fn new() -> Self {
        Self { slots: [const { Slot::free() }; SLOTS], more: OnceLock::new() }
    }

    /// Takes a free slot for a thread. Each thread begins at another one.
    fn take(&self, thread: u32) -> Option<&Slot> {
        let (before, from_start) = self.slots.split_at(thread as usize % SLOTS);
        from_start.iter().chain(before).find(|slot| slot.take(thread))
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

    fn take(&self, thread: u32) -> bool {
        self.thread.compare_exchange(0, thread, Ordering::SeqCst, Ordering::SeqCst).is_ok()
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
    slots().filter(|slot| slot.holds(thread, region, page)).count()
}

/// Whether a thread is filling a page itself.
pub(crate) fn fills(thread: u32, region: &Mapping, page: Page) -> bool {
    slots().any(|slot| slot.holds(thread, region, page))
}

/// Whether a thread is filling any page of a region itself.
pub(crate) fn fills_any(thread: u32, region: &Mapping) -> bool {
    let region = ptr::from_ref(region).addr();
    slots().any(|slot| {
        slot.thread.load(Ordering::SeqCst) == thread && slot.region.load(Ordering::SeqCst) == region
    })
}

/// Whether the calling thread is filling a page itself. Costs one load while no caller fills pages.
pub(crate) fn fills_itself(region: &Mapping, page: Page) -> bool {
    ANNOUNCED.load(Ordering::SeqCst) > 0 && fills(this_thread(), region, page)
}

fn slots() -> impl Iterator<Item = &'static Slot> {
    let tables = iter::successors(Some(&FIRST), |table| table.more.get().map(|more| &**more));
    tables.flat_map(|table| &table.slots)
}

/// The kernel's number of this thread. Async-signal-safe: a plain system call.
pub(crate) fn this_thread() -> u32 {
    gettid().as_raw() as u32
}

/// The number of callers that fill pages.
static ANNOUNCED: AtomicUsize = AtomicUsize::new(0);
static FIRST: Table = Table::new();
/// The slots of a table.
const SLOTS: usize = 256;
