//! A bitmap of dirty pages.
//!
//! ```text
//!   virtual CPU, vhost ──▶ the kernel's record ── scan, once a round ──▶ bits ◀── mark_dirty: this VMM's devices
//!                                                                         │
//!                                                        dirty_at: a load ◀──▶ take: a round ends
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// The dirty pages of a [`GuestRegion`](crate::GuestRegion).
///
/// A page is dirty from a write through [`vm_memory`] on, or from a mark: a back end of vhost-user logs
/// its writes, and the VMM marks them here. Writes through other pointers, those of virtual CPUs
/// included, count from the next [scan](crate::GuestRegion::scan) on. A page that is both written here
/// and found by a scan may be reported in two rounds.
///
/// ```
/// use pagestitch::{Chunk, ErrorKind, Pool, Region};
/// use pagestitch_vm_memory::{GuestRegion, GuestRegionError};
/// use vm_memory::bitmap::Bitmap;
/// use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
///
/// let builder = Region::builder().chunk(Chunk::hole(1 << 20)).writable().track_changes();
/// let region = match builder.build_shared(&Pool::new()?) {
///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),   // Linux before 6.7
///     built => built?,
/// };
/// let guest = GuestRegion::tracked(region, GuestAddress(0))?;
/// guest.write_obj(1u8, MemoryRegionAddress(5_000))?;
/// assert!(guest.dirty_pages().dirty_at(4_096));
/// guest.scan()?;                                              // writes of virtual CPUs count from here on
/// assert_eq!(guest.dirty_pages().take(), [4_096..8_192]);
/// assert_eq!(guest.dirty_pages().take(), []);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DirtyPages {
    /// A bit for each page.
    words: Box<[AtomicU64]>,
    bytes: usize,
}

impl DirtyPages {
    /// The bytes of a page. A scan marks whole pages of the kernel, which have as many or more.
    pub const PAGE_BYTES: usize = 1 << PAGE_SHIFT;

    /// For a region of so many bytes.
    pub(crate) fn new(bytes: usize) -> Self {
        let words = bytes.div_ceil(Self::PAGE_BYTES).div_ceil(BITS);
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { words, bytes }
    }

    /// Returns the dirty pages as ranges of byte offsets in the region, ascending, without two that
    /// touch, and makes all pages clean. Each mark is returned by one call.
    ///
    /// Read the bytes after the call: they then include each write that it reports.
    #[must_use = "the marks are gone"]
    pub fn take(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (number, word) in self.words.iter().enumerate() {
            // Most words are zero, and a load shares their cache line with other threads.
            let mut bits = if word.load(Ordering::SeqCst) == 0 { 0 } else { word.swap(0, Ordering::SeqCst) };
            while bits != 0 {
                let first = bits.trailing_zeros();
                let pages = (bits >> first).trailing_ones();
                let ones = u64::MAX >> (BITS as u32 - pages);
                bits &= !(ones << first);
                let start = (number * BITS + first as usize) << PAGE_SHIFT;
                let end = (start + ((pages as usize) << PAGE_SHIFT)).min(self.bytes);
                match runs.last_mut().filter(|last| last.end == start) {
                    Some(last) => last.end = end,
                    None => runs.push(start..end),
                }
            }
        }
        runs
    }

    /// Makes all pages clean.
    ///
    /// ```
    /// # use pagestitch::{Chunk, ErrorKind, Pool, Region};
    /// # use pagestitch_vm_memory::GuestRegion;
    /// # use vm_memory::GuestAddress;
    /// # use vm_memory::bitmap::Bitmap;
    /// # let builder = Region::builder().chunk(Chunk::hole(1 << 20)).writable().track_changes();
    /// # let region = match builder.build_shared(&Pool::new()?) {
    /// #     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),   // Linux before 6.7
    /// #     built => built?,
    /// # };
    /// # let guest = GuestRegion::tracked(region, GuestAddress(0))?;
    /// guest.dirty_pages().mark_dirty(5_000, 1);
    /// guest.dirty_pages().reset();
    /// assert!(!guest.dirty_pages().dirty_at(5_000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reset(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Marks the pages of a range. Bytes outside the region are ignored.
    fn mark(&self, offset: usize, bytes: usize) {
        let end = offset.saturating_add(bytes).min(self.bytes);
        if offset >= end {
            return;
        }
        // The bytes were written before, and a processor may let the load below overtake that write. A `take` in
        // between would clear the mark, and the reader of the bytes would miss them.
        fence(Ordering::SeqCst);
        for page in offset >> PAGE_SHIFT..=(end - 1) >> PAGE_SHIFT {
            let (word, bit) = (&self.words[page / BITS], 1 << (page % BITS));
            // A page that is written often is dirty already, and a load leaves its cache line shared.
            if word.load(Ordering::SeqCst) & bit == 0 {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    fn is_dirty(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        let word = self.words.get(page / BITS);
        word.is_some_and(|word| word.load(Ordering::SeqCst) & 1 << (page % BITS) != 0)
    }
}

/// The dirty pages from an offset on.
#[derive(Debug, Clone, Copy)]
pub struct DirtySlice<'a> {
    pages: &'a DirtyPages,
    offset: usize,
}

impl<'a> WithBitmapSlice<'a> for DirtyPages {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice { pages: self, offset }
    }
}

impl WithBitmapSlice<'_> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.pages.mark(self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.is_dirty(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { pages: self.pages, offset: self.offset.saturating_add(offset) }
    }
}

const PAGE_SHIFT: u32 = 12;
/// The pages of a word.
const BITS: usize = u64::BITS as usize;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    const fn pages(start: usize, end: usize) -> Range<usize> {
        start * PAGE..end * PAGE
    }

    #[test]
    fn marks_are_whole_pages_and_each_is_taken_once() {
        let dirty = DirtyPages::new(200 * PAGE + 5);
        dirty.mark_dirty(PAGE - 1, 2);
        dirty.mark_dirty(62 * PAGE, 4 * PAGE);
        dirty.mark_dirty(128 * PAGE + 7, 1);
        dirty.mark_dirty(200 * PAGE, 100 * PAGE);
        assert!(dirty.dirty_at(0) && dirty.dirty_at(2 * PAGE - 1) && !dirty.dirty_at(2 * PAGE));
        let expected =
            [0..2 * PAGE, 62 * PAGE..66 * PAGE, 128 * PAGE..129 * PAGE, 200 * PAGE..200 * PAGE + 5];
        assert_eq!(dirty.take(), expected);
        assert_eq!(dirty.take(), []);
        dirty.mark_dirty(0, 128 * PAGE);
        assert_eq!(dirty.take(), vec![pages(0, 128)], "two words without a gap are one range");
    }

    #[test]
    fn nothing_outside_the_region_is_marked_or_dirty() {
        let dirty = DirtyPages::new(3 * PAGE);
        for (offset, bytes) in [(0, 0), (3 * PAGE, 1), (usize::MAX, usize::MAX), (PAGE, 0)] {
            dirty.mark_dirty(offset, bytes);
        }
        assert_eq!(dirty.take(), []);
        assert!(!dirty.dirty_at(3 * PAGE) && !dirty.dirty_at(usize::MAX));
        dirty.mark_dirty(2 * PAGE, usize::MAX);
        assert_eq!(dirty.take(), vec![pages(2, 3)]);
    }

    #[test]
    fn a_slice_marks_from_its_offset_on() {
        let dirty = DirtyPages::new(10 * PAGE);
        let slice = dirty.slice_at(3 * PAGE).slice_at(2 * PAGE);
        slice.mark_dirty(0, 1);
        assert!(dirty.dirty_at(5 * PAGE) && slice.dirty_at(PAGE - 1) && !slice.dirty_at(PAGE));
        slice.mark_dirty(usize::MAX, 5);
        dirty.reset();
        assert!(!slice.dirty_at(0));
    }
}
