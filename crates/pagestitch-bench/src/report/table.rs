//! The rows of a workload as an aligned table.

use super::{columns, targets};
use crate::format::count;
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
    let _ = writeln!(
        text,
        "  medians of {}, interleaved; < 1 is faster than the baseline",
        count(first.rounds, "round")
    );
    let columns = columns::used(&rows);
    let head = columns.iter().map(|column| column.head).chain(["ratio"]);
    let mut cells = vec![head.map(str::to_owned).collect::<Vec<_>>()];
    cells.extend(rows.iter().map(|row| {
        let row_cells = columns.iter().map(|column| (column.cell)(row).unwrap_or_default());
        row_cells.chain([ratios(row)]).collect()
    }));
    text += &aligned(&cells);
    let notes = notes(workload, &rows);
    notes.for_each(|line| text += &format!("  {line}\n"));
    text
}

/// The lines below a table.
pub(super) fn notes(workload: &Workload, rows: &[&Row]) -> impl Iterator<Item = String> {
    let mark = columns::about_mark(rows);
    crossovers(workload, rows).into_iter().chain(targets::lines(workload, rows)).chain(mark)
}

/// For each pattern and baseline: the share of touched pages at which the baseline becomes faster.
fn crossovers(workload: &Workload, rows: &[&Row]) -> Vec<String> {
    let mut lines = Vec::new();
    if workload.name != "sparse" {
        return lines;
    }
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
            lines.push(format!(
                "lazy against {baseline}, {pattern}: {verdict}; at worst {:.2}, at {}",
                most.1, most.0
            ));
        }
    }
    lines
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

fn ratios(row: &Row) -> String {
    let others = row.ratios.iter().filter(|(name, _)| *name != row.system);
    others.map(|(name, ratio)| format!("{ratio:.2} of {name}")).collect::<Vec<_>>().join(", ")
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
