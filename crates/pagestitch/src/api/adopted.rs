//! Memory that its owner has registered: another process that sent its userfaultfd, or another part
//! of this program.

use crate::api::Core;
use crate::error::Error;
use crate::error::Failure;
use crate::metrics::{Meter, Metrics};
use crate::policy::Recording;
use crate::space::Plan;
use std::fmt;
use std::ops::RangeBounds;
use std::sync::Arc;

/// Memory of another process, or of another part of this program, that is filled on first touch.
/// [`Builder::build_adopted`](crate::Builder::build_adopted) creates it.
///
/// The owner of the memory opens a userfaultfd, registers ranges of its memory with it, and hands
/// it over. From then on, a thread of the owner that touches an absent page blocks until this
/// region fills the page. Requires Linux 4.11. The owner's pages may be larger than the system's
/// (hugetlbfs).
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
    core: Core,
}

impl AdoptedRegion {
    pub(super) const fn new(core: Core) -> Self {
        Self { core }
    }

    /// The name given to the builder, for errors, logs and plans.
    #[must_use]
    pub fn name(&self) -> &str {
        self.core.name()
    }

    /// The length of all ranges together, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.len()
    }

    /// As [`Region::populate`](crate::Region::populate). Pages that the owner has discarded stay
    /// absent.
    ///
    /// # Errors
    ///
    /// As there; also [`ErrorKind::Source`](crate::ErrorKind::Source) if the owner has ended.
    pub fn populate(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.populate(range)
    }

    /// As [`Region::retry_failed`](crate::Region::retry_failed).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn retry_failed(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.retry_failed(range)
    }

    /// As [`Region::failures`](crate::Region::failures).
    #[must_use]
    pub fn failures(&self) -> Vec<(u64, Arc<Failure>)> {
        self.core.failures()
    }

    /// As [`Region::plan`](crate::Region::plan).
    #[must_use]
    pub fn plan(&self) -> Plan {
        self.core.plan()
    }

    /// As [`Region::metrics`](crate::Region::metrics).
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.core.metrics()
    }

    /// As [`Region::meter`](crate::Region::meter).
    #[must_use]
    pub fn meter(&self) -> Meter {
        self.core.meter()
    }

    /// As [`Region::recording`](crate::Region::recording).
    #[must_use]
    pub fn recording(&self) -> Option<Recording> {
        self.core.recording()
    }

    /// Fills all absent pages and releases the memory: from then on its owner runs without the
    /// region. Returns the final counters.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Source`](crate::ErrorKind::Source) for the first source that fails. All other
    /// pages are filled; the failed ones are lost, as by [dropping](Self#drop). The same if the
    /// owner has ended, or keeps discarding pages.
    pub fn finish(self) -> Result<Metrics, Error> {
        self.finish_while(|| true)
    }

    /// As [`finish`](Self::finish), until `go_on` returns false. Several threads call it, each
    /// before every block of 2 MiB. Pages not filled by then are lost.
    ///
    /// # Errors
    ///
    /// As [`finish`](Self::finish). A `go_on` that returns false is no error.
    pub fn finish_while(self, go_on: impl Fn() -> bool + Sync) -> Result<Metrics, Error> {
        let filled = self.core.fill_rest(&go_on);
        let metrics = self.core.close();
        filled.map(|()| metrics)
    }

    /// As [`Region::close`](crate::Region::close).
    #[must_use = "without the metrics, drop the region"]
    pub fn close(self) -> Metrics {
        self.core.close()
    }
}

impl fmt::Debug for AdoptedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdoptedRegion")
            .field("name", &self.name())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
