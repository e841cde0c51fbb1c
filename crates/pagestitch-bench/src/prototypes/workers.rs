//! Workers that read the events of a userfaultfd and fill the pages.

use super::parts::Parts;
use crate::affinity::{allowed, pin};
use nix::poll::{PollFd, PollFlags, poll};
use pagestitch_kernel::{Batch, PageSize};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Runs `work` while so many workers serve the memory. Worker `n` serves part `n`, modulo the number of
/// parts, and stays on CPU `n`, modulo the number of CPUs.
pub(super) fn serve<T>(parts: &Parts, workers: usize, work: impl FnOnce() -> T) -> T {
    let (cpus, ended) = (allowed(), AtomicBool::new(false));
    thread::scope(|scope| {
        // Set also if `work` panics, because the scope waits for the workers.
        let _end = End(&ended);
        for worker in 0..workers {
            let (cpu, ended) = (cpus[worker % cpus.len()], &ended);
            scope.spawn(move || {
                pin(cpu);
                run(parts, worker % parts.count(), ended);
            });
        }
        work()
    })
}

fn run(parts: &Parts, part: usize, ended: &AtomicBool) {
    let uffd = parts.uffd(part);
    let mut batch = Batch::with_capacity(EVENTS);
    while !ended.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
        // Another worker may read the event first: then the batch is empty.
        if poll(&mut ready, LOOKS_UP_AFTER_MS).is_ok_and(|ready| ready > 0) {
            batch.read(uffd, PageSize::system()).expect("events");
            batch
                .faults()
                .iter()
                .filter_map(|fault| parts.find(fault.address))
                .for_each(|page| parts.fill(page));
        }
    }
}

/// Ends the workers when it is dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The most events of one read.
const EVENTS: usize = 16;
/// An idle worker looks so often whether the measurement has ended.
const LOOKS_UP_AFTER_MS: u16 = 20;
