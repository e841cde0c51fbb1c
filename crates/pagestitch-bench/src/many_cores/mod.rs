//! The table of many cores: figures by the number of threads, and ratios with their targets.
//!
//! | file | content |
//! |---|---|
//! | `figures` | throughput and processor time by the number of threads |
//! | `targets` | ratios, each with its target |
//! | `rows` | the rows of a run, found by their keys |

mod figures;
mod rows;
mod targets;

use crate::row::Row;
use crate::runner::Options;
use crate::workloads::restore::{MAPPING, PLAIN};
use crate::workloads::{ALL, Workload};
use rows::Rows;
use std::collections::BTreeSet;
use std::time::Duration;

/// The workloads of the table, each with its options: the cases that the table names, and a time limit.
/// All of them together take less than four minutes on an idle machine.
#[must_use]
pub fn plan(options: &Options) -> Vec<(&'static Workload, Options)> {
    let planned = ALL.iter().filter_map(|workload| {
        let (_, seconds, keep) = PLAN.iter().find(|(name, ..)| *name == workload.name)?;
        let threads = options.threads.clone().filter(|_| workload.name == SCALING);
        let time_limit = Some(Duration::from_secs(*seconds));
        Some((workload, Options { threads, time_limit, keep: *keep, ..options.clone() }))
    });
    planned.collect()
}

/// The table, in Markdown.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let few = of_few_rounds(rows);
    let rows = Rows(rows);
    format!("\n{}\n{}{few}", figures::table(&rows), targets::table(&rows))
}

/// A line that names the workloads with fewer rounds than a median needs.
fn of_few_rounds(rows: &[Row]) -> String {
    let few = rows.iter().filter(|row| row.rounds < 3).map(|row| row.workload.as_str());
    let few = few.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ");
    match few.as_str() {
        "" => String::new(),
        few => format!("\nThe time was enough for one or two rounds, whose figures vary: {few}\n"),
    }
}

/// True for the cases of a workload that the table names.
type Keep = fn(system: &str, point: &str) -> bool;

/// The workloads, with the seconds and the cases of each.
static PLAN: [(&str, u64, Keep); 6] = [
    (SCALING, 110, |_, _| true),
    ("latency", 10, |system, _| system == "pool, defaults" || system.starts_with("manual-page")),
    ("parallel", 20, |_, point| ["1 contended", "8 contended"].contains(&point)),
    ("regions", 15, |_, point| ["1", "1000"].contains(&point)),
    ("crowd", 25, |_, _| true),
    ("restore", 30, |system, point| {
        point == "to the last touch" && ["pool, defaults", PLAIN, MAPPING].contains(&system)
    }),
];
const SCALING: &str = "scaling";

#[cfg(test)]
mod tests {
    use super::*;

    /// Made-up rows of a machine: each figure tells the number of threads.
    fn rows(cpus: usize, threads: &[usize]) -> Vec<Row> {
        let row = |workload: &str, system: &str, point: String, threads: usize| {
            let ratios: Vec<(String, f64)> =
                ["prototype pool", "prototype inline", "plain handler", "manual-page"]
                    .map(|baseline| (baseline.to_owned(), 0.5))
                    .into();
            Row {
                workload: workload.to_owned(),
                system: system.to_owned(),
                point,
                threads,
                cpus,
                faults_per_s: threads as f64 * 1.5e5,
                cpu_ns_per_fault: 9_500.0 + 500.0 * threads as f64,
                gib_per_s: 2.0 * threads as f64,
                cpu_ratios: vec![(String::from("plain handler"), 1.2)],
                ratios,
                ..Row::default()
            }
        };
        let mut rows = vec![row("restore", "pool, defaults", String::from("to the last touch"), 4)];
        for &threads in threads {
            for system in ["pool, no readahead", "inline", "prototype pool"] {
                rows.push(row("scaling", system, format!("{threads} random"), threads));
            }
            rows.push(row("scaling", "pool, defaults", format!("{threads} sequential"), threads));
        }
        rows
    }

    #[test]
    fn the_table_has_a_column_for_each_number_of_threads() {
        let text = table(&rows(2, &[1, 2, 4]));
        for line in [
            "| 2 CPUs | 1 thread | 2 | 4 * |",
            "|---|---|---|---|",
            "| random 4 KiB first touch, pool without readahead, million pages/s | 0.150 | 0.300 | 0.600 |",
            "| its processor time a page, us | 10.0 | 10.5 | 11.5 |",
            "| inline | 0.150 | 0.300 | 0.600 |",
            "| prototype `zero`: the kernel's new page, at a write | - | - | - |",
            "| sequential sum, pool with defaults, GiB/s | 2.00 | 4.00 | 8.00 |",
            "*: more threads than CPUs",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
        }
        let cells = |line: &str| line.matches(" |").count();
        let widths: Vec<usize> = text.lines().filter(|line| line.starts_with("| ")).map(cells).collect();
        assert!(widths.iter().all(|&width| [4, 5].contains(&width)), "{text}");
    }

    #[test]
    fn the_table_names_workloads_of_few_rounds() {
        let mut rows = rows(2, &[1]);
        assert!(table(&rows).ends_with("vary: restore, scaling\n"));
        rows.iter_mut().for_each(|row| row.rounds = 3);
        assert!(!table(&rows).contains("vary"));
    }

    #[test]
    fn a_target_is_met_or_missed_on_a_machine_that_is_large_enough() {
        let line = |text: &str, about: &str| {
            let found = text.lines().find(|line| line.contains(about));
            found.unwrap_or_else(|| panic!("no line {about} in\n{text}")).to_owned()
        };
        let small = table(&rows(2, &[1, 2, 4]));
        assert!(
            line(&small, "without readahead / prototype `pool`")
                .ends_with("| 2.00 | >= 0.8 | not measured: too few CPUs |")
        );
        assert!(line(&small, "inline / prototype `inline`").ends_with("| 0.500 | <= 1.05 | met |"));
        assert!(
            line(&small, "its processor time a page / plain handler").ends_with("| 1.20 | <= 1.1 | missed |")
        );
        assert!(line(&small, "1,000 regions on one pool").ends_with("| - | <= 1.2 | not measured |"));
        let large = table(&rows(16, &[1, 2, 4, 8, 16]));
        assert!(!large.contains("*: more threads") && !large.contains("OTHERS"));
        assert!(line(&large, "without readahead / prototype `pool`").ends_with("| 2.00 | >= 0.8 | met |"));
        assert!(
            line(&large, "its processor time a page / at 1 thread").ends_with("| 1.75 | <= 1.2 | missed |")
        );
        assert!(
            line(&large, "sequential sum at the most threads / at 4").ends_with("| 4.00 | >= 1.3 | met |")
        );
        assert!(
            line(&large, "its processor time a page / plain handler").ends_with("| a target of few CPUs |")
        );
    }

    #[test]
    fn the_time_of_the_table_is_less_than_four_minutes() {
        let seconds: u64 = PLAN.iter().map(|(_, seconds, _)| seconds).sum();
        assert!(seconds <= 220, "{seconds}");
        assert_eq!(plan(&Options::default()).len(), PLAN.len(), "each name is that of a workload");
    }
}
