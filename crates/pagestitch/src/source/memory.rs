//! Bytes at a stable address: the kernel copies them into a page from there, without a buffer.

use super::Source;
use crate::error::FailureReason;
use bytes::Bytes;
use pagestitch_kernel::releasable::{Releasable, ReleasableGuard, Release};
use pagestitch_kernel::revocable::{RevocableGuard, RevocableSlice};
use std::any::Any;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::{fmt, io, mem};

/// Bytes in this process's memory, kept alive for as long as a region needs them.
///
/// Convert an owner of bytes (`Vec<u8>`, `Box<[u8]>`, `Arc<[u8]>`, [`Bytes`], `String`, an array,
/// `&'static [u8]`, `&'static str`), or pass any other `AsRef<[u8]>` value, such as a memory-mapped
/// file or a [`Region`](crate::Region), to [`Memory::new`]. Cloning does not copy the bytes. Bytes can be borrowed only inside a [`scope`](crate::scope()).
///
/// **Memory of a region** can be a chunk of another region only if the two have different servers:
/// a server that waits for itself may wait forever, so the build of the second region fails. Memory
/// of a region that is served [inline](crate::Inline) is refused too. For an ordinary user the
/// kernel copies no absent page of a region: [`populate`](crate::AnyRegion::populate) that region
/// first.
///
/// ```
/// use pagestitch::source::Memory;
/// use pagestitch::Chunk;
///
/// let memory = Memory::from(vec![0u8; 10_000]);
/// let two_chunks_of_it = [Chunk::from(memory.clone()).range(5_000..10_000), Chunk::from(memory).range(0..5_000)];
/// # let _ = two_chunks_of_it;
/// ```
#[derive(Clone)]
pub struct Memory {
    bytes: Stable,
}

#[derive(Clone)]
enum Stable {
    /// Bytes in a buffer of the standard library, whose drop runs no code of the application.
    ///
    /// Invariant: the address never changes, because the owner is neither moved nor accessed until
    /// the last clone is dropped.
    Buffer(Bytes),
    /// As `Buffer`, of an owner of any kind.
    Owned(Bytes),
    /// Bytes of the program itself, which no owner frees.
    Static(&'static [u8]),
    Lent(RevocableSlice),
    /// Owned bytes that a region releases when it has all of them.
    Releasable(Arc<Owned>),
}

/// Owned bytes until they are released.
struct Owned {
    bytes: Releasable<Bytes>,
    len: usize,
}

/// The memory that a region releases when it has all of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Releasables {
    /// Buffers of the standard library that have at least so many bytes. Their drop runs no code of the
    /// application. To watch a smaller one costs more than it frees.
    Buffers { least: usize },
    /// All owned memory.
    Owned,
}

/// The answer to the release of a memory source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Released {
    /// This number of bytes was released.
    Bytes(u64),
    /// A thread reads the bytes: it looks again when it has read them.
    Busy,
    /// The bytes were released before, or cannot be released.
    No,
}

impl Memory {
    /// Keeps `owner` alive and reads the bytes that its `as_ref` returns. `as_ref` is called once.
    ///
    /// ```
    /// use pagestitch::source::Memory;
    /// use pagestitch::{Pool, Region};
    ///
    /// /// Any owner of bytes: a memory map, a buffer of a library.
    /// struct Row([u8; 512]);
    /// impl AsRef<[u8]> for Row {
    ///     fn as_ref(&self) -> &[u8] {
    ///         &self.0
    ///     }
    /// }
    /// let region = Region::builder().chunk(Memory::new(Row([7; 512]))).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[511], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn new<T>(owner: T) -> Self
    where
        T: AsRef<[u8]> + Send + 'static,
    {
        Self { bytes: Stable::Owned(Bytes::from_owner(owner)) }
    }

    const fn buffer(bytes: Bytes) -> Self {
        Self { bytes: Stable::Buffer(bytes) }
    }

    pub(crate) const fn lent(lent: RevocableSlice) -> Self {
        Self { bytes: Stable::Lent(lent) }
    }

    /// The bytes, for as long as the guard lives.
    pub(crate) fn bytes(&self) -> io::Result<MemoryBytes<'_>> {
        self.bytes_if_any().ok_or_else(|| match self.bytes {
            Stable::Releasable(_) => released(),
            _ => FailureReason::ScopeEnded
                .error("the scope of this borrowed memory has ended: drop the region inside the scope"),
        })
    }

    /// As [`bytes`](Self::bytes), without allocating an error: `None` if the scope of the borrow
    /// has ended, or the bytes are released.
    pub(crate) fn bytes_if_any(&self) -> Option<MemoryBytes<'_>> {
        match &self.bytes {
            Stable::Owned(bytes) | Stable::Buffer(bytes) => Some(MemoryBytes::Owned(bytes)),
            Stable::Static(bytes) => Some(MemoryBytes::Owned(bytes)),
            Stable::Lent(lent) => lent.read().map(MemoryBytes::Lent),
            Stable::Releasable(owned) => owned.bytes.read().map(MemoryBytes::Kept),
        }
    }

    /// The addresses of the bytes. `None` if the scope of the borrow has ended, or the bytes are
    /// released.
    pub(crate) fn addresses(&self) -> Option<Range<usize>> {
        let bytes = self.bytes_if_any()?;
        let start = bytes.as_ptr().addr();
        Some(start..start + bytes.len())
    }

    /// True if the memory is some of `which`.
    pub(crate) fn can_release(&self, which: Releasables) -> bool {
        match (&self.bytes, which) {
            (Stable::Buffer(_) | Stable::Owned(_), Releasables::Owned) => true,
            (Stable::Buffer(bytes), Releasables::Buffers { least }) => bytes.len() >= least,
            _ => false,
        }
    }

    /// Lets [`release`](Self::release) drop this share of owned bytes.
    pub(crate) fn make_releasable(&mut self) {
        // Moved, because a clone would allocate.
        self.bytes = match mem::replace(&mut self.bytes, Stable::Static(&[])) {
            Stable::Buffer(bytes) | Stable::Owned(bytes) => {
                let len = bytes.len();
                Stable::Releasable(Arc::new(Owned { bytes: Releasable::new(bytes), len }))
            }
            other => other,
        };
    }

    /// Releases the bytes, unless a thread reads them. They are freed after
    /// [`take_released`](Self::take_released), or at the drop of the last clone.
    pub(crate) fn release(&self) -> Released {
        let Stable::Releasable(owned) = &self.bytes else { return Released::No };
        match owned.bytes.release() {
            Release::Done => Released::Bytes(owned.len as u64),
            Release::Busy => Released::Busy,
            Release::Before => Released::No,
        }
    }

    /// The bytes, once after their release.
    pub(crate) fn take_released(&self) -> Option<Bytes> {
        match &self.bytes {
            Stable::Releasable(owned) => owned.bytes.take_released(),
            _ => None,
        }
    }

    /// True if the bytes are released.
    pub(crate) fn is_released(&self) -> bool {
        matches!(&self.bytes, Stable::Releasable(owned) if owned.bytes.is_released())
    }

    /// The number of bytes that this source keeps allocated.
    pub(crate) fn kept_bytes(&self) -> u64 {
        match &self.bytes {
            Stable::Owned(bytes) | Stable::Buffer(bytes) => bytes.len() as u64,
            Stable::Releasable(owned) if !owned.bytes.is_released() => owned.len as u64,
            Stable::Releasable(_) | Stable::Static(_) | Stable::Lent(_) => 0,
        }
    }

    /// Address and length: the same memory, whatever value keeps it alive.
    pub(crate) fn identity(&self) -> Option<(usize, u64)> {
        match &self.bytes {
            Stable::Owned(bytes) | Stable::Buffer(bytes) if bytes.is_unique() => None,
            Stable::Owned(bytes) | Stable::Buffer(bytes) => Some((bytes.as_ptr().addr(), bytes.len() as u64)),
            Stable::Static(bytes) => Some((bytes.as_ptr().addr(), bytes.len() as u64)),
            // Two scopes may borrow the same bytes and end at different times. Each region releases
            // its own share.
            Stable::Lent(_) | Stable::Releasable(_) => None,
        }
    }
}

impl Source for Memory {
    fn size(&self) -> u64 {
        match &self.bytes {
            Stable::Owned(bytes) | Stable::Buffer(bytes) => bytes.len() as u64,
            Stable::Static(bytes) => bytes.len() as u64,
            Stable::Lent(lent) => lent.len() as u64,
            Stable::Releasable(owned) => owned.len as u64,
        }
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes()?;
        let wanted = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)?.get(..into.len()));
        into.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn name(&self) -> String {
        match &self.bytes {
            Stable::Owned(_) | Stable::Buffer(_) | Stable::Static(_) | Stable::Releasable(_) => {
                String::from("memory")
            }
            Stable::Lent(_) => String::from("borrowed memory"),
        }
    }

    fn direct(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the bytes themselves, because this output ends up in logs.
        write!(f, "{} of {} bytes", self.name(), self.size())
    }
}

/// Read access to the bytes. It delays the end of the scope of borrowed bytes, and prevents a
/// release.
pub(crate) enum MemoryBytes<'m> {
    Owned(&'m [u8]),
    Lent(RevocableGuard<'m>),
    Kept(ReleasableGuard<'m, Bytes>),
}

impl Deref for MemoryBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Lent(bytes) => bytes,
            Self::Kept(bytes) => bytes,
        }
    }
}

impl From<Bytes> for Memory {
    fn from(bytes: Bytes) -> Self {
        Self { bytes: Stable::Owned(bytes) }
    }
}

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        Self::buffer(Bytes::from(bytes))
    }
}

impl From<Box<[u8]>> for Memory {
    fn from(bytes: Box<[u8]>) -> Self {
        Self::buffer(Bytes::from(bytes))
    }
}

impl From<Arc<[u8]>> for Memory {
    fn from(bytes: Arc<[u8]>) -> Self {
        Self::buffer(Bytes::from_owner(bytes))
    }
}

impl From<&'static [u8]> for Memory {
    fn from(bytes: &'static [u8]) -> Self {
        Self { bytes: Stable::Static(bytes) }
    }
}

impl<const N: usize> From<&'static [u8; N]> for Memory {
    fn from(bytes: &'static [u8; N]) -> Self {
        Self::from(bytes.as_slice())
    }
}

impl From<&'static str> for Memory {
    fn from(text: &'static str) -> Self {
        Self::from(text.as_bytes())
    }
}

impl From<String> for Memory {
    fn from(text: String) -> Self {
        Self::from(text.into_bytes())
    }
}

impl<const N: usize> From<[u8; N]> for Memory {
    fn from(bytes: [u8; N]) -> Self {
        Self::buffer(Bytes::from_owner(bytes))
    }
}

/// The error for a source that is read after its release.
pub(crate) fn released() -> io::Error {
    FailureReason::Released.error(RELEASED)
}

const RELEASED: &str = "the page was discarded (MADV_DONTNEED) after its source was released: add keep_sources() if pages are discarded";
