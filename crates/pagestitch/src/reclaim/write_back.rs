//! Writes the bytes of pages that have left to their sources.

use crate::error::Failure;
use crate::reclaim::dirty::DirtyPages;
use crate::reclaim::places::Place;
use crate::reclaim::share::{Quiet, Share, State};
use crate::reclaim::soft_fault::Return;
use crate::reclaim::state::{BATCH, Standby, count, key_of};
use crate::reclaim::write_in_handler::HandlerWrites;
use crate::source::{ask_writer, write_all};
use crate::space::Mapping;
use crate::space::page_table::{PageState, Wake};
use pagestitch_kernel::mapped_buffer::MappedBuffer;
use pagestitch_kernel::{Errno, Page, PageSize, Span};
use std::thread;

/// The way in which dirty pages that have moved to slots are written.
pub(super) enum Writer<'w, 's> {
    /// Together, once they are not claimed any more. `None` for a region without dirty pages.
    Batch(Option<&'w mut Batch<'s>>),
    /// At once, in a signal handler.
    Handler(&'w mut HandlerWrites),
}

impl Writer<'_, '_> {
    /// True if the bytes of a dirty page cannot be written.
    pub(super) fn refuses(&self, region: &Mapping, dirty: &DirtyPages, page: Page) -> bool {
        match self {
            Self::Batch(_) => has_padding(region, page),
            Self::Handler(writes) => writes.refuses(region, dirty, page),
        }
    }
}

/// Dirty pages that have moved to slots together, with a copy of their bytes.
pub(super) struct Batch<'s> {
    state: &'s State,
    /// Invariant: present until the drop, which gives it back.
    buffer: Option<MappedBuffer>,
    /// The pages, ascending, with their slots; at the end of the array, those whose bytes the kernel does not read.
    pages: [(Page, usize); BATCH],
    /// The number of pages in the buffer.
    filled: usize,
    /// The number of pages that are not read.
    unread: usize,
}

impl<'s> Batch<'s> {
    /// `None` without a buffer.
    pub(super) fn new(state: &'s State) -> Option<Self> {
        let buffer = state.take_buffer().ok()?;
        Some(Self { state, buffer: Some(buffer), pages: [(Page(0), 0); BATCH], filled: 0, unread: 0 })
    }

    /// Adds a page that is claimed still.
    pub(super) fn add(&mut self, standby: &Standby, page: Page, slot: usize) {
        if self.is_empty() {
            self.state.writes.begin();
        }
        match self.copy(standby, slot) {
            Ok(()) => {
                self.pages[self.filled] = (page, slot);
                self.filled += 1;
            }
            // A memory error, for example.
            Err(_) => {
                self.unread += 1;
                self.pages[BATCH - self.unread] = (page, slot);
            }
        }
    }

    /// Copies the bytes of a slot behind those of the pages before.
    fn copy(&mut self, standby: &Standby, slot: usize) -> Result<(), Errno> {
        let size = PageSize::system().bytes();
        let buffer = self.buffer.as_mut().expect("a batch has its buffer until its drop");
        standby.arena.read(slot, &mut buffer.bytes()[self.filled * size..][..size])
    }

    const fn is_empty(&self) -> bool {
        self.filled + self.unread == 0
    }

    /// Its pages, and their bytes.
    fn content(&mut self) -> Content<'_> {
        let buffer = self.buffer.as_mut().expect("a batch has its buffer until its drop");
        let unread = &self.pages[BATCH - self.unread..];
        Content { pages: &self.pages[..self.filled], bytes: buffer.bytes(), unread }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.state.keep_buffer(buffer);
        }
        if !self.is_empty() {
            self.state.writes.end();
        }
    }
}

/// The pages of a batch.
struct Content<'b> {
    /// Those that are read, with their slots.
    pages: &'b [(Page, usize)],
    bytes: &'b [u8],
    /// The others.
    unread: &'b [(Page, usize)],
}

/// The first pages that follow each other.
fn neighbours(pages: &[(Page, usize)]) -> Span {
    let next = pages.windows(2).take_while(|two| two[0].0.0 + 1 == two[1].0.0).count();
    Span { first: pages[0].0, pages: 1 + next }
}

impl Share {
    /// Writes the pages of a batch to their sources. They are clean standby then; pages whose source has
    /// failed go back to the region. Called without a claim, because a touch may bring pages back
    /// meanwhile.
    pub(super) fn write_batch(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        standby: &Standby,
        batch: &mut Batch<'_>,
    ) {
        let Content { pages: mut rest, mut bytes, unread } = batch.content();
        while !rest.is_empty() {
            let span = neighbours(rest);
            let (pages, later) = rest.split_at(span.pages);
            let (now, after) = bytes.split_at(span.pages * region.page_size().bytes());
            let mut slots = pages.iter().map(|(_, slot)| *slot);
            self.write_span(region, dirty, span, now, &mut |page, is_written| {
                let slot = slots.next().expect("each page has a slot");
                if is_written {
                    let page = key_of(self.member, page);
                    // A return that ends in vain would leave a modified page that no thread writes.
                    while !standby.slots.written(slot, page) && standby.slots.is_returning(slot, page) {
                        thread::yield_now();
                    }
                } else {
                    self.put_back(region, dirty, standby, page, slot);
                }
            });
            self.end_writing(dirty, span);
            (rest, bytes) = (later, after);
        }
        for &(page, slot) in unread {
            self.put_back(region, dirty, standby, page, slot);
            self.end_writing(dirty, page.span());
        }
    }

    /// Writes the bytes of pages to their sources: at once, or one by one if that fails. Tells of each page
    /// whether it is written, and returns the first failure with its page. The pages are marked as being
    /// written.
    pub(super) fn write_span(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        span: Span,
        bytes: &[u8],
        each: &mut dyn FnMut(Page, bool),
    ) -> Option<(Page, Box<Failure>)> {
        let mut first = None;
        match self.write_pages(region, dirty, span, bytes) {
            Ok(()) => span.iter().for_each(|page| each(page, true)),
            Err(failure) if span.pages == 1 => {
                // Before the page goes back, because a thread that waits for room must know the reason.
                self.note_failure(region, dirty, span.first, &failure);
                each(span.first, false);
                first = Some((span.first, failure));
            }
            Err(_) => {
                for (page, bytes) in span.iter().zip(bytes.chunks(region.page_size().bytes())) {
                    let written = self.write_pages(region, dirty, page.span(), bytes);
                    let is_written = written.is_ok();
                    if let Some(failure) = written.err().filter(|_| first.is_none()) {
                        self.note_failure(region, dirty, page, &failure);
                        first = Some((page, failure));
                    }
                    each(page, is_written);
                }
            }
        }
        first
    }

    fn write_pages(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        span: Span,
        bytes: &[u8],
    ) -> Result<(), Box<Failure>> {
        let offsets = region.page_size().offsets(span);
        let mut rest = bytes;
        for piece in region.layout.pieces(offsets.start..offsets.end.min(region.len())) {
            let (now, later) = rest.split_at(piece.bytes as usize);
            rest = later;
            // Padding has none.
            if piece.backing.writer().is_none() {
                continue;
            }
            // Before the write, because a sync that fails beside it may lose its bytes; and after it, because a sync
            // that comes between would miss them.
            dirty.unsynced.set(piece.chunk);
            let answer = ask_writer(piece.backing.writer(), |writer| write_all(writer, piece.offset, now));
            dirty.unsynced.set(piece.chunk);
            answer.map_err(|error| Box::new(piece.failed(error)))?;
        }
        count(&self.state.tally.write_backs, span.pages);
        self.state.writes.succeeded(&dirty.backoff);
        Ok(())
    }

    /// The bytes of a span are in their sources, or the pages are dirty again.
    pub(super) fn end_writing(&self, dirty: &DirtyPages, span: Span) {
        span.iter().for_each(|page| {
            dirty.writing.clear(page.0);
        });
        self.state.writes.pages_done();
    }

    /// A write has failed. The first failure since a success is told.
    #[cold]
    fn note_failure(&self, region: &Mapping, dirty: &DirtyPages, page: Page, failure: &Failure) {
        count(&self.state.tally.write_failures, 1);
        if self.state.writes.failed(&dirty.backoff) {
            region.report(page, failure);
            log!(error, region = region.name, %failure, "written pages stay in memory, because their source has failed");
        }
    }

    /// A page could not be written: it goes back to its region, and is dirty.
    #[cold]
    fn put_back(&self, region: &Mapping, dirty: &DirtyPages, standby: &Standby, page: Page, slot: usize) {
        while !self.try_to_put_back(region, dirty, standby, page, slot) {
            // The thread with the claim may wait for room, and thus for this write.
            self.state.writes.pages_done();
            thread::yield_now();
        }
    }

    /// As [`put_back`](Self::put_back). False if another thread has the claim of the page, or changes the map.
    #[cold]
    pub(super) fn try_to_put_back(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        standby: &Standby,
        page: Page,
        slot: usize,
    ) -> bool {
        let (quiet, key) = (Quiet(region), key_of(self.member, page));
        let waits = || standby.slots.is_modified(slot, key) || standby.slots.is_returning(slot, key);
        if !waits() {
            return true;
        }
        // A touch brings it back otherwise.
        if let Ok(mut claim) = region.pages.claim(page, &quiet) {
            let range = region.target.addresses(page.span());
            let back = self.bring_back(page, slot, range, region.uffd.of(range), true);
            if back == Return::Unmapped {
                self.forget_unmapped(dirty, page, slot);
            }
            claim.settle(1, if back == Return::Done { PageState::Present } else { PageState::Absent });
            // A thread may have faulted before the claim.
            quiet.wake(page.span());
        }
        !waits()
    }

    /// The application has unmapped a claimed page, so that its bytes have no place any more.
    #[cold]
    pub(super) fn forget_unmapped(&self, dirty: &DirtyPages, page: Page, slot: usize) {
        let Some(standby) = &self.state.standby else { return };
        if standby.slots.begin_return(slot, key_of(self.member, page)).is_some() {
            standby.slots.abandon(slot);
            dirty.unmark(page);
            self.places.set(page, Place::Gone);
        }
    }
}

/// True if a page has bytes of padding, which no source takes back.
pub(super) fn has_padding(region: &Mapping, page: Page) -> bool {
    let offsets = region.page_size().offsets(page.span());
    let mut pieces = region.layout.pieces(offsets.start..offsets.end.min(region.len()));
    pieces.any(|piece| piece.backing.writer().is_none())
}
