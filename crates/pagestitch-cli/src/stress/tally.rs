//! The counters of a stress run.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! tally {
    ($($(#[doc = $doc:literal])+ $name:ident,)*) => {
        /// The counters of a run, over all rounds.
        #[derive(Debug, Default)]
        pub(super) struct Tally { $($(#[doc = $doc])+ pub(super) $name: AtomicU64,)* }

        impl Tally {
            pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

tally! {
    /// Regions that were built and dropped.
    regions,
    /// Faults that were served.
    faults,
    /// Pages that were installed.
    pages,
    /// Bytes that were compared with the model.
    bytes_verified,
    /// Reads that failed in a range whose source may fail.
    errors_as_declared,
    /// Reads that failed because of an injected answer of the kernel.
    errors_as_injected,
    /// Failures, panics and dropped requests of sources.
    failures_injected,
    /// Delayed answers of sources.
    delays_injected,
    /// Ranges that were discarded while other threads touched them.
    discards,
    /// Pages that a guest discarded.
    balloons,
    /// Processes that were started during a round.
    forks,
    /// Forked children that read a region.
    children,
    /// Failed pages that were filled by a retry.
    retried,
    /// Rounds that locked all memory of the process.
    locked,
    /// Rounds without their locks, because the process may not lock.
    locked_skipped,
    /// Shards of the regions that were built.
    shards,
    /// Threads that stayed on one CPU.
    pinned_threads,
    /// Calls on a part of a region, most of which split its mapping.
    splits,
    /// Donations whose chunks have another order, and share pages.
    donated_rotations,
    /// Chunks of files.
    files,
    /// Chunks of files that are read around the page cache.
    direct_files,
    /// Faults in regions that are served inline.
    inline_faults,
    /// Parts of memfds of huge pages.
    hugetlb_parts,
    /// Parts that were left out, because no huge pages are reserved (vm.nr_hugepages).
    hugetlb_parts_skipped,
    /// Times that the process with a time limit was stopped.
    stopped,
    /// Regions with a budget.
    bounded,
    /// Regions whose written pages go back to their sources.
    written_back,
    /// Those of them that are served inline.
    written_back_inline,
    /// Regions that were not built, because the kernel cannot record writes, or cannot move pages.
    written_back_skipped,
    /// Pages that have left regions with a budget.
    evictions,
    /// Pages that have come back without a read of their source.
    soft_faults,
    /// Pages above a budget, because none could leave.
    overruns,
    /// Flushes.
    flushes,
    /// Flushes that have returned an announced error.
    flushes_failed,
    /// Errors, panics and empty answers of sources that take bytes back.
    write_failures_injected,
    /// Writes that took some of the bytes, or none for the moment.
    short_writes_injected,
    /// Chunks that were appended.
    appends,
    /// Ranges that got other bytes.
    replacements,
    /// Ranges that were pinned.
    pins,
}

impl Tally {
    pub(super) fn count(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
