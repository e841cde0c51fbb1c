//! The contract between a server and a region. The builder uses only these traits.

use crate::error::{BuildOption, Error, Failure};
use crate::fault::PrefetchJob;
use crate::metrics::Presence;
use crate::serve::served::Served;
use crate::serve::{populate, retry_failed};
use crate::space::{Chunk, DeferredFree, Mapping, Shards, SpareUffds};
use pagestitch_kernel::{Errno, Features, Reservation, Span, View};
use std::fmt;
use std::sync::Arc;

/// Serves the faults of regions. A loop of the application's is a [`Manual`](crate::Manual).
pub(crate) trait FaultServer: fmt::Debug + Send + Sync {
    /// Its name in errors.
    fn noun(&self) -> &'static str;

    /// A number that no other server has.
    fn number(&self) -> usize;

    /// False in a forked child, which has neither its threads nor its descriptors.
    fn is_of_this_process(&self) -> bool;

    /// The userfaultfd features that it needs. Request only events that it reads: an unread REMOVE
    /// event blocks `madvise(2)` in the application.
    fn features(&self) -> Features {
        // Without EVENT_REMAP, unfilled pages that `mremap(2)` moves read as zeros.
        Features::EVENT_REMOVE | Features::EVENT_REMAP | Features::THREAD_ID
    }

    /// The number of shards that suits a large region.
    fn shards(&self) -> usize {
        1
    }

    /// The number of threads that serve faults, as far as it is known.
    fn threads(&self) -> usize {
        1
    }

    /// The userfaultfds of its dropped regions, if it keeps them for the next ones. None in a forked
    /// child: a userfaultfd registers addresses of the process that has opened it.
    fn spare_uffds(&self) -> Option<&Arc<SpareUffds>> {
        None
    }

    /// The features of the userfaultfds that its small regions share. `None` if each region has its own.
    fn open_shared(&self, _wanted: Features) -> Option<Features> {
        None
    }

    /// Registers the range of a small region with a userfaultfd that it shares with others. Called after
    /// [`open_shared`](Self::open_shared).
    fn register_shared(&self, _reservation: &Reservation) -> Result<Shards, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    /// Refuses a kernel that has not granted the features that it needs.
    fn check_features(&self, _given: Features) -> Result<(), Error> {
        Ok(())
    }

    /// False if the build fills the region. Such a region has a stand-in for its uffd.
    fn serves_faults(&self) -> bool {
        true
    }

    /// True if the thread that touches a page fills it in a signal handler.
    fn is_in_handler(&self) -> bool {
        false
    }

    /// Frees released sources in a thread that serves no faults. `None`: the threads that fill pages free
    /// them.
    fn deferred_free(&self) -> Option<&Arc<DeferredFree>> {
        None
    }

    /// Fills a region before it attaches, if it serves no faults. `most` limits the threads.
    fn fill(&self, _region: &Mapping, _view: &mut View, _most: Option<usize>) -> Result<(), Error> {
        Ok(())
    }

    /// Refuses a region that it cannot serve, before memory is reserved.
    fn check(&self, demands: &Demands) -> Result<(), Error>;

    /// Starts to serve a region. The server belongs to this process.
    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error>;
}

/// A region's tie to its server: the server runs as long as an attachment exists.
pub(crate) trait Attachment: fmt::Debug + Send + Sync {
    /// False in a forked child, which has neither the region nor the threads.
    fn is_of_this_process(&self) -> bool;

    /// True if system calls can wait for absent pages.
    fn serves_system_calls(&self) -> bool {
        true
    }

    /// True if the calling thread may be the only one that serves the region.
    fn may_be_caller(&self) -> bool {
        false
    }

    /// The CPU of the worker that a fault of a shard wakes, if it is pinned.
    fn cpu_of(&self, _region: &Mapping, _shard: usize) -> Option<usize> {
        None
    }

    /// Starts a prefetch on threads that have no fault to serve.
    fn prefetch(&self, region: &Arc<Served>, job: &Arc<PrefetchJob>) -> Result<(), Error>;

    /// An error if the server has ended, and with it the regions that are left.
    fn check_running(&self, _region: &Mapping) -> Result<(), Error> {
        Ok(())
    }

    /// Fills the absent pages of a span in the calling thread, as long as `go_on` returns true.
    fn populate(
        &self,
        region: &Mapping,
        span: Span,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), Arc<Failure>> {
        populate::populate(region, span, go_on)
    }

    /// Fills the poisoned pages of a span in the calling thread.
    fn retry_failed(&self, region: &Mapping, span: Span) -> Result<(), Arc<Failure>> {
        retry_failed::retry_failed(region, span)
    }

    /// Refuses a chunk that is appended and that it cannot serve.
    fn check_chunk(&self, _region: &Mapping, _chunk: &Chunk) -> Result<(), Error> {
        Ok(())
    }

    /// A handle that tells which pages are present, for metrics.
    fn presence(&self, region: &Mapping) -> Arc<dyn Presence> {
        region.presence()
    }

    /// Stops taking up faults of the region.
    fn detach(&self, region: &Served);

    /// Ends a region whose forked children were served.
    fn stop_reading(&self, _region: &Served) {}

    /// Stops serving the region's forked children.
    fn detach_children(&self, _region: &Served) {}
}

/// The properties of a region that a server may refuse.
#[derive(Debug)]
pub(crate) struct Demands {
    /// The memory is adopted: its owner has registered it.
    pub(crate) adopted: bool,
    /// Children of `fork(2)` are served.
    pub(crate) children: bool,
    /// The option by which a recording is made, or replayed.
    pub(crate) recording: Option<BuildOption>,
    /// The builder has asked for readahead.
    pub(crate) readahead: bool,
    /// Concurrent faults are limited.
    pub(crate) limit: bool,
    /// The builder has asked for more than one shard.
    pub(crate) shards: bool,
    /// The builder has asked that the kernel reports discards.
    pub(crate) report_discards: bool,
    /// The parts of faults are timed.
    pub(crate) timed: bool,
    /// The option that asks for a record of written pages.
    pub(crate) tracked: Option<BuildOption>,
    /// Chunks are appended later.
    pub(crate) growth: bool,
    /// The pages are those of a memfd.
    pub(crate) on_memfd: bool,
}

/// The number of all threads that fill their own pages.
pub(crate) const INLINE: usize = 0;
/// The number of the server that fills regions when they are built.
pub(super) const EAGER: usize = 1;
