//! What a region costs to build, by the chunk.

use crate::{Environment, median, timed};
use pagestitch::source::Memory;
use pagestitch::{Chunk, Pool, Region};
use std::fmt;
use std::fs;

/// What was measured, for each number of chunks.
#[derive(Debug)]
pub struct Report {
    environment: Environment,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    chunks: u64,
    shared_ns: f64,
    own_ns: f64,
    bytes: f64,
}

/// Builds regions of 1,000, 10,000 ... `most` chunks: parts of one memory, and heap buffers of their own.
///
/// # Panics
///
/// Where this process has no userfaultfd.
#[must_use]
pub fn run(most: u64, rounds: usize) -> Report {
    let pool = Pool::builder().workers(1).start().expect("a pool");
    let shared = Memory::from(vec![1u8; 1 << 20]);
    let sizes =
        std::iter::successors(Some(1000), |chunks| Some(chunks * 10)).take_while(|&chunks| chunks <= most);
    let rows = sizes.map(|chunks| {
        let part =
            |i: u64| Chunk::from(shared.clone()).range(i * 7919 % 1_000_000..i * 7919 % 1_000_000 + 48);
        let rounds: Vec<_> = (0..rounds)
            .map(|_| {
                let before = resident();
                let (shared_ns, region) =
                    timed(|| Region::builder().chunks((0..chunks).map(part)).build(&pool).expect("a region"));
                let bytes = (resident() - before) as f64 / chunks as f64;
                drop(region);
                // The buffers are there before: only the region is measured.
                let own: Vec<Vec<u8>> = (0..chunks).map(|_| vec![1; 48]).collect();
                let (own_ns, region) =
                    timed(|| Region::builder().chunks(own).build(&pool).expect("a region"));
                drop(region);
                (shared_ns as f64 / chunks as f64, own_ns as f64 / chunks as f64, bytes)
            })
            .collect();
        let of = |pick: fn(&(f64, f64, f64)) -> f64| median(rounds.iter().map(pick).collect());
        // The most, as later rounds are built in what the allocator has kept of earlier ones.
        let bytes = rounds.iter().map(|round| round.2).fold(0.0, f64::max);
        Row { chunks, shared_ns: of(|r| r.0), own_ns: of(|r| r.1), bytes }
    });
    Report { rows: rows.collect(), environment: Environment::current() }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "building a region of chunks of 48 bytes: medians; bytes beside the sources\n{}",
            self.environment
        )?;
        writeln!(
            f,
            "  {:>10}  {:>22}  {:>22}  {:>12}",
            "chunks", "parts of one: ns each", "heap buffers: ns each", "bytes each"
        )?;
        self.rows.iter().try_for_each(|Row { chunks, shared_ns, own_ns, bytes }| {
            writeln!(f, "  {chunks:>10}  {shared_ns:>22.0}  {own_ns:>22.0}  {bytes:>12.1}")
        })
    }
}

/// Bytes of this process that are in memory.
fn resident() -> i64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok()).unwrap_or(0) * 4096
}
