//! The comparison of this run with an earlier one.

use super::table::aligned;
use crate::format::seconds;
use crate::measure::median;
use crate::row::Row;
use fastrand::Rng;
use serde::Serialize;
use std::io;
use std::path::Path;

/// A row of both runs. Compare the ratios, because the times of two runs differ by the load of the
/// machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The name of the workload.
    pub workload: String,
    /// The name of the measured system.
    pub system: String,
    /// The point of the workload, or nothing if the workload has one point.
    pub point: String,
    /// The seconds of the earlier run: the median latency if each touch was timed, else the time.
    pub seconds_then: f64,
    /// The seconds of this run.
    pub seconds_now: f64,
    /// The ratio to the baseline in the earlier run.
    pub ratio_then: Option<f64>,
    /// The ratio to the baseline in this run.
    pub ratio_now: Option<f64>,
    /// The change of the ratio in percent.
    pub change_percent: Option<f64>,
    /// Its 95 % interval. `None` if one of the runs has fewer than ten rounds.
    pub change_interval: Option<[f64; 2]>,
}

impl Comparison {
    /// Compares a row of an earlier run with the same row of this run.
    fn new(then: &Row, now: &Row) -> Self {
        let time = |row: &Row| row.p50_ns.map_or(row.seconds, |ns| ns as f64 / 1e9);
        let change = match (then.ratio, now.ratio) {
            (Some(then), Some(now)) if then > 0.0 => Some((now / then - 1.0) * 100.0),
            _ => None,
        };
        Self {
            workload: now.workload.clone(),
            system: now.system.clone(),
            point: now.point.clone(),
            seconds_then: time(then),
            seconds_now: time(now),
            ratio_then: then.ratio,
            ratio_now: now.ratio,
            change_percent: change,
            change_interval: interval(&then.round_ratios, &now.round_ratios),
        }
    }

    /// The cells of a table, in the order of [`HEAD`].
    pub(super) fn cells(&self) -> [String; HEAD.len()] {
        let ratio = |ratio: Option<f64>| ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        [
            self.workload.clone(),
            self.system.clone(),
            self.point.clone(),
            seconds(self.seconds_then),
            seconds(self.seconds_now),
            ratio(self.ratio_then),
            ratio(self.ratio_now),
            self.change_percent.map_or_else(String::new, |change| format!("{change:+.0} %")),
            self.change_interval.map_or_else(String::new, |[low, high]| format!("{low:+.0} to {high:+.0}")),
        ]
    }
}

/// The columns of a comparison. The first three are names.
pub(super) const HEAD: [&str; 9] =
    ["workload", "system", "at", "time then", "now", "ratio then", "now", "change", "95 %"];

/// The 95 % interval of the change of a median in percent: the changes between rounds that are drawn at random from both
/// runs, again and again (bootstrap).
fn interval(then: &[f64], now: &[f64]) -> Option<[f64; 2]> {
    const DRAWS: usize = 1_000;
    const ROUNDS_LEAST: usize = 10;
    if then.len().min(now.len()) < ROUNDS_LEAST {
        return None;
    }
    let mut rng = Rng::with_seed(1);
    let mut drawn =
        |rounds: &[f64]| median(rounds.iter().map(|_| rounds[rng.usize(..rounds.len())]).collect());
    let mut changes: Vec<f64> = (0..DRAWS).map(|_| (drawn(now) / drawn(then) - 1.0) * 100.0).collect();
    changes.sort_by(f64::total_cmp);
    Some([changes[DRAWS / 40], changes[DRAWS - 1 - DRAWS / 40]])
}

/// Reads the rows of an earlier run with `--json`.
///
/// # Errors
///
/// If the file cannot be read, a line of it is no row, or it has none. The error names the line.
pub fn read(path: &Path) -> io::Result<Vec<Row>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let text = std::fs::read(path)?;
    let text = String::from_utf8(text)
        .map_err(|_| invalid(String::from("it is no text: name the output of `pagestitch bench --json`")))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| {
        serde_json::from_str(line).map_err(|error| {
            invalid(format!("line {} is no row of `pagestitch bench --json`: {error}", index + 1))
        })
    });
    let rows = rows.collect::<io::Result<Vec<Row>>>()?;
    if rows.is_empty() {
        return Err(invalid(String::from("it has no row: name the output of `pagestitch bench --json`")));
    }
    Ok(rows)
}

/// Compares the rows that both runs have, in the order of this run.
#[must_use]
pub fn compare(then: &[Row], now: &[Row]) -> Vec<Comparison> {
    let both = now.iter().filter_map(|row| Some((then.iter().find(|old| old.key() == row.key())?, row)));
    both.map(|(then, now)| Comparison::new(then, now)).collect()
}

/// A table with a line for each comparison.
#[must_use]
pub fn table(comparisons: &[Comparison]) -> String {
    if comparisons.is_empty() {
        return String::from("\nno row in common with the earlier run\n");
    }
    let mut cells = vec![HEAD.map(String::from).to_vec()];
    cells.extend(comparisons.iter().map(|comparison| comparison.cells().to_vec()));
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
        let text = table(&compare(&[row(0.5)], &[row(0.6)]));
        assert!(text.contains("0.50") && text.contains("0.60") && text.contains("+20 %"), "{text}");
        assert!(table(&compare(&[], &[row(0.5)])).contains("no row in common"));
    }

    #[test]
    fn the_interval_of_a_change_has_the_change_and_is_narrow_for_even_rounds() {
        let rounds =
            |from: f64, step: f64| (0..20).map(|round| from + step * f64::from(round)).collect::<Vec<_>>();
        let [low, high] = interval(&rounds(0.99, 0.001), &rounds(1.09, 0.001)).unwrap();
        assert!(low > 8.0 && low < 10.0 && high > 10.0 && high < 12.0, "{low} to {high}");
        let [low, high] = interval(&rounds(0.5, 0.05), &rounds(0.6, 0.05)).unwrap();
        assert!(low < 0.0 && high > 20.0, "{low} to {high}");
        assert_eq!(interval(&[1.0; 9], &[1.0; 20]), None);
    }
}
