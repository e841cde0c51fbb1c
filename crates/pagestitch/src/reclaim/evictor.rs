//! The thread that evicts pages for signal handlers, in a budget whose written pages go back to their sources.
//!
//! A handler writes pages to files, and runs no code of a source. So it asks this thread if a page stays that it must
//! not write, or whose file has refused it. It waits only while the budget is used up, or nearly all of its pages are dirty. The thread exists from the first time that a budget has both kinds of regions, one
//! that is served inline and one with write-back, which may be the same; it ends with the budget.

use crate::guard::AbortOnPanic;
use crate::policy::PageKey;
use crate::signals::NoSignals;
use pagestitch_kernel::sync::EventCount;
use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::{io, thread};

/// The ties of the handlers of a budget to its thread.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// True if a handler has asked since the thread looked last, or the budget has ended.
    is_asked: AtomicBool,
    has_ended: AtomicBool,
    /// A page that a handler could not write, plus 1; 0 for none.
    refused: AtomicU64,
    asked: EventCount,
    /// The number of attempts to free memory.
    attempts: AtomicUsize,
    /// Those of them that have freed none.
    in_vain: AtomicUsize,
    tried: EventCount,
}

/// The thread of a budget, once there is one.
#[derive(Debug, Default)]
pub(super) struct Evictor(OnceLock<Arc<Requests>>);

impl Evictor {
    pub(super) fn requests(&self) -> Option<&Requests> {
        self.0.get().map(|requests| &**requests)
    }

    /// Starts the thread of a budget, which calls `evict` for each request, unless it runs. Called by one thread
    /// at a time.
    ///
    /// # Errors
    ///
    /// That of the start of a thread.
    pub(super) fn start<B>(&self, budget: &Arc<B>, evict: fn(&B, &Requests)) -> io::Result<()>
    where
        B: Send + Sync + 'static,
    {
        if self.0.get().is_some() {
            return Ok(());
        }
        let requests = Arc::new(Requests::default());
        let (budget, asked) = (Arc::downgrade(budget), Arc::clone(&requests));
        let quiet = NoSignals::until_dropped();
        thread::Builder::new()
            .name(String::from("pagestitch/wb"))
            .spawn(move || serve(&budget, &asked, evict))?;
        drop(quiet);
        let _ = self.0.set(requests);
        Ok(())
    }
}

impl Drop for Evictor {
    fn drop(&mut self) {
        if let Some(requests) = self.requests() {
            requests.has_ended.store(true, Ordering::SeqCst);
            requests.ask();
        }
    }
}

impl Requests {
    /// Has the thread evict pages, if some should leave. Async-signal-safe.
    pub(super) fn ask(&self) {
        if !self.is_asked.load(Ordering::SeqCst) {
            self.is_asked.store(true, Ordering::SeqCst);
            self.asked.notify_all();
        }
    }

    /// Has the thread write a page whose file has not taken it. Async-signal-safe.
    pub(super) fn write(&self, page: PageKey) {
        self.refused.store(page + 1, Ordering::SeqCst);
        self.ask();
    }

    /// The last page that a handler could not write, once.
    pub(super) fn take_refused(&self) -> Option<PageKey> {
        self.refused.swap(0, Ordering::SeqCst).checked_sub(1)
    }

    fn next(&self) {
        self.asked.wait_while(|| !self.is_asked.load(Ordering::SeqCst));
        // Before the thread looks at the budget, because a handler that asks later must be heard.
        self.is_asked.store(false, Ordering::SeqCst);
    }

    pub(super) fn tried(&self, has_freed: bool) {
        self.in_vain.fetch_add(usize::from(!has_freed), Ordering::SeqCst);
        self.attempts.fetch_add(1, Ordering::SeqCst);
        self.tried.notify_all();
    }

    /// The attempts that have freed no memory.
    pub(super) fn in_vain(&self) -> usize {
        self.in_vain.load(Ordering::SeqCst)
    }

    /// Asks, and waits for the next attempt to free memory.
    pub(super) fn ask_and_wait(&self) {
        let before = self.attempts.load(Ordering::SeqCst);
        self.ask();
        self.tried.wait_while(|| self.attempts.load(Ordering::SeqCst) == before);
    }
}

fn serve<B>(budget: &Weak<B>, requests: &Requests, evict: fn(&B, &Requests)) {
    // Handlers would wait for ever.
    let _abort = AbortOnPanic::armed();
    loop {
        requests.next();
        if requests.has_ended.load(Ordering::SeqCst) {
            return;
        }
        let Some(budget) = budget.upgrade() else { return };
        evict(&budget, requests);
    }
}
