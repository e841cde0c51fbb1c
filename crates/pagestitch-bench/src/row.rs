//! A result: one system at one point of a workload, over all rounds.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// One line of a table, one JSON object. Times are medians of the rounds; latencies cover all
/// rounds together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// The name of the workload.
    pub workload: String,
    /// The name of the measured system.
    pub system: String,
    /// The point of the workload, such as `1 % random`; empty if the workload has one point.
    pub point: String,
    /// The bytes of a page.
    pub page_size: usize,
    /// The bytes of a chunk; 0 if there are none.
    pub chunk_size: usize,
    /// The number of threads that touch.
    pub threads: usize,
    /// The number of CPUs that the process may use; 0 if unknown.
    pub cpus: usize,
    /// The bytes that a run handles.
    pub bytes: u64,
    /// The pages, or chunks, that a run touches or builds.
    pub pages: u64,
    /// The number of rounds.
    pub rounds: usize,
    /// The seconds of a round: the median.
    pub seconds: f64,
    /// The seconds of the fastest round.
    pub seconds_min: f64,
    /// The seconds of the slowest round.
    pub seconds_max: f64,
    /// Pages, or chunks, per second.
    pub faults_per_s: f64,
    /// GiB per second.
    pub gib_per_s: f64,
    /// The processor time of all threads for each page, in nanoseconds.
    pub cpu_ns_per_fault: f64,
    /// The latency of a touch in nanoseconds: the median of the medians of the rounds. None unless
    /// each touch was timed.
    pub p50_ns: Option<u64>,
    /// The 90th percentile of the latency.
    pub p90_ns: Option<u64>,
    /// The 99th percentile.
    pub p99_ns: Option<u64>,
    /// The 99.9th percentile.
    pub p999_ns: Option<u64>,
    /// The maximum.
    pub max_ns: Option<u64>,
    /// The bytes of memory for each chunk, if measured.
    pub bytes_each: Option<f64>,
    /// The descriptors that the process has open, if counted.
    pub descriptors: Option<u64>,
    /// The share of the touches that read their source, if counted: the median of the rounds.
    pub reads: Option<f64>,
    /// The share of the touches that bring a page back from the standby list, if counted.
    pub soft_faults: Option<f64>,
    /// The share of the touches that wait for no read, divided by that of S3-FIFO with perfect reference bits,
    /// simulated on the same touches and in as much memory.
    pub of_perfect_bits: Option<f64>,
    /// The most bytes of anonymous memory that the process had, if another process has looked every 10 ms.
    pub resident_bytes: Option<u64>,
    /// The bytes that they may be: the budget, and a block for each worker and each thread that touches.
    pub resident_limit: Option<u64>,
    /// The baseline of `ratio`: a system, with its point if that is another one.
    pub baseline: Option<String>,
    /// The time of this system (p50 if there is one) divided by the time of the baseline. Below 1
    /// is faster.
    pub ratio: Option<f64>,
    /// The ratio of each round to the baseline of `ratio`.
    pub round_ratios: Vec<f64>,
    /// The ratios to all baselines.
    pub ratios: Vec<(String, f64)>,
    /// The ratios of the processor time of a page to that of all baselines, if both were measured.
    pub cpu_ratios: Vec<(String, f64)>,
}

impl Row {
    /// The key of the row, unique in a run.
    #[must_use]
    pub fn key(&self) -> (&str, &str, &str) {
        (&self.workload, &self.point, &self.system)
    }

    /// The ratio of its time to that of a baseline: the median of the ratios of the rounds.
    pub(crate) fn time_ratio(&self, baseline: &str) -> Option<f64> {
        self.ratios.iter().find(|(name, _)| name == baseline).map(|(_, ratio)| *ratio)
    }

    /// True if some of the threads that touch share a CPU.
    #[must_use]
    pub const fn has_more_threads_than_cpus(&self) -> bool {
        self.cpus > 0 && self.threads > self.cpus
    }
}

/// A row with all its latencies for a curve.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The row.
    pub row: Row,
    /// The latencies in nanoseconds.
    pub latencies: Option<Histogram<u64>>,
}
