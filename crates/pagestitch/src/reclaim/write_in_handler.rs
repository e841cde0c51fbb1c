//! A signal handler writes the dirty pages that it evicts to their files.
//!
//! It has no room for a copy of their bytes, and writes them from their slots. A page that is not claimed may come
//! back, and change meanwhile. So the handler keeps its claim until the file has the bytes.
//!
//! A source that is not a file, or whose last write has failed, is left to the [thread](super::evictor) of the
//! budget, which runs code of sources, and tells of failures.

use crate::policy::PageKey;
use crate::reclaim::dirty::DirtyPages;
use crate::reclaim::share::{Share, State};
use crate::reclaim::state::{Standby, count, key_of, page_of};
use crate::space::Mapping;
use pagestitch_kernel::file_write::has_bytes;
use pagestitch_kernel::sync::yield_now;
use pagestitch_kernel::{Page, PageSize, Span};
use std::cell::Cell;

/// Some of a few pages, as bits: the first page is bit 0.
pub(super) type Few = u32;

/// The writes of a handler for a few pages, which it moves to slots that follow each other.
pub(super) struct HandlerWrites {
    pub(super) first_slot: usize,
    /// The pages whose bytes no file has taken.
    pub(super) refused: Few,
    /// True if a dirty page stays, because the handler must not write it.
    has_left_some: Cell<bool>,
}

impl HandlerWrites {
    pub(super) const fn new(first_slot: usize) -> Self {
        Self { first_slot, refused: 0, has_left_some: Cell::new(false) }
    }

    pub(super) fn has_left_some(&self) -> bool {
        self.has_left_some.get()
    }

    /// True for a page that the handler must not write, because it has bytes of another source than a file, or its
    /// region ends. The caller has the claim of the page.
    pub(super) fn refuses(&self, region: &Mapping, dirty: &DirtyPages, page: Page) -> bool {
        let refuses = dirty.is_ending() || !is_in_files(region, page);
        self.has_left_some.set(self.has_left_some.get() || refuses);
        refuses
    }
}

impl State {
    /// True if handlers write pages back, or if there are none to write.
    pub(super) fn handlers_write(&self) -> bool {
        self.writes.failing() == 0
    }

    /// Puts pages back whose bytes no file has taken. The thread of the budget writes them once more, and tells of
    /// the failure.
    ///
    /// The region has not ended: its last flush waits for the mark of a page that is being written, and handlers
    /// move no dirty page afterwards. No thread that this one has interrupted has the claim of such a page,
    /// because the handler had it a moment ago. A thread that has it may wait for one that ends another region, and
    /// so the handler leaves the table of the regions after each attempt.
    #[cold]
    #[inline(never)] // a signal handler has a small stack
    pub(super) fn put_refused_back(&self, keys: &[PageKey], writes: &HandlerWrites) {
        count(&self.tally.write_failures, 1);
        for (step, &key) in keys.iter().enumerate() {
            if writes.refused >> step & 1 == 0 {
                continue;
            }
            let mut is_back = false;
            while !is_back {
                is_back = true;
                let mut put = |share: &Share, region: &Mapping| {
                    is_back = share.try_to_put_refused_back(region, page_of(key), writes.first_slot + step);
                };
                self.enter_region(key, &mut put);
                if !is_back {
                    // The thread with the claim may wait for room, and thus for this write.
                    self.writes.pages_done();
                    yield_now();
                }
            }
            if let Some(requests) = self.evictor.requests() {
                requests.write(key);
            }
        }
    }
}

impl Share {
    #[inline(never)] // a signal handler has a small stack
    fn try_to_put_refused_back(&self, region: &Mapping, page: Page, slot: usize) -> bool {
        let (Some(dirty), Some(standby)) = (&self.dirty, &self.state.standby) else { return true };
        let is_back = self.try_to_put_back(region, dirty, standby, page, slot);
        if is_back {
            self.end_writing(dirty, page.span());
        }
        is_back
    }

    /// Writes the dirty ones of claimed pages that have moved to slots, from `slot` on: they are clean then.
    #[inline(never)] // a signal handler has a small stack
    pub(super) fn write_moved(
        &self,
        region: &Mapping,
        standby: &Standby,
        (span, slot): (Span, usize),
        writes: &mut HandlerWrites,
    ) {
        let Some(dirty) = &self.dirty else { return };
        let (mut done, mut at_once) = (0, span.pages);
        while done < span.pages {
            let rest = span.without_prefix(done).prefix(at_once);
            let run = rest.prefix(self.leading_modified(standby, rest, slot + done));
            if !run.is_empty() && !self.write_slots(region, dirty, standby, run, slot + done) {
                if run.pages > 1 {
                    // One by one, because the file may take some of them.
                    at_once = 1;
                    continue;
                }
                writes.refused |= 1 << (slot + done - writes.first_slot);
            }
            done += run.pages.max(1);
        }
    }

    /// The number of leading pages of a span that are modified, in their slots from `slot` on.
    fn leading_modified(&self, standby: &Standby, span: Span, slot: usize) -> usize {
        let mut pages = 0;
        while pages < span.pages {
            if !standby.slots.is_modified(slot + pages, key_of(self.member, Page(span.first.0 + pages))) {
                break;
            }
            pages += 1;
        }
        pages
    }

    /// Writes the bytes of slots that follow each other to the files of their pages. False if a file does not take
    /// all of them.
    #[inline(always)] // a signal handler has a small stack
    fn write_slots(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        standby: &Standby,
        run: Span,
        slot: usize,
    ) -> bool {
        self.state.writes.begin();
        let is_written = write_pieces(region, dirty, standby, run, slot);
        if is_written {
            self.note_written(dirty, standby, run, slot);
        }
        self.state.writes.end();
        is_written
    }

    fn note_written(&self, dirty: &DirtyPages, standby: &Standby, run: Span, slot: usize) {
        for (step, page) in run.iter().enumerate() {
            // False if a handler of this thread has brought the page back beside the claim: it is dirty then.
            standby.slots.written(slot + step, key_of(self.member, page));
            dirty.writing.clear(page.0);
        }
        count(&self.state.tally.write_backs, run.pages);
    }
}

/// As [`Share::write_slots`], without a note of the result.
#[inline(never)] // a signal handler has a small stack
fn write_pieces(region: &Mapping, dirty: &DirtyPages, standby: &Standby, run: Span, slot: usize) -> bool {
    let (page, offsets) = (PageSize::system(), region.page_size().offsets(run));
    let (mut from, mut at) = (page.offset_of(Page(slot)) as usize, offsets.start);
    let end = offsets.end.min(region.len());
    while at < end {
        let piece = region.layout.piece_at(at, end);
        let Some(file) = piece.backing.file_to_write() else { return false };
        // Before the write, because a sync that fails beside it may lose its bytes; and after it, because a sync that
        // comes between would miss them.
        dirty.unsynced.set(piece.chunk);
        // A truncated file must not grow again with a hole in it.
        let is_written = has_bytes(file, piece.offset + piece.bytes)
            && standby.arena.write_to(file, piece.offset, from..from + piece.bytes as usize);
        at += piece.bytes;
        from += piece.bytes as usize;
        dirty.unsynced.set(piece.chunk);
        if !is_written {
            return false;
        }
    }
    true
}

/// True if files take all bytes of a page.
fn is_in_files(region: &Mapping, page: Page) -> bool {
    let offsets = region.page_size().offsets(page.span());
    let (mut at, end) = (offsets.start, offsets.end.min(region.len()));
    while at < end {
        let piece = region.layout.piece_at(at, end);
        if piece.backing.file_to_write().is_none() {
            return false;
        }
        at += piece.bytes;
    }
    true
}
