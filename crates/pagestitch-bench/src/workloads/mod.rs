//! The workloads, with their baselines.

mod build;
mod changes;
mod crowd;
mod curve;
mod evict;
mod latency;
mod mapped;
mod metering;
mod ooc;
mod parallel;
mod populate;
mod regions;
pub(crate) mod restore;
pub(crate) mod scaling;
mod scan;
mod shards;
mod sparse;

use crate::case::{Case, Options};
use crate::format::{round_count, round_seconds};
use curve::CPU_BY_THREADS;

pub(crate) use curve::{BY_THREADS, Curve, THREADS};

/// A workload.
pub struct Workload {
    /// Its name on the command line and in the rows.
    pub name: &'static str,
    /// The question that it answers.
    pub about: &'static str,
    /// The axes of its curves, if its points make some.
    pub(crate) curves: &'static [Curve],
    /// True if [`Options::threads`] sets its numbers of threads.
    pub(crate) takes_threads: bool,
    /// Makes the data, warms the memory, and returns the systems at all points.
    pub(crate) cases: fn(&Options) -> Vec<Case>,
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workload").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Workload {
    /// True if [`Options::threads`] sets its numbers of threads.
    #[must_use]
    pub const fn takes_threads(&self) -> bool {
        self.takes_threads
    }
}

/// All workloads, in the order of a run.
pub static ALL: [Workload; 17] = [
    // The first one, because it measures memory: memory that the allocator kept from another
    // workload would hide its own.
    Workload {
        name: "build",
        about: "building a region, and locating a byte, by the number of chunks",
        curves: &[Curve {
            group: None,
            x: "chunks",
            y: "time each",
            value: |row| row.seconds / row.pages.max(1) as f64,
            label: round_seconds,
        }],
        takes_threads: false,
        cases: build::cases,
    },
    Workload {
        name: "latency",
        about: "the wait of a thread for a page: random first touches of 64 MiB without readahead, by one thread unless --threads names others",
        curves: &[],
        takes_threads: true,
        cases: latency::cases,
    },
    Workload {
        name: "scan",
        about: "reading 512 MiB from start to end once, with the time to build or copy",
        curves: &[],
        takes_threads: true,
        cases: scan::cases,
    },
    Workload {
        name: "sparse",
        about: "touching a share of the pages of 1 GiB, with the time to build or copy: lazy against eager",
        curves: &[Curve {
            group: None,
            x: "% of the pages touched",
            y: "time",
            value: |row| row.seconds,
            label: round_seconds,
        }],
        takes_threads: false,
        cases: sparse::cases,
    },
    Workload {
        name: "parallel",
        about: "faults per second of several threads, on disjoint pages and on the same ones",
        curves: &[
            Curve {
                group: None,
                x: THREADS,
                y: "faults per second",
                value: |row| row.faults_per_s,
                label: round_count,
            },
            CPU_BY_THREADS,
        ],
        takes_threads: true,
        cases: parallel::cases,
    },
    Workload {
        name: "scaling",
        about: "one region and several threads, beside prototypes that do the least: random first touches of 256 MiB, sums of 2 GiB",
        curves: &scaling::CURVES,
        takes_threads: true,
        cases: scaling::cases,
    },
    Workload {
        name: "mapped",
        about: "a memfd of 256 MiB mapped in place, against a plain mmap of it",
        curves: &[],
        takes_threads: false,
        cases: mapped::cases,
    },
    Workload {
        name: "shards",
        about: "40 tensors in 8 files of 80 MiB: opened, laid end to end, used once and dropped, against a plain mmap of each file",
        curves: &[],
        takes_threads: false,
        cases: shards::cases,
    },
    // A workload of its own, because the kernel frees so many mappings for a while after they are
    // unmapped.
    Workload {
        name: "mappings",
        about: "building a region of 65,000 pages of a memfd, one mapping each, against as many bare mmap calls",
        curves: &[],
        takes_threads: false,
        cases: mapped::many,
    },
    Workload {
        name: "regions",
        about: "random first touches of 64 MiB, spread over several regions of one pool",
        curves: &[Curve {
            group: None,
            x: "regions",
            y: "median latency",
            value: |row| row.p50_ns.unwrap_or(0) as f64 / 1e9,
            label: round_seconds,
        }],
        takes_threads: false,
        cases: regions::cases,
    },
    Workload {
        name: "crowd",
        about: "building and dropping a region of 16 pages among others on one pool, and the descriptors of all of them",
        curves: &[],
        takes_threads: false,
        cases: crowd::cases,
    },
    Workload {
        name: "restore",
        about: "a guest in another process, restored from a memory file of 2 GiB: its threads, four unless --threads names others, touch a tenth of it at random",
        curves: &[],
        takes_threads: true,
        cases: restore::cases,
    },
    Workload {
        name: "metering",
        about: "timing the parts of each fault, against counting faults: random first touches of 64 MiB",
        curves: &[],
        takes_threads: false,
        cases: metering::cases,
    },
    Workload {
        name: "changes",
        about: "finding the pages of 1 GiB that were written, and arming them again, against reading the kernel's page table; and arming alone",
        curves: &[],
        takes_threads: false,
        cases: changes::cases,
    },
    Workload {
        name: "ooc",
        about: "reading and writing more than memory holds: 2 GiB of chunks in 512 MiB, and a file of 4 GiB on a disk in a cgroup of 1 GiB (as root, or where cgroups can be made)",
        curves: &[],
        takes_threads: false,
        cases: ooc::cases,
    },
    Workload {
        name: "evict",
        about: "clean pages that leave a region with a budget, and touches of pages that have left: 256 MiB that leave, 64 MiB that are touched",
        curves: &[],
        takes_threads: false,
        cases: evict::cases,
    },
    Workload {
        name: "populate",
        about: "filling 512 MiB at once",
        curves: &[],
        takes_threads: true,
        cases: populate::cases,
    },
];
