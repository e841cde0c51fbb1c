//! One system at one point of a workload, the options of a run, and the sample that it yields.

use crate::measure::{processor_time, timed};
use crate::threads::Threads;
use hdrhistogram::Histogram;
use std::time::Duration;

/// The options of a measurement.
#[derive(Debug, Clone)]
pub struct Options {
    /// The number of rounds. In each round every case runs once.
    pub rounds: usize,
    /// Decides the order of chunks and of touches.
    pub seed: u64,
    /// Small, for a smoke run. The figures mean little.
    pub quick: bool,
    /// The numbers of threads, for the workloads that take them; none for those of each workload.
    pub threads: Option<Threads>,
    /// The shards of the regions on pools in the workload `scaling`; none for those of the builder.
    pub shards: Option<usize>,
    /// Ends a workload before a round that would end later than this after its start. The first
    /// round is always complete.
    pub time_limit: Option<Duration>,
    /// Chooses cases by their system and point.
    pub keep: fn(system: &str, point: &str) -> bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rounds: 5,
            seed: 1,
            quick: false,
            threads: None,
            shards: None,
            time_limit: None,
            keep: |_, _| true,
        }
    }
}

impl Options {
    /// A size, or a sixteenth of it in a smoke run.
    pub(crate) const fn size(&self, full: usize) -> usize {
        if self.quick { full / 16 } else { full }
    }

    /// The numbers of threads that the caller has asked for, or these.
    pub(crate) fn threads_or(&self, usual: &[usize]) -> Vec<usize> {
        self.threads.as_ref().map_or(usual, Threads::counts).to_vec()
    }

    /// As [`threads_or`](Self::threads_or), each with the name of its point: none if the caller has
    /// not asked.
    pub(crate) fn thread_points(&self, usual: usize) -> Vec<(usize, String)> {
        let name = |threads: usize| self.threads.as_ref().map_or_else(String::new, |_| threads.to_string());
        self.threads_or(&[usual]).into_iter().map(|threads| (threads, name(threads))).collect()
    }
}

/// One system at one point of a workload.
pub(crate) struct Case {
    pub(crate) system: &'static str,
    pub(crate) point: String,
    pub(crate) threads: usize,
    pub(crate) chunk_size: usize,
    /// The system and point of each baseline. The first one is the main baseline.
    pub(crate) baselines: Vec<(&'static str, String)>,
    /// Runs the case once, with a seed of its own for each round.
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

    /// Sets other systems at the same point as baselines. Set the point first.
    pub(crate) fn against(mut self, systems: &[&'static str]) -> Self {
        self.baselines = systems.iter().map(|&system| (system, self.point.clone())).collect();
        self
    }

    /// Sets the same system at another point as the baseline.
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

/// The result of one run of a case.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    pub(crate) time: Duration,
    pub(crate) processor: Duration,
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
    pub(crate) latencies: Option<Histogram<u64>>,
    pub(crate) bytes_each: Option<f64>,
    pub(crate) descriptors: Option<u64>,
    /// The share of the touches that read their source.
    pub(crate) reads: Option<f64>,
    /// The share of the touches that bring a page back from the standby list.
    pub(crate) soft_faults: Option<f64>,
    /// The share of the touches that wait for no read, divided by that of a policy with perfect reference bits.
    pub(crate) of_perfect_bits: Option<f64>,
    /// The most bytes of memory that the process had, seen from outside.
    pub(crate) resident_bytes: Option<u64>,
    /// The bytes that they may be.
    pub(crate) resident_limit: Option<u64>,
}

impl Sample {
    /// Measures `work`, which handles so many pages and bytes.
    pub(crate) fn of<T>(pages: usize, bytes: usize, work: impl FnOnce() -> T) -> Self {
        let before = processor_time();
        let (ns, result) = timed(work);
        let processor = processor_time() - before;
        drop(result);
        let (pages, bytes, time) = (pages as u64, bytes as u64, Duration::from_nanos(ns));
        Self { time, processor, pages, bytes, ..Self::default() }
    }

    /// Measures `work`, which times each touch.
    pub(crate) fn of_touches(bytes: usize, work: impl FnOnce() -> Histogram<u64>) -> Self {
        let mut latencies = None;
        let sample = Self::of(0, bytes, || latencies = Some(work()));
        let pages = latencies.as_ref().map_or(0, Histogram::len);
        Self { pages, latencies, ..sample }
    }
}
