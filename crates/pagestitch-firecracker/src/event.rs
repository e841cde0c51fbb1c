//! What a handler tells.

use crate::HandshakeError;
use pagestitch::{Meter, Metrics, Process};
use std::fmt;
use std::path::Path;

/// What has happened. `Display` is a line for a person.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A guest is served.
    Restored {
        /// Its VMM.
        owner: &'a Process,
        /// How much memory it has.
        bytes: u64,
        /// What happens in it.
        meter: Meter,
    },
    /// A client is not served.
    Refused {
        /// Its process, if it can be told.
        owner: Option<i32>,
        /// Why not.
        why: &'a HandshakeError,
    },
    /// A guest's VMM has ended.
    Ended {
        /// It.
        owner: &'a Process,
        /// What was done for it.
        metrics: Metrics,
        /// Pages whose bytes could not be had.
        lost: usize,
    },
    /// The first touches of a guest were written to a file; of a guest that touched nothing, they were not.
    Recorded {
        /// Its VMM.
        owner: &'a Process,
        /// The file.
        path: &'a Path,
        /// How many pages, or why it could not be written.
        outcome: Result<usize, pagestitch::Error>,
    },
    /// A guest was left to itself, with all of its memory or, if it is an error, without.
    Detached {
        /// Its VMM.
        owner: &'a Process,
        /// What was done for it.
        outcome: Result<Metrics, pagestitch::Error>,
    },
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restored { owner, bytes, .. } => write!(f, "{owner}: serving {} MiB", bytes >> 20),
            Self::Refused { owner: Some(pid), why } => write!(f, "process {pid}: refused: it {why}"),
            Self::Refused { owner: None, why } => write!(f, "a client: refused: it {why}"),
            Self::Ended { owner, metrics, lost: 0 } => {
                write!(
                    f,
                    "{owner}: ended after {} faults, {} pages",
                    metrics.faults,
                    metrics.pages_installed()
                )
            }
            Self::Ended { owner, lost, .. } => {
                write!(f, "{owner}: ended; {lost} pages of it could not be had")
            }
            Self::Recorded { owner, path, outcome: Ok(0) } => {
                write!(f, "{owner}: nothing was touched: {} is left as it was", path.display())
            }
            Self::Recorded { owner, path, outcome: Ok(pages) } => {
                write!(f, "{owner}: {pages} first touches recorded in {}", path.display())
            }
            Self::Recorded { owner, outcome: Err(error), .. } => {
                write!(f, "{owner}: its first touches are lost: {error}")
            }
            Self::Detached { owner, outcome: Ok(metrics) } => {
                write!(f, "{owner}: left to itself, {} pages filled", metrics.pages_installed())
            }
            Self::Detached { owner, outcome: Err(error) } => write!(f, "{owner}: left incomplete: {error}"),
        }
    }
}
