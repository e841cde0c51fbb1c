//! The latency of a first touch: one thread, random pages, no readahead.

use crate::manual_page::ManualPage;
use crate::touch::{first_touches, histogram, shuffled_pages};
use crate::{Environment, median, warm};
use hdrhistogram::Histogram;
use pagestitch::{Chunk, Pool, PoolBuilder, Readahead, Region};
use pagestitch_kernel::{Access, PageSize, Reservation};
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes in the region.
    pub bytes: usize,
    /// Bytes in a chunk, each a heap buffer of its own: a multiple of the page size.
    pub chunk: usize,
    /// Rounds; in each, every system runs once, after each other.
    pub rounds: usize,
    /// Decides the order of the chunks and of the touches.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { bytes: 64 << 20, chunk: 64 << 10, rounds: 7, seed: 1 }
    }
}

impl Config {
    /// Small enough for a smoke test.
    #[must_use]
    pub fn quick() -> Self {
        Self { bytes: 4 << 20, rounds: 3, ..Self::default() }
    }
}

/// What was measured.
#[derive(Debug)]
pub struct Report {
    config: Config,
    environment: Environment,
    systems: Vec<System>,
}

#[derive(Debug)]
struct System {
    name: &'static str,
    all: Histogram<u64>,
    medians: Vec<f64>,
}

/// Measures every system, interleaved.
///
/// # Panics
///
/// Where this process has no userfaultfd.
#[must_use]
pub fn run(config: Config) -> Report {
    warm(3 * config.bytes);
    let chunks = shuffled_chunks(&config);
    type Measure = fn(&[Arc<[u8]>], &[usize]) -> Histogram<u64>;
    let measures: [(&'static str, Measure); 4] = [
        ("pagestitch, pool of 1", |chunks, touches| pagestitch(Pool::builder().workers(1), chunks, touches)),
        ("pagestitch, defaults", |chunks, touches| pagestitch(Pool::builder(), chunks, touches)),
        ("manual-page", |chunks, touches| first_touches(ManualPage::new(chunks.to_vec()).bytes(), touches)),
        ("kernel zero page", |chunks, touches| zero_pages(chunks.len() * chunks[0].len(), touches)),
    ];
    let mut systems: Vec<_> =
        measures.iter().map(|&(name, _)| System { name, all: histogram(), medians: Vec::new() }).collect();
    for round in 0..config.rounds {
        let touches = shuffled_pages(config.bytes, config.seed + round as u64);
        for (system, (_, measure)) in systems.iter_mut().zip(&measures) {
            let latencies = measure(&chunks, &touches);
            system.medians.push(latencies.value_at_quantile(0.5) as f64);
            system.all += latencies;
        }
    }
    Report { config, environment: Environment::current(), systems }
}

fn pagestitch(pool: PoolBuilder, chunks: &[Arc<[u8]>], touches: &[usize]) -> Histogram<u64> {
    let pool = pool.start().expect("a pool");
    let chunks = chunks.iter().map(|chunk| Chunk::from(Arc::clone(chunk)));
    let region = Region::builder().chunks(chunks).readahead(Readahead::None).build(&pool).expect("a region");
    first_touches(region.as_slice(), touches)
}

/// What the kernel takes for a page of its own: addresses of ours that nobody serves.
fn zero_pages(bytes: usize, touches: &[usize]) -> Histogram<u64> {
    let page = PageSize::system();
    let pages = NonZeroUsize::new(bytes / page.bytes()).expect("some pages");
    let (_reservation, view) = Reservation::new(pages, page, Access::ReadOnly).expect("addresses");
    let view = view.into_stable().expect("nothing is shown in it");
    first_touches(view.as_slice(), touches)
}

fn shuffled_chunks(config: &Config) -> Vec<Arc<[u8]>> {
    let mut chunks: Vec<Arc<[u8]>> =
        (0..config.bytes / config.chunk).map(|index| vec![index as u8 | 1; config.chunk].into()).collect();
    fastrand::Rng::with_seed(config.seed).shuffle(&mut chunks);
    chunks
}

impl Report {
    /// The median over the rounds of a system's p50, in nanoseconds.
    fn p50(system: &System) -> f64 {
        median(system.medians.clone())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config { bytes, chunk, rounds, seed } = self.config;
        writeln!(
            f,
            "latency of a random first touch of 4 KiB, in ns: {} MiB in chunks of {} KiB, {rounds} rounds interleaved, seed {seed}",
            bytes >> 20,
            chunk >> 10
        )?;
        writeln!(f, "{}", self.environment)?;
        let baseline = self.systems.iter().find(|system| system.name == BASELINE).map_or(f64::NAN, Self::p50);
        writeln!(
            f,
            "  {:22} {:>8} {:>17} {:>8} {:>8} {:>8} {:>10}  p50/{BASELINE}",
            "system", "p50", "of the rounds", "p90", "p99", "p99.9", "max"
        )?;
        for system in &self.systems {
            let (low, high) = system.medians.iter().fold((f64::MAX, 0f64), |(l, h), &m| (l.min(m), h.max(m)));
            let at = |quantile| system.all.value_at_quantile(quantile);
            writeln!(
                f,
                "  {:22} {:>8} {:>17} {:>8} {:>8} {:>8} {:>10}  {:.2}",
                system.name,
                Self::p50(system),
                format!("{low}..{high}"),
                at(0.9),
                at(0.99),
                at(0.999),
                system.all.max(),
                Self::p50(system) / baseline,
            )?;
        }
        Ok(())
    }
}

const BASELINE: &str = "manual-page";
