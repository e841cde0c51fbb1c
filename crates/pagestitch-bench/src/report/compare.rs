//! This run beside an earlier one.

use super::table::aligned;
use crate::format::seconds;
use crate::row::Row;
use std::io;
use std::path::Path;

/// Reads the rows that a run with `--json` has printed.
///
/// # Errors
///
/// The file cannot be read, or a line of it is no row: which, and why.
pub fn read(path: &Path) -> io::Result<Vec<Row>> {
    let text = std::fs::read_to_string(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| {
        serde_json::from_str(line).map_err(|error| {
            let what = format!("line {} is no row of `pagestitch bench --json`: {error}", index + 1);
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    });
    rows.collect()
}

/// A line for each row that both runs have. Ratios are what to look at: times of two runs differ by what the machine was
/// doing meanwhile.
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
        return String::from("\nnothing in common with the earlier run\n");
    }
    format!("\ncompared with the earlier run: ratios to the baselines of their own runs\n{}", aligned(&cells))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_again_and_their_ratios_compared() {
        let row = |ratio| Row { workload: String::from("w"), ratio: Some(ratio), ..Row::default() };
        let text = table(&[row(0.5)], &[row(0.6)]);
        assert!(text.contains("0.50") && text.contains("0.60") && text.contains("+20 %"), "{text}");
        assert!(table(&[], &[row(0.5)]).contains("nothing in common"));
    }
}
