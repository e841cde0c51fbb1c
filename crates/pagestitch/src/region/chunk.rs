//! A chunk: a byte range of one source, to be laid into a region.

use crate::source::{Backing, File, Hole, Memfd, Memory, Source};
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;

/// A byte range of one source. It may start and end anywhere; chunks lie end to end in a region.
///
/// ```
/// use std::sync::Arc;
/// use pagestitch::Chunk;
/// use pagestitch::source::Memory;
///
/// let whole = Chunk::from(vec![1u8; 5_000]);
/// let part = Chunk::from(vec![2u8; 5_000]).range(100..777);
/// let shared: Arc<[u8]> = vec![3u8; 64].into();
/// let twice = [Chunk::from(Arc::clone(&shared)), Chunk::from(shared)];
/// let zeros = Chunk::hole(1 << 30);
/// # let _ = (whole, part, twice, zeros);
/// ```
#[derive(Debug, Clone)]
pub struct Chunk {
    pub(super) backing: Backing,
    pub(super) range: Range<u64>,
}

impl Chunk {
    /// All bytes of a source of your own. Clone the `Arc` to take several chunks of it.
    #[must_use]
    pub fn source<S: Source + 'static>(source: Arc<S>) -> Self {
        Self::whole(Backing::Read(source))
    }

    /// `bytes` zeros.
    #[must_use]
    pub const fn hole(bytes: u64) -> Self {
        Self { backing: Backing::Hole(Hole), range: 0..bytes }
    }

    /// Only these bytes of the source, counted from the source's start.
    ///
    /// A range that is empty or reaches past the source's end is an error when the region is built.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = range;
        self
    }

    fn whole(backing: Backing) -> Self {
        let range = 0..backing.source().size();
        Self { backing, range }
    }
}

impl From<Memory> for Chunk {
    fn from(memory: Memory) -> Self {
        Self::whole(Backing::Memory(memory))
    }
}

impl From<Memfd> for Chunk {
    fn from(memfd: Memfd) -> Self {
        Self::whole(Backing::Memfd(memfd))
    }
}

impl From<File> for Chunk {
    fn from(file: File) -> Self {
        Self::source(Arc::new(file))
    }
}

impl From<Arc<File>> for Chunk {
    fn from(file: Arc<File>) -> Self {
        Self::source(file)
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        Memory::from(bytes).into()
    }
}

impl From<Box<[u8]>> for Chunk {
    fn from(bytes: Box<[u8]>) -> Self {
        Memory::from(bytes).into()
    }
}

impl From<Arc<[u8]>> for Chunk {
    fn from(bytes: Arc<[u8]>) -> Self {
        Memory::from(bytes).into()
    }
}

impl From<Bytes> for Chunk {
    fn from(bytes: Bytes) -> Self {
        Memory::from(bytes).into()
    }
}

impl From<&'static [u8]> for Chunk {
    fn from(bytes: &'static [u8]) -> Self {
        Memory::from(bytes).into()
    }
}
