//! A region: scattered chunks as one contiguous range of addresses, filled on first touch.

use crate::api::Core;
use crate::error::Error;
use crate::error::Failure;
use crate::metrics::{Meter, Metrics};
use crate::policy::Recording;
#[cfg(all(test, not(shuttle)))]
use crate::serve::Served;
use crate::space::Plan;
use pagestitch_kernel::StableView;
use std::fmt;
use std::ops::RangeBounds;
use std::ptr::NonNull;
use std::sync::Arc;

/// Scattered memory as one contiguous slice, filled page by page on first touch.
///
/// ```text
///   as_slice():  [ a a a a b b c c c c c c 0 0 0 ]     one range of addresses
///                  │     │   │           │
///                 Vec  &[u8] file       hole           the chunks, where they always were
/// ```
///
/// The first touch of a page, by any thread, copies its bytes from the sources. Before that, the
/// region reads no source and uses no memory for the page. A page whose source fails never reads as
/// zeros: touching it raises SIGBUS, and [`read_at`](Self::read_at) and
/// [`populate`](Self::populate) return the source's error.
///
/// # System calls
///
/// Where [`serves_system_calls`](Self::serves_system_calls) is false (an ordinary user), the kernel
/// cannot touch absent pages: `write(2)` from one fails with `EFAULT`. Call
/// [`populate`](Self::populate) before such a system call.
///
/// # Children
///
/// A forked child can access only the pages that are mapped in place, unless the region is built
/// with [`inherit_on_fork`](crate::Builder::inherit_on_fork). Touching another page raises SIGSEGV
/// in the child, and the addresses stay reserved there.
///
/// A raw `clone(2)` runs no fork handlers, so in such a child other mappings may take the region's
/// addresses: the child must not use a pointer into the region.
///
/// `fork(2)` waits for a build or drop of a region in progress. A fork handler
/// (`pthread_atfork(3)`) must therefore not take a lock that is held around a build or drop.
///
/// # Locked memory
///
/// * `mlockall(MCL_FUTURE)` neither fills nor locks a region: its pages come from the sources on
///   first touch, and can be swapped out.
/// * `mlock2(MLOCK_ONFAULT)` on the region locks each page when it is filled. Whole blocks are then
///   copied in, because the kernel moves pages only between mappings that are locked alike.
/// * Files and memfds that are mapped in place are locked as any mapping is.
/// * `mlockall(MCL_CURRENT)` touches every page of a region that a pool serves: it returns when the
///   region is filled.
///
/// # Drop
///
/// Dropping waits for source reads in progress, then releases everything. A thread that waits in a
/// fault of the region at that moment gets SIGSEGV, never zeros. (It uses a raw pointer: safe code
/// holds a borrow.) The addresses then stay reserved for one more second, or for 10 ms if the
/// process has no others left; a later build or drop of a region releases them. The addresses of a
/// region that is served [inline](crate::Inline) always stay reserved that long.
///
/// # Example
///
/// ```
/// use pagestitch::{Chunk, Pool, Region};
///
/// let pool = Pool::new()?;
/// let region = Region::builder()
///     .chunk(b"scattered ".to_vec())
///     .chunk(Chunk::hole(4096))
///     .chunk(b"memory".to_vec())
///     .build(&pool)?;
/// assert_eq!(&region.as_slice()[..10], b"scattered ");
/// assert_eq!(&region.as_slice()[10 + 4096..], b"memory");
/// # Ok::<(), pagestitch::Error>(())
/// ```
pub struct Region {
    view: StableView,
    core: Core,
}

impl Region {
    #[cfg(all(test, not(shuttle)))]
    pub(crate) const fn served(&self) -> &Arc<Served> {
        &self.core.served
    }

    pub(super) const fn new(view: StableView, core: Core) -> Self {
        Self { view, core }
    }

    /// The name given to the builder, for errors, logs and plans.
    #[must_use]
    pub fn name(&self) -> &str {
        self.core.name()
    }

    /// The length of all chunks together, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.len()
    }

    /// The offset of a chunk's first byte; chunks are numbered from 0. `None` if the region has
    /// fewer chunks.
    #[must_use]
    pub fn offset_of(&self, chunk: usize) -> Option<u64> {
        self.core.offset_of(chunk)
    }

    /// The number of the chunk that holds the byte at `offset`, counted as in
    /// [`offset_of`](Self::offset_of). `None` past the end and in padding.
    #[must_use]
    pub fn chunk_at(&self, offset: u64) -> Option<usize> {
        self.core.chunk_at(offset)
    }

    /// The bytes. Touching an absent page blocks until the page is filled, or raises SIGBUS if its
    /// source fails.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.view.as_slice()[..self.len()]
    }

    /// The bytes for writing; `None` unless the region is built
    /// [`writable`](crate::Builder::writable). Writes stay in the region and never reach the
    /// sources.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        let len = self.len();
        self.view.as_mut_slice().map(|bytes| &mut bytes[..len])
    }

    /// The address of the first byte. Valid until the region is dropped.
    #[must_use]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.view.as_ptr()
    }

    /// Whether system calls can read and write absent pages; see [above](Self#system-calls).
    #[must_use]
    pub fn serves_system_calls(&self) -> bool {
        self.core.serves_system_calls()
    }

    /// Copies bytes from `offset` on into `into`. Absent pages are filled first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Source`](crate::ErrorKind::Source) names the chunk whose source failed;
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) if the range leaves the region.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let range = self.core.inside(offset, offset.checked_add(into.len() as u64))?;
        self.core.populate(range.clone())?;
        into.copy_from_slice(&self.as_slice()[range.start as usize..range.end as usize]);
        Ok(())
    }

    /// Fills the absent pages of a range of byte offsets, on the calling thread.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at). The pages before the failed one are filled.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// region.populate(4096..8192)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn populate(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.populate(range)
    }

    /// Reads the poisoned pages of a range from their sources again. A page whose source succeeds
    /// is filled as if it had never failed, and touching it raises no signal any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Source`](crate::ErrorKind::Source) names the first chunk whose source fails
    /// again; the pages before it are filled. Before Linux 6.6 a poisoned page cannot be filled
    /// again, which is the same kind of error.
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) if the range leaves the region.
    pub fn retry_failed(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.retry_failed(range)
    }

    /// The poisoned pages: each page's byte offset in the region, and its failure.
    #[must_use]
    pub fn failures(&self) -> Vec<(u64, Arc<Failure>)> {
        self.core.failures()
    }

    /// The method by which each run of chunks is installed, with the reason.
    #[must_use]
    pub fn plan(&self) -> Plan {
        self.core.plan()
    }

    /// The region's counters so far. [`close`](Self::close) returns their final values.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.core.metrics()
    }

    /// A handle to the same counters that can be read by any thread, also after the region's drop.
    #[must_use]
    pub fn meter(&self) -> Meter {
        self.core.meter()
    }

    /// The order in which pages were first touched so far; `None` unless the region
    /// [records](crate::Builder::record).
    #[must_use]
    pub fn recording(&self) -> Option<Recording> {
        self.core.recording()
    }

    /// Releases everything, as dropping does, and returns the final counters.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[5_000], 7);
    /// assert_eq!(region.close().pages_installed(), 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use = "without the metrics, drop the region"]
    pub fn close(self) -> Metrics {
        self.core.close()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("name", &self.name()).field("len", &self.len()).finish_non_exhaustive()
    }
}
