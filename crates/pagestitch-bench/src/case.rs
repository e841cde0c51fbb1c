//! One system at one point of a workload, the options of a run, and the sample that it yields.

use crate::measure::{processor_time, timed};
use hdrhistogram::Histogram;
use std::time::Duration;

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// In each, every case runs once.
    pub rounds: usize,
    /// Decides every order: of chunks, of touches.
    pub seed: u64,
    /// Small enough for a smoke run; the figures are worth little.
    pub quick: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { rounds: 5, seed: 1, quick: false }
    }
}

impl Options {
    /// A size, or a much smaller one for a smoke run.
    pub(crate) const fn size(&self, full: usize) -> usize {
        if self.quick { full / 16 } else { full }
    }
}

/// One system at one point of a workload.
pub(crate) struct Case {
    pub(crate) system: &'static str,
    pub(crate) point: String,
    pub(crate) threads: usize,
    pub(crate) chunk_size: usize,
    /// System and point of what it is compared with; the first is the one that matters.
    pub(crate) baselines: Vec<(&'static str, String)>,
    /// Runs it once; the number is another one for each round.
    pub(crate) run: Box<dyn FnMut(u64) -> Sample>,
}

impl Case {
    pub(crate) fn new(system: &'static str, run: impl FnMut(u64) -> Sample + 'static) -> Self {
        let (point, baselines) = (String::new(), Vec::new());
        Self { system, point, threads: 1, chunk_size: 0, baselines, run: Box::new(run) }
    }

    pub(crate) fn at(self, point: impl Into<String>) -> Self {
        Self { point: point.into(), ..self }
    }

    /// To be compared with other systems at the same point, which has been set.
    pub(crate) fn against(mut self, systems: &[&'static str]) -> Self {
        self.baselines = systems.iter().map(|&system| (system, self.point.clone())).collect();
        self
    }

    /// To be compared with the same system at another point.
    pub(crate) fn against_point(mut self, point: impl Into<String>) -> Self {
        self.baselines = vec![(self.system, point.into())];
        self
    }

    pub(crate) fn chunks_of(self, chunk_size: usize) -> Self {
        Self { chunk_size, ..self }
    }

    pub(crate) fn by(self, threads: usize) -> Self {
        Self { threads, ..self }
    }
}

/// What one run of a case came to.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    pub(crate) time: Duration,
    pub(crate) processor: Duration,
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
    pub(crate) latencies: Option<Histogram<u64>>,
    pub(crate) bytes_each: Option<f64>,
}

impl Sample {
    /// Times `work`, which is about so many pages and bytes.
    pub(crate) fn of<T>(pages: usize, bytes: usize, work: impl FnOnce() -> T) -> Self {
        let before = processor_time();
        let (ns, result) = timed(work);
        let processor = processor_time() - before;
        drop(result);
        let (pages, bytes, time) = (pages as u64, bytes as u64, Duration::from_nanos(ns));
        Self { time, processor, pages, bytes, ..Self::default() }
    }

    /// Times touches one by one, by `work`.
    pub(crate) fn of_touches(bytes: usize, work: impl FnOnce() -> Histogram<u64>) -> Self {
        let mut latencies = None;
        let sample = Self::of(0, bytes, || latencies = Some(work()));
        let pages = latencies.as_ref().map_or(0, Histogram::len);
        Self { pages, latencies, ..sample }
    }
}
