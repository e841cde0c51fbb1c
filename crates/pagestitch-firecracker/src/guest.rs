//! One guest, while its memory is served.

use crate::Snapshot;
use crate::handshake::{GuestMappings, HandshakeError};
use pagestitch::{
    AdoptedMemory, AdoptedRegion, FillRate, Metrics, OnUnavailable, OwnMemory, Pool, PrefetchHandle,
    PrefetchProgress, Process, Readahead, Recording, Region,
};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// The consequence of a shutdown for the guests of a handler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStop {
    /// The handler fills the missing pages. The guests then run without it.
    #[default]
    Finish,
    /// The missing pages are unavailable from then on: see [`OnUnavailable`].
    Abandon,
}

/// A guest that is served.
#[derive(Debug)]
pub(crate) struct ServedGuest {
    region: AdoptedRegion,
    owner: Arc<Process>,
    /// True if its first touches are recorded.
    recorded: bool,
    /// The user of its VMM.
    user: u32,
    /// Its background fill, until it has ended.
    fill: Option<PrefetchHandle>,
    /// True if it has all of its memory, so that it can be detached.
    is_complete: bool,
    /// Kept open, as Firecracker keeps its end.
    _stream: UnixStream,
}

/// The options with which guests are served.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) snapshot: Snapshot,
    pub(crate) pool: Pool,
    pub(crate) on_unavailable: OnUnavailable,
    pub(crate) readahead: Readahead,
    pub(crate) replay: Option<Recording>,
    /// The rate at which guests are filled in the background.
    pub(crate) background: Option<FillRate>,
    pub(crate) record_latency: bool,
    /// The promise that covers guests of this process; none refuses them.
    pub(crate) own: Option<OwnMemory>,
}

impl Service {
    /// Serves the memory of a guest. `record`: records its first touches.
    pub(crate) fn serve(
        &self,
        record: bool,
        owner: &Arc<Process>,
        mappings: &GuestMappings,
        uffd: OwnedFd,
    ) -> Result<AdoptedRegion, HandshakeError> {
        let Self { snapshot, pool, on_unavailable, readahead, replay, record_latency, own, .. } = self;
        let memory = match own {
            Some(promise) => AdoptedMemory::of_this_process(uffd, *promise)?,
            None => AdoptedMemory::new(uffd)?,
        };
        let memory = memory.page_size(mappings.page_bytes() as usize)?;
        let memory = mappings.ranges().iter().fold(memory, |memory, range| {
            memory.range(range.base_host_virt_addr as usize, range.size as usize)
        });
        let memory = memory.owner(Arc::clone(owner)).on_unavailable(*on_unavailable);
        let builder = Region::builder().name(owner.to_string()).readahead(*readahead);
        let builder = if record { builder.record() } else { builder };
        let builder = if *record_latency { builder.record_latency() } else { builder };
        // A replayed page has no first touch, so a recorded guest is not replayed.
        let replay = replay.iter().filter(|_| !record);
        let replay = replay.filter(|recording| has_page_size_of(recording, mappings, owner));
        let builder = replay.fold(builder, |builder, recording| builder.replay(recording));
        Ok(builder.chunks(snapshot.chunks()).build_adopted(memory, pool)?)
    }
}

impl ServedGuest {
    pub(crate) const fn new(
        region: AdoptedRegion,
        owner: Arc<Process>,
        recorded: bool,
        user: u32,
        stream: UnixStream,
    ) -> Self {
        Self { region, owner, recorded, user, fill: None, is_complete: false, _stream: stream }
    }

    /// Starts its background fill.
    pub(crate) fn fill_in_background(&mut self, rate: FillRate) {
        // A page that is filled ahead has no first touch to record.
        if self.recorded {
            return;
        }
        match self.region.fill_in_background(rate) {
            Ok(fill) => self.fill = Some(fill),
            Err(error) => {
                tracing::error!(guest = %self.owner, %error, "the guest is not filled in the background");
            }
        }
    }

    /// The progress of its background fill, once, after the fill has ended. Until then, its end wakes
    /// `waker`.
    pub(crate) fn end_of_fill(&mut self, waker: &Waker) -> Option<PrefetchProgress> {
        let fill = self.fill.as_mut()?;
        let Poll::Ready(progress) = Pin::new(fill).poll(&mut Context::from_waker(waker)) else { return None };
        self.fill = None;
        self.is_complete = progress.is_complete();
        Some(progress)
    }

    pub(crate) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The user of its VMM.
    pub(crate) const fn user(&self) -> u32 {
        self.user
    }

    /// Its VMM. The descriptor is readable after the VMM has ended.
    pub(crate) const fn owner(&self) -> &Arc<Process> {
        &self.owner
    }

    /// True if first touches are recorded, and there are some.
    pub(crate) fn is_recorded(&self) -> bool {
        self.recorded && self.region.metrics().faults > 0
    }

    pub(crate) const fn region(&self) -> &AdoptedRegion {
        &self.region
    }

    /// Releases the memory of a guest that has ended.
    pub(crate) fn close(self) -> Metrics {
        self.region.close()
    }

    /// Detaches the guest. `hurry` is called now and then, and ends the filling when it returns
    /// true.
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

/// True if the recording has the page size of this guest. If not, the guest is served without it,
/// which is better than a refusal.
fn has_page_size_of(recording: &Recording, mappings: &GuestMappings, owner: &Process) -> bool {
    let (recorded, has) = (recording.page_bytes() as u64, mappings.page_bytes());
    if recorded != has {
        tracing::warn!(guest = %owner, recorded, has, "the recording has another page size and is not replayed");
    }
    recorded == has
}
