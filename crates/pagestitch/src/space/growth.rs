//! The room of a region for chunks that are appended later.

use pagestitch_kernel::Errno;
use parking_lot::{Mutex, MutexGuard};

/// Writes the first bytes behind the region's length in place, and makes the bytes before an offset
/// visible.
pub(crate) type Reveal<'r> = &'r dyn Fn(&[u8], usize) -> Result<(), Errno>;

/// The room of a region for further chunks.
#[derive(Debug)]
pub(crate) struct Growth {
    /// The most bytes of the region.
    pub(super) capacity: u64,
    /// The alignment of each chunk, in bytes.
    pub(super) align: u64,
    /// The number of chunks of the build, including padding.
    built: usize,
    /// Held while a chunk is appended.
    appending: Mutex<()>,
}

impl Growth {
    pub(crate) const fn new(capacity: u64, align: u64, built: usize) -> Self {
        Self { capacity, align, built, appending: Mutex::new(()) }
    }

    pub(crate) const fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.appending.lock()
    }

    /// True if a chunk was appended after the build.
    pub(super) const fn has_appended(&self, chunk: usize) -> bool {
        chunk >= self.built
    }
}
