//! The counters of a region for the `metrics` facade, and for the exporter that the program has
//! installed.

use super::{Histogram, Latency, Meter, Metrics};
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

impl Meter {
    /// Passes the current counters to the recorder of the [`metrics`] crate. Their names are those
    /// of [`Metrics`](crate::Metrics) with the prefix `pagestitch_`, and the region's name is a
    /// label. Each has a unit and a description. Call it before the counters are read: on a timer, or
    /// for a scrape.
    ///
    /// Serving a fault calls no recorder. Needs the feature `metrics`.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).build(&Pool::new()?)?;
    /// let meter = region.meter();
    /// region.populate(..)?;
    /// meter.publish();                                            // on a timer, for example
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn publish(&self) {
        let region = || self.region().to_owned();
        describe();
        for (name, value) in self.metrics().all() {
            counter!(format!("pagestitch_{name}_total"), "region" => region()).absolute(value);
        }
        counter!("pagestitch_bytes_moved_total", "region" => region()).absolute(self.bytes_moved());
        counter!("pagestitch_bytes_mapped_total", "region" => region()).absolute(self.bytes_mapped());
        gauge!("pagestitch_faults_in_flight", "region" => region()).set(self.in_flight() as f64);
        let oldest = self.oldest().map_or(0.0, |(_, age)| age.as_secs_f64());
        gauge!("pagestitch_oldest_fault_seconds", "region" => region()).set(oldest);
        if let Some(Latency { queue, fill, resolve }) = self.latency() {
            for (part, histogram) in [("queue", queue), ("fill", fill), ("resolve", resolve)] {
                self.publish_quantiles(part, &histogram);
            }
        }
    }

    fn publish_quantiles(&self, part: &'static str, histogram: &Histogram) {
        for (label, share) in [("0.5", 0.5), ("0.9", 0.9), ("0.99", 0.99), ("1", 1.0)] {
            let labels = [
                ("region", self.region().to_owned()),
                ("part", part.to_owned()),
                ("quantile", label.to_owned()),
            ];
            gauge!("pagestitch_fault_seconds", &labels).set(histogram.quantile(share).as_secs_f64());
        }
    }
}

/// Describes all names, each time, because the program may install another recorder.
fn describe() {
    let none = Metrics::default();
    let counters = none.all().map(|(name, _)| (name, Metrics::description(name).unwrap_or(UNDESCRIBED)));
    let moved = [
        ("bytes_moved", "Bytes that moved in without a copy, or in staged blocks."),
        ("bytes_mapped", "Bytes mapped in place."),
    ];
    for (name, help) in counters.chain(moved) {
        let unit = if name.starts_with("bytes") { Unit::Bytes } else { Unit::Count };
        describe_counter!(format!("pagestitch_{name}_total"), unit, help);
    }
    for (name, unit, help) in [
        ("faults_in_flight", Unit::Count, "Faults that are served or wait for a worker now."),
        ("oldest_fault_seconds", Unit::Seconds, "The age of the oldest fault in flight."),
        ("fault_seconds", Unit::Seconds, "Quantiles of the duration of the parts of faults."),
    ] {
        describe_gauge!(format!("pagestitch_{name}"), unit, help);
    }
}

const UNDESCRIBED: &str = "A counter of pagestitch::Metrics.";
