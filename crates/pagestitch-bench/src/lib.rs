//! The cost of a fault, measured beside plain ways to get the same bytes, in the same run. No
//! module uses an earlier one of this table:
//!
//! | module | content |
//! |---|---|
//! | [`many_cores`] | the table of figures by the number of threads, and of ratios with targets |
//! | [`report`] | tables, a comparison with an earlier run, a page with curves |
//! | [`runner`] | runs the cases of a workload in turn, round by round, and sums up |
//! | [`workloads`] | the workloads: each is a list of cases with their baselines |
//! | [`guest`] | the other process of the workload `restore` |
//! | `ooc` | a reader of a file larger than its memory, in a cgroup of its own |
//! | `prototypes` | the least that a program can do to fill pages: a limit of each way to serve |
//! | `hot` | bytes in the processor's caches, and touches of memory that repeats them |
//! | `systems`, `manual_page` | the systems that workloads compare, and their data |
//! | [`simulated`] | a replacement policy with perfect reference bits |
//! | `team` | work of several threads at once |
//! | `case` | one system at one point, and the sample of one run |
//! | [`row`] | a result: one line of a table, one JSON object |
//! | [`touch`] | first touches, each of them timed |
//! | [`environment`] | the machine of a measurement |
//! | [`threads`] | the numbers of threads of a measurement |
//! | `measure`, `format`, `bound`, `date`, `affinity` | clocks, formatted times, bounds of figures, the date, pinned threads |
//! | `child` | the program started again, as a process that a round measures |
//!
//! The ratios are the lasting result of a measurement. In each round every case runs once, right
//! after the others, on warmed memory. The ratio of a case is the median of its ratios to the
//! baseline *of the same round*. Absolute times hold for one machine at one moment.

mod affinity;
mod bound;
mod case;
mod child;
mod date;
pub mod environment;
mod format;
pub mod guest;
mod hot;
mod manual_page;
pub mod many_cores;
mod measure;
mod ooc;
mod prototypes;
pub mod report;
pub mod row;
pub mod runner;
pub mod simulated;
mod systems;
mod team;
pub mod threads;
pub mod touch;
pub mod workloads;
pub mod zipf;

pub use measure::{median, timed, warm};

/// Measures a workload and prints its table, as `cargo bench` does. The argument `--quick` makes it
/// a smoke run.
///
/// # Panics
///
/// If no workload has this name, or the kernel gives no userfaultfd.
pub fn print(workload: &str) {
    guest::run_as_guest_if_requested();
    let quick = std::env::args().any(|argument| argument == "--quick");
    let usual = runner::Options::default();
    let options = runner::Options { quick, rounds: if quick { 2 } else { usual.rounds }, ..usual };
    let workload = workloads::ALL.iter().find(|known| known.name == workload).expect("a workload's name");
    println!("{}", environment::Environment::current());
    let measured = runner::run(workload, &options, &mut runner::Silent);
    print!("{}", report::table::table(workload, &measured));
}
