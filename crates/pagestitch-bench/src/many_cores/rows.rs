//! The rows of a run, found by their keys.

use crate::row::Row;

/// The rows of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a>(pub(super) &'a [Row]);

impl<'a> Rows<'a> {
    pub(super) fn find(self, workload: &str, system: &str, point: &str) -> Option<&'a Row> {
        self.0.iter().find(|row| row.key() == (workload, point, system))
    }

    /// A row of the workload `scaling`.
    pub(super) fn scaling(self, system: &str, threads: usize, pattern: &str) -> Option<&'a Row> {
        self.find("scaling", system, &format!("{threads} {pattern}"))
    }

    /// The numbers of threads of the workload `scaling`, ascending.
    pub(super) fn threads(self) -> Vec<usize> {
        let rows = self.0.iter().filter(|row| row.workload == "scaling");
        let mut threads: Vec<usize> = rows.map(|row| row.threads).collect();
        threads.sort_unstable();
        threads.dedup();
        threads
    }

    /// The number of CPUs of the machine.
    pub(super) fn cpus(self) -> usize {
        self.0.first().map_or(0, |row| row.cpus)
    }
}

/// The ratio of the time of a row to that of a baseline: the median of the ratios of the rounds.
pub(super) fn time_ratio(row: &Row, baseline: &str) -> Option<f64> {
    row.time_ratio(baseline)
}

/// The ratio of the processor times, as [`time_ratio`].
pub(super) fn cpu_ratio(row: &Row, baseline: &str) -> Option<f64> {
    row.cpu_ratios.iter().find(|(name, _)| name == baseline).map(|(_, ratio)| *ratio)
}
