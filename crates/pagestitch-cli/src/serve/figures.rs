//! The figures of a handler, in the text format of Prometheus. Those of guests that have ended stay
//! in the sums, so that no counter falls.

use pagestitch::{Histogram, Meter, Metrics};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::fmt::{Display, Write};
use std::sync::Arc;
use std::time::Duration;

/// The figures of a handler, shared with the thread that answers scrapes.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures(Arc<Mutex<Content>>);

#[derive(Debug, Clone, Default)]
struct Content {
    snapshot_bytes: u64,
    /// The guests that are served, by their keys.
    guests: HashMap<usize, Meter>,
    restored: u64,
    refused: u64,
    ended: u64,
    detached: u64,
    /// The counters of guests that have ended or are detached.
    past: Sums,
}

/// The sums over guests.
#[derive(Debug, Clone, Default)]
struct Sums {
    counters: BTreeMap<&'static str, u64>,
    queue: Distribution,
    fill: Distribution,
    resolve: Distribution,
}

/// A histogram with the same bounds for all guests.
#[derive(Debug, Clone)]
struct Distribution {
    /// The number of durations up to each of the [`bounds`], and above the last one.
    counts: [u64; BOUNDS + 1],
    sum: Duration,
}

impl Figures {
    pub(super) fn of_snapshot(bytes: u64) -> Self {
        Self(Arc::new(Mutex::new(Content { snapshot_bytes: bytes, ..Content::default() })))
    }

    pub(super) fn restored(&self, key: usize, meter: Meter) {
        let mut content = self.0.lock();
        content.restored += 1;
        content.guests.insert(key, meter);
    }

    pub(super) fn refused(&self) {
        self.0.lock().refused += 1;
    }

    /// Keeps the final counters of a guest. Returns its meter.
    pub(super) fn ended(&self, key: usize) -> Option<Meter> {
        let mut content = self.0.lock();
        content.ended += 1;
        content.leave(key)
    }

    /// Keeps the final counters of a guest that runs on. Returns its meter.
    pub(super) fn detached(&self, key: usize) -> Option<Meter> {
        let mut content = self.0.lock();
        content.detached += 1;
        content.leave(key)
    }

    /// The number of guests that are served.
    pub(super) fn guests(&self) -> usize {
        self.0.lock().guests.len()
    }

    /// The answer to a scrape.
    pub(super) fn page(&self) -> String {
        // A copy, so that the handler does not wait while the page is written.
        let Content { snapshot_bytes, guests, restored, refused, ended, detached, past } =
            self.0.lock().clone();
        let mut sums = past;
        guests.values().for_each(|meter| sums.add(meter));
        let in_flight: usize = guests.values().map(Meter::in_flight).sum();
        let oldest = guests.values().filter_map(Meter::oldest).map(|(_, age)| age).max().unwrap_or_default();
        let mut page = Page::default();
        page.gauge("build_info", "Its label is the version of pagestitch.", [(BUILD, 1)]);
        page.gauge("snapshot_bytes", "The bytes of the snapshot's memory.", [("", snapshot_bytes)]);
        page.gauge("guests", "Guests that are served now.", [("", guests.len())]);
        page.counter("guests_restored", "Guests that were served since the start.", restored);
        page.counter("guests_refused", "Clients that were refused.", refused);
        page.counter("guests_ended", "Guests whose VMM has ended while they were served.", ended);
        page.counter(
            "guests_detached",
            "Guests that run on without the handler since its shutdown.",
            detached,
        );
        page.gauge("faults_in_flight", "Faults that are served or wait for a worker now.", [("", in_flight)]);
        page.gauge(
            "oldest_fault_seconds",
            "The age of the oldest fault in flight.",
            [("", oldest.as_secs_f64())],
        );
        for (name, sum) in &sums.counters {
            page.counter(name, Metrics::description(name).unwrap_or(UNKNOWN), *sum);
        }
        let parts = [("queue", &sums.queue), ("fill", &sums.fill), ("resolve", &sums.resolve)];
        page.histograms("fault_seconds", FAULT_SECONDS, &parts);
        page.0
    }
}

impl Content {
    fn leave(&mut self, key: usize) -> Option<Meter> {
        let meter = self.guests.remove(&key);
        meter.iter().for_each(|meter| self.past.add(meter));
        meter
    }
}

impl Sums {
    fn add(&mut self, meter: &Meter) {
        for (name, value) in meter.metrics().all() {
            *self.counters.entry(name).or_default() += value;
        }
        if let Some(latency) = meter.latency() {
            self.queue.add(&latency.queue);
            self.fill.add(&latency.fill);
            self.resolve.add(&latency.resolve);
        }
    }
}

impl Distribution {
    fn add(&mut self, histogram: &Histogram) {
        for (longest, count) in histogram.steps() {
            let bound = bounds().position(|bound| longest <= bound).unwrap_or(BOUNDS);
            self.counts[bound] += count;
            self.sum += Duration::from_secs_f64(longest.as_secs_f64() * count as f64);
        }
    }
}

impl Default for Distribution {
    fn default() -> Self {
        Self { counts: [0; BOUNDS + 1], sum: Duration::ZERO }
    }
}

/// The text of an answer.
#[derive(Default)]
struct Page(String);

impl Page {
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(&format!("{name}_total"), "counter", help);
        self.line(&format!("{name}_total"), "", value);
    }

    fn gauge<V: Display>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (&'static str, V)>,
    ) {
        self.family(name, "gauge", help);
        values.into_iter().for_each(|(labels, value)| self.line(name, labels, value));
    }

    fn histograms(&mut self, name: &str, help: &str, parts: &[(&str, &Distribution)]) {
        self.family(name, "histogram", help);
        for (part, distribution) in parts {
            let mut below = 0;
            let bounds = bounds().map(|bound| bound.as_secs_f64().to_string()).chain([String::from("+Inf")]);
            for (bound, count) in bounds.zip(distribution.counts) {
                below += count;
                self.line(&format!("{name}_bucket"), &format!("{{part=\"{part}\",le=\"{bound}\"}}"), below);
            }
            let label = format!("{{part=\"{part}\"}}");
            self.line(&format!("{name}_sum"), &label, distribution.sum.as_secs_f64());
            self.line(&format!("{name}_count"), &label, below);
        }
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP pagestitch_{name} {help}\n# TYPE pagestitch_{name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = writeln!(self.0, "pagestitch_{name}{labels} {value}");
    }
}

/// The upper bounds of the histograms: powers of two from 1 us to 34 s, because the recorded
/// durations are known to within an eighth of a power of two.
fn bounds() -> impl Iterator<Item = Duration> {
    (0..BOUNDS).map(|power| Duration::from_nanos(1024 << power))
}

const UNKNOWN: &str = "A counter of pagestitch::Metrics.";
const BUILD: &str = concat!("{version=\"", env!("CARGO_PKG_VERSION"), "\"}");
const FAULT_SECONDS: &str = "The duration of the parts of faults: queue, from the read of the fault to its service; fill, finding the bytes; resolve, \
     installing them. Each duration is known to within an eighth, and so is the sum.";
const BOUNDS: usize = 26;

#[cfg(test)]
mod tests {
    use super::*;
    use pagestitch::{Chunk, Pool, Region};

    fn value(page: &str, series: &str) -> f64 {
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("pagestitch_{series} ")));
        line.unwrap_or_else(|| panic!("{series} is not in\n{page}")).parse().unwrap()
    }

    #[test]
    fn counters_and_histograms_keep_the_guests_that_have_ended() {
        let pool = Pool::new().unwrap();
        let figures = Figures::of_snapshot(40960);
        for key in [1, 2] {
            let builder = Region::builder().chunk(Chunk::from(vec![7; 40960])).record_latency();
            let region = builder.build(&pool).unwrap();
            figures.restored(key, region.meter());
            assert_eq!(region.as_slice()[5000], 7);
            let faults = region.close().faults;
            assert!(faults >= 1);
            let before = value(&figures.page(), "faults_total");
            assert!(before >= (key as u64 * faults) as f64, "{before}");
            assert!(figures.ended(key).is_some() && figures.ended(99).is_none());
            assert_eq!(value(&figures.page(), "faults_total"), before);
        }
        let page = figures.page();
        let faults = value(&page, "faults_total");
        for part in ["queue", "fill", "resolve"] {
            assert_eq!(value(&page, &format!("fault_seconds_count{{part=\"{part}\"}}")), faults);
            assert_eq!(value(&page, &format!("fault_seconds_bucket{{part=\"{part}\",le=\"+Inf\"}}")), faults);
            assert!(value(&page, &format!("fault_seconds_sum{{part=\"{part}\"}}")) > 0.0);
        }
        assert_eq!((value(&page, "guests"), value(&page, "snapshot_bytes")), (0.0, 40960.0));
    }

    #[test]
    fn each_family_has_a_type_and_a_help_before_its_first_sample() {
        let region = Region::builder().chunk(vec![7; 4096]).build(&Pool::new().unwrap()).unwrap();
        let figures = Figures::of_snapshot(4096);
        figures.restored(1, region.meter());
        figures.refused();
        let page = figures.page();
        assert!(!page.contains(UNKNOWN), "a counter has no help in\n{page}");
        let mut family = "";
        for line in page.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(
                    help.ends_with('.') && page.matches(&format!("# TYPE {name} ")).count() == 1,
                    "{line}"
                );
                family = name;
            } else {
                assert!(line.trim_start_matches("# TYPE ").starts_with(family), "{line} is not of {family}");
            }
        }
        assert_eq!(value(&page, "guests_refused_total"), 1.0);
    }

    #[test]
    fn a_duration_counts_below_its_bound() {
        let bounds: Vec<_> = bounds().collect();
        assert_eq!(
            (bounds[0], bounds[BOUNDS - 1]),
            (Duration::from_nanos(1024), Duration::from_nanos(1 << 35))
        );
        let mut page = Page::default();
        let mut distribution = Distribution::default();
        distribution.counts[1] = 3;
        distribution.counts[BOUNDS] = 1;
        page.histograms("x_seconds", "Help.", &[("fill", &distribution)]);
        let at = |bound: &str| value(&page.0, &format!("x_seconds_bucket{{part=\"fill\",le=\"{bound}\"}}"));
        assert_eq!((at("0.000001024"), at("0.000002048"), at("+Inf")), (0.0, 3.0, 4.0));
    }
}
