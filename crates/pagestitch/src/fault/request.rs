//! A request to serve a fault, and the trait through which faults use their server.

use crate::fault::fetch_semaphore::Permit;
use crate::fault::install::{SHORT_OF_MEMORY, Short, fail_without_memory, poison};
use crate::space::Mapping;
use crate::space::page_table::{Claim, Unclaimed, Wake};
use pagestitch_kernel::Page;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The services that a fault needs from its server. The fault layer calls the serve layer only
/// through this trait.
pub(crate) trait Host: Deref<Target = Mapping> + fmt::Debug + Send + Sync + 'static {
    /// Whether one more asynchronous fetch may start; with its permit, if there is a limit. `None`:
    /// the worker waits for the source.
    fn may_fetch(&self) -> Option<Option<Permit>>;

    /// Queues a fault to be served again after `wait`. False if the queue is full.
    fn handle_later(self: &Arc<Self>, request: FaultRequest, wait: Duration) -> bool;

    /// Records the time that a fault took, in nanoseconds.
    fn record_latency(&self, ns: u64);
}

/// A fault to be served: its page, its thread, and the time at which a worker read it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FaultRequest {
    pub(crate) page: Page,
    pub(crate) read: Instant,
    /// The kernel's number of the faulting thread.
    pub(crate) thread: u32,
    /// Its slot among the faults in flight, if it has one. The slot is freed when the fault is
    /// served.
    pub(crate) slot: Option<usize>,
    /// The number of times that the kernel had no memory for the page.
    pub(crate) tries: usize,
    /// The number of times that the page's source has failed.
    pub(crate) failures: u32,
}

impl FaultRequest {
    /// The reaction if the kernel has no memory for the page.
    pub(crate) const fn short(&self) -> Short {
        if self.tries < SHORT_OF_MEMORY.len() { Short::Tell } else { Short::Fail }
    }

    pub(super) const fn is_first(&self) -> bool {
        self.tries == 0 && self.failures == 0
    }
}

/// Queues a fault to be served again when there may be memory for its page. If the queue is full,
/// the page fails.
pub(super) fn serve_later<H: Host>(region: &Arc<H>, asked: FaultRequest) {
    let wait = SHORT_OF_MEMORY[asked.tries];
    let again = FaultRequest { tries: asked.tries + 1, ..asked };
    if !region.handle_later(again, wait) {
        if let Some(mut claim) = claim(region, asked.page) {
            fail_without_memory(region, &mut claim);
        }
        region.counters.finish(asked.slot);
    }
}

/// Claims the page of a fault. `None`: another thread fills it, or it is present or poisoned; the
/// faulting thread was or will be woken.
pub(super) fn claim(region: &Mapping, page: Page) -> Option<Claim<'_>> {
    match region.pages.claim_touched(page, region, || region.is_resident(page)) {
        Ok(claim) => return Some(claim),
        Err(Unclaimed::Filling) => {}
        Err(Unclaimed::Resident) => {
            region.counters.local().late.add(1);
            region.wake(page.span());
        }
        // The thread faulted before the page was poisoned. Poisoning again wakes it into its
        // signal, also if the poison marker was discarded since.
        Err(Unclaimed::Poisoned) => drop(poison(region, page.span())),
    }
    None
}
