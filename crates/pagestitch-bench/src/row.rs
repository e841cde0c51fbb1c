//! A result: what one system did at one point of a workload, over all rounds.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// One line of a table, one JSON object. Times are medians of the rounds; latencies are of all rounds together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// The workload's name.
    pub workload: String,
    /// Whose figures these are.
    pub system: String,
    /// The point of the workload, as `1 % random`; empty where there is only one.
    pub point: String,
    /// Bytes in a page.
    pub page_size: usize,
    /// Bytes in a chunk; 0 where there are none.
    pub chunk_size: usize,
    /// Threads that touch.
    pub threads: usize,
    /// Bytes that the run was about.
    pub bytes: u64,
    /// Pages, or chunks, that were touched or built.
    pub pages: u64,
    /// How many rounds it ran.
    pub rounds: usize,
    /// Seconds for a round: the median.
    pub seconds: f64,
    /// The quickest round.
    pub seconds_min: f64,
    /// The slowest round.
    pub seconds_max: f64,
    /// Pages, or chunks, a second.
    pub faults_per_s: f64,
    /// GiB a second.
    pub gib_per_s: f64,
    /// Processor time for each page, of all threads together, in nanoseconds.
    pub cpu_ns_per_fault: f64,
    /// Latency of a touch in nanoseconds, where touches were timed one by one: the median of the rounds' medians.
    pub p50_ns: Option<u64>,
    /// 90 of 100 touches took no longer.
    pub p90_ns: Option<u64>,
    /// 99 of 100.
    pub p99_ns: Option<u64>,
    /// 999 of 1,000.
    pub p999_ns: Option<u64>,
    /// None took longer.
    pub max_ns: Option<u64>,
    /// Bytes of memory for each chunk, where that was measured.
    pub bytes_each: Option<f64>,
    /// What `ratio` is to: a system, and its point if it is another.
    pub baseline: Option<String>,
    /// This one's time (p50 where there is one) by the baseline's: below 1 is quicker.
    pub ratio: Option<f64>,
    /// The ratios to all baselines.
    pub ratios: Vec<(String, f64)>,
}

impl Row {
    /// What tells a row from all others of a run.
    #[must_use]
    pub fn key(&self) -> (&str, &str, &str) {
        (&self.workload, &self.point, &self.system)
    }
}

/// A row, and all of its latencies for a curve.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The row.
    pub row: Row,
    /// Nanoseconds.
    pub latencies: Option<Histogram<u64>>,
}
