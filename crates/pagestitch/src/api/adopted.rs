//! Memory that its owner has registered: another process that sent its userfaultfd, or another part
//! of this program.

use crate::api::AnyRegion;
use crate::error::Error;
use crate::metrics::Metrics;
use std::fmt;
use std::ops::Deref;

/// Memory of another process, or of another part of this program, that is filled on first touch.
/// [`Builder::build_adopted`](crate::Builder::build_adopted) creates it.
///
/// The owner of the memory opens a userfaultfd, registers ranges of its memory with it, and hands
/// it over. From then on, a thread of the owner that touches an absent page blocks until this
/// region fills the page. Requires Linux 4.11. The owner's pages may be larger than the system's
/// (hugetlbfs).
///
/// The methods that regions of all kinds share are those of [`AnyRegion`].
///
/// # Drop
///
/// Pages that are still absent are lost, and would read as zeros. Their pages are therefore
/// [poisoned](crate::OnUnavailable::Poison), or the owner is [killed](crate::OnUnavailable::Kill).
/// [`finish`](Self::finish) fills all pages before, and the owner runs on without the region.
///
/// # Example
///
/// Two processes: the sender is as in `examples/adopt.rs`.
///
/// ```no_run
/// use pagestitch::{AdoptedMemory, Pool, Region, source::FileSource};
/// # fn receive() -> (std::os::fd::OwnedFd, usize) { unimplemented!() }
///
/// let (uffd, address) = receive();                     // SCM_RIGHTS, see unix(7)
/// let memory = AdoptedMemory::new(uffd)?.range(address, 1 << 30);
/// let region = Region::builder().name("guest").chunk(FileSource::open("guest.mem")?).build_adopted(memory, &Pool::new()?)?;
/// region.finish()?;                                    // fills the absent pages, releases the memory
/// # Ok::<(), pagestitch::Error>(())
/// ```
pub struct AdoptedRegion {
    any: AnyRegion,
}

impl AdoptedRegion {
    pub(super) const fn new(any: AnyRegion) -> Self {
        Self { any }
    }

    /// Fills all absent pages and releases the memory: from then on its owner runs without the
    /// region. Returns the final counters.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SourceFailed`](crate::ErrorKind::SourceFailed) for the first source that fails.
    /// All other pages are filled; the failed ones are lost, as by [dropping](Self#drop).
    /// [`ErrorKind::MemoryGone`](crate::ErrorKind::MemoryGone) if the owner has ended, and
    /// [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut) if it keeps discarding pages.
    pub fn finish(self) -> Result<Metrics, Error> {
        self.finish_while(|| true)
    }

    /// As [`finish`](Self::finish), until `go_on` returns false. Several threads call it, each
    /// before every block of 2 MiB. Pages not filled by then are lost.
    ///
    /// # Errors
    ///
    /// As [`finish`](Self::finish). A `go_on` that returns false is no error.
    ///
    /// ```no_run
    /// # fn receive() -> pagestitch::AdoptedRegion { unimplemented!() }
    /// use std::time::{Duration, Instant};
    ///
    /// let guest = receive();
    /// let end = Instant::now() + Duration::from_secs(60);
    /// guest.finish_while(|| Instant::now() < end)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn finish_while(self, go_on: impl Fn() -> bool + Sync) -> Result<Metrics, Error> {
        let filled = self.any.fill_rest(&go_on);
        let metrics = self.any.close();
        filled.map(|()| metrics)
    }

    /// As [`Region::close`](crate::Region::close).
    #[must_use = "without the metrics, drop the region"]
    pub fn close(self) -> Metrics {
        self.any.close()
    }
}

impl Deref for AdoptedRegion {
    type Target = AnyRegion;

    fn deref(&self) -> &AnyRegion {
        &self.any
    }
}

impl fmt::Debug for AdoptedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.any.describe("AdoptedRegion", f)
    }
}
