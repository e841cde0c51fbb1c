//! Write-back: written pages go to their sources, by a flush, and when the region is dropped.

use crate::api::AnyRegion;
use crate::api::refused::refused;
use crate::error::{Error, Failure};
use crate::source::{Backing, ask_writer, write_all};
use crate::space::layout::Piece;
use crate::space::{FailedSyncs, Flushes, RecordFor, Target, WrittenBack, WrittenPages};
use pagestitch_kernel::{Errno, Span};
use std::collections::HashMap;
use std::ops::{Range, RangeBounds};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The place to which written pages of a region go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WriteBack {
    /// The sources of the chunks, which are all [writable](crate::Chunk::writable).
    ToSource,
}

impl AnyRegion {
    /// Writes the pages of a range that were written since the last flush to their sources, and syncs
    /// these. When it returns, each write that was complete before the call is in its source, and
    /// synced. Neighbouring pages go as one write, up to 1 MiB.
    ///
    /// * **Concurrent writes.** A page that is written during the call is written back with some of its
    ///   bytes, and again by the next flush. Flushes of one region wait for each other.
    /// * **Whole pages** go back: the other bytes of a written page go along. Padding does not go back.
    /// * **A kill** during the call leaves old or new bytes in each page of a file. After a power cut,
    ///   the same holds for pages that a finished flush has synced; others depend on the file system.
    /// * **Discarded pages** (`MADV_DONTNEED`) that were not flushed lose their writes.
    /// * **Transfers** into pinned pages (`O_DIRECT`, devices, another process) end before the call, or their
    ///   bytes may be missed, as by [`changes`](Self::changes). With a [budget](crate::Builder::budget),
    ///   pinned pages stay dirty, and each flush writes them; but a debugger's write to `/proc/PID/mem`
    ///   pins no page, and is lost if the page leaves meanwhile.
    ///
    /// The end of the region flushes too: `finish` returns an error of that flush, while `close` and the
    /// drop can only log it and tell [`on_page_failure`](crate::Builder::on_page_failure).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SourceFailed`](crate::ErrorKind::SourceFailed) names the first chunk whose source has
    /// failed, the offset in the source, and its error. The pages that were not written stay dirty: the
    /// next flush writes them. After a failed sync, written bytes may be lost: each later flush that
    /// meets the range returns this error; with a budget, each later flush that meets one of the chunks
    /// that had bytes to sync, because pages may have left at any time. [`ErrorKind::OptionConflict`](crate::ErrorKind::OptionConflict)
    /// unless the region is built [`write_back`](crate::Builder::write_back).
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) if the range leaves the region.
    ///
    /// [`Chunk::writable`](crate::Chunk::writable) has an example.
    pub fn flush(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        let span = self.span(range)?;
        let Some(flushes) = self.served.flushes.as_deref() else {
            return Err(self.lacks_record(RecordFor::WriteBack, "flush"));
        };
        self.check_process("flush")?;
        self.write_and_sync(flushes, span, &mut |_, _| {})
    }

    /// As [`flush`](Self::flush); tells each run that was not written, and a span that was not synced,
    /// with the error.
    fn write_and_sync(
        &self,
        flushes: &Flushes,
        span: Span,
        not_written: &mut dyn FnMut(Span, &Error),
    ) -> Result<(), Error> {
        let offsets = self.served.page_size().offsets(span);
        // One flush at a time, because a flush that finds a page clean must not return before another
        // one has written and synced its bytes.
        let mut failed_syncs = flushes.failed_syncs.lock();
        let (sources, first_error) = match (self.served.written.as_deref(), self.served.written_back()) {
            (Some(written), _) => self.write_dirty(written, span, not_written)?,
            (None, Some(back)) => self.write_bounded(back, span, not_written),
            (None, None) => unreachable!("written pages are recorded if they go back"),
        };
        let mut failures = HashMap::new();
        for piece in distinct(sources) {
            let Err(error) = ask_writer(piece.backing.writer(), |writer| writer.sync()) else { continue };
            let failure = Arc::new(piece.failed(error));
            not_written(span, &Error::of_failure(self.name(), Arc::clone(&failure)));
            failed_syncs.note(offsets.clone(), &failure);
            failures.insert(ptr::from_ref(piece.backing), failure);
        }
        if let Some(back) = self.served.written_back().filter(|_| !failures.is_empty()) {
            self.note_lost_chunks(back, &failures, &offsets, &mut failed_syncs);
        }
        first_error.map_or(Ok(()), Err)?;
        match failed_syncs.find(&offsets) {
            Some(failure) => Err(Error::of_failure(self.name(), Arc::clone(failure))),
            None => Ok(()),
        }
    }

    /// Notes the chunks of a region with a budget of which failed syncs may have lost bytes: those of their sources
    /// that meet the flush, and those whose pages have left since the last sync, because no later sync tells of them.
    fn note_lost_chunks(
        &self,
        back: &dyn WrittenBack,
        failures: &HashMap<*const Backing, Arc<Failure>>,
        flushed: &Range<u64>,
        failed_syncs: &mut FailedSyncs,
    ) {
        let mut end = 0;
        for piece in self.served.layout.pieces(0..self.served.len()) {
            let offsets = end..end + piece.bytes;
            end = offsets.end;
            let Some(failure) = failures.get(&ptr::from_ref(piece.backing)) else { continue };
            let meets = offsets.start < flushed.end && flushed.start < offsets.end;
            if back.take_unsynced(piece.chunk) || meets {
                failed_syncs.note(offsets, failure);
            }
        }
    }

    /// The last flush, before the end of the region, with a caller that takes its error.
    pub(super) fn flush_to_finish(&self) -> Result<(), Error> {
        self.last_flush(&mut |_, _| {})
    }

    /// The last flush, before the end of the region. No caller is left to take its error.
    pub(super) fn flush_at_end(&self) {
        let flushed = self.last_flush(&mut |run, error| {
            if let Some(failure) = error.failure() {
                self.served.report(run.first, failure);
            }
        });
        if let Err(error) = flushed {
            log!(error, region = self.name(), %error, "written pages are lost: end the region by finish()");
        }
    }

    /// Flushes if written pages go back, and no last flush was before: a page that it could not write is
    /// lost, and told once.
    fn last_flush(&self, not_written: &mut dyn FnMut(Span, &Error)) -> Result<(), Error> {
        match self.served.flushes.as_deref() {
            Some(flushes) if !flushes.is_ended.swap(true, Ordering::Relaxed) => {
                self.served.written_back().into_iter().for_each(WrittenBack::end);
                self.write_and_sync(flushes, self.span(..)?, not_written)
            }
            _ => Ok(()),
        }
    }

    /// As [`write_dirty`](Self::write_dirty), for a region with a budget. The sources are those that were written
    /// since their last sync, also by evictions.
    fn write_bounded(
        &self,
        back: &dyn WrittenBack,
        span: Span,
        not_written: &mut dyn FnMut(Span, &Error),
    ) -> (Vec<Piece<'_>>, Option<Error>) {
        let mut first_error = None;
        back.flush(span, &mut |page, failure| {
            let error = Error::of_failure(self.name(), Arc::new(failure));
            not_written(page.span(), &error);
            first_error.get_or_insert(error);
        });
        let mut sources = Vec::new();
        for piece in self.served.layout.pieces(self.clipped(span)) {
            if piece.backing.writer().is_some() && back.take_unsynced(piece.chunk) {
                add_source(&mut sources, piece);
            }
        }
        (sources, first_error)
    }

    /// Writes the dirty pages of a span; the pages of a run with an error stay dirty. Returns a piece of
    /// each source that was written, and the first error.
    fn write_dirty(
        &self,
        written: &WrittenPages,
        span: Span,
        not_written: &mut dyn FnMut(Span, &Error),
    ) -> Result<(Vec<Piece<'_>>, Option<Error>), Error> {
        let (mut sources, mut first_error) = (Vec::new(), None);
        let mut buffer = vec![0; WRITTEN_AT_ONCE.min(self.len())];
        // The pages are armed again before their bytes are read, so that a later write is found.
        for run in self.take_written(written, RecordFor::WriteBack, span)? {
            if let Err(error) = self.write_run(run, &mut buffer, &mut sources) {
                written.give_back(RecordFor::WriteBack, &[run]);
                not_written(run, &error);
                first_error.get_or_insert(error);
            }
        }
        Ok((sources, first_error))
    }

    fn write_run<'r>(
        &'r self,
        run: Span,
        buffer: &mut [u8],
        sources: &mut Vec<Piece<'r>>,
    ) -> Result<(), Error> {
        let offsets = self.clipped(run);
        for start in offsets.clone().step_by(buffer.len()) {
            let bytes = (offsets.end - start).min(buffer.len() as u64) as usize;
            self.read_pages(start, &mut buffer[..bytes])?;
            let mut rest = &buffer[..bytes];
            for piece in self.served.layout.pieces(start..start + bytes as u64) {
                let (now, later) = rest.split_at(piece.bytes as usize);
                rest = later;
                // Padding has none.
                if piece.backing.writer().is_none() {
                    continue;
                }
                let answer =
                    ask_writer(piece.backing.writer(), |writer| write_all(writer, piece.offset, now));
                let failed = answer.map_err(|error| Arc::new(piece.failed(error)));
                failed.map_err(|failure| Error::of_failure(self.name(), failure))?;
                add_source(sources, piece);
            }
        }
        Ok(())
    }

    /// Copies the current bytes of pages. One that was discarded meanwhile is filled again.
    fn read_pages(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let Target::Owned(reservation) = &self.served.target else {
            unreachable!("adopted memory has no record of writes")
        };
        let mut read = reservation.read_at(offset, into);
        if read == Err(Errno::EFAULT) {
            self.filled(offset, into.len())?;
            read = reservation.read_at(offset, into);
        }
        read.map_err(|errno| {
            let range = offset..offset + into.len() as u64;
            refused(self, "written back", &range, errno)
        })
    }
}

/// Adds the source of a piece, unless it is that of the last one.
fn add_source<'r>(sources: &mut Vec<Piece<'r>>, piece: Piece<'r>) {
    if sources.last().is_none_or(|last| !ptr::eq(last.backing, piece.backing)) {
        sources.push(piece);
    }
}

/// The first piece of each source, in the order of the chunks.
fn distinct(mut sources: Vec<Piece<'_>>) -> Vec<Piece<'_>> {
    sources.sort_by_key(|piece| (ptr::from_ref(piece.backing), piece.chunk));
    sources.dedup_by_key(|piece| ptr::from_ref(piece.backing));
    sources.sort_by_key(|piece| piece.chunk);
    sources
}

/// The most bytes of one write.
const WRITTEN_AT_ONCE: usize = 1 << 20;
