//! First touches, each of them timed.

use hdrhistogram::Histogram;
use std::borrow::Borrow;
use std::hint::black_box;
use std::time::Instant;

/// Reads the byte at each offset, in order, and records the duration of each read in nanoseconds.
///
/// # Panics
///
/// If an offset is outside `bytes`.
#[must_use]
pub fn first_touches(bytes: &[u8], offsets: impl IntoIterator<Item: Borrow<usize>>) -> Histogram<u64> {
    touches(offsets, |offset| *black_box(&bytes[offset]))
}

/// Calls `touch` with each offset, in order, and records the duration of each call in nanoseconds.
#[must_use]
pub fn touches(
    offsets: impl IntoIterator<Item: Borrow<usize>>,
    touch: impl Fn(usize) -> u8,
) -> Histogram<u64> {
    let mut latencies = histogram();
    for offset in offsets {
        let started = Instant::now();
        black_box(touch(*offset.borrow()));
        latencies.saturating_record(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    latencies
}

/// An empty histogram of nanoseconds, up to a minute, with three digits.
#[must_use]
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that hdrhistogram takes")
}

/// One offset in each page of `len` bytes, in an order that depends on the seed alone.
#[must_use]
pub fn shuffled_pages(len: usize, seed: u64) -> Vec<usize> {
    let mut offsets: Vec<usize> = (0..len).step_by(PAGE).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut offsets);
    offsets
}

const PAGE: usize = 4096;
