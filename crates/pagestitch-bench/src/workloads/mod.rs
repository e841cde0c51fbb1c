//! What is measured, and against what.

mod build;
mod latency;
mod mapped;
mod metering;
mod parallel;
mod populate;
mod regions;
mod restore;
mod scan;
mod sparse;

use crate::case::{Case, Options};
use crate::format::seconds;
use crate::row::Row;

/// Something to measure.
pub struct Workload {
    /// Its name, for the command line and the rows.
    pub name: &'static str,
    /// The question that it answers.
    pub about: &'static str,
    /// What its points are on, if they make a curve.
    pub(crate) curve: Option<Curve>,
    /// The systems at all points. Data is made, and memory warmed, here.
    pub(crate) cases: fn(&Options) -> Vec<Case>,
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workload").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The axes of a curve.
pub(crate) struct Curve {
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    pub(crate) value: fn(&Row) -> f64,
    /// How a value is written.
    pub(crate) label: fn(f64) -> String,
}

/// All of them, in the order in which they are run.
pub static ALL: [Workload; 11] = [
    // First, as it counts memory: an allocator that has kept some of an earlier one would seem to need none.
    Workload {
        name: "build",
        about: "what a region costs to build, and a byte to locate, by the number of its chunks",
        curve: Some(Curve {
            x: "chunks",
            y: "time each",
            value: |row| row.seconds / row.pages.max(1) as f64,
            label: seconds,
        }),
        cases: build::cases,
    },
    Workload {
        name: "latency",
        about: "how long a thread waits for a page: random first touches of 64 MiB, one thread, no readahead",
        curve: None,
        cases: latency::cases,
    },
    Workload {
        name: "scan",
        about: "reading 512 MiB from start to end once, building or copying included",
        curve: None,
        cases: scan::cases,
    },
    Workload {
        name: "sparse",
        about: "touching a share of the pages of 1 GiB, building or copying included: when does lazy beat eager?",
        curve: Some(Curve {
            x: "% of the pages touched",
            y: "time",
            value: |row| row.seconds,
            label: seconds,
        }),
        cases: sparse::cases,
    },
    Workload {
        name: "parallel",
        about: "faults a second of several threads, on pages of their own and on the same ones",
        curve: Some(Curve {
            x: "threads",
            y: "faults a second",
            value: |row| row.faults_per_s,
            label: |rate| format!("{:.0} k", rate / 1e3),
        }),
        cases: parallel::cases,
    },
    Workload {
        name: "mapped",
        about: "a memfd of 256 MiB shown in place, against a plain mmap of it",
        curve: None,
        cases: mapped::cases,
    },
    // Apart: the kernel is busy freeing so many mappings for a while after they have gone.
    Workload {
        name: "mappings",
        about: "building a region of 65,000 pages of a memfd, each a mapping, against as many bare mmap calls",
        curve: None,
        cases: mapped::many,
    },
    Workload {
        name: "regions",
        about: "random first touches of 64 MiB, spread over several regions of one pool",
        curve: Some(Curve {
            x: "regions",
            y: "median latency",
            value: |row| row.p50_ns.unwrap_or(0) as f64 / 1e9,
            label: seconds,
        }),
        cases: regions::cases,
    },
    Workload {
        name: "restore",
        about: "a guest in another process, restored from a memory file of 2 GiB: four threads touch a tenth of it, at random",
        curve: None,
        cases: restore::cases,
    },
    Workload {
        name: "metering",
        about: "what it costs to take the time of each fault's parts, beside counting them: random first touches of 64 MiB",
        curve: None,
        cases: metering::cases,
    },
    Workload { name: "populate", about: "filling 512 MiB at once", curve: None, cases: populate::cases },
];
