//! One guest: its memory, as it is served.

use crate::Snapshot;
use crate::handshake::{GuestMappings, HandshakeError};
use pagestitch::{
    AdoptedMemory, AdoptedRegion, Loss, Metrics, OwnMemory, Pool, Process, Readahead, Recording, Region,
};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// What becomes of guests when their handler is told to stop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnStop {
    /// What is missing of their memory is filled; they go on without a handler.
    #[default]
    Finish,
    /// What is missing is lost: see [`Loss`].
    Abandon,
}

/// A guest that is being served.
#[derive(Debug)]
pub(crate) struct ServedGuest {
    region: AdoptedRegion,
    owner: Arc<Process>,
    /// Whether its first touches are taken down.
    recorded: bool,
    /// Kept open, as Firecracker keeps its end.
    _stream: UnixStream,
}

/// How the memory of guests is served.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) snapshot: Snapshot,
    pub(crate) pool: Pool,
    pub(crate) loss: Loss,
    pub(crate) readahead: Readahead,
    pub(crate) replay: Option<Recording>,
    pub(crate) timed: bool,
    /// Whether guests of this process are served.
    pub(crate) own: Option<OwnMemory>,
}

impl Service {
    /// Starts to serve a guest's memory. `record`: its first touches are taken down.
    pub(crate) fn serve(
        &self,
        record: bool,
        owner: &Arc<Process>,
        mappings: &GuestMappings,
        uffd: OwnedFd,
    ) -> Result<AdoptedRegion, HandshakeError> {
        let Self { snapshot, pool, loss, readahead, replay, timed, own } = self;
        let memory = match own {
            Some(promise) => AdoptedMemory::of_this_process(uffd, *promise)?,
            None => AdoptedMemory::new(uffd)?,
        };
        let memory = memory.page_size(mappings.page_bytes() as usize)?;
        let memory = mappings.ranges().iter().fold(memory, |memory, range| {
            memory.range(range.base_host_virt_addr as usize, range.size as usize)
        });
        let memory = memory.owner(Arc::clone(owner)).on_loss(*loss);
        let builder = Region::builder().name(owner.to_string()).readahead(*readahead);
        let builder = if record { builder.record() } else { builder };
        let builder = if *timed { builder.timed() } else { builder };
        // A page that is replayed has no first touch.
        let replay = replay.iter().filter(|_| !record);
        let replay = replay.filter(|recording| has_pages_of(recording, mappings, owner));
        let builder = replay.fold(builder, |builder, recording| builder.replay(recording));
        Ok(builder.chunks(snapshot.chunks()).build_adopted(memory, pool)?)
    }
}

impl ServedGuest {
    pub(crate) const fn new(
        region: AdoptedRegion,
        owner: Arc<Process>,
        recorded: bool,
        stream: UnixStream,
    ) -> Self {
        Self { region, owner, recorded, _stream: stream }
    }

    /// Its VMM, readable when that has ended.
    pub(crate) const fn owner(&self) -> &Arc<Process> {
        &self.owner
    }

    /// Whether first touches are taken down, and there are some.
    pub(crate) fn is_recorded(&self) -> bool {
        self.recorded && self.region.metrics().faults > 0
    }

    pub(crate) const fn region(&self) -> &AdoptedRegion {
        &self.region
    }

    /// Nobody is there any more.
    pub(crate) fn close(self) -> Metrics {
        self.region.close()
    }

    /// Leaves the guest to itself. `hurry` is asked now and then, and ends the filling when it is true.
    pub(crate) fn detach(
        self,
        how: OnStop,
        hurry: impl Fn() -> bool + Sync,
    ) -> Result<Metrics, pagestitch::Error> {
        match how {
            OnStop::Abandon => Ok(self.region.close()),
            OnStop::Finish => self.region.finish_while(|| !hurry()),
        }
    }
}

/// Whether a recording is of pages as this guest has them. If not, the guest is better served without it than refused.
fn has_pages_of(recording: &Recording, mappings: &GuestMappings, owner: &Process) -> bool {
    let (recorded, has) = (recording.page_bytes() as u64, mappings.page_bytes());
    if recorded != has {
        tracing::warn!(guest = %owner, recorded, has, "the recording is of pages of another size: not replayed");
    }
    recorded == has
}
