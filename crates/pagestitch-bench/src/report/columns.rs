//! The columns of the tables: all except the ratios.

use crate::format::{count, digits, seconds};
use crate::row::Row;

/// A column of a table.
pub(super) struct Column {
    pub(super) head: &'static str,
    /// The meaning of its cells.
    pub(super) about: &'static str,
    /// The cell of a row, if the row has one.
    pub(super) cell: fn(&Row) -> Option<String>,
    pub(super) kind: Kind,
}

/// The alignment and the importance of a column.
pub(super) enum Kind {
    /// Begins at the left.
    Name,
    /// Ends at the right.
    Number,
    /// A number that a narrow page omits.
    Detail,
}

/// The columns that have a cell in some row.
pub(super) fn used(rows: &[&Row]) -> Vec<&'static Column> {
    COLUMNS.iter().filter(|column| rows.iter().any(|row| (column.cell)(row).is_some())).collect()
}

/// The explanation of the mark of rows with more threads than CPUs, if there is such a row.
pub(super) fn about_mark(rows: &[&Row]) -> Option<String> {
    let marked = rows.iter().find(|row| row.has_more_threads_than_cpus())?;
    let cpus = count(marked.cpus, "CPU");
    Some(format!("{}: more threads than the {cpus}, which they share", SHARED.trim_start()))
}

/// The mark of rows with more threads than CPUs.
const SHARED: &str = " *";

/// All columns.
pub(super) static COLUMNS: [Column; 16] = [
    Column {
        head: "system",
        about: "the way to get the bytes",
        cell: |row| Some(row.system.clone()),
        kind: Kind::Name,
    },
    Column {
        head: "at",
        about: "the point of the workload",
        cell: |row| {
            let mark = if row.has_more_threads_than_cpus() { SHARED } else { "" };
            Some(format!("{}{mark}", row.point).trim_start().to_owned()).filter(|cell| !cell.is_empty())
        },
        kind: Kind::Name,
    },
    number("time", "the time of a round: the median of all rounds", |row| {
        row.p50_ns.is_none().then(|| seconds(row.seconds))
    }),
    Column {
        kind: Kind::Detail,
        ..number("of the rounds", "the fastest and the slowest round", |row| {
            row.p50_ns
                .is_none()
                .then(|| format!("{}..{}", seconds(row.seconds_min), seconds(row.seconds_max)))
        })
    },
    number("each", "the time divided by the pages that are touched, or the chunks that are built", |row| {
        row.p50_ns.is_none().then(|| seconds(row.seconds / row.pages.max(1) as f64))
    }),
    number("bytes each", "the memory for each chunk", |row| {
        row.bytes_each.map(|bytes| format!("{bytes:.1}"))
    }),
    number("descriptors", "the descriptors that the process has open", |row| {
        row.descriptors.map(|descriptors| descriptors.to_string())
    }),
    number("reads", "the share of the touches that read their source", |row| percent(row.reads)),
    number("soft", "the share of the touches that bring a page back from the standby list", |row| {
        percent(row.soft_faults)
    }),
    number(
        "of bits",
        "the share of the touches that wait for no read, divided by that of S3-FIFO with perfect reference bits, simulated on the same touches",
        |row| row.of_perfect_bits.map(digits),
    ),
    number(
        "resident",
        "the most memory of the process, seen from outside every 10 ms, of what it may be: the budget, and 2 MiB for each thread",
        |row| {
            let mib = |bytes: u64| bytes >> 20;
            Some(format!("{} of {} MiB", mib(row.resident_bytes?), mib(row.resident_limit?)))
        },
    ),
    number("p50", "the median latency of a touch: the median of the rounds", |row| nanoseconds(row.p50_ns)),
    number("p90", "the latency that 90 % of the touches do not exceed", |row| nanoseconds(row.p90_ns)),
    number("p99", "the latency that 99 % of the touches do not exceed", |row| nanoseconds(row.p99_ns)),
    number("p99.9", "the latency that 99.9 % of the touches do not exceed", |row| nanoseconds(row.p999_ns)),
    number("CPU each", "the processor time of all threads for each page, or chunk", |row| {
        Some(seconds(row.cpu_ns_per_fault / 1e9))
    }),
];

const fn number(head: &'static str, about: &'static str, cell: fn(&Row) -> Option<String>) -> Column {
    Column { head, about, cell, kind: Kind::Number }
}

fn percent(share: Option<f64>) -> Option<String> {
    share.map(|share| format!("{:.1} %", share * 100.0))
}

fn nanoseconds(ns: Option<u64>) -> Option<String> {
    ns.map(|ns| seconds(ns as f64 / 1e9))
}
