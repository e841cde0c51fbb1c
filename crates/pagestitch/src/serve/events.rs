//! The messages of a region: faults become requests, and discards, unmaps, moves and forks are handled.

use crate::fault::FaultRequest;
use crate::fault::owner::{release, show};
use crate::serve::Served;
use crate::serve::fork::first_page;
use crate::serve::fork::orphans::Remaining;
use crate::serve::served::ForkedChildren;
use crate::space::target::{Busy, Foreign};
use crate::space::{DiscardNotice, Target};
use pagestitch_kernel::{AddressRange, Batch, Errno, Event, Fault, FaultKind, Features, Uffd};
use std::ops::Deref;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// An event that may wait until no thread is forking.
#[derive(Debug)]
pub(crate) enum DeferredEvent {
    /// A forked child, with a uffd of its own.
    Child(Uffd),
    /// A child was forked and no descriptor is left for it: those of ended children must be
    /// released.
    NoDescriptor,
    /// A child is given up, because no descriptor or no server is left for it: its absent pages are
    /// poisoned.
    GivenUp,
    /// `mremap(2)` has moved a part of the region.
    Moved {
        /// Its new address.
        to: usize,
        /// Its length.
        bytes: usize,
    },
}

/// The result of reading events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadOutcome {
    All,
    /// All, with a descriptor of the reserve, which must be refilled before the next child.
    OneTooMany,
    Nothing,
}

impl Served {
    /// Reads the events of one of a region's shards and applies changes of the memory map. Faults stay in the
    /// batch. An event that takes time or memory goes to `defer`, which may refuse it. True if some
    /// work is left: read again in a moment.
    ///
    /// For a region whose children are served, it allocates nothing and waits for no thread that
    /// allocates, because a forking thread may hold the allocator.
    pub(crate) fn read_events(
        &self,
        shard: usize,
        batch: &mut Batch,
        defer: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) -> bool {
        // A page that the owner of adopted memory discards holds other bytes from then on: no page
        // is installed meanwhile.
        let _alone = self.target.foreign().and_then(Foreign::change);
        self.read_alone(shard, batch, defer)
    }

    /// Reads the events of all shards, without serving their faults.
    pub(super) fn read_without_serving(&self, batch: &mut Batch) {
        for shard in 0..self.uffd.count() {
            self.read_events(shard, batch, &mut |event| self.handle_deferred(event));
        }
    }

    /// As [`read_events`](Self::read_events), for a thread that must not wait: an installation
    /// lasts as long as it waits for the memory of a source.
    pub(crate) fn try_read_events(
        &self,
        shard: usize,
        batch: &mut Batch,
        defer: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) -> Result<bool, Busy> {
        let _alone = self.target.foreign().map(Foreign::try_change).transpose()?;
        Ok(self.read_alone(shard, batch, defer))
    }

    fn read_alone(
        &self,
        shard: usize,
        batch: &mut Batch,
        defer: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) -> bool {
        // An owner that forks or moves memory again and again waits until some orphans are closed.
        if self.children.is_none() && self.orphans.are_many() && self.close_orphans() == Remaining::Some {
            batch.clear();
            return true;
        }
        let notice = self.written.as_ref().map(|written| &written.notice);
        let _reading = notice.map(DiscardNotice::reading);
        let read = self.read(shard, batch);
        for event in batch.take_events() {
            if !matches!(event, Event::Fork { .. }) {
                notice.into_iter().for_each(DiscardNotice::note);
            }
            match event {
                Event::Remove { start, end } | Event::Unmap { start, end } => self.on_discard(start, end),
                Event::Remap { from, to, bytes } => self.moved(shard, (from, to, bytes), defer),
                Event::Fork { child, kept } => {
                    self.children.iter().for_each(|children| children.reset_shortage());
                    let is_served = kept || self.children.is_none();
                    let event = if read == ReadOutcome::OneTooMany || !is_served {
                        Err(DeferredEvent::Child(child))
                    } else {
                        defer(DeferredEvent::Child(child))
                    };
                    if let Err(DeferredEvent::Child(child)) = event {
                        self.orphans.child(child);
                        let _ = defer(DeferredEvent::GivenUp);
                    }
                }
            }
        }
        if read == ReadOutcome::Nothing {
            let _ = defer(DeferredEvent::NoDescriptor);
        }
        // The reading thread has other work, so it comes back for the rest.
        self.close_orphans() != Remaining::None || read != ReadOutcome::All
    }

    /// Handles a move of part of the region. Other ranges that the owner of adopted memory has
    /// registered with its userfaultfd are ignored.
    pub(super) fn moved(
        &self,
        shard: usize,
        (from, to, bytes): (usize, usize, usize),
        defer: &mut dyn FnMut(DeferredEvent) -> Result<(), DeferredEvent>,
    ) {
        // Also of an event without pages, which tells of a duplicate of shared memory.
        self.orphans.note_move();
        for span in self.target.pages_in(from, from.saturating_add(bytes)) {
            let range = self.target.addresses(span);
            // At the same distance from the new address as from the old one.
            let to = range.start().wrapping_sub(from).wrapping_add(to);
            self.orphans.moved(shard, to, range.bytes());
            let _ = defer(DeferredEvent::Moved { to, bytes: range.bytes() });
        }
    }

    fn read(&self, shard: usize, batch: &mut Batch) -> ReadOutcome {
        let uffd = self.uffd.get(shard);
        let read = |batch: &mut Batch| match &self.children {
            Some(children) => children.read(batch, (uffd, self.page_size()), first_page(self)),
            None => batch.read(uffd, self.page_size()),
        };
        match read(batch) {
            Ok(()) => ReadOutcome::All,
            // The event of a child carries a descriptor. Until one is free, the parent waits in
            // fork(2), and so do all faults.
            Err(Errno::EMFILE | Errno::ENFILE) => {
                // One child at a time, because such a child may have children before it is closed.
                let room = |children: &Arc<ForkedChildren>| {
                    children.note_shortage() && !self.orphans.have_children() && children.close_spare()
                };
                match self.children.as_ref().is_some_and(room).then(|| read(batch)) {
                    Some(Ok(())) => ReadOutcome::OneTooMany,
                    _ => ReadOutcome::Nothing,
                }
            }
            Err(errno) => {
                if let Some(suppressed) = self.orphans.log_limit.permit() {
                    log!(error, region = self.name, %errno, suppressed, "cannot read events");
                }
                ReadOutcome::All
            }
        }
    }

    /// Logs a deferred event. A child is not served here: it is returned.
    pub(crate) fn handle_deferred(&self, event: DeferredEvent) -> Result<(), DeferredEvent> {
        match event {
            DeferredEvent::Child(_) => return Err(event),
            DeferredEvent::NoDescriptor => {}
            DeferredEvent::GivenUp => {
                let served = self.children.is_some();
                let reason = if served {
                    "no descriptor is left (ulimit -n)"
                } else {
                    "its parent's memory is adopted"
                };
                if let Some(suppressed) = self.orphans.log_limit.permit() {
                    log!(
                        error,
                        region = self.name,
                        reason,
                        suppressed,
                        "a child cannot be served: the pages that it lacks are poisoned"
                    );
                }
            }
            DeferredEvent::Moved { to, bytes } => {
                if let Some(suppressed) = self.orphans.log_limit.permit() {
                    log!(
                        error,
                        region = self.name,
                        to,
                        bytes,
                        suppressed,
                        "moved by mremap(2): unfilled pages are poisoned there"
                    );
                }
            }
        }
        Ok(())
    }

    /// Gives up a child: its absent pages are poisoned.
    pub(crate) fn orphan_child(&self, child: Uffd) {
        self.orphans.child(child);
        self.close_all_orphans();
    }

    /// Poisons all orphaned pages, except those that are blocked.
    fn close_all_orphans(&self) -> Remaining {
        loop {
            match self.close_orphans() {
                Remaining::Some => thread::yield_now(),
                rest => return rest,
            }
        }
    }

    /// Poisons the next batch of orphaned pages.
    pub(crate) fn close_orphans(&self) -> Remaining {
        let rest = self.orphans.close_some(self, self.children.as_deref().map(Deref::deref));
        // Refills the reserve, perhaps with the descriptor of a child that is closed by now.
        if let Some(children) = &self.children {
            children.refill_spare();
        }
        rest
    }

    fn on_discard(&self, start: usize, end: usize) {
        for span in self.target.pages_in(start, end) {
            // Logging may allocate, and if children are served, a forking thread may hold the
            // allocator lock.
            if self.children.is_none() {
                log!(debug, region = self.name, first = span.first.0, pages = span.pages, "discarded");
            }
            if let Target::Foreign(adopted) = &self.target {
                adopted.note_discard(span);
            }
            // The failure of a poisoned page stays: the discarding thread continued before this
            // call, so the page may have failed again since.
            self.pages.invalidate(span);
        }
    }
}

/// Answers a fault beside the region's addresses: the application has grown or duplicated its memory by
/// `mremap(2)`, so it is registered there too. No source has bytes for it.
#[cold]
fn answer_outside(region: &Served, fault: &Fault) {
    // The owner of adopted memory may have registered other ranges, which it serves itself.
    if region.target.foreign().is_some() || !region.uffd.features().contains(Features::POISON) {
        return;
    }
    let size = region.page_size();
    let Some(page) = AddressRange::new(fault.address & !(size.bytes() - 1), size.bytes(), size) else {
        return;
    };
    for uffd in region.uffd.iter() {
        // Another shard's userfaultfd refuses the page. A page in a memfd has its bytes there.
        let _ = if fault.kind == FaultKind::Minor { uffd.continue_pages(page) } else { uffd.poison(page) };
        let _ = uffd.wake(page);
    }
}

/// The request for a fault; `None` if its address is outside the target, if it needs no page, or if
/// it is already answered.
pub(super) fn to_request(region: &Served, fault: &Fault, read: Instant) -> Option<FaultRequest> {
    let Some(page) = region.target.page_at(fault.address) else {
        answer_outside(region, fault);
        return None;
    };
    let counters = region.counters.local();
    counters.faults_writing.add(u64::from(fault.write));
    counters.faults_minor.add(u64::from(fault.kind == FaultKind::Minor));
    match fault.kind {
        FaultKind::WriteProtect if region.written_back().is_none() => release(region, page),
        // Except for memfds that are filled later, only a foreign registration requests minor
        // faults.
        FaultKind::Minor if region.target.foreign().is_some() => show(region, page),
        _ => {
            // Its words are in no cache if the region is large.
            region.prefetch_page(page);
            let thread = fault.thread as u32;
            let slot = region.counters.begin(page, thread, read);
            return Some(FaultRequest::new(page, read, thread, slot).by((*fault).into()));
        }
    }
    None
}
