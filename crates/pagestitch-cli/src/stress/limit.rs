//! The budget of a round.

use super::context::Failure;
use super::tally::Tally;
use fastrand::Rng;
use pagestitch::{Budget, Error, ErrorKind, Replacement};
use std::thread;

/// A budget that is small enough to be used up, and large enough for the server of a round.
pub(super) fn random(rng: &mut Rng) -> Result<Budget, Error> {
    let threads = thread::available_parallelism().map_or(1, usize::from).max(5);
    let blocks = if rng.u8(..32) == 0 { 64 << 20 } else { 0 };
    let bytes = (4 << 20) + (threads as u64 + 1) * (1 << 19) + rng.u64(..1 << 20) + blocks;
    let replacement = if rng.bool() { Replacement::S3Fifo } else { Replacement::Fifo };
    Budget::bytes(bytes)?.with_replacement(replacement)
}

/// Checks the counts of a budget while regions use it.
pub(super) fn check(budget: &Budget) -> Result<(), Failure> {
    let metrics = budget.metrics();
    if metrics.overruns == 0 && metrics.resident_bytes > budget.limit() {
        return Err(format!(
            "{} bytes exceed the budget of {}: {metrics:?}",
            metrics.resident_bytes,
            budget.limit()
        ));
    }
    Ok(())
}

/// Checks the counts of a budget after its regions have ended: the frames of the standby list are left.
pub(super) fn check_end(budget: &Budget, tally: &Tally) -> Result<(), Failure> {
    let metrics = budget.metrics();
    Tally::count(&tally.evictions, metrics.evictions);
    Tally::count(&tally.soft_faults, metrics.soft_faults);
    Tally::count(&tally.overruns, metrics.overruns);
    if metrics.resident_bytes != metrics.standby_bytes || metrics.dirty_bytes > 0 {
        return Err(format!("a budget without regions counts pages: {metrics:?}"));
    }
    Ok(())
}

/// True for an error that tells that written pages cannot leave, and leave no room.
pub(super) fn is_full(error: &Error) -> bool {
    error.kind() == ErrorKind::LimitReached
}
