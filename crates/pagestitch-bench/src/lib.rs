//! What a fault costs, measured against the plain ways in the same run.
//!
//! Ratios are what to keep of a measurement: rounds of all systems are interleaved, on warmed memory, and the
//! medians of the rounds are compared. Absolute times belong to one machine at one moment.

pub mod build;
pub mod in_place;
pub mod latency;
mod manual_page;
pub mod scan;
pub mod touch;

use std::fmt;
use std::fs;
use std::time::Instant;

/// What a measurement was made on, for the head of a report.
#[derive(Debug, Clone)]
pub struct Environment {
    kernel: String,
    cpus: usize,
    huge_pages: String,
    load: String,
}

impl Environment {
    /// Of this machine, now.
    #[must_use]
    pub fn current() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        Self {
            kernel: pagestitch::Support::current().kernel().to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
            load: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
        }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, cpus, huge_pages, load } = self;
        let page = pagestitch::Support::current().page_size();
        write!(f, "Linux {kernel}, {cpus} CPUs, pages of {page}, huge pages {huge_pages}, load {load}")
    }
}

/// Touches as much memory as will be measured, and gives it back: a virtual machine's first use of a page of its
/// host is many times dearer than any later one.
pub fn warm(bytes: usize) {
    let mut memory = vec![0u8; bytes];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

/// The time that `work` takes, in nanoseconds, and what it returns.
pub fn timed<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let started = Instant::now();
    let result = work();
    (u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX), result)
}

/// The middle one of some figures.
///
/// # Panics
///
/// If there are none.
#[must_use]
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
