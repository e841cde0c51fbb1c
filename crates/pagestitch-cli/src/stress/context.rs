//! The parts of a round that all its threads share.

use super::model::Model;
use super::tally::Tally;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;

/// The description of a wrong byte, or of an unexpected error.
pub(super) type Failure = String;

/// The model of a round, and the counters of the run.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) model: &'a Model,
    pub(super) run: Run<'a>,
}

impl Context<'_> {
    /// Compares bytes with the model.
    pub(super) fn verify(&self, read: &[u8], range: &Range<usize>) -> Result<(), Failure> {
        self.run.verify(read, &self.model.bytes[range.clone()], range.start)
    }

    /// Adds the counters of a region to those of the run.
    pub(super) fn add(&self, metrics: &pagestitch::Metrics) {
        Tally::count(&self.run.tally.faults, metrics.faults);
        Tally::count(&self.run.tally.pages, metrics.pages_installed());
    }
}

/// The counters of the run, for rounds without a [`Model`].
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) tally: &'a Arc<Tally>,
    pub(super) heartbeat: &'a AtomicU64,
}

impl Run<'_> {
    /// Tells the watching thread that this thread makes progress.
    pub(super) fn beat(&self) {
        self.heartbeat.fetch_add(1, Ordering::Relaxed);
    }

    /// Compares bytes that were read at an offset.
    pub(super) fn verify(&self, read: &[u8], expected: &[u8], offset: usize) -> Result<(), Failure> {
        if let Some(at) = difference(read, expected) {
            let (read, expected) = (read[at], expected[at]);
            return Err(format!("byte {} is {read:#x}, expected {expected:#x}", offset + at));
        }
        Tally::count(&self.tally.bytes_verified, read.len() as u64);
        Ok(())
    }
}

/// The index of the first byte that differs.
pub(super) fn difference(one: &[u8], other: &[u8]) -> Option<usize> {
    // At once, because a build without optimization compares single bytes slowly.
    if one == other {
        return None;
    }
    let differs = one.iter().zip(other).position(|(one, other)| one != other);
    differs.or_else(|| Some(one.len().min(other.len())))
}

/// Waits for threads. Returns the first failure of one.
pub(super) fn join_all(threads: Vec<ScopedJoinHandle<'_, Result<(), Failure>>>) -> Result<(), Failure> {
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| String::from("a thread panicked"))?)
}
