//! Bytes that take the place of those of chunks: a number for each page, which a lookup reads before it
//! looks at the chunks.
//!
//! ```text
//!   pages      | - | - | hole | 2 | 2 | - | 3 |      -: the bytes of the chunks
//!   entries    2: a source, and its offset for the first byte      3: ...
//! ```
//!
//! The number of a page changes only while the page is claimed, and a thread that fills the page looks
//! it up with the claim. So a page has all of its bytes from one side. Chunks keep their numbers.

use crate::source::{Backing, Hole};
use crate::space::Chunk;
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::atomic::Ordering;
use pagestitch_kernel::{Errno, Page, PageSize, Span};
use parking_lot::{Mutex, MutexGuard};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::OnceLock;

/// The replaced pages of a layout. Versions of a layout share them.
#[derive(Debug)]
pub(crate) struct Replaced {
    page: PageSize,
    /// The number of each page's entry, 32 bits a page; 0 for none. It takes memory where it is touched.
    numbers: AtomicTable,
    /// The entries, in segments of 1, 2, 4 and so on, so that none ever moves.
    segments: [OnceLock<Box<[OnceLock<Entry>]>>; SEGMENTS],
    hole: Backing,
    /// The number of the next entry. Held while bytes are replaced.
    next: Mutex<u32>,
}

/// Bytes that replace others.
#[derive(Debug)]
struct Entry {
    /// The offset in the region of the first byte.
    start: u64,
    backing: Backing,
    /// The offset of that byte in the source.
    offset: u64,
}

/// The right to replace bytes.
pub(crate) struct Replacing<'r> {
    replaced: &'r Replaced,
    next: MutexGuard<'r, u32>,
}

impl Replaced {
    /// The right to replace bytes, of one thread at a time.
    pub(super) fn replacing(&self) -> Replacing<'_> {
        Replacing { replaced: self, next: self.next.lock() }
    }

    pub(super) fn new(page: PageSize, pages: usize) -> Result<Self, Errno> {
        let words = NonZeroUsize::new(pages.div_ceil(2)).expect("a region has pages");
        Ok(Self {
            page,
            numbers: AtomicTable::new(words)?,
            segments: [const { OnceLock::new() }; SEGMENTS],
            hole: Backing::Hole(Hole),
            next: Mutex::new(HOLE + 1),
        })
    }

    /// The entry of the page at `start`, and the end of the pages with the same one, `end` at most.
    pub(super) fn run(&self, start: u64, end: u64) -> (Option<u32>, u64) {
        let (first, size) = (self.page.page_at(start), self.page.bytes() as u64);
        let (number, mut page) = (self.number(first), first.0 + 1);
        while page as u64 * size < end && self.number(Page(page)) == number {
            page += 1;
        }
        (Some(number).filter(|&number| number > 0), end.min(page as u64 * size))
    }

    pub(super) fn bytes_of(&self, number: u32, at: u64) -> (&Backing, u64) {
        match number {
            HOLE => (&self.hole, 0),
            _ => {
                let (segment, place) = place_of(number);
                let entry = self.segments[segment].get().and_then(|segment| segment[place].get());
                let entry = entry.expect("an entry is there before its number is");
                (&entry.backing, entry.offset + (at - entry.start))
            }
        }
    }

    fn number(&self, page: Page) -> u32 {
        (self.numbers[page.0 / 2].load(Ordering::SeqCst) >> shift(page)) as u32
    }
}

impl Replacing<'_> {
    /// Gives the pages of a span the bytes of a chunk, whose first byte lies at `range.start`; or zeros.
    /// The caller has claimed the pages.
    pub(crate) fn set(mut self, span: Span, range: &Range<u64>, chunk: Option<&Chunk>) {
        let number = match chunk {
            None => HOLE,
            Some(chunk) => {
                let number = *self.next;
                let entry =
                    Entry { start: range.start, backing: chunk.backing.clone(), offset: chunk.range.start };
                let (segment, place) = place_of(number);
                let segment = self.replaced.segments[segment]
                    .get_or_init(|| (0..1usize << segment).map(|_| OnceLock::new()).collect());
                let _ = segment[place].set(entry);
                *self.next += 1;
                number
            }
        };
        span.iter().for_each(|page| self.set_number(page, number));
    }

    /// True if there is a number for one more entry.
    pub(crate) fn has_number(&self) -> bool {
        *self.next < u32::MAX
    }

    fn set_number(&self, page: Page, number: u32) {
        let word = &self.replaced.numbers[page.0 / 2];
        // The lock keeps other threads from the word.
        let others = word.load(Ordering::SeqCst) & !(u64::from(u32::MAX) << shift(page));
        word.store(others | u64::from(number) << shift(page), Ordering::SeqCst);
    }
}

/// The position of a page's number in its word.
const fn shift(page: Page) -> u32 {
    (page.0 % 2) as u32 * u32::BITS
}

/// The segment of an entry, and its place there.
const fn place_of(number: u32) -> (usize, usize) {
    let segment = number.ilog2();
    (segment as usize, (number - (1 << segment)) as usize)
}

/// The number of pages that read as zeros.
const HOLE: u32 = 1;
/// The segments for all numbers of 32 bits.
const SEGMENTS: usize = 32;
