//! Writes the dirty pages of a region to their sources, while threads use them.
//!
//! ```text
//!   region      |d|d|d|         |c|c|c|  write-protected copies: threads go on
//!                 │ MOVE           ▲ COPY_MODE_WP
//!                 ▼                │
//!   snapshots   |■|■|■| ───────────┘ ───────▶ source
//! ```
//!
//! The move proves that no device has a page pinned. The threads that touch a page wait for the move and
//! the copy, and not for the source.

use crate::error::{Failure, FailureReason};
use crate::reclaim::dirty::DirtyPages;
use crate::reclaim::places::Place;
use crate::reclaim::share::{Quiet, Share, without_handlers};
use crate::reclaim::soft_fault::Return;
use crate::reclaim::state::{BATCH, key_of};
use crate::reclaim::write_back::has_padding;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState};
use pagestitch_kernel::arena::Arena;
use pagestitch_kernel::mapped_buffer::MappedBuffer;
use pagestitch_kernel::uffd::Arrival;
use pagestitch_kernel::{Errno, Outcome, Page, Span};
use std::sync::PoisonError;
use std::thread;

/// The pages of a run whose bytes were copied.
enum Copied {
    /// They are clean, if their source takes the bytes.
    Clean(usize),
    /// The first page stays dirty, because it is pinned, or has padding. It is marked as being written, and
    /// its bytes are not copied yet.
    Stays,
    /// The first page has no bytes to write.
    Skipped,
    /// Look at the first page again.
    Again,
}

impl Share {
    /// As [`WrittenBack::flush`](crate::space::WrittenBack::flush).
    pub(super) fn flush(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        span: Span,
        failed: &mut dyn FnMut(Page, Failure),
    ) {
        let snapshots = dirty.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = self.wait_for_buffer();
        let is_reserved = self.state.try_reserve(BATCH);
        let mut rest = span;
        while let Some(first) = dirty.first_unwritten(rest) {
            rest = rest.without_prefix(first.0 - rest.first.0);
            let done = self.flush_run(region, dirty, (&snapshots, buffer.bytes()), rest, failed);
            rest = rest.without_prefix(done);
        }
        self.state.release(if is_reserved { BATCH } else { 0 });
        let quiet = without_handlers();
        self.state.keep_buffer(buffer);
        drop(quiet);
    }

    /// A buffer, after a wait for another thread if the kernel has no memory for one.
    fn wait_for_buffer(&self) -> MappedBuffer {
        loop {
            // A signal handler of this thread may wait for a thread that takes a buffer.
            let quiet = without_handlers();
            let taken = self.state.take_buffer();
            drop(quiet);
            match taken {
                Ok(buffer) => return buffer,
                Err(_) => thread::yield_now(),
            }
        }
    }

    /// Writes the first pages of a span, of which the first is dirty or being written. Returns the number of
    /// pages that are done.
    fn flush_run(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        (snapshots, buffer): (&Arena, &mut [u8]),
        span: Span,
        failed: &mut dyn FnMut(Page, Failure),
    ) -> usize {
        if dirty.writing.get(span.first.0) {
            self.state.writes.wait_while(|| dirty.writing.get(span.first.0));
            return 0;
        }
        let (pages, stays) = match self.copy_dirty(region, dirty, (snapshots, buffer), span.prefix(BATCH)) {
            Copied::Clean(pages) => (pages, false),
            Copied::Stays => match self.read_in_place(span.first, buffer) {
                Ok(()) => (1, true),
                Err(errno) => {
                    self.end_writing(dirty, span.first.span());
                    // The next touch fills a page that is discarded.
                    if self.is_there(span.first) {
                        failed(span.first, unreadable(region, span.first, errno));
                    }
                    return 1;
                }
            },
            Copied::Skipped => return 1,
            Copied::Again => {
                region.pages.wait_while_filling(span.first);
                thread::yield_now();
                return 0;
            }
        };
        let (span, bytes) = (span.prefix(pages), pages * region.page_size().bytes());
        self.state.writes.begin();
        let failure = self.write_span(region, dirty, span, &buffer[..bytes], &mut |page, is_written| {
            if stays || !is_written {
                dirty.mark(page);
            }
        });
        self.end_writing(dirty, span);
        self.state.writes.end();
        failure.into_iter().for_each(|(page, failure)| failed(page, *failure));
        pages
    }

    /// Copies the bytes of the leading dirty pages of a span, and marks these as being written.
    fn copy_dirty(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        (snapshots, buffer): (&Arena, &mut [u8]),
        span: Span,
    ) -> Copied {
        let (quiet, _handlers) = (Quiet(region), without_handlers());
        let mut claim = match region.pages.claim_present(region.in_one_shard(span), &quiet) {
            Ok(claim) => claim,
            Err(PageState::Absent) => return self.find_absent(region, dirty, span.first),
            Err(PageState::Poisoned) => return Copied::Skipped,
            Err(_) => return Copied::Again,
        };
        let is_first = |page: Page| page == span.first;
        let moves = |page: &Page| {
            dirty.is_dirty(*page)
                && !dirty.writing.get(page.0)
                && (is_first(*page) || !has_padding(region, *page))
        };
        let pages = claim.span().iter().take_while(moves).count();
        let alone = pages > 0 && has_padding(region, span.first);
        let mut run = claim.split_off(if alone { 1 } else { pages });
        claim.settle(claim.span().pages, PageState::Present);
        let copied = match run.span().is_empty() {
            true if dirty.writing.get(span.first.0) => Copied::Again,
            // Another thread has written it meanwhile.
            true => Copied::Skipped,
            false if alone => stays(dirty, run.span().first),
            false => self.move_and_copy(region, dirty, (snapshots, buffer), &mut run),
        };
        run.settle(run.span().pages, PageState::Present);
        copied
    }

    /// A page that is dirty by its mark is not in the region.
    fn find_absent(&self, region: &Mapping, dirty: &DirtyPages, page: Page) -> Copied {
        let quiet = Quiet(region);
        let Ok(mut claim) = region.pages.claim(page, &quiet) else { return Copied::Again };
        if self.looks_absent(page, PageState::Absent) {
            claim.settle(1, PageState::Present);
            return Copied::Again;
        }
        let range = region.target.addresses(page.span());
        let is_modified = |slot: usize| {
            let standby = self.state.standby.as_ref();
            standby.is_some_and(|standby| standby.slots.is_modified(slot, key_of(self.member, page)))
        };
        match self.places.get(page) {
            Place::Slot(slot) if is_modified(slot as usize) => {
                match self.bring_back(page, slot as usize, range, region.uffd.of(range), true) {
                    Return::Done => claim.settle(1, PageState::Present),
                    Return::Unmapped => self.forget_unmapped(dirty, page, slot as usize),
                    Return::Changing | Return::Gone => {}
                }
                Copied::Again
            }
            // Its fill has failed.
            _ => {
                dirty.unmark(page);
                Copied::Skipped
            }
        }
    }

    /// Moves the pages of a claim to snapshots, and copies them back write-protected.
    fn move_and_copy(
        &self,
        region: &Mapping,
        dirty: &DirtyPages,
        (snapshots, buffer): (&Arena, &mut [u8]),
        claim: &mut Claim<'_>,
    ) -> Copied {
        let (span, size) = (claim.span(), region.page_size().bytes());
        let moved = match snapshots.take_in(&self.evictable, span, 0) {
            Outcome::Done => span.pages,
            Outcome::Partial { bytes } => bytes / size,
            Outcome::Changing => return Copied::Again,
            // The application has discarded it: it takes no memory.
            Outcome::NotRegistered => {
                dirty.unmark(span.first);
                self.uncount(span.first, Place::Listed);
                claim.settle(1, PageState::Absent);
                return Copied::Skipped;
            }
            // Pinned, or locked.
            _ => return stays(dirty, span.first),
        };
        let read = snapshots.read(0, &mut buffer[..moved * size]);
        let copied = if read.is_ok() { copy_back(region, snapshots, span.prefix(moved)) } else { 0 };
        for (slot, page) in span.prefix(moved).iter().enumerate().skip(copied) {
            move_back(region, snapshots, page, slot);
        }
        for page in span.prefix(copied).iter() {
            dirty.begin_writing(page);
        }
        // None of its slots is in use.
        let _ = snapshots.empty(0..moved);
        match copied {
            0 => stays(dirty, span.first),
            copied => Copied::Clean(copied),
        }
    }

    /// Copies the bytes of a page that stays, and stays dirty. The caller has no claim of it, because the
    /// read of a page that is discarded meanwhile is a fault.
    fn read_in_place(&self, page: Page, buffer: &mut [u8]) -> Result<(), Errno> {
        let reservation = self.evictable.reservation();
        let size = reservation.page_size();
        let mut read = || reservation.read_at(size.offset_of(page), &mut buffer[..size.bytes()]);
        // Once more, because a page that was missing may be there by now.
        read().or_else(|_| read())
    }

    /// False for a page that is discarded or unmapped.
    fn is_there(&self, page: Page) -> bool {
        let mut is_there = false;
        let told = self.evictable.reservation().residency(page.span(), |_, here| is_there = here);
        told.is_ok() && is_there
    }
}

/// The failure of a page whose written bytes the kernel does not read.
#[cold]
fn unreadable(region: &Mapping, page: Page, errno: Errno) -> Failure {
    let what = format!(
        "the written page stays dirty, because the kernel cannot read it ({errno}): give it read access; its memory may have an error otherwise"
    );
    let offsets = region.page_size().offsets(page.span());
    region.layout.piece_at(offsets.start, offsets.end).failed(FailureReason::Kernel.error(what))
}

/// The caller has the claim of the page.
fn stays(dirty: &DirtyPages, page: Page) -> Copied {
    dirty.writing.set(page.0);
    Copied::Stays
}

/// Copies pages back write-protected. Returns their number.
fn copy_back(region: &Mapping, snapshots: &Arena, span: Span) -> usize {
    let (mut done, size) = (0, region.page_size().bytes());
    while done < span.pages {
        let range = region.target.addresses(span.without_prefix(done));
        match snapshots.copy_back(region.uffd.of(range), range, done..span.pages, Arrival::Protected) {
            Outcome::Done => done = span.pages,
            Outcome::Partial { bytes } => done += bytes / size,
            Outcome::Changing => thread::yield_now(),
            _ => break,
        }
    }
    done
}

/// Moves a page back that the kernel does not copy. Its bytes are nowhere else, so this ends with success.
#[cold]
fn move_back(region: &Mapping, snapshots: &Arena, page: Page, slot: usize) {
    let range = region.target.addresses(page.span());
    let uffd = region.uffd.of(range);
    loop {
        let back = match snapshots.give_back(uffd, range, slot) {
            outcome @ (Outcome::Done | Outcome::AlreadyThere | Outcome::Changing) => outcome,
            // The frame is pinned, or the region is locked since.
            _ => snapshots.copy_back(uffd, range, slot..slot + 1, Arrival::Writable),
        };
        match back {
            Outcome::Done | Outcome::AlreadyThere => return,
            // The application has unmapped the page.
            Outcome::NotRegistered | Outcome::ProcessGone => return,
            _ => thread::yield_now(),
        }
    }
}
