//! A guest in this process: virtual CPUs touch its memory and discard pages.

use super::context::{Context, Failure, join_all};
use super::model::PAGE;
use super::tally::Tally;
use fastrand::Rng;
use pagestitch::{AdoptedMemory, AdoptedRegion, Process};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::memory::Split;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// A guest whose memory a region serves.
pub(super) struct ServedGuest<'a> {
    guest: &'a Guest,
    region: &'a AdoptedRegion,
    context: Context<'a>,
    cpus: usize,
    /// True for each discarded page, which must read as zeros.
    discarded: Vec<AtomicBool>,
}

impl<'a> ServedGuest<'a> {
    pub(super) fn new(
        rng: &mut Rng,
        guest: &'a Guest,
        region: &'a AdoptedRegion,
        context: Context<'a>,
    ) -> Self {
        let pages = context.model.bytes.len() / PAGE;
        let discarded = (0..pages).map(|_| AtomicBool::new(false)).collect();
        Self { guest, region, context, cpus: rng.usize(1..6), discarded }
    }

    /// Runs the virtual CPUs, repairs the sources, and checks each page.
    pub(super) fn run(&self, rng: &mut Rng) -> Result<(), Failure> {
        thread::scope(|scope| {
            let start = |cpu| {
                let mut rng = rng.fork();
                scope.spawn(move || self.run_cpu(&mut rng, cpu))
            };
            join_all((0..self.cpus).map(start).collect())
        })?;
        self.context.model.repair();
        let all = 0..self.context.model.bytes.len() as u64;
        self.region
            .retry_failed(all.clone())
            .and_then(|()| self.region.populate(all))
            .map_err(|error| format!("fails after the repair: {error}"))?;
        (0..self.discarded.len()).try_for_each(|page| self.check_at_the_end(page))?;
        self.context.add(&self.region.metrics());
        Ok(())
    }

    /// Checks also pages that failed before the repair, and discarded ones.
    fn check_at_the_end(&self, page: usize) -> Result<(), Failure> {
        let is_discarded = self.discarded[page].load(Ordering::Relaxed);
        let expected = if is_discarded { 0 } else { self.context.model.bytes[page * PAGE + 7] };
        let read = self.guest.read(page * PAGE + 7);
        if read == expected {
            return Ok(());
        }
        Err(format!("byte 7 of page {page} is {read:#x} at the end, expected {expected:#x}"))
    }

    /// Runs a virtual CPU. Each has pages of its own to discard, and touches all pages.
    fn run_cpu(&self, rng: &mut Rng, cpu: usize) -> Result<(), Failure> {
        for _ in 0..rng.usize(20..400) {
            self.context.run.beat();
            let page = rng.usize(..self.discarded.len());
            if self.context.model.may_fail(&(page * PAGE..page * PAGE + 1)) {
                continue;
            }
            let is_own = page % self.cpus == cpu;
            if is_own && rng.u8(..6) == 0 {
                self.discard(page)?;
            }
            if rng.u8(..12) == 0 {
                let call = split(rng);
                self.guest.split(rng.usize(..self.discarded.len()) * PAGE, PAGE, call);
                Tally::count(&self.context.run.tally.splits, 1);
            }
            self.touch(page * PAGE + rng.usize(..PAGE), is_own)?;
        }
        Ok(())
    }

    fn discard(&self, page: usize) -> Result<(), Failure> {
        self.guest
            .balloon(page * PAGE, PAGE)
            .map_err(|error| format!("the guest cannot discard a page: {error}"))?;
        self.discarded[page].store(true, Ordering::SeqCst);
        Tally::count(&self.context.run.tally.balloons, 1);
        Ok(())
    }

    /// Reads a byte. `is_own`: no other virtual CPU discards its page.
    fn touch(&self, at: usize, is_own: bool) -> Result<(), Failure> {
        let discarded = self.discarded[at / PAGE].load(Ordering::SeqCst);
        let (read, expected) = (self.guest.read(at), self.context.model.bytes[at]);
        // Another virtual CPU may discard the page at this moment, so zeros are right, too.
        let right = if discarded { read == 0 } else { read == expected || !is_own && read == 0 };
        if !right {
            return Err(format!("byte {at} is {read:#x}, expected {expected:#x}; discarded: {discarded}"));
        }
        Tally::count(&self.context.run.tally.bytes_verified, 1);
        Ok(())
    }
}

/// A random call on a page. It takes no locks, because a locked page cannot be discarded.
fn split(rng: &mut Rng) -> Split {
    match rng.u8(..4) {
        0 => Split::Protect,
        1 => Split::PageOut,
        _ => Split::Advise(rng.bool()),
    }
}

/// One or two ranges of so many bytes in total.
pub(super) fn ranges(rng: &mut Rng, bytes: usize) -> Vec<usize> {
    let pages = bytes / PAGE;
    let first = if pages > 1 && rng.bool() { rng.usize(1..pages) } else { pages };
    [first, pages - first].into_iter().filter(|&pages| pages > 0).map(|pages| pages * PAGE).collect()
}

pub(super) fn adopt(guest: &Guest) -> Result<AdoptedMemory, Box<dyn std::error::Error>> {
    let memory = guest.memory()?;
    // The owner is this process, so unavailable bytes end the test.
    Ok(memory.owner(Process::open(std::process::id())?))
}
