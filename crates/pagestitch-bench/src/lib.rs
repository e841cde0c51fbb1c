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

mod affinity;
mod case;
pub mod environment;
mod format;
pub mod guest;
mod manual_page;
mod measure;
pub mod report;
pub mod row;
pub mod runner;
mod systems;
pub mod touch;
pub mod workloads;

pub use measure::{median, timed, warm};

/// Measures a workload and prints its table: what `cargo bench` runs. `--quick` among the arguments makes it a smoke run.
///
/// # Panics
///
/// If there is no such workload, or no userfaultfd.
pub fn print(workload: &str) {
    guest::run_as_guest_if_requested();
    let quick = std::env::args().any(|argument| argument == "--quick");
    let options = runner::Options { quick, ..runner::Options::default() };
    let workload = workloads::ALL.iter().find(|known| known.name == workload).expect("a workload's name");
    println!("{}", environment::Environment::current());
    let measured = runner::run(workload, &options, &mut runner::Silent);
    print!("{}", report::table::table(workload, &measured));
}
