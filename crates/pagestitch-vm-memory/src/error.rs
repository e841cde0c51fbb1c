//! The errors of guest regions.

use std::io;

/// A region that cannot be guest memory, or cannot be shared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestRegionError {
    /// The region has no bytes.
    #[error("region {region} has no bytes, and guest memory needs some: append a chunk first")]
    Empty {
        /// The name of the region.
        region: String,
    },
    /// The region would end at the last guest address or past it.
    #[error(
        "region {region} of {bytes} bytes does not fit at guest address {start:#x}, because its end would be 2^64 or more: choose a lower address"
    )]
    TooHigh {
        /// The name of the region.
        region: String,
        /// Its length.
        bytes: u64,
        /// The guest address of its first byte.
        start: u64,
    },
    /// No other process can map the region.
    #[error("region {region} has no file that another process can map: build it on_memfd()")]
    NoFile {
        /// The name of the region.
        region: String,
    },
    /// The descriptor of the region's memfd cannot be duplicated.
    #[error("region {region}: cannot duplicate the descriptor of its memfd (ulimit -n): {error}")]
    Descriptor {
        /// The name of the region.
        region: String,
        /// The error of the system call.
        error: io::Error,
    },
    /// The region is read-only, or its changes are not tracked.
    #[error(transparent)]
    Region(#[from] pagestitch::Error),
}
