//! Figures of the workloads with targets, as lines below their tables.

use crate::bound::Bound;
use crate::format::digits;
use crate::row::Row;
use crate::workloads::Workload;
use Bound::{AtLeast, AtMost};
use Figure::{Each, EachGib, OfPerfectBits, OfResidentLimit, Speed, Time};

/// A figure of a row with its target.
struct Target {
    workload: &'static str,
    system: &'static str,
    point: &'static str,
    figure: Figure,
    bound: Bound,
}

/// A figure of a row.
enum Figure {
    /// Pages a second, divided by those of a baseline.
    Speed(&'static str),
    /// The time, divided by that of a baseline.
    Time(&'static str),
    /// The microseconds of a page.
    Each,
    /// The milliseconds of a GiB.
    EachGib,
    /// The share of the touches that wait for no read, divided by that of a policy with perfect reference bits.
    OfPerfectBits,
    /// The most memory of the process, divided by that which it may have.
    OfResidentLimit,
}

/// A line for each target of which a figure was measured.
pub(super) fn lines(workload: &Workload, rows: &[&Row]) -> Vec<String> {
    let targets = TARGETS.iter().filter(|target| target.workload == workload.name);
    targets.filter_map(|target| target.line(rows)).collect()
}

impl Target {
    fn line(&self, rows: &[&Row]) -> Option<String> {
        let &Self { workload, system, point, bound, .. } = self;
        let row = rows.iter().find(|row| row.key() == (workload, point, system))?;
        let (about, figure) = self.figure.of(row)?;
        let verdict = if bound.holds(figure) { "met" } else { "missed" };
        Some(format!("target, {point}: {system} {about}: {} ({bound}): {verdict}", digits(figure)))
    }
}

impl Figure {
    /// Its words and its value.
    fn of(&self, row: &Row) -> Option<(String, f64)> {
        match self {
            Self::Speed(baseline) => Some((format!("/ {baseline}, speed"), 1.0 / row.time_ratio(baseline)?)),
            Self::Time(baseline) => Some((format!("/ {baseline}, time"), row.time_ratio(baseline)?)),
            Self::Each if row.seconds == 0.0 => None,
            Self::Each => Some((String::from("in us a page"), row.seconds * 1e6 / row.pages.max(1) as f64)),
            Self::EachGib => Some((String::from("in ms a GiB"), row.seconds * 1e3 / gib(row)?)),
            Self::OfPerfectBits => Some((
                String::from("/ S3-FIFO with perfect bits, touches without a wait for a read"),
                row.of_perfect_bits?,
            )),
            Self::OfResidentLimit => {
                let share = row.resident_bytes? as f64 / row.resident_limit? as f64;
                Some((String::from("resident / its budget and a block a thread"), share))
            }
        }
    }
}

fn gib(row: &Row) -> Option<f64> {
    (row.bytes > 0).then_some(row.bytes as f64 / f64::from(1 << 30))
}

/// A target of the workload `evict`.
const fn evict(system: &'static str, point: &'static str, figure: Figure, bound: Bound) -> Target {
    Target { workload: "evict", system, point, figure, bound }
}

/// A target of the workload `changes`.
const fn changes(system: &'static str, point: &'static str, figure: Figure, bound: Bound) -> Target {
    Target { workload: "changes", system, point, figure, bound }
}

/// A target of the workload `ooc`.
const fn ooc(system: &'static str, point: &'static str, figure: Figure, bound: Bound) -> Target {
    Target { workload: "ooc", system, point, figure, bound }
}

const INLINE_MEMFD: &str = "inline, budget, memfd";
const INLINE: &str = "inline, budget";
const INLINE_DIRECT: &str = "inline, budget, direct";
const POOL: &str = "pool, budget";
const POOL_DIRECT: &str = "pool, budget, direct";
const RANDOM: &str = "mmap, MADV_RANDOM";

static TARGETS: [Target; 44] = [
    evict("evict()", "pages in order", Each, AtMost(1.0)),
    evict("evict()", "pages in order, 2 threads", Speed("evict() pages in order"), AtLeast(1.5)),
    evict("evict()", "every other page", Each, AtMost(1.0)),
    evict("budget", "for new pages", Each, AtMost(1.0)),
    evict("evict()", "every other page, 2 threads", Speed("evict() every other page"), AtLeast(1.5)),
    evict("inline", "soft fault", Time("inline cold fault"), AtMost(1.0)),
    evict("inline", "first write", Time("inline cold fault"), AtMost(1.0)),
    evict("pool, same CPU", "soft fault", Time("pool, same CPU cold fault"), AtMost(1.15)),
    evict("pool, same CPU", "first write", Time("pool, same CPU cold fault"), AtMost(1.15)),
    changes("changes()", "1 % written", EachGib, AtMost(1.0)),
    changes("changes()", "1 % written", Speed("pagemap"), AtLeast(10.0)),
    changes("PAGEMAP_SCAN", "arming small pages", EachGib, AtMost(10.0)),
    changes("PAGEMAP_SCAN", "arming huge pages", EachGib, AtMost(0.3)),
    ooc(INLINE, "memory, random", Speed("prototype evict move"), AtLeast(0.85)),
    ooc(POOL, "memory, random", Speed("plain handler, FIFO"), AtLeast(1.2)),
    ooc(POOL, "memory, sequential", Speed("pool, no budget"), AtLeast(0.5)),
    ooc(INLINE_MEMFD, "memory, half writing", Speed("prototype evict move w"), AtLeast(0.85)),
    ooc(POOL, "memory, scan + hot set", OfPerfectBits, AtLeast(0.95)),
    ooc(INLINE, "memory, scan + hot set", OfPerfectBits, AtLeast(0.95)),
    ooc(POOL_DIRECT, "file, random", Time(RANDOM), AtMost(1.1)),
    ooc(INLINE_DIRECT, "file, random", Time(RANDOM), AtMost(1.1)),
    ooc(POOL_DIRECT, "file, random, 16 threads", Time(RANDOM), AtMost(1.1)),
    ooc(INLINE_DIRECT, "file, random, 16 threads", Time(RANDOM), AtMost(1.1)),
    ooc(POOL_DIRECT, "file, zipf", Time(RANDOM), AtMost(1.1)),
    ooc(INLINE_DIRECT, "file, zipf", Time(RANDOM), AtMost(1.1)),
    ooc(POOL_DIRECT, "file, zipf, 16 threads", Time(RANDOM), AtMost(1.1)),
    ooc(INLINE_DIRECT, "file, zipf, 16 threads", Time(RANDOM), AtMost(1.1)),
    ooc(POOL, "file, sequential", Time("mmap"), AtMost(1.1)),
    ooc(POOL, "file, sequential", Time("mmap, MADV_SEQUENTIAL"), AtMost(1.2)),
    ooc(POOL_DIRECT, "file, sequential", Time("mmap"), AtMost(1.1)),
    ooc(POOL_DIRECT, "file, sequential", Time("mmap, MADV_SEQUENTIAL"), AtMost(1.2)),
    ooc(POOL_DIRECT, "file, scan + hot set", Time(RANDOM), AtMost(0.7)),
    ooc(POOL_DIRECT, "file, scan + hot set", OfPerfectBits, AtLeast(0.95)),
    ooc(INLINE_DIRECT, "file, scan + hot set", OfPerfectBits, AtLeast(0.95)),
    ooc(POOL_DIRECT, "file, misses", Speed("prototype ooc2"), AtLeast(0.95)),
    ooc(INLINE_DIRECT, "file, misses", Speed("prototype ooc2"), AtLeast(0.95)),
    ooc(POOL_DIRECT, "file, misses, 16 threads", Speed("prototype ooc2"), AtLeast(0.95)),
    ooc(INLINE_DIRECT, "file, misses, 16 threads", Speed("prototype ooc2"), AtLeast(0.95)),
    ooc(POOL, "file, random, 16 threads", OfResidentLimit, AtMost(1.0)),
    ooc(INLINE_DIRECT, "file, random, 16 threads", OfResidentLimit, AtMost(1.0)),
    ooc(POOL, "file, sequential", OfResidentLimit, AtMost(1.0)),
    ooc(POOL_DIRECT, "file, scan + hot set", OfResidentLimit, AtMost(1.0)),
    ooc(POOL, "file, half writing, 16 threads", OfResidentLimit, AtMost(1.0)),
    ooc("inline, budget", "file, half writing, 16 threads", OfResidentLimit, AtMost(1.0)),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::ALL;

    #[test]
    fn a_line_tells_the_figure_of_each_target_that_was_measured() {
        let row = |system: &str, point: &str, ratios: &[(&str, f64)]| Row {
            workload: String::from("ooc"),
            system: system.to_owned(),
            point: point.to_owned(),
            ratios: ratios.iter().map(|(baseline, ratio)| ((*baseline).to_owned(), *ratio)).collect(),
            resident_bytes: Some(3 << 20),
            resident_limit: Some(2 << 20),
            of_perfect_bits: Some(0.96),
            ..Row::default()
        };
        let rows = [
            row(INLINE, "memory, random", &[("plain handler, FIFO", 0.5), ("prototype evict move", 1.25)]),
            row(POOL, "file, sequential", &[("mmap", 1.2)]),
            row(POOL_DIRECT, "file, scan + hot set", &[]),
        ];
        let rows: Vec<&Row> = rows.iter().collect();
        let lines = |name| lines(ALL.iter().find(|workload| workload.name == name).unwrap(), &rows);
        assert!(lines("evict").is_empty());
        assert_eq!(
            lines("ooc"),
            [
                "target, memory, random: inline, budget / prototype evict move, speed: 0.800 (>= 0.85): missed",
                "target, file, sequential: pool, budget / mmap, time: 1.20 (<= 1.1): missed",
                "target, file, scan + hot set: pool, budget, direct / S3-FIFO with perfect bits, touches without a wait for a read: 0.960 (>= 0.95): met",
                "target, file, sequential: pool, budget resident / its budget and a block a thread: 1.50 (<= 1): missed",
                "target, file, scan + hot set: pool, budget, direct resident / its budget and a block a thread: 1.50 (<= 1): missed",
            ]
        );
    }

    #[test]
    fn each_target_names_a_workload() {
        for Target { workload, .. } in &TARGETS {
            assert!(ALL.iter().any(|known| known.name == *workload), "{workload}");
        }
    }
}
