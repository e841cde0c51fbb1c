//! The counters of a stress run.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! tally {
    ($($(#[doc = $doc:literal])+ $name:ident,)*) => {
        /// What was done, over all rounds.
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
    /// Regions built and dropped.
    regions,
    /// Faults that were served.
    faults,
    /// Pages that were installed.
    pages,
    /// Bytes that were compared with what they have to be.
    bytes_verified,
    /// Reads that failed where a source was declared to.
    errors_as_declared,
    /// Reads that failed because the kernel was made to refuse something.
    errors_as_injected,
    /// Failures, panics and dropped requests of sources.
    failures_injected,
    /// Answers that were delayed.
    delays_injected,
    /// Ranges that were let go of while others touched them.
    discards,
    /// Ranges that a guest gave back.
    balloons,
    /// Processes that were started meanwhile.
    forks,
    /// ForkedChild children that looked at a region.
    children,
    /// Pages that were healed.
    retried,
    /// Times that all memory of the process was locked.
    locked,
    /// Rounds that would have locked it, in a process that may not.
    locked_skipped,
    /// Calls on a part of a region: they split its mapping, as a rule, or page it out.
    splits,
    /// Donations whose chunks lie in another order, and share pages.
    donated_rotations,
    /// Parts of memfds of huge pages.
    hugetlb_parts,
    /// Those that could not be had: there are no huge pages (vm.nr_hugepages).
    hugetlb_parts_skipped,
    /// Times that a process with a time limit was stopped.
    stopped,
}

impl Tally {
    pub(super) fn count(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
