//! Builds a layout, chunk by chunk. Its tables are plain vectors, because no other thread reads them yet.

use super::{Layout, Origin};
use crate::error::{Bytes, Error, ErrorKind};
use crate::policy::OnFailure;
use crate::source::{Backing, Hole, Identity};
use crate::space::Chunk;
use pagestitch_kernel::PageSize;
use pagestitch_kernel::page::HUGE;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

/// A layout that is described chunk by chunk.
#[derive(Debug, Default)]
pub(crate) struct LayoutBuilder {
    /// The offset in the region of each chunk's first byte, ascending.
    starts: Vec<u64>,
    origins: Vec<Origin>,
    sources: Vec<Backing>,
    /// As in the layout. Most regions have none, and the vector of sources grows in place if no other
    /// vector grows beside it.
    units: Vec<u8>,
    /// The sources so far by their identity, because several chunks share one.
    known: HashMap<Identity, u32, BuildHasherDefault<IdentityHasher>>,
    /// The last chunk's, which the next chunk often shares.
    last: Option<(Identity, u32)>,
    total: u64,
    padding: Vec<u32>,
    policies: Vec<(Range<usize>, OnFailure)>,
}

impl LayoutBuilder {
    /// Reserves capacity for `chunks` more chunks.
    pub(crate) fn reserve(&mut self, chunks: usize) {
        self.starts.reserve(chunks.saturating_add(1));
        self.origins.reserve(chunks);
    }

    /// Appends a chunk.
    pub(crate) fn push(&mut self, chunk: Chunk) -> Result<(), Error> {
        let Chunk { backing, range, on_failure, align: _ } = chunk;
        let number = self.next_number();
        check(number, &backing, &range)?;
        match self.policies.last_mut() {
            Some((run, same)) if run.end == number && Some(*same) == on_failure => run.end += 1,
            _ => self.policies.extend(on_failure.map(|chosen| (number..number + 1, chosen))),
        }
        self.lay(backing, &range)
    }

    /// The chunk number of the next chunk that is appended.
    pub(crate) fn next_number(&self) -> usize {
        self.origins.len() - self.padding.len()
    }

    /// Appends padding, so that `chunk` begins at a multiple of `align`; with a page size, in a page
    /// of its own. There it has the same offset in the page as in its source, if that is a multiple;
    /// a chunk with huge pages has the same offset in the huge page.
    pub(crate) fn pad_for(&mut self, chunk: &Chunk, align: u64, page: Option<PageSize>) -> Result<(), Error> {
        let has_place = page.is_some() && chunk.backing.has_pages() && chunk.range.start % align == 0;
        let unit = match page {
            Some(_) if has_place && chunk.has_huge_pages() => HUGE as u64,
            Some(page) => page.bytes() as u64,
            None => align,
        };
        let wanted = if has_place { chunk.range.start } else { 0 };
        let gap = if has_place { self.gap_before(chunk, unit) } else { None };
        if let Some(gap) = gap {
            if !gap.is_empty() {
                self.padding.push(self.origins.len() as u32);
                self.lay(chunk.backing.clone(), &gap)?;
            }
            return Ok(());
        }
        // The offset from which on no other chunk has bytes in the page.
        let free = page.and_then(|page| page.round_up(self.total)).unwrap_or(self.total);
        let padding = free - self.total + wanted.wrapping_sub(free) % unit;
        if padding > 0 {
            self.padding.push(self.origins.len() as u32);
            self.lay(Backing::Hole(Hole), &(0..padding))?;
        }
        Ok(())
    }

    /// The bytes of its source between the last chunk and this one, if they are few and the last
    /// chunk has its place. With them as padding, one mapping shows both chunks.
    fn gap_before(&self, chunk: &Chunk, unit: u64) -> Option<Range<u64>> {
        let (last, start) = (self.origins.last()?, self.starts.last()?);
        let identity = chunk.backing.identity()?;
        let is_same = self.sources[last.source as usize].identity() == Some(identity);
        let end = last.offset + (self.total - start);
        let gap = chunk.range.start.checked_sub(end)?;
        let most = if chunk.backing.is_in_page_cache() { GAP_MAX } else { 0 };
        let in_place = (self.total ^ end) % unit == 0;
        (is_same && in_place && gap <= most).then_some(end..chunk.range.start)
    }

    fn lay(&mut self, backing: Backing, range: &Range<u64>) -> Result<(), Error> {
        let total = self.total.checked_add(range.end - range.start).ok_or_else(|| {
            let number = self.next_number();
            let what = format!("chunk {number} takes the region to 2^64 bytes or more: split the region");
            Error::new(ErrorKind::TooLarge, what).of_chunk(number)
        })?;
        let source = self.source_index(backing)?;
        self.starts.push(self.total);
        self.origins.push(Origin { offset: range.start, source });
        self.total = total;
        Ok(())
    }

    /// The layout, whose entries are immutable. If it `grows`, chunks may follow, and it may be without
    /// chunks now.
    pub(crate) fn finish(mut self, grows: bool) -> Result<Layout, Error> {
        if self.origins.is_empty() && !grows {
            return Err(Error::new(
                ErrorKind::NoChunks,
                "a region needs at least one chunk: the list is empty",
            ));
        }
        self.starts.push(self.total);
        self.starts.shrink_to_fit();
        self.origins.shrink_to_fit();
        let mut layout = Layout {
            starts: self.starts.into(),
            origins: self.origins.into(),
            sources: self.sources.into(),
            units: self.units.into(),
            padding: self.padding.into(),
            policies: self.policies.into(),
            grows,
            ..Layout::default()
        };
        layout.index();
        Ok(layout)
    }

    fn source_index(&mut self, backing: Backing) -> Result<u32, Error> {
        let identity = backing.identity();
        if let Some(known) = identity.and_then(|identity| self.known_source(identity)) {
            return Ok(known);
        }
        let index =
            u32::try_from(self.sources.len()).ok().filter(|&index| index < u32::MAX).ok_or_else(|| {
                Error::new(ErrorKind::TooLarge, "a region takes fewer than 2^32 sources: split the region")
            })?;
        let unit = backing.read_unit_shift();
        if unit > 0 {
            self.units.resize(index as usize, 0);
            self.units.push(unit);
        }
        self.sources.push(backing);
        if let Some(identity) = identity {
            self.known.insert(identity, index);
            self.last = Some((identity, index));
        }
        Ok(index)
    }

    /// The number of a source that an earlier chunk has.
    fn known_source(&mut self, identity: Identity) -> Option<u32> {
        let last = self.last.filter(|(last, _)| *last == identity).map(|(_, source)| source);
        let source = last.or_else(|| self.known.get(&identity).copied())?;
        self.last = Some((identity, source));
        Some(source)
    }
}

/// The most bytes of a source that are shown between two chunks to save a mapping.
const GAP_MAX: u64 = 4096;
/// A region takes fewer chunks.
const CHUNKS_MAX: usize = u32::MAX as usize / 2;

/// Refuses a chunk that has no bytes, or that its source does not have.
#[inline]
pub(super) fn check(number: usize, backing: &Backing, range: &Range<u64>) -> Result<(), Error> {
    let size = backing.source().size();
    let is_good = number < CHUNKS_MAX && range.start < range.end && range.end <= size;
    if is_good && !matches!(backing, Backing::Donated(_)) {
        return Ok(());
    }
    check_rest(number, backing, range, size)
}

/// The part of [`check`] that few chunks need. Apart from it, the check is a few instructions, and there
/// may be millions of chunks.
#[cold]
fn check_rest(number: usize, backing: &Backing, range: &Range<u64>, size: u64) -> Result<(), Error> {
    let bad = |why: String| {
        let name = backing.source().name();
        let what = format!("chunk {number} ({name}) {why}");
        Err(Error::new(ErrorKind::InvalidChunk, what).of_chunk(number))
    };
    if number >= CHUNKS_MAX {
        return Err(Error::new(
            ErrorKind::TooLarge,
            "a region takes fewer than 2^31 chunks: split the region",
        ));
    }
    if range.start >= range.end {
        return bad(String::from("is empty: leave it out, or give it a length"));
    }
    if range.end > size {
        return bad(format!(
            "reaches to byte {} of a source of {}: end it at or before {size}",
            range.end,
            Bytes(size)
        ));
    }
    match backing {
        Backing::Donated(donated) => donated.claim(range.clone()).or_else(|other| {
            bad(format!(
                "donates bytes {}..{}, which another chunk has donated already: a page moves only once",
                other.start, other.end
            ))
        }),
        _ => Ok(()),
    }
}

/// A hash that spreads addresses. It resists no attacker, because no attacker chooses them.
#[derive(Debug, Default)]
struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("an identity is integers");
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Memfd, Memory, Source, UnsealedMemfd};
    use crate::space::layout::tests::Units;
    use std::sync::Arc;

    #[test]
    fn chunks_of_one_source_share_it() {
        let memory = Memory::from(vec![0u8; 100]);
        let mut layout = LayoutBuilder::default();
        for start in 0..50 {
            layout.push(Chunk::from(memory.clone()).range(start..start + 2)).unwrap();
        }
        layout.push(Chunk::from(vec![0u8; 100])).unwrap();
        assert_eq!(layout.sources.len(), 2);
    }

    #[test]
    fn chunks_of_one_sized_or_unsized_arc_share_its_source() {
        let sized = Arc::new(Units);
        let unsized_source: Arc<dyn Source> = Arc::clone(&sized) as Arc<dyn Source>;
        let mut layout = LayoutBuilder::default();
        for _ in 0..3 {
            layout.push(Chunk::source(Arc::clone(&sized))).unwrap();
            layout.push(Chunk::source(Arc::clone(&unsized_source))).unwrap();
            layout.push(Chunk::from(Arc::clone(&unsized_source))).unwrap();
        }
        assert_eq!(layout.sources.len(), 1);
        layout.push(Chunk::source(Arc::new(Units))).unwrap();
        assert_eq!(layout.sources.len(), 2);
    }

    #[test]
    fn padding_is_not_counted() {
        let page = PageSize::new(4096).unwrap();
        let mut layout = LayoutBuilder::default();
        for bytes in [5000, 4096, 1, 100, 8192] {
            let chunk = Chunk::hole(bytes);
            layout.pad_for(&chunk, 1, Some(page)).unwrap();
            layout.push(chunk).unwrap();
        }
        let layout = layout.finish(false).unwrap();
        let place = |number| layout.chunk_of(number).map(|chunk| layout.offsets_of(chunk).start);
        assert_eq!([0, 1, 2, 3, 4].map(place), [0, 8192, 12288, 16384, 20480].map(Some));
        assert_eq!(place(5), None);
        for number in 0..5 {
            assert_eq!(layout.number_of(layout.chunk_of(number).unwrap()), number);
        }
    }

    #[test]
    fn a_long_chunk_of_a_memfd_keeps_its_offset_in_a_huge_page() {
        let memfd = Memfd::from(UnsealedMemfd::create("test", 16 << 20).unwrap().seal().unwrap());
        let (page, huge) = (PageSize::system(), HUGE as u64);
        let mut layout = LayoutBuilder::default();
        let ranges = [0..100, 5000..5000 + huge, 5008 + huge..9 << 20, 8192..9000, 808..900];
        for range in ranges.clone() {
            let chunk = Chunk::from(memfd.clone()).range(range);
            layout.pad_for(&chunk, 1, Some(page)).unwrap();
            layout.push(chunk).unwrap();
        }
        let layout = layout.finish(false).unwrap();
        let starts = [0, 1, 2, 3, 4].map(|number| layout.offsets_of(layout.chunk_of(number).unwrap()).start);
        assert_eq!(starts[..3], [0, 5000, huge + 5008], "the third chunk follows the second as in the memfd");
        assert_eq!(starts[3], 9 << 20, "a short chunk starts in the next page");
        assert_eq!(
            starts[4],
            starts[3] + 4096 + 808,
            "a chunk that would fit behind the last one has its own page"
        );
    }

    #[test]
    fn bad_chunks_are_named() {
        let mut layout = LayoutBuilder::default();
        layout.push(Chunk::from(vec![0u8; 10])).unwrap();
        for range in [3..3, 3..11] {
            let error = layout.push(Chunk::from(vec![0u8; 10]).range(range)).unwrap_err();
            assert_eq!((error.kind(), error.chunk()), (ErrorKind::InvalidChunk, Some(1)), "{error}");
        }
        layout.push(Chunk::hole(u64::MAX - 10)).unwrap();
        let error = layout.push(Chunk::hole(1)).unwrap_err();
        assert_eq!((error.kind(), error.chunk()), (ErrorKind::TooLarge, Some(2)), "{error}");
        assert_eq!(LayoutBuilder::default().finish(false).unwrap_err().kind(), ErrorKind::NoChunks);
    }
}
