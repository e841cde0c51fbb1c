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
    let counters = none.all().map(|(name, _)| (name, help(name)));
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

/// The meaning of a counter of [`Metrics`].
fn help(counter: &str) -> &'static str {
    match counter {
        "faults" => "Faults read from the kernel, one for each page and batch.",
        "faults_writing" => "Faults of writers.",
        "faults_minor" => "Faults on pages that the page cache has and no page table maps.",
        "faults_overdue" => "Faults that were reported for taking too long.",
        "faults_given_up" => "Faults that timed out, so that their pages were poisoned.",
        "children" => "Forked children that inherited the region.",
        "late" => "Faults whose page was present by the time they were served.",
        "pages_in_place" => "Pages mapped in place by the build: no copy, no fault.",
        "pages_copied" => "Pages copied from the memory of a source, without a buffer.",
        "pages_buffered" => "Pages read from one source into a buffer, and copied from there.",
        "pages_gathered" => "Pages gathered from several chunks in a buffer, and copied from there.",
        "pages_staged" => "Pages of whole blocks that were filled in staging and moved in.",
        "pages_moved" => "Donated pages that moved in without a copy.",
        "pages_continued" => "Pages of a memfd, mapped after their fill without a copy.",
        "pages_zeroed" => "Pages of zeros.",
        "pages_poisoned" => "Pages poisoned because their bytes were unavailable: a touch is SIGBUS.",
        "pages_recovered" => "Poisoned pages that were filled later.",
        "pages_ahead" => "Pages filled ahead of their first touch.",
        "pages_ahead_used" => "Pages filled ahead that a reader has passed.",
        "bytes_copied" => "Bytes copied into the region.",
        "bytes_released" => "Bytes of sources in memory that were released.",
        "source_errors" => "Failed reads of sources.",
        "source_retries" => "Repeated reads of sources.",
        "pages_given_up" => "Pages with zeros for bytes of a failed source.",
        "retries" => "Fills that met a change of the memory map or a lack of memory, and were repeated.",
        _ => UNDESCRIBED,
    }
}

const UNDESCRIBED: &str = "A counter of pagestitch::Metrics.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_a_description() {
        assert!(Metrics::default().all().all(|(name, _)| help(name) != UNDESCRIBED));
    }
}
