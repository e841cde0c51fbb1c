//! What a server is to a region, and a region to its server. The builder knows no more of either.

use crate::error::Error;
use crate::serve::served::Served;
use pagestitch_kernel::Features;
use std::fmt;
use std::sync::Arc;

/// Serves the faults of regions. A loop of the application's is a [`Manual`](crate::Manual).
pub(crate) trait FaultServer: fmt::Debug + Send + Sync {
    /// What errors call it.
    fn noun(&self) -> &'static str;

    /// A number that no other server has.
    fn number(&self) -> usize;

    /// False in a forked child, which has neither its threads nor its descriptors.
    fn is_of_this_process(&self) -> bool;

    /// The features that a userfaultfd needs for it: events that it does not read stop the application's `madvise(2)`.
    fn features(&self) -> Features {
        // Somewhere else, what was not filled would be zeros.
        Features::EVENT_REMOVE | Features::EVENT_REMAP | Features::THREAD_ID
    }

    /// Refuses a kernel that has not given all of these.
    fn check_features(&self, _given: Features) -> Result<(), Error> {
        Ok(())
    }

    /// Refuses what it cannot serve, before anything is reserved.
    fn check(&self, demands: &Demands) -> Result<(), Error>;

    /// Starts to serve a region, whose server is of this process.
    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error>;
}

/// A region's tie to its server: keeps the server at work as long as there is a region to serve.
pub(crate) trait Attachment: fmt::Debug + Send + Sync {
    /// False in a forked child, which has neither the region nor the threads.
    fn is_of_this_process(&self) -> bool;

    /// Whether system calls can wait for absent pages.
    fn serves_system_calls(&self) -> bool {
        true
    }

    /// No fault of the region is taken up any more.
    fn detach(&self, region: &Served);

    /// The last of a region whose children were served.
    fn retire(&self, _region: &Served) {}

    /// Serves none of a region's children any more.
    fn detach_children(&self, _region: &Served) {}
}

/// What a region asks of its server.
#[derive(Debug)]
pub(crate) struct Demands {
    /// Memory that its owner has registered.
    pub(crate) adopted: bool,
    /// Children of `fork(2)`.
    pub(crate) children: bool,
    /// A recording is made, or replayed.
    pub(crate) recording: bool,
    /// Pages are to be filled ahead: that was said.
    pub(crate) readahead: bool,
    /// At most so many faults at once.
    pub(crate) limit: bool,
    /// The parts of faults are timed.
    pub(crate) timed: bool,
}

/// The number of all threads that fill their own pages.
pub(crate) const INLINE: usize = 0;
