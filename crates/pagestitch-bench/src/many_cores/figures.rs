//! Throughput and processor time by the number of threads.

use super::rows::Rows;
use crate::format::{count, digits};
use crate::row::Row;
use crate::workloads::scaling::{
    BARE, DEFAULTS, EAGER, EAGER_HUGE, INLINE, OWN_CPUS, RANDOM, SEQUENTIAL, ZERO,
};

/// A row of the table: the system, the pattern and the figure.
struct Line(&'static str, &'static str, &'static str, fn(&Row) -> f64);

/// The figures, in Markdown: a column for each number of threads.
pub(super) fn table(rows: &Rows<'_>) -> String {
    let threads = rows.threads();
    let cpus = rows.cpus();
    let head = threads.iter().enumerate().map(|(column, &number)| {
        let mark = if number > cpus { " *" } else { "" };
        if column == 0 { count(number, "thread") + mark } else { format!("{number}{mark}") }
    });
    let mut text = format!("| {} | {} |\n", count(cpus, "CPU"), head.collect::<Vec<_>>().join(" | "));
    text += &format!("|---|{}\n", "---|".repeat(threads.len()));
    for Line(about, system, pattern, figure) in &LINES {
        let cells = threads.iter().map(|&threads| {
            rows.scaling(system, threads, pattern)
                .map_or_else(|| String::from("-"), |row| digits(figure(row)))
        });
        text += &format!("| {about} | {} |\n", cells.collect::<Vec<_>>().join(" | "));
    }
    if threads.iter().any(|&threads| threads > cpus) {
        text += "\n*: more threads than CPUs\n";
    }
    text
}

const MILLIONS: fn(&Row) -> f64 = |row| row.faults_per_s / 1e6;
const CPU: fn(&Row) -> f64 = |row| row.cpu_ns_per_fault / 1e3;
const GIB: fn(&Row) -> f64 = |row| row.gib_per_s;
const ITS_CPU: &str = "its processor time a page, us";

const LINES: [Line; 32] = [
    Line("random 4 KiB first touch, pool without readahead, million pages/s", BARE, RANDOM, MILLIONS),
    Line(ITS_CPU, BARE, RANDOM, CPU),
    Line(
        "prototype `pool`: a userfaultfd for each of as many parts as CPUs, a worker for each",
        "prototype pool",
        RANDOM,
        MILLIONS,
    ),
    Line(ITS_CPU, "prototype pool", RANDOM, CPU),
    Line("prototype `pool1`: one userfaultfd, as many workers as CPUs", "prototype pool1", RANDOM, MILLIONS),
    Line(ITS_CPU, "prototype pool1", RANDOM, CPU),
    Line(
        "pool without readahead, each thread in its own part, on the CPU of a worker",
        OWN_CPUS,
        RANDOM,
        MILLIONS,
    ),
    Line(ITS_CPU, OWN_CPUS, RANDOM, CPU),
    Line(
        "prototype `poollocal`: a userfaultfd and a worker for each thread, on its CPU, in its own part",
        "prototype poollocal",
        RANDOM,
        MILLIONS,
    ),
    Line(ITS_CPU, "prototype poollocal", RANDOM, CPU),
    Line("inline", INLINE, RANDOM, MILLIONS),
    Line(ITS_CPU, INLINE, RANDOM, CPU),
    Line("prototype `inline`: SIGBUS, one userfaultfd", "prototype inline", RANDOM, MILLIONS),
    Line(ITS_CPU, "prototype inline", RANDOM, CPU),
    Line(
        "prototype `inlinemasked`: the same, with all signals masked in the handler",
        "prototype inlinemasked",
        RANDOM,
        MILLIONS,
    ),
    Line(ITS_CPU, "prototype inlinemasked", RANDOM, CPU),
    Line(
        "prototype `inlinelocal`: a userfaultfd for each thread, in its own part",
        "prototype inlinelocal",
        RANDOM,
        MILLIONS,
    ),
    Line("pool with defaults", DEFAULTS, RANDOM, MILLIONS),
    Line(ITS_CPU, DEFAULTS, RANDOM, CPU),
    Line("eager copy of hot bytes by the threads", EAGER, RANDOM, MILLIONS),
    Line("the kernel's page of zeros, at a read", ZERO, RANDOM, MILLIONS),
    Line("prototype `zero`: the kernel's new page, at a write", "prototype zero", RANDOM, MILLIONS),
    Line(
        "prototype `copy`: bare COPY of 4 KiB pages by the threads, one userfaultfd",
        "prototype copy",
        RANDOM,
        MILLIONS,
    ),
    Line(
        "the same, a userfaultfd for each of as many parts as CPUs",
        "prototype copy, in parts",
        RANDOM,
        MILLIONS,
    ),
    Line("sequential sum, pool with defaults, GiB/s", DEFAULTS, SEQUENTIAL, GIB),
    Line(ITS_CPU, DEFAULTS, SEQUENTIAL, CPU),
    Line("eager copy by the threads into 2 MiB pages, then the sum", EAGER_HUGE, SEQUENTIAL, GIB),
    Line(ITS_CPU, EAGER_HUGE, SEQUENTIAL, CPU),
    Line("eager copy by the threads into 4 KiB pages, then the sum", EAGER, SEQUENTIAL, GIB),
    Line(ITS_CPU, EAGER, SEQUENTIAL, CPU),
    Line("the kernel's page of zeros, then the sum", ZERO, SEQUENTIAL, GIB),
    Line(ITS_CPU, ZERO, SEQUENTIAL, CPU),
];
