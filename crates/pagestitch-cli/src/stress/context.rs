//! The parts of a round that all its threads share.

use super::model::Model;
use super::tally::Tally;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;

/// The description of a wrong byte, or of an unexpected error.
pub(super) type Failure = String;

/// The model of a round, and the counters of the run.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) model: &'a Model,
    pub(super) tally: &'a Tally,
    pub(super) heartbeat: &'a AtomicU64,
}

impl Context<'_> {
    /// Tells the watching thread that this thread makes progress.
    pub(super) fn beat(&self) {
        self.heartbeat.fetch_add(1, Ordering::Relaxed);
    }

    /// Compares bytes with the model.
    pub(super) fn verify(&self, read: &[u8], range: &Range<usize>) -> Result<(), Failure> {
        let expected = &self.model.bytes[range.clone()];
        if let Some(at) = read.iter().zip(expected).position(|(read, expected)| read != expected) {
            let (read, expected) = (read[at], expected[at]);
            return Err(format!("byte {} is {read:#x}, expected {expected:#x}", range.start + at));
        }
        Tally::count(&self.tally.bytes_verified, read.len() as u64);
        Ok(())
    }

    /// Adds the counters of a region to those of the run.
    pub(super) fn add(&self, metrics: &pagestitch::Metrics) {
        Tally::count(&self.tally.faults, metrics.faults);
        Tally::count(&self.tally.pages, metrics.pages_installed());
    }
}

/// Waits for threads. Returns the first failure of one.
pub(super) fn join_all(threads: Vec<ScopedJoinHandle<'_, Result<(), Failure>>>) -> Result<(), Failure> {
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| String::from("a thread panicked"))?)
}
