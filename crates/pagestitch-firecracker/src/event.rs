//! The events that a handler reports.

use crate::HandshakeError;
use pagestitch::{Meter, Metrics, Process};
use std::fmt;
use std::path::Path;

/// An event of a handler. `Display` is a line for a person.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A guest is served.
    Restored {
        /// The process that owns the guest's memory: its VMM.
        owner: &'a Process,
        /// The bytes of its memory.
        bytes: u64,
        /// The counters of its memory.
        meter: Meter,
    },
    /// A client is refused.
    Refused {
        /// Its pid, if it is known.
        owner: Option<u32>,
        /// The reason.
        reason: &'a HandshakeError,
    },
    /// The VMM of a guest has ended.
    Ended {
        /// The VMM.
        owner: &'a Process,
        /// The final counters of the guest.
        metrics: Metrics,
        /// The number of pages whose bytes were unavailable.
        pages_lost: usize,
    },
    /// The first touches of a guest were written to a file, or the guest touched nothing.
    Recorded {
        /// The process that owns the guest's memory: its VMM.
        owner: &'a Process,
        /// The file.
        path: &'a Path,
        /// The number of pages, or the error of the file.
        outcome: Result<usize, pagestitch::Error>,
    },
    /// The [background fill](crate::Builder::background) of a guest has ended. Told once a guest. If no
    /// page is missing, [`Detached`](Self::Detached) follows: the guest needs no handler any more.
    Filled {
        /// The process that owns the guest's memory: its VMM.
        owner: &'a Process,
        /// The number of pages that the fill has brought. Faults and a recording bring the others.
        pages: u64,
        /// The number of pages that could not be filled. The guest still needs the handler for these:
        /// their touch reads the snapshot again.
        pages_missing: u64,
    },
    /// A guest runs without the handler from now on: with all of its memory or, after an error,
    /// without some of it.
    Detached {
        /// The process that owns the guest's memory: its VMM.
        owner: &'a Process,
        /// The final counters of the guest.
        outcome: Result<Metrics, pagestitch::Error>,
    },
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restored { owner, bytes, .. } => write!(f, "{owner}: serving {} MiB", bytes >> 20),
            Self::Refused { owner: Some(pid), reason } => {
                write!(f, "process {pid}: refused, because it {reason}")
            }
            Self::Refused { owner: None, reason } => write!(f, "a client: refused, because it {reason}"),
            Self::Ended { owner, metrics, pages_lost: 0 } => {
                write!(
                    f,
                    "{owner}: ended after {} faults, {} pages",
                    metrics.faults,
                    metrics.pages_installed()
                )
            }
            Self::Ended { owner, pages_lost, .. } => {
                write!(f, "{owner}: ended; {pages_lost} of its pages were unavailable")
            }
            Self::Recorded { owner, path, outcome: Ok(0) } => {
                write!(f, "{owner}: touched no page; {} is unchanged", path.display())
            }
            Self::Recorded { owner, path, outcome: Ok(pages) } => {
                write!(f, "{owner}: {pages} first touches recorded in {}", path.display())
            }
            Self::Recorded { owner, outcome: Err(error), .. } => {
                write!(f, "{owner}: first touches not recorded: {error}")
            }
            Self::Filled { owner, pages, pages_missing: 0 } => {
                write!(f, "{owner}: all of its memory is filled, {pages} pages in the background")
            }
            Self::Filled { owner, pages, pages_missing } => {
                write!(
                    f,
                    "{owner}: {pages} pages filled in the background; {pages_missing} could not be read, so it still needs the handler"
                )
            }
            Self::Detached { owner, outcome: Ok(metrics) } => {
                write!(f, "{owner}: detached, {} pages filled", metrics.pages_installed())
            }
            Self::Detached { owner, outcome: Err(error) } => {
                write!(f, "{owner}: detached with missing pages: {error}")
            }
        }
    }
}
