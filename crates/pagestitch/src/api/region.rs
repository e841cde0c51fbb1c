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
/// A byte is copied when its page is first touched, by any thread; until then nothing is read and no memory
/// used. A page whose source fails is never shown as zeros: touching it is SIGBUS, and [`read_at`](Self::read_at)
/// and [`populate`](Self::populate) return the source's error instead.
///
/// # System calls
///
/// An ordinary user's region ([`serves_system_calls`](Self::serves_system_calls) is false) cannot hand absent pages to the
/// kernel: `write(2)` from one is `EFAULT`. [`populate`](Self::populate) first.
///
/// # Children
///
/// A forked child has no access to a region that does not [`inherit_on_fork`](crate::Builder::inherit_on_fork), but for pages that are shown in
/// place: a touch is SIGSEGV, and no mapping of the child's comes to lie there. In a child of a raw `clone(2)`, which runs no fork handlers,
/// the region's addresses are free for other mappings: the child must not use a pointer into the region. `fork(2)` waits for a build or
/// drop of a region that is under way: a fork handler (`pthread_atfork(3)`) must not take a lock that is held around one.
///
/// # Locked memory
///
/// `mlockall(MCL_FUTURE)` neither fills a region nor locks it: its pages come from its sources, on first touch, and can be swapped out.
/// `mlock2(MLOCK_ONFAULT)` on the region locks each page when it is filled; whole blocks are then copied in, because the kernel
/// moves pages only between mappings that are locked alike. Files and memfds that are shown in place are locked as any mapping is.
/// `mlockall(MCL_CURRENT)` touches every page of a region that a pool serves: it returns when all of it is filled.
///
/// # Drop
///
/// Waits for sources that are being read for it, then gives everything back. A thread that is stopped in the
/// region at that moment (through a raw pointer: safe code holds a borrow) gets SIGSEGV, not zeros: the addresses then stay reserved for
/// another second, or for 10 ms where the process has no others left. A later build or drop gives them back. Those of a region that is
/// served [inline](crate::Inline) always do.
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

    /// How many bytes the chunks hold together.
    #[expect(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.len()
    }

    /// The offset at which a chunk begins; chunks are numbered from 0. `None` if the region has fewer chunks.
    #[must_use]
    pub fn offset_of(&self, chunk: usize) -> Option<u64> {
        self.core.offset_of(chunk)
    }

    /// The chunk that holds the byte at `offset`, counted as [`offset_of`](Self::offset_of) does; `None` past the end and in
    /// padding.
    #[must_use]
    pub fn chunk_at(&self, offset: u64) -> Option<usize> {
        self.core.chunk_at(offset)
    }

    /// The bytes. Touching an absent page waits until it is filled; a page whose source fails is SIGBUS.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.view.as_slice()[..self.len()]
    }

    /// The bytes for writing, of a region built [`writable`](crate::Builder::writable). Writes stay in the region; the
    /// sources do not see them.
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

    /// Whether absent pages can be handed to system calls; see [above](Self#system-calls).
    #[must_use]
    pub fn serves_system_calls(&self) -> bool {
        self.core.serves_system_calls()
    }

    /// Copies the bytes at `offset` out, filling their pages first where they are absent.
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

    /// Fills the absent pages of a range of offsets now, in this thread.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at). Pages before the one that failed are filled.
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

    /// Asks again for the pages of a range whose source has failed, and fills those that it gives now. A page that is healed
    /// is as if it had never failed; touching it is no signal any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Source`](crate::ErrorKind::Source) names the first chunk whose source fails again; pages before it are
    /// healed. Before Linux 6.6 a page that has failed is gone for good, and this says so.
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) if the range leaves the region.
    pub fn retry_failed(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.retry_failed(range)
    }

    /// The pages that have failed and are poisoned, by their offsets in the region, and why each has.
    #[must_use]
    pub fn failures(&self) -> Vec<(u64, Arc<Failure>)> {
        self.core.failures()
    }

    /// How each run of chunks is installed, and why.
    #[must_use]
    pub fn plan(&self) -> Plan {
        self.core.plan()
    }

    /// What has happened in the region so far. [`close`](Self::close) tells it when nothing can happen any more.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.core.metrics()
    }

    /// The same as a handle, for whoever looks while the region is at work, or when it has gone.
    #[must_use]
    pub fn meter(&self) -> Meter {
        self.core.meter()
    }

    /// In which order pages were touched so far, of a region that [records](crate::Builder::record).
    #[must_use]
    pub fn recording(&self) -> Option<Recording> {
        self.core.recording()
    }

    /// Gives everything back, as dropping does, and tells what has happened, to the last page.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[5_000], 7);
    /// assert_eq!(region.close().pages_installed(), 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use = "to give everything back, dropping is enough"]
    pub fn close(self) -> Metrics {
        self.core.close()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("name", &self.name()).field("len", &self.len()).finish_non_exhaustive()
    }
}
