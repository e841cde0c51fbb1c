//! Clocks, the median, and memory that the host has warmed.

use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Touches as many bytes as a measurement needs, and frees them. In a virtual machine the first use of
/// a page of the host costs many times as much as each later use.
pub fn warm(bytes: usize) {
    let mut memory = vec![0u8; bytes];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

/// Runs `work`; returns its duration in nanoseconds, and its result.
pub fn timed<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let started = Instant::now();
    let result = work();
    (u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX), result)
}

/// The processor time that all threads of this process have used.
pub(crate) fn processor_time() -> Duration {
    // Every process has this clock.
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// The median of the figures.
///
/// # Panics
///
/// If there are no figures.
#[must_use]
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
