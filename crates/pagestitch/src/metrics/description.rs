//! What each counter counts, for exporters.

use crate::metrics::Metrics;

impl Metrics {
    /// What a counter of [`all`](Self::all) counts, in a sentence. `None` for another name.
    ///
    /// ```
    /// use pagestitch::Metrics;
    ///
    /// for (counter, _) in Metrics::default().all() {
    ///     println!("# HELP {counter} {}", Metrics::description(counter).unwrap());
    /// }
    /// assert_eq!(Metrics::description("elephants"), None);
    /// ```
    #[must_use]
    pub fn description(counter: &str) -> Option<&'static str> {
        Some(match counter {
            "faults" => "Faults read from the kernel, one for each page and batch.",
            "faults_writing" => "Faults of writers.",
            "faults_minor" => "Faults on pages that the page cache has and no page table maps.",
            "faults_overdue" => "Faults that were reported for taking too long.",
            "faults_timed_out" => "Faults that timed out, so that their pages were poisoned.",
            "children" => "Forked children that inherited the region.",
            "faults_spurious" => "Faults whose page was present by the time they were served.",
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
            "pages_zeroed_on_failure" => "Pages with zeros for bytes of a failed source.",
            "retries" => "Fills that met a change of the memory map or a lack of memory, and were repeated.",
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_a_description() {
        assert!(Metrics::default().all().all(|(name, _)| Metrics::description(name).is_some()));
    }
}
