//! Reading all of it once, from start to end: filling page by page, filling ahead, and copying it all first.

use crate::{Environment, median, timed, warm};
use pagestitch::source::Memory;
use pagestitch::{Chunk, Pool, Readahead, Region};
use std::fmt;
use std::hint::black_box;

/// What was measured.
#[derive(Debug)]
pub struct Report {
    environment: Environment,
    bytes: usize,
    systems: Vec<(&'static str, Vec<f64>)>,
}

/// Sums `bytes` of memory in shuffled chunks of 64 KiB, building or copying included, as many `rounds` in turn.
///
/// # Panics
///
/// Where this process has no userfaultfd.
#[must_use]
pub fn run(bytes: usize, rounds: usize) -> Report {
    warm(2 * bytes);
    let mut chunks: Vec<Memory> =
        (0..bytes / CHUNK).map(|index| Memory::from(vec![index as u8; CHUNK])).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut chunks);
    let pool = Pool::new().expect("a pool");
    let region = |readahead| {
        let chunks = chunks.iter().map(|chunk| Chunk::from(chunk.clone()));
        let region = Region::builder().chunks(chunks).readahead(readahead).build(&pool).expect("a region");
        sum(region.as_slice())
    };
    let mut systems =
        vec![("eager copy", Vec::new()), ("readahead (default)", Vec::new()), ("no readahead", Vec::new())];
    for _ in 0..rounds {
        let times = [
            timed(|| eager(&chunks)),
            timed(|| region(Readahead::Adaptive)),
            timed(|| region(Readahead::None)),
        ];
        assert!(times.iter().all(|(_, sum)| *sum == times[0].1), "all have read the same bytes");
        for (system, (ns, _)) in systems.iter_mut().zip(times) {
            system.1.push(ns as f64);
        }
    }
    Report { environment: Environment::current(), bytes, systems }
}

fn eager(chunks: &[Memory]) -> u64 {
    use pagestitch::Source;
    let mut copy = vec![0; chunks.len() * CHUNK];
    for (chunk, into) in chunks.iter().zip(copy.chunks_mut(CHUNK)) {
        chunk.read_at(0, into).expect("memory");
    }
    sum(&copy)
}

fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.as_chunks::<8>().0.iter();
    black_box(words.map(|word| u64::from_le_bytes(*word)).fold(0, u64::wrapping_add))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.systems[0].1.len();
        writeln!(
            f,
            "reading {} MiB from start to end, building or copying included: medians of {rounds} rounds, interleaved",
            self.bytes >> 20
        )?;
        writeln!(f, "{}", self.environment)?;
        writeln!(f, "  {:22} {:>8} {:>11}", "system", "GiB/s", "time/eager")?;
        let eager = median(self.systems[0].1.clone());
        self.systems.iter().try_for_each(|(name, times)| {
            let ns = median(times.clone());
            let rate = self.bytes as f64 / f64::from(1 << 30) / (ns / 1e9);
            writeln!(f, "  {name:22} {rate:>8.2} {:>11.2}", ns / eager)
        })
    }
}

const CHUNK: usize = 64 << 10;
