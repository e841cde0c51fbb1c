//! Memory that somebody else has registered: another part of this program, or another process that sent its userfaultfd.

use crate::api::Core;
use crate::error::Error;
use crate::error::Failure;
use crate::metrics::{Meter, Metrics};
use crate::policy::Recording;
use crate::space::Plan;
use std::fmt;
use std::ops::RangeBounds;
use std::sync::Arc;

/// Memory of another process, or another part of this program, that is filled on first touch. Made by
/// [`Builder::build_adopted`](crate::Builder::build_adopted).
///
/// Its owner opened a userfaultfd, registered ranges of its memory with it, and handed it over; from then on whoever touches
/// a missing page there waits for us. Linux 4.11; other page sizes than the system's: hugetlbfs.
///
/// # Drop
///
/// What was not filled by then is lost to the owner: it is [poisoned](OnUnavailable::Poison) or [ended](OnUnavailable::Kill), because it would read
/// zeros otherwise. [`finish`](Self::finish) fills everything first; the owner then goes on alone.
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
/// region.finish()?;                                    // fills what nobody has asked for yet, and lets it go
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

    /// How many bytes its ranges hold together.
    #[expect(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.len()
    }

    /// As [`Region::populate`](crate::Region::populate). What the owner has let go of is left alone.
    ///
    /// # Errors
    ///
    /// As there; [`ErrorKind::Source`](crate::ErrorKind::Source) also where the owner has ended.
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

    /// Fills all that is missing, and lets the memory go: its owner needs nobody from then on.
    ///
    /// # Errors
    ///
    /// The first source that failed; what could be filled is filled, and what could not is lost, as by
    /// [dropping](Self#drop). Also where the owner has ended, or discards pages without end.
    pub fn finish(self) -> Result<Metrics, Error> {
        self.finish_while(|| true)
    }

    /// As [`finish`](Self::finish), as long as `go_on` says so: it is asked before each block of 2 MiB, by several threads. What is not
    /// filled by then is lost.
    ///
    /// # Errors
    ///
    /// As [`finish`](Self::finish); that `go_on` has ended it is none.
    pub fn finish_while(self, go_on: impl Fn() -> bool + Sync) -> Result<Metrics, Error> {
        let filled = self.core.fill_rest(&go_on);
        let metrics = self.core.close();
        filled.map(|()| metrics)
    }

    /// As [`Region::close`](crate::Region::close).
    #[must_use = "to give everything back, dropping is enough"]
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
