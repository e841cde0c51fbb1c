//! Ratios in one run, each with its target.

use super::rows::{Rows, cpu_ratio, time_ratio};
use crate::bound::Bound;
use crate::format::digits;
use crate::row::Row;
use crate::workloads::restore::{MAPPING, PLAIN};
use crate::workloads::scaling::{BARE, DEFAULTS, INLINE, OWN_CPUS, RANDOM, SEQUENTIAL};

/// A figure with its target.
struct Target {
    /// The number of CPUs of the machines for which it holds: 2 for less than [`MANY`].
    cpus: usize,
    about: &'static str,
    figure: fn(&Rows<'_>) -> Option<f64>,
    bound: Bound,
}

/// The targets, in Markdown.
pub(super) fn table(rows: &Rows<'_>) -> String {
    let mut text = format!("| CPUs | figure | {} CPUs | target | |\n|---|---|---|---|---|\n", rows.cpus());
    for Target { cpus, about, figure, bound } in &TARGETS {
        let figure = figure(rows);
        let verdict = match figure {
            _ if rows.cpus() < *cpus => "not measured: too few CPUs",
            _ if rows.cpus() >= MANY && *cpus < MANY => "a target of few CPUs",
            None => "not measured",
            Some(figure) if bound.holds(figure) => "met",
            Some(_) => "missed",
        };
        let figure = figure.map_or_else(|| String::from("-"), digits);
        let others = crowd(rows).map_or("many", |row| row.point.as_str());
        let about = about.replace(OTHERS, others);
        text += &format!("| {cpus} | {about} | {figure} | {bound} | {verdict} |\n");
    }
    text
}

/// The throughput of a system divided by that of another, at so many threads.
fn throughput(rows: &Rows<'_>, system: &str, threads: usize, other: &str) -> Option<f64> {
    Some(1.0 / time_ratio(rows.scaling(system, threads, RANDOM)?, other)?)
}

/// As [`throughput`], at the most threads.
fn most(rows: &Rows<'_>, system: &str, other: &str) -> Option<f64> {
    throughput(rows, system, *rows.threads().last()?, other)
}

/// The sum at the most threads divided by that at four.
fn sum_at_the_most(rows: &Rows<'_>) -> Option<f64> {
    let at = |threads| Some(rows.scaling(DEFAULTS, threads, SEQUENTIAL)?.gib_per_s);
    let last = rows.threads().into_iter().max().filter(|&last| last > 4)?;
    Some(at(last)? / at(4)?)
}

/// The processor time at the most threads divided by that at one.
fn processor_at_the_most(rows: &Rows<'_>) -> Option<f64> {
    let at = |threads| Some(rows.scaling(BARE, threads, RANDOM)?.cpu_ns_per_fault);
    let last = rows.threads().into_iter().max().filter(|&last| last > 1)?;
    Some(at(last)? / at(1)?)
}

fn latency(rows: &Rows<'_>, baseline: &str) -> Option<f64> {
    time_ratio(rows.find("latency", "pool, defaults", "")?, baseline)
}

fn contended(rows: &Rows<'_>, system: &str) -> Option<f64> {
    cpu_ratio(rows.find("parallel", system, "8 contended")?, &format!("{system} 1 contended"))
}

fn restored(rows: &Rows<'_>, ratio: fn(&Row, &str) -> Option<f64>, baseline: &str) -> Option<f64> {
    ratio(rows.find("restore", "pool, defaults", "to the last touch")?, baseline)
}

/// The row of the crowd with the most other regions.
fn crowd<'a>(rows: &Rows<'a>) -> Option<&'a Row> {
    let of_crowd = rows.0.iter().filter(|row| row.workload == "crowd");
    of_crowd.max_by_key(|row| row.point.parse::<usize>().unwrap_or(0))
}

/// The place of the number of regions in the largest crowd.
const OTHERS: &str = "OTHERS";
/// A machine with that many CPUs has the targets of many.
const MANY: usize = 16;

static TARGETS: [Target; 20] = [
    Target {
        cpus: MANY,
        about: "random first touch at the most threads, pool without readahead / prototype `pool`",
        figure: |rows| most(rows, BARE, "prototype pool"),
        bound: Bound::AtLeast(0.8),
    },
    Target {
        cpus: MANY,
        about: "its processor time a page / at 1 thread",
        figure: processor_at_the_most,
        bound: Bound::AtMost(1.2),
    },
    Target {
        cpus: MANY,
        about: "the same in own parts, threads and workers on the same CPUs / prototype `poollocal`",
        figure: |rows| most(rows, OWN_CPUS, "prototype poollocal"),
        bound: Bound::AtLeast(0.8),
    },
    Target {
        cpus: MANY,
        about: "inline at 8 threads / prototype `inline`",
        figure: |rows| throughput(rows, INLINE, 8, "prototype inline"),
        bound: Bound::AtLeast(0.85),
    },
    Target {
        cpus: MANY,
        about: "inline at the most threads / prototype `inline`",
        figure: |rows| most(rows, INLINE, "prototype inline"),
        bound: Bound::AtLeast(0.85),
    },
    Target {
        cpus: MANY,
        about: "sequential sum at the most threads / at 4",
        figure: sum_at_the_most,
        bound: Bound::AtLeast(1.3),
    },
    Target {
        cpus: MANY,
        about: "p50 of a first touch, pool with defaults / manual page, not pinned",
        figure: |rows| latency(rows, "manual-page"),
        bound: Bound::AtMost(1.0),
    },
    Target {
        cpus: 2,
        about: "p50 of a first touch, pool with defaults / manual page on the same CPU",
        figure: |rows| latency(rows, "manual-page, same CPU"),
        bound: Bound::AtMost(1.25),
    },
    Target {
        cpus: 2,
        about: "or: time a page at 1 thread, pool without readahead / prototype `pool1`",
        figure: |rows| throughput(rows, BARE, 1, "prototype pool1").map(f64::recip),
        bound: Bound::AtMost(1.1),
    },
    Target {
        cpus: 2,
        about: "time a page at 1 thread, inline / prototype `inline`",
        figure: |rows| throughput(rows, INLINE, 1, "prototype inline").map(f64::recip),
        bound: Bound::AtMost(1.05),
    },
    Target {
        cpus: 2,
        about: "restore, 10 % at random, 4 threads: to the last touch / plain handler",
        figure: |rows| restored(rows, time_ratio, PLAIN),
        bound: Bound::AtMost(1.0),
    },
    Target {
        cpus: MANY,
        about: "the same",
        figure: |rows| restored(rows, time_ratio, PLAIN),
        bound: Bound::AtMost(0.6),
    },
    Target {
        cpus: 2,
        about: "its processor time a page / plain handler",
        figure: |rows| restored(rows, cpu_ratio, PLAIN),
        bound: Bound::AtMost(1.1),
    },
    Target {
        cpus: 2,
        about: "the same / plain handler that maps the file for its guest",
        figure: |rows| restored(rows, cpu_ratio, MAPPING),
        bound: Bound::AtMost(1.1),
    },
    Target {
        cpus: 2,
        about: "p50 of a first touch, 1,000 regions on one pool / 1",
        figure: |rows| time_ratio(rows.find("regions", "pool, defaults", "1000")?, "pool, defaults 1"),
        bound: Bound::AtMost(1.2),
    },
    Target {
        cpus: 2,
        about: "building and dropping a small region among OTHERS / among 100",
        figure: |rows| time_ratio(crowd(rows)?, "pool, defaults 100"),
        bound: Bound::AtMost(1.5),
    },
    Target {
        cpus: 2,
        about: "open descriptors with OTHERS regions",
        figure: |rows| crowd(rows)?.descriptors.map(|descriptors| descriptors as f64),
        bound: Bound::AtMost(100.0),
    },
    Target {
        cpus: 2,
        about: "processor time a page, 8 threads on the same pages / 1 thread: pool",
        figure: |rows| contended(rows, "pool, defaults"),
        bound: Bound::AtMost(1.6),
    },
    Target {
        cpus: 2,
        about: "the same: inline",
        figure: |rows| contended(rows, "inline"),
        bound: Bound::AtMost(1.6),
    },
    Target {
        cpus: MANY,
        about: "the worse of both",
        figure: |rows| Some(contended(rows, "pool, defaults")?.max(contended(rows, "inline")?)),
        bound: Bound::AtMost(6.0),
    },
];
