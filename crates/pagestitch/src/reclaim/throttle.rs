//! The throttle of writers: where nearly all pages of a budget are dirty, a write fault has some go back to their
//! sources before it lets its page be written.
//!
//! A page that comes needs the memory of another one, and waits for its write if that page is dirty. Without the
//! throttle, threads that write to pages in memory would leave these waits to threads that only read. With it, the
//! write-back makes room in advance, at the pace of the sources, and the threads that cause it pay for it.

use crate::reclaim::share::{State, without_handlers};
use std::time::Instant;

impl State {
    /// As [`Residence::throttle`](crate::space::Residence::throttle).
    pub(super) fn throttle(&self) {
        if self.has_too_many_dirty() {
            let began = Instant::now();
            let _quiet = without_handlers();
            self.evict();
            self.stalled_since(began);
        }
    }

    /// As [`Residence::throttle_in_handler`](crate::space::Residence::throttle_in_handler).
    pub(super) fn throttle_in_handler(&self) {
        if self.has_too_many_dirty() && !self.evict_in_handler() {
            self.wait_for_an_eviction();
        }
    }

    /// Waits for the thread of the budget, if there is one. Not a part of its caller, which needs the stack.
    #[cold]
    #[inline(never)]
    fn wait_for_an_eviction(&self) {
        if let Some(requests) = self.evictor.requests() {
            let began = Instant::now();
            requests.ask_and_wait();
            self.stalled_since(began);
        }
    }

    /// True if a writer of a present page has to wait. Not while a source of the budget fails, because its pages stay.
    pub(super) fn has_too_many_dirty(&self) -> bool {
        // Most budgets have no dirty page.
        let dirty = self.writes.dirty_pages();
        let most = || self.resident_at_rest() / CLEAN_SHARE * (CLEAN_SHARE - 1);
        dirty > 0 && dirty > most() && self.writes.failing() == 0
    }
}

/// One page of so many is clean, or free.
const CLEAN_SHARE: usize = 8;
