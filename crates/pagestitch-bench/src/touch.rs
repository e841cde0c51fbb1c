//! First touches, timed one by one.

use hdrhistogram::Histogram;
use std::borrow::Borrow;
use std::hint::black_box;
use std::time::Instant;

/// Reads the byte at each offset, in order, and records how long each read took, in nanoseconds.
///
/// # Panics
///
/// If an offset is outside.
#[must_use]
pub fn first_touches(bytes: &[u8], offsets: impl IntoIterator<Item: Borrow<usize>>) -> Histogram<u64> {
    touches(offsets, |offset| *black_box(&bytes[offset]))
}

/// The same, with a touch of one's own.
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

/// An empty histogram of nanoseconds, up to a minute, to three digits.
#[must_use]
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that hdrhistogram takes")
}

/// One offset in each page of `len` bytes, in an order that only `seed` decides.
#[must_use]
pub fn shuffled_pages(len: usize, seed: u64) -> Vec<usize> {
    let mut offsets: Vec<usize> = (0..len).step_by(PAGE).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut offsets);
    offsets
}

const PAGE: usize = 4096;
