//! The rows of a workload as an aligned table.

use crate::format::seconds;
use crate::row::{Measured, Row};
use crate::workloads::Workload;
use std::fmt::Write;

/// A heading, and a line for each row. A column without a value is omitted.
#[must_use]
pub fn table(workload: &Workload, measured: &[Measured]) -> String {
    let mut text = format!("\n{}: {}\n", workload.name, workload.about);
    let rows: Vec<&Row> = measured.iter().map(|measured| &measured.row).collect();
    let Some(first) = rows.first() else {
        text += "  no complete round\n";
        return text;
    };
    let _ =
        writeln!(text, "  medians of {} rounds, interleaved; < 1 is faster than the baseline", first.rounds);
    let columns: Vec<&Column> =
        COLUMNS.iter().filter(|column| rows.iter().any(|row| (column.cell)(row).is_some())).collect();
    let mut cells = vec![columns.iter().map(|column| column.head.to_owned()).collect::<Vec<_>>()];
    cells.extend(rows.iter().map(|row| {
        let row = columns.iter().map(|column| (column.cell)(row).unwrap_or_default());
        row.collect()
    }));
    text += &aligned(&cells);
    if workload.name == "sparse" {
        text += &crossovers(&rows);
    }
    text
}

/// For each pattern and baseline: the share of touched pages at which the baseline becomes faster.
fn crossovers(rows: &[&Row]) -> String {
    let mut text = String::new();
    let lazy: Vec<&&Row> = rows.iter().filter(|row| row.system.starts_with("pool")).collect();
    for pattern in ["random", "clustered"] {
        for baseline in ["eager, 2 MiB pages", "eager, 4 KiB pages"] {
            let ratios: Vec<(&str, f64)> = lazy
                .iter()
                .filter_map(|row| {
                    let share = row.point.strip_suffix(pattern)?.trim_end();
                    Some((share, row.ratios.iter().find(|(name, _)| name == baseline)?.1))
                })
                .collect();
            let Some(most) = ratios.iter().max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
            let crossing = ratios.iter().find(|(_, ratio)| *ratio >= 1.0);
            let verdict = crossing.map_or_else(
                || String::from("faster at every share"),
                |(share, _)| format!("faster below {share}"),
            );
            let _ = writeln!(
                text,
                "  lazy against {baseline}, {pattern}: {verdict}; at worst {:.2}, at {}",
                most.1, most.0
            );
        }
    }
    text
}

/// Columns of text: the first two aligned left, the others right, and the last one unpadded.
pub(super) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                _ if column + 1 == columns && columns > 2 => write!(line, "  {cell}"),
                0 | 1 => write!(line, "  {cell:width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

struct Column {
    head: &'static str,
    cell: fn(&Row) -> Option<String>,
}

const COLUMNS: [Column; 12] = [
    Column { head: "system", cell: |row| Some(row.system.clone()) },
    Column { head: "at", cell: |row| (!row.point.is_empty()).then(|| row.point.clone()) },
    Column { head: "time", cell: |row| row.p50_ns.is_none().then(|| seconds(row.seconds)) },
    Column {
        head: "of the rounds",
        cell: |row| {
            row.p50_ns
                .is_none()
                .then(|| format!("{}..{}", seconds(row.seconds_min), seconds(row.seconds_max)))
        },
    },
    Column {
        head: "each",
        cell: |row| row.p50_ns.is_none().then(|| seconds(row.seconds / row.pages.max(1) as f64)),
    },
    Column { head: "bytes each", cell: |row| row.bytes_each.map(|bytes| format!("{bytes:.1}")) },
    Column { head: "p50", cell: |row| nanoseconds(row.p50_ns) },
    Column { head: "p90", cell: |row| nanoseconds(row.p90_ns) },
    Column { head: "p99", cell: |row| nanoseconds(row.p99_ns) },
    Column { head: "p99.9", cell: |row| nanoseconds(row.p999_ns) },
    Column { head: "CPU each", cell: |row| Some(seconds(row.cpu_ns_per_fault / 1e9)) },
    Column { head: "ratio", cell: |row| Some(ratios(row)) },
];

fn ratios(row: &Row) -> String {
    let others = row.ratios.iter().filter(|(name, _)| *name != row.system);
    others.map(|(name, ratio)| format!("{ratio:.2} of {name}")).collect::<Vec<_>>().join(", ")
}

fn nanoseconds(ns: Option<u64>) -> Option<String> {
    ns.map(|ns| seconds(ns as f64 / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows =
            [["a", "b", "c", "d"], ["long", "", "12", "x y"]].map(|row| row.map(String::from).to_vec());
        assert_eq!(aligned(&rows), "  a     b   c  d\n  long     12  x y\n");
    }
}
