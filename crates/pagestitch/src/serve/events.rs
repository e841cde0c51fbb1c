//! What the kernel tells of a region but for faults: pages that are let go, unmapped or moved, and forks.

use crate::fault::FaultRequest;
use crate::fault::install::{release, show};
use crate::serve::Served;
use crate::serve::fork::first_page;
use crate::serve::fork::orphans::Rest;
use crate::serve::served::ForkedChildren;
use crate::space::Target;
use crate::space::target::{Busy, Foreign};
use pagestitch_kernel::{Batch, Errno, Event, Fault, FaultKind, Uffd};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// What the kernel has told, and may wait until nobody forks.
#[derive(Debug)]
pub(crate) enum DeferredEvent {
    /// There is a forked child, with a uffd of its own.
    Child(Uffd),
    /// There is one, and no descriptor for it: those of children that have ended are to be let go of.
    NoDescriptor,
    /// There was none after all, or nobody to serve it: what the child does not have is bad.
    GivenUp,
    /// `mremap(2)` has moved part of the region to somewhere else.
    Moved {
        /// Its new address.
        to: usize,
        /// Its length.
        bytes: usize,
    },
}

/// What has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    All,
    /// With the last descriptor: it has to be free again before there is another child.
    OneTooMany,
    Nothing,
}

impl Served {
    /// Reads what the kernel has to tell, and acts on changes of the memory map. Faults are left in the batch, and what takes time or
    /// memory to `told`, which may refuse it. True if something could not be done yet: it is to be read again in a moment.
    ///
    /// Where a region has a family, it allocates nothing, and waits for nobody who does: whoever forks may hold the allocator.
    pub(crate) fn read_events(
        &self,
        batch: &mut Batch,
        told: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) -> bool {
        // What is let go of somebody else's memory holds other bytes from then on: nothing is installed meanwhile.
        let _alone = self.target.foreign().and_then(Foreign::change);
        self.read_alone(batch, told)
    }

    /// As [`read_events`](Self::read_events), for a thread that must not wait: an installation may take as long as memory of a source
    /// cannot be read.
    pub(crate) fn try_read_events(
        &self,
        batch: &mut Batch,
        told: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) -> Result<bool, Busy> {
        let _alone = self.target.foreign().map(Foreign::try_change).transpose()?;
        Ok(self.read_alone(batch, told))
    }

    fn read_alone(
        &self,
        batch: &mut Batch,
        told: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) -> bool {
        // An owner that forks or moves without end waits until some of it has been seen to.
        if self.children.is_none() && self.orphans.are_many() && self.close_orphans() == Rest::Some {
            batch.clear();
            return true;
        }
        let read = self.read(batch);
        for event in batch.take_events() {
            match event {
                Event::Remove { start, end } | Event::Unmap { start, end } => self.let_go(start, end),
                Event::Remap { from, to, bytes } => self.moved((from, to, bytes), told),
                Event::Fork { child } => {
                    self.children.iter().for_each(|children| children.had_room());
                    let keep =
                        |children: &Arc<ForkedChildren>| children.keep(child.as_fd(), first_page(self));
                    let kept = self.children.as_ref().is_none_or(keep);
                    let news = if read == Read::OneTooMany || !kept {
                        Err(DeferredEvent::Child(child))
                    } else {
                        told(DeferredEvent::Child(child))
                    };
                    if let Err(DeferredEvent::Child(child)) = news {
                        self.orphans.child(child);
                        let _ = told(DeferredEvent::GivenUp);
                    }
                }
            }
        }
        if read == Read::Nothing {
            let _ = told(DeferredEvent::NoDescriptor);
        }
        // Whoever reads has more to do than this, and comes again.
        self.close_orphans() != Rest::None || read != Read::All
    }

    /// Part of the region is somewhere else. What else the owner of adopted memory has registered with its userfaultfd is its own
    /// business.
    fn moved(
        &self,
        (from, to, bytes): (usize, usize, usize),
        told: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) {
        for span in self.target.pages_in(from, from.saturating_add(bytes)) {
            let range = self.target.addresses(span);
            // As far behind the new address as it was behind the old one.
            let to = range.start().wrapping_sub(from).wrapping_add(to);
            self.orphans.moved(to, range.bytes());
            let _ = told(DeferredEvent::Moved { to, bytes: range.bytes() });
        }
    }

    fn read(&self, batch: &mut Batch) -> Read {
        match batch.read(&self.uffd, self.page_size()) {
            Ok(()) => Read::All,
            // A child comes with a descriptor. Until there is one, its parent waits in fork(2), and so do all faults.
            Err(Errno::EMFILE | Errno::ENFILE) => {
                // One after the other: such a child may have children before it is seen to.
                let room = |children: &Arc<ForkedChildren>| {
                    children.is_short() && !self.orphans.have_children() && children.make_room()
                };
                match self
                    .children
                    .as_ref()
                    .is_some_and(room)
                    .then(|| batch.read(&self.uffd, self.page_size()))
                {
                    Some(Ok(())) => Read::OneTooMany,
                    _ => Read::Nothing,
                }
            }
            Err(errno) => {
                if let Some(untold) = self.orphans.told.again() {
                    log!(error, region = self.name, %errno, untold, "cannot read events");
                }
                Read::All
            }
        }
    }

    /// Takes note of what the kernel has told. A child is not served.
    pub(crate) fn handle_deferred(&self, news: DeferredEvent) -> Result<(), DeferredEvent> {
        match news {
            DeferredEvent::Child(_) => return Err(news),
            DeferredEvent::NoDescriptor => {}
            DeferredEvent::GivenUp => {
                let served = self.children.is_some();
                let why = if served {
                    "no descriptor is left (ulimit -n)"
                } else {
                    "its parent's memory is adopted"
                };
                if let Some(untold) = self.orphans.told.again() {
                    log!(
                        error,
                        region = self.name,
                        why,
                        untold,
                        "a child cannot be served: what it does not have is bad"
                    );
                }
            }
            DeferredEvent::Moved { to, bytes } => {
                if let Some(untold) = self.orphans.told.again() {
                    log!(
                        error,
                        region = self.name,
                        to,
                        bytes,
                        untold,
                        "moved by mremap(2): what was not filled is bad there"
                    );
                }
            }
        }
        Ok(())
    }

    /// A child is not served: what it does not have yet is bad there.
    pub(crate) fn orphan_child(&self, child: Uffd) {
        self.orphans.child(child);
        self.close_all_orphans();
    }

    /// Makes what nobody serves bad, but for what is blocked.
    fn close_all_orphans(&self) -> Rest {
        loop {
            match self.close_orphans() {
                Rest::Some => thread::yield_now(),
                rest => return rest,
            }
        }
    }

    /// Makes some more of what nobody serves bad.
    pub(crate) fn close_orphans(&self) -> Rest {
        let rest = self.orphans.close_some(self, self.children.as_deref().map(Deref::deref));
        // With the descriptor of a child that has been seen to, perhaps.
        if let Some(children) = &self.children {
            children.has_room();
        }
        rest
    }

    fn let_go(&self, start: usize, end: usize) {
        for span in self.target.pages_in(start, end) {
            // Who forks may hold the allocator.
            if self.children.is_none() {
                log!(debug, region = self.name, first = span.first.0, pages = span.pages, "let go");
            }
            if let Target::Foreign(adopted) = &self.target {
                adopted.remove(span);
            }
            // Why a page was bad is kept: who let go of it runs on before this, and it may have failed anew since.
            self.pages.invalidate(span);
        }
    }
}

/// The request for a fault; `None` if the fault needs no page or is already answered.
pub(super) fn to_request(region: &Served, fault: &Fault, read: Instant) -> Option<FaultRequest> {
    let page = region.target.page_at(fault.address)?;
    let counters = region.counters.local();
    counters.faults_writing.add(u64::from(fault.write));
    counters.faults_minor.add(u64::from(fault.kind == FaultKind::Minor));
    match fault.kind {
        FaultKind::WriteProtect => release(region, page),
        // Beside memfds that are filled later, only a foreign registration asks for these.
        FaultKind::Minor if region.target.foreign().is_some() => show(region, page),
        FaultKind::Minor | FaultKind::Missing => {
            let thread = fault.thread.cast_unsigned();
            let place = region.counters.begin(page, thread, read);
            return Some(FaultRequest { page, read, thread, place, tries: 0, failures: 0 });
        }
    }
    None
}
