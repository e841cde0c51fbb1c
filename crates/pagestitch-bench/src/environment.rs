//! The machine of a measurement.

use std::fmt;
use std::fs;

/// The machine, for the head of a report.
#[derive(Debug, Clone)]
pub struct Environment {
    kernel: String,
    processor: String,
    cpus: usize,
    huge_pages: String,
    load: String,
}

impl Environment {
    /// Describes this machine at this moment.
    #[must_use]
    pub fn current() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let processor = read("/proc/cpuinfo");
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            kernel: pagestitch::Support::current().kernel().to_owned(),
            processor: processor
                .map_or_else(|| String::from("unknown processor"), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
            load: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
        }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, processor, cpus, huge_pages, load } = self;
        let page = pagestitch::Support::current().page_size();
        write!(
            f,
            "Linux {kernel}, {cpus} CPUs ({processor}), pages of {page}, huge pages {huge_pages}, load {load}"
        )
    }
}
