//! Figures of the workloads with targets, as lines below their tables.

use crate::bound::Bound;
use crate::format::digits;
use crate::row::Row;
use crate::workloads::Workload;

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
    /// Touches a second, divided by those of a baseline.
    Speed(&'static str),
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
        Some(format!("target at {point}: {system} {about}: {} ({bound}): {verdict}", digits(figure)))
    }
}

impl Figure {
    /// Its words and its value.
    fn of(&self, row: &Row) -> Option<(String, f64)> {
        match self {
            Self::Speed(baseline) => {
                Some((format!("/ {baseline}, touches a second"), 1.0 / row.time_ratio(baseline)?))
            }
        }
    }
}

static TARGETS: [Target; 4] = [
    Target {
        workload: "ooc",
        system: "inline, budget",
        point: "memory, random",
        figure: Figure::Speed("prototype evict move"),
        bound: Bound::AtLeast(0.85),
    },
    Target {
        workload: "ooc",
        system: "pool, budget",
        point: "memory, random",
        figure: Figure::Speed("plain handler, FIFO"),
        bound: Bound::AtLeast(1.2),
    },
    Target {
        workload: "ooc",
        system: "pool, budget",
        point: "memory, sequential",
        figure: Figure::Speed("pool, no budget"),
        bound: Bound::AtLeast(0.5),
    },
    Target {
        workload: "ooc",
        system: "inline, budget, memfd",
        point: "memory, half writing",
        figure: Figure::Speed("prototype evict move w"),
        bound: Bound::AtLeast(0.85),
    },
];
