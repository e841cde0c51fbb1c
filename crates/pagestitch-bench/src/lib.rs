//! What a fault costs, measured against the plain ways in the same run.
//!
//! | module | what it is |
//! |---|---|
//! | [`workloads`] | what is measured: a list of cases for each, with their baselines |
//! | [`runner`] | runs the cases of a workload in turn, round by round, and sums up |
//! | [`row`] | a result: one line of a table, one JSON object |
//! | [`report`] | tables, a comparison with an earlier run, a page with curves |
//! | [`touch`] | first touches, timed one by one |
//! | [`guest`] | the other process, where there is one |
//!
//! Ratios are what to keep of a measurement: in each round every case runs once, right after the others, on memory that was
//! warmed, and the ratio of a case is the median of its ratios to the baseline *of the same round*. Absolute times belong
//! to one machine at one moment.

pub mod environment;
pub mod guest;
mod manual_page;
pub mod report;
pub mod row;
pub mod runner;
mod systems;
pub mod touch;
pub mod workloads;

use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Measures a workload and prints its table: what `cargo bench` runs. `--quick` among the arguments makes it a smoke run.
///
/// # Panics
///
/// If there is no such workload, or no userfaultfd.
pub fn print(workload: &str) {
    guest::play_if_asked();
    let quick = std::env::args().any(|argument| argument == "--quick");
    let options = runner::Options { quick, ..runner::Options::default() };
    let workload = workloads::ALL.iter().find(|known| known.name == workload).expect("a workload's name");
    println!("{}", environment::Environment::current());
    let measured = runner::run(workload, &options, &mut runner::Silent);
    print!("{}", report::table::table(workload, &measured));
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

/// The processor time of this process so far, all threads together.
fn processor_time() -> Duration {
    // A clock that every process has.
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default()
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
