//! The counts of a budget for the `metrics` facade, and for the exporter that the program has installed.

use crate::reclaim::budget::Budget;
use crate::reclaim::metrics::BudgetMetrics;
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

impl Budget {
    /// Passes the current counts to the recorder of the [`metrics`] crate, with `name` as the label `budget`.
    /// Their names are those of [`BudgetMetrics`] with the prefix `pagestitch_budget_`; those that only grow
    /// end in `_total`. The stalled time is in seconds. Call it as
    /// [`Meter::publish`](crate::Meter::publish).
    ///
    /// Needs the feature `metrics`.
    ///
    /// ```
    /// # use pagestitch::Budget;
    /// let budget = Budget::bytes(8 << 20)?;
    /// budget.publish("cache");                                     // on a timer, for example
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn publish(&self, name: &str) {
        let budget = || name.to_owned();
        let metrics = self.metrics();
        for (name, help, value) in counts(&metrics) {
            let name = format!("pagestitch_budget_{name}_total");
            describe_counter!(name.clone(), Unit::Count, help);
            counter!(name, "budget" => budget()).absolute(value);
        }
        for (name, unit, help, value) in self.sizes(&metrics) {
            let name = format!("pagestitch_budget_{name}");
            describe_gauge!(name.clone(), unit, help);
            gauge!(name, "budget" => budget()).set(value);
        }
    }

    /// The numbers that are no counters of events.
    fn sizes(&self, metrics: &BudgetMetrics) -> [(&'static str, Unit, &'static str, f64); 6] {
        let bytes = |name, help, value: u64| (name, Unit::Bytes, help, value as f64);
        let stalled = metrics.stalled.as_secs_f64();
        [
            bytes("limit_bytes", "The most bytes of memory of the budget's regions.", self.limit()),
            bytes("resident_bytes", "The bytes of memory in use.", metrics.resident_bytes),
            bytes(
                "standby_bytes",
                "The bytes of pages that have left and are in memory.",
                metrics.standby_bytes,
            ),
            bytes(
                "dirty_bytes",
                "The bytes of written pages that are not in their sources.",
                metrics.dirty_bytes,
            ),
            bytes(
                "lowered_bytes",
                "The bytes that are not used for now, because of pressure.",
                metrics.lowered_bytes,
            ),
            ("stalled_seconds", Unit::Seconds, "The time that threads have taken to free memory.", stalled),
        ]
    }
}

/// The counters of events.
const fn counts(metrics: &BudgetMetrics) -> [(&'static str, &'static str, u64); 8] {
    [
        ("evictions", "Pages that have left their regions.", metrics.evictions),
        ("soft_faults", "Pages that came back without a read of their source.", metrics.soft_faults),
        ("refaults", "Pages that had left, and were filled from their source again.", metrics.refaults),
        ("kept", "Pages that should have left, and that the kernel kept.", metrics.kept),
        ("overruns", "Pages that were filled above the limit.", metrics.overruns),
        ("write_backs", "Written pages whose bytes went to their sources.", metrics.write_backs),
        ("write_failures", "Writes to sources that have failed.", metrics.write_failures),
        ("pressure_reports", "Reports of memory pressure by the kernel.", metrics.pressure_reports),
    ]
}
