//! The scene of `--live`: the regions that are drawn, with their rates, and the latest lines of text.

use pagestitch::{Budget, BudgetMetrics, Meter, Metrics};
use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The regions and lines that `--live` draws. Commands add to it; the drawing thread reads it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scene(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
pub(crate) struct Content {
    pub(crate) regions: Vec<Watched>,
    pub(crate) lines: VecDeque<String>,
}

/// A region, with its counters at the time of the latest update.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) meter: Meter,
    updated: Instant,
    pub(crate) metrics: Metrics,
    pub(crate) faults_per_second: f64,
    pub(crate) pages_per_second: f64,
    /// The limit of its memory, if it has one.
    pub(crate) budget: Option<Limit>,
}

/// A limit of memory, with its counts at the time of the latest update.
#[derive(Debug)]
pub(crate) struct Limit {
    pub(crate) budget: Budget,
    pub(crate) metrics: BudgetMetrics,
    pub(crate) evictions_per_second: f64,
}

impl Scene {
    pub(crate) fn add(&self, meter: Meter) {
        self.push(meter, None);
    }

    /// Adds a region whose pages leave because of a budget.
    pub(crate) fn add_limited(&self, meter: Meter, budget: Budget) {
        let metrics = budget.metrics();
        self.push(meter, Some(Limit { budget, metrics, evictions_per_second: 0.0 }));
    }

    fn push(&self, meter: Meter, budget: Option<Limit>) {
        let metrics = meter.metrics();
        let (faults_per_second, pages_per_second) = (0.0, 0.0);
        let watched =
            Watched { meter, updated: Instant::now(), metrics, faults_per_second, pages_per_second, budget };
        self.lock().regions.push(watched);
    }

    pub(crate) fn remove(&self, name: &str) {
        self.lock().regions.retain(|watched| watched.meter.region() != name);
    }

    /// Appends a line of text, and drops the oldest one above the limit.
    pub(crate) fn say(&self, line: String) {
        let lines = &mut self.lock().lines;
        lines.push_back(line);
        lines.drain(..lines.len().saturating_sub(LINES_KEPT));
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock()
    }
}

impl Watched {
    /// Reads the counters and computes the rates. Rates over less than `shortest` would jump, so
    /// they stay.
    pub(crate) fn update(&mut self, shortest: Duration) {
        let (now, metrics) = (Instant::now(), self.meter.metrics());
        let elapsed = now - self.updated;
        if elapsed <= shortest {
            return;
        }
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / elapsed.as_secs_f64();
        self.faults_per_second = rate(metrics.faults, self.metrics.faults);
        self.pages_per_second = rate(metrics.pages_installed(), self.metrics.pages_installed());
        if let Some(Limit { budget, metrics, evictions_per_second }) = &mut self.budget {
            let now = budget.metrics();
            *evictions_per_second = rate(now.evictions, metrics.evictions);
            *metrics = now;
        }
        (self.updated, self.metrics) = (now, metrics);
    }
}

const LINES_KEPT: usize = 100;
