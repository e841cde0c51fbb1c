//! Growth: chunks that are appended to a region while threads read it.
//!
//! ```text
//!   addresses   | chunk 0 | chunk 1 |  appended  |            closed            |    SIGSEGV where it is closed
//!               0                   built        length                 capacity
//! ```
//!
//! The whole capacity is reserved and registered when the region is built. Only the pages that have
//! bytes are open to accesses, so a fault never asks for a page without a chunk. An append adds the
//! chunk to the layout, opens its pages, and then publishes the new length.

use crate::error::{Bytes, Error, ErrorKind};
use crate::source::Backing;
use crate::space::{Chunk, Growth, Mapping, Piece, Target};
use pagestitch_kernel::limits::ReserveError;
use pagestitch_kernel::{Errno, Span};
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Mapping {
    /// The place of a chunk that is appended next. The error names the capacity.
    pub(crate) fn place(&self, growth: &Growth, chunk: &Chunk) -> Result<Range<u64>, Error> {
        let number = self.layout.next_number();
        let refused = |kind, what: String| Error::new(kind, what).of_chunk(number).inside(&self.name);
        if matches!(chunk.backing, Backing::Donated(_)) || chunk.is_filled_later() {
            let name = chunk.backing.source().name();
            let what = format!(
                "chunk {number} ({name}) cannot be appended, because its pages move in or are mapped by the build: build a \
                 region of it"
            );
            return Err(refused(ErrorKind::InvalidChunk, what));
        }
        self.layout.check_next(chunk).map_err(|error| error.inside(&self.name))?;
        let align = chunk.align_with(growth.align, number).map_err(|error| error.inside(&self.name))?;
        let end = self.layout.total();
        let bytes = chunk.range.end - chunk.range.start;
        let start = end.checked_next_multiple_of(align).unwrap_or(u64::MAX);
        match start.checked_add(bytes).filter(|&end| end <= growth.capacity) {
            Some(end) => Ok(start..end),
            None => {
                let what = format!(
                    "{} after its {} exceed its capacity of {}: build it with a larger capacity()",
                    Bytes(bytes),
                    Bytes(end),
                    Bytes(growth.capacity)
                );
                Err(refused(ErrorKind::TooLarge, what))
            }
        }
    }

    /// The first bytes of the chunk that is appended next.
    pub(crate) fn first_piece<'c>(&self, chunk: &'c Chunk, bytes: u64) -> Piece<'c> {
        let number = self.layout.next_number();
        Piece { chunk: number, backing: &chunk.backing, offset: chunk.range.start, bytes }
    }

    /// Adds a chunk to the layout at its place, and opens its pages. After an error the region is as
    /// before.
    pub(crate) fn lay(&self, chunk: &Chunk, place: &Range<u64>) -> Result<(), Error> {
        let chunks = self.layout.chunks();
        self.kinds.note(&chunk.backing);
        let padding = place.start - self.layout.total();
        if !self.layout.append(padding, chunk) {
            let grown = self.layout.grown(place.end);
            let added = grown.append(padding, chunk);
            debug_assert!(added, "a grown layout has room");
            self.layout.replace(grown);
        }
        let all = self.page_size().covering(&(0..place.end));
        let new = all.without_prefix(self.laid.load(Ordering::Relaxed));
        self.open(new).map_err(|errno| {
            // No thread has looked at the chunk: its pages are closed, and the page before them is
            // claimed.
            self.layout.replace(self.layout.first(chunks));
            let bytes = self.page_size().bytes_of(new);
            Error::unreserved(&self.name, ReserveError::met(bytes, errno))
        })?;
        // After the pages are open: a block moves in only where all of its pages are.
        self.laid.store(all.pages, Ordering::Relaxed);
        self.policy.set_pages(all.pages);
        self.counters.set_pages(all.pages);
        Ok(())
    }

    /// Publishes the bytes of the layout to callers, after they are visible.
    pub(crate) fn publish(&self) {
        self.published.store(self.layout.total(), Ordering::Release);
    }

    fn open(&self, span: Span) -> Result<(), Errno> {
        match &self.target {
            Target::Owned(reservation) => reservation.open_span(span),
            Target::Foreign(_) => unreachable!("adopted memory does not grow"),
        }
    }
}
