//! The axes of the curves of workloads.

use crate::format::{round_count, round_seconds};
use crate::row::Row;

/// The axes of a curve. Its points have a number, and the name of a group may follow.
pub(crate) struct Curve {
    /// The group of points that has this curve; all of them, each in a chart, without a name.
    pub(crate) group: Option<&'static str>,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    pub(crate) value: fn(&Row) -> f64,
    /// Formats a value.
    pub(crate) label: fn(f64) -> String,
}

/// The processor time of a page, by the number of threads.
pub(super) const CPU_BY_THREADS: Curve = Curve {
    group: None,
    x: THREADS,
    y: "processor time of a page",
    value: |row| row.cpu_ns_per_fault / 1e9,
    label: round_seconds,
};

/// The curves of a workload at several numbers of threads, if it has none of its own.
pub(crate) static BY_THREADS: [Curve; 3] = [
    Curve {
        group: None,
        x: THREADS,
        y: "median latency",
        value: |row| row.p50_ns.unwrap_or(0) as f64 / 1e9,
        label: round_seconds,
    },
    Curve {
        group: None,
        x: THREADS,
        y: "pages per second",
        value: |row| row.faults_per_s,
        label: round_count,
    },
    CPU_BY_THREADS,
];

/// The quantity of an axis with numbers of threads.
pub(crate) const THREADS: &str = "threads";
