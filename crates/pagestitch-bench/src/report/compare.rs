//! The comparison of this run with an earlier one.

use super::table::aligned;
use crate::format::seconds;
use crate::row::Row;
use std::io;
use std::path::Path;

/// Reads the rows of an earlier run with `--json`.
///
/// # Errors
///
/// If the file cannot be read, or a line of it is no row. The error names the line.
pub fn read(path: &Path) -> io::Result<Vec<Row>> {
    let text = std::fs::read_to_string(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| {
        serde_json::from_str(line).map_err(|error| {
            let reason = format!("line {} is no row of `pagestitch bench --json`: {error}", index + 1);
            io::Error::new(io::ErrorKind::InvalidData, reason)
        })
    });
    rows.collect()
}

/// A table with a line for each row of both runs. Compare the ratios, because the times of two runs
/// differ by the load of the machine.
#[must_use]
pub fn table(then: &[Row], now: &[Row]) -> String {
    let head = ["workload", "system", "at", "time then", "now", "ratio then", "now", "change"];
    let mut cells = vec![head.map(String::from).to_vec()];
    for row in now {
        let Some(old) = then.iter().find(|old| old.key() == row.key()) else { continue };
        let ratio = |row: &Row| row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let change = match (old.ratio, row.ratio) {
            (Some(old), Some(new)) if old > 0.0 => format!("{:+.0} %", (new / old - 1.0) * 100.0),
            _ => String::new(),
        };
        let time = |row: &Row| row.p50_ns.map_or(row.seconds, |ns| ns as f64 / 1e9);
        cells.push(vec![
            row.workload.clone(),
            row.system.clone(),
            row.point.clone(),
            seconds(time(old)),
            seconds(time(row)),
            ratio(old),
            ratio(row),
            change,
        ]);
    }
    if cells.len() == 1 {
        return String::from("\nno row in common with the earlier run\n");
    }
    format!(
        "\ncompared with the earlier run: each ratio is to the baseline of its own run\n{}",
        aligned(&cells)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_two_runs_are_matched_by_their_keys() {
        let row = |ratio| Row { workload: String::from("w"), ratio: Some(ratio), ..Row::default() };
        let text = table(&[row(0.5)], &[row(0.6)]);
        assert!(text.contains("0.50") && text.contains("0.60") && text.contains("+20 %"), "{text}");
        assert!(table(&[], &[row(0.5)]).contains("no row in common"));
    }
}
