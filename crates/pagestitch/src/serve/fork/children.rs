//! The forked children of a region, and their children.

use crate::serve::fork::descriptors::Descriptors;
use crate::space::Mapping;
use pagestitch_kernel::{AddressRange, Errno, Outcome, Page};
use parking_lot::Mutex;
use std::ops::Deref;
use std::sync::Arc;

/// All forked children of a region, and their children. Each is served as an `R`.
#[derive(Debug)]
pub(crate) struct ForkedChildren<R> {
    members: Mutex<Members<R>>,
    descriptors: Descriptors,
}

#[derive(Debug)]
struct Members<R> {
    served: Vec<Arc<R>>,
    /// The region is being dropped.
    closed: bool,
}

impl<R> Deref for ForkedChildren<R> {
    type Target = Descriptors;

    fn deref(&self) -> &Descriptors {
        &self.descriptors
    }
}

impl<R: Deref<Target = Mapping>> ForkedChildren<R> {
    pub(crate) fn new() -> Result<Self, Errno> {
        let members = Mutex::new(Members { served: Vec::new(), closed: false });
        Ok(Self { members, descriptors: Descriptors::new()? })
    }

    /// Adds a served child. False if the region is being dropped: no worker would serve the child.
    pub(crate) fn add(&self, child: &Arc<R>) -> bool {
        let mut members = self.members.lock();
        if !members.closed {
            members.served.push(Arc::clone(child));
        }
        !members.closed
    }

    /// Removes and returns the children whose processes have ended or have unmapped the region.
    pub(crate) fn reap(&self) -> Vec<Arc<R>> {
        let mut members = self.members.lock();
        let (dead, alive) = members.served.drain(..).partition(|child| is_dead(child));
        members.served = alive;
        dead
    }

    /// Accepts no more children. Returns the served ones.
    pub(crate) fn close(&self) -> Vec<Arc<R>> {
        let mut members = self.members.lock();
        members.closed = true;
        std::mem::take(&mut members.served)
    }
}

/// True if the process of a child has ended, or has replaced the memory by exec(2).
fn is_dead(child: &Mapping) -> bool {
    // Private memory has no page cache, so UFFDIO_CONTINUE fails. The error tells whether the
    // process lives.
    child.uffd.get(0).continue_pages(first_page(child)) == Outcome::ProcessGone
}

pub(crate) fn first_page(region: &Mapping) -> AddressRange {
    region.target.addresses(Page(0).span())
}
