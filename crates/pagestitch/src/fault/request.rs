//! A request for a page, and the server that it is handled for.

use crate::fault::fetch_semaphore::Permit;
use crate::fault::install::{SHORT_OF_MEMORY, Short, fail_without_memory, poison};
use crate::space::Mapping;
use crate::space::page_table::{Claim, Unclaimed, Wake};
use pagestitch_kernel::Page;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// What a fault needs of the server that it is handled for: the one way up from this room.
pub(crate) trait Host: Deref<Target = Mapping> + fmt::Debug + Send + Sync + 'static {
    /// Whether one more fetch may be under way, and the permission where there is a limit. `None`: the source is waited for.
    fn may_fetch(&self) -> Option<Option<Permit>>;

    /// Has a fault handled once more, after `wait`. False where too many wait.
    fn handle_later(self: &Arc<Self>, request: FaultRequest, wait: Duration) -> bool;

    /// Takes note of how long a fault took, in nanoseconds.
    fn took(&self, ns: u64);
}

/// What a fault asks for: a page. And when a worker read of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FaultRequest {
    pub(crate) page: Page,
    pub(crate) read: Instant,
    /// The thread that waits, by the kernel's number.
    pub(crate) thread: u32,
    /// Its place among the faults in flight, if it has one. It lands there when it is served.
    pub(crate) place: Option<usize>,
    /// How often there was no memory for it.
    pub(crate) tries: usize,
    /// How often its source has failed.
    pub(crate) failures: u32,
}

impl FaultRequest {
    /// What to do where there is no memory for its page.
    pub(crate) const fn short(&self) -> Short {
        if self.tries < SHORT_OF_MEMORY.len() { Short::Tell } else { Short::Fail }
    }

    pub(super) const fn is_first(&self) -> bool {
        self.tries == 0 && self.failures == 0
    }
}

/// Has a worker ask a source again after a pause. It serves other faults meanwhile; where too many faults wait for a time, it sleeps.
pub(super) fn ask_later<H: Host>(region: &Arc<H>, asked: FaultRequest, pause: Duration) {
    let mut wait = pause;
    while !region.handle_later(asked, wait) {
        thread::sleep(wait.max(MOMENT));
        wait = Duration::ZERO;
    }
}

/// Has a fault served once more when there may be memory for its page. Where too many wait for that, the page fails.
pub(super) fn serve_later<H: Host>(region: &Arc<H>, asked: FaultRequest) {
    let wait = SHORT_OF_MEMORY[asked.tries];
    let again = FaultRequest { tries: asked.tries + 1, ..asked };
    if !region.handle_later(again, wait) {
        if let Some(mut claim) = claim(region, asked.page) {
            fail_without_memory(region, &mut claim);
        }
        region.counters.finish(asked.place);
    }
}

/// Claims the page of a fault. `None`: somebody else fills it, or it is there, and the waiter was or will be woken.
pub(super) fn claim(region: &Mapping, page: Page) -> Option<Claim<'_>> {
    match region.pages.claim_touched(page, region, || region.is_resident(page)) {
        Ok(claim) => return Some(claim),
        Err(Unclaimed::Filling) => {}
        Err(Unclaimed::Resident) => {
            region.counters.local().late.add(1);
            region.wake(page.span());
        }
        // The thread had been queued by then. Poisoning once more wakes it into its signal, and is right also where the
        // mark was let go since.
        Err(Unclaimed::Poisoned) => drop(poison(region, page.span())),
    }
    None
}

/// Until a fault that waits for a time may have made room for another.
const MOMENT: Duration = Duration::from_millis(1);
