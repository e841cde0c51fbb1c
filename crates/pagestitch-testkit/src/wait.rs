//! Waiting for a condition without a busy CPU.

use std::thread;
use std::time::{Duration, Instant};

/// Waits until `done` returns true. Sleeps between its calls, because on a machine with few CPUs a spinning
/// test delays the very threads that it waits for.
///
/// Use this only if no event tells of the condition.
///
/// # Panics
///
/// If the condition `what` does not hold within a minute.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let (started, mut pause) = (Instant::now(), SHORTEST);
    while !done() {
        assert!(started.elapsed() < TIME_LIMIT, "not within {TIME_LIMIT:?}: {what}");
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST);
    }
}

/// The first pause: about as long as a fault takes.
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(2);
const TIME_LIMIT: Duration = Duration::from_secs(60);
