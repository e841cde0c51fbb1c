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
use pagestitch_kernel::{Page, PageSize, Span};

/// Some of a few pages, as bits: the first page is bit 0.
pub(super) type Few = u32;

/// The writes of a handler for a run of pages that it evicts.
pub(super) struct HandlerWrites<'r> {
    region: &'r Mapping,
    /// The pages whose bytes no file has taken.
    pub(super) refused: Few,
}

impl<'r> HandlerWrites<'r> {
    pub(super) const fn new(region: &'r Mapping) -> Self {
        Self { region, refused: 0 }
    }
}

impl State {
    /// True if handlers write pages back, or if there are none to write.
    pub(super) fn handlers_write(&self) -> bool {
        self.writes.failing() == 0
    }

    /// Puts pages back whose bytes no file has taken, from a slot and the next ones. The thread of the budget
    /// writes them once more, and tells of the failure.
    #[cold]
    #[inline(never)] // a signal handler has a small stack
    pub(super) fn put_refused_back(&self, keys: &[PageKey], slot: usize, refused: Few) {
        count(&self.tally.write_failures, 1);
        for (step, &key) in keys.iter().enumerate().filter(|(step, _)| refused >> step & 1 != 0) {
            let mut put =
                |share: &Share, region: &Mapping| share.put_refused_back(region, page_of(key), slot + step);
            self.enter_region(key, &mut put);
            self.evictor.requests().iter().for_each(|requests| requests.write(key));
        }
    }
}

impl Share {
    #[inline(never)] // a signal handler has a small stack
    fn put_refused_back(&self, region: &Mapping, page: Page, slot: usize) {
        // A region does not end before the mark of the page does, because it is flushed before.
        if let (Some(dirty), Some(standby)) = (&self.dirty, &self.state.standby) {
            self.put_back(region, dirty, standby, page, slot);
            self.end_writing(dirty, page.span());
        }
    }

    /// Writes the dirty ones of claimed pages that have moved to slots, from `slot` on: they are clean then.
    #[inline(never)] // a signal handler has a small stack
    pub(super) fn write_moved(
        &self,
        standby: &Standby,
        span: Span,
        slot: usize,
        writes: &mut HandlerWrites<'_>,
    ) {
        let Some(dirty) = &self.dirty else { return };
        let mut done = 0;
        while done < span.pages {
            let pages = self.leading_modified(standby, span.without_prefix(done), slot + done);
            let run = Span { first: Page(span.first.0 + done), pages };
            if pages > 0 && !self.write_slots(writes.region, dirty, standby, run, slot + done) {
                writes.refused |= (Few::MAX >> (Few::BITS as usize - pages)) << done;
            }
            done += pages.max(1);
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
            for (step, page) in run.iter().enumerate() {
                standby.slots.written(slot + step, key_of(self.member, page));
                dirty.writing.clear(page.0);
            }
            count(&self.state.tally.write_backs, run.pages);
        }
        self.state.writes.end();
        is_written
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
        // A truncated file must not grow again with a hole in it.
        let is_written = has_bytes(file, piece.offset + piece.bytes)
            && standby.arena.write_to(file, piece.offset, from..from + piece.bytes as usize);
        at += piece.bytes;
        from += piece.bytes as usize;
        // After the write, because a sync that comes between would miss it.
        dirty.unsynced.set(piece.chunk);
        if !is_written {
            return false;
        }
    }
    true
}

/// True if a handler can write all bytes of a page.
pub(super) fn is_in_files(region: &Mapping, page: Page) -> bool {
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
