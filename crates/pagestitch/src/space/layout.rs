//! The layout: a table that finds the chunk of each byte of a region. Sorted; 25 bytes a chunk. Its
//! entries are immutable.
//!
//! ```text
//!   offset   0        5000      5300                 12288        total
//!            |  chunk 0  | chunk 1 |      chunk 2       |  chunk 3  |
//!   starts   0        5000      5300                 12288   total
//!   origins  the source of each chunk, and the chunk's offset in it
//!   buckets  the chunk at offset 0, 1 << shift, 2 << shift, ...       one bucket for four chunks
//! ```
//!
//! A lookup reads one bucket, and searches among the few chunks that start in it. It takes O(1) if
//! chunks have similar lengths, O(log n) at worst, and allocates nothing.
//!
//! A layout that grows ([`append`](Layout::append)) gets further entries behind the others while
//! threads look up. A full one is copied with room for twice as many chunks
//! ([`grown`](Layout::grown)), and the copy replaces it.

mod append;
mod builder;
mod replace;
mod replaced;

pub(crate) use builder::LayoutBuilder;

use crate::error::Failure;
use crate::guard::{discard, guarded};
use crate::policy::OnFailure;
use crate::source::{Backing, Memory, Releasables, Released, Shared};
use crate::space::source_kinds::SourceKinds;
use pagestitch_kernel::append_vec::AppendVec;
use pagestitch_kernel::cache::prefetch;
use pagestitch_kernel::{Errno, PageSize};
use replaced::Replaced;
use std::iter;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// The chunks of a region, in order, with their sources.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    /// The offset in the region of each chunk's first byte, ascending, and then the total.
    ///
    /// Invariant: a chunk's other entries are there before its end is.
    starts: AppendVec<u64>,
    origins: AppendVec<Origin>,
    sources: AppendVec<Backing>,
    /// For each source up to the last one that has a [unit](Self::read_unit) of reads, the size of
    /// its unit as a power of two; 0 for none. Most regions have none.
    units: AppendVec<u8>,
    /// The chunks that are only padding, ascending. They have no chunk number.
    padding: AppendVec<u32>,
    /// Runs of chunk numbers whose policy the user has chosen, ascending.
    policies: AppendVec<(Range<usize>, OnFailure)>,
    /// The chunk at each multiple of `1 << shift` below the total.
    buckets: AppendVec<u32>,
    shift: u32,
    /// True if chunks are appended after the build. The last page then has no other bytes than those
    /// of its chunks.
    grows: bool,
    /// The pages whose bytes were replaced after the build, if any ever were.
    replaced: OnceLock<Arc<Replaced>>,
}

/// The origin of a chunk's bytes.
#[derive(Debug, Clone, Copy)]
struct Origin {
    /// The offset of the chunk's first byte in its source.
    offset: u64,
    source: u32,
}

/// A run of bytes of one chunk.
pub(crate) struct Piece<'l> {
    /// The chunk number, as errors show it; padding has none.
    pub(crate) chunk: usize,
    pub(crate) backing: &'l Backing,
    /// The offset of the first byte in the source.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Piece<'_> {
    pub(crate) fn failed(&self, error: std::io::Error) -> Failure {
        let name = guarded(|| self.backing.source().name());
        let name = name.unwrap_or_else(|said| format!("a source whose name panics: {said}"));
        Failure::new(self.chunk, name, self.offset, error)
    }
}

impl Layout {
    /// The chunk number of the next chunk that is appended.
    pub(crate) fn next_number(&self) -> usize {
        self.number_of(self.origins.len())
    }

    /// The failure policy of the chunk with this number.
    pub(crate) fn on_failure(&self, number: usize) -> OnFailure {
        self.chosen_policy(number).unwrap_or_default()
    }

    /// True if the user has chosen that the pages of the chunk with this number are poisoned.
    pub(crate) fn is_poisoned_by_choice(&self, number: usize) -> bool {
        self.chosen_policy(number) == Some(OnFailure::Poison)
    }

    fn chosen_policy(&self, number: usize) -> Option<OnFailure> {
        let next = self.policies.partition_point(|(run, _)| run.end <= number);
        let policy = self.policies.get(next).filter(|(run, _)| run.contains(&number));
        policy.map(|(_, policy)| *policy)
    }

    /// The total length of the chunks, in bytes.
    pub(crate) fn total(&self) -> u64 {
        // One look at the table: an append between two looks at its length would make the second one longer.
        let starts: &[u64] = &self.starts;
        starts[starts.len() - 1]
    }

    /// The number of chunks, including padding.
    pub(crate) fn chunks(&self) -> usize {
        self.starts.len() - 1
    }

    /// The chunk number of a chunk. Users know a chunk by this number, which does not count
    /// padding.
    pub(crate) fn number_of(&self, chunk: usize) -> usize {
        chunk - leading(0, self.padding.len(), |at| (self.padding[at] as usize) < chunk)
    }

    /// The chunk number of a chunk, or `None` for padding.
    pub(crate) fn number_if_any(&self, chunk: usize) -> Option<usize> {
        self.padding.binary_search(&(chunk as u32)).err().map(|paddings| chunk - paddings)
    }

    /// The number of chunks, including padding, in the first `bytes` bytes, which end with a chunk.
    pub(crate) fn chunks_in_first(&self, bytes: u64) -> usize {
        self.starts.iter().rposition(|&start| start <= bytes).unwrap_or(0)
    }

    /// The chunk with a chunk number.
    pub(crate) fn chunk_of(&self, number: usize) -> Option<usize> {
        // Adds the number of paddings before the chunk: those after at most `number` chunks.
        let paddings =
            leading(0, self.padding.len(), |padding| self.padding[padding] as usize - padding <= number);
        let chunk = number.checked_add(paddings)?;
        (chunk < self.chunks()).then_some(chunk)
    }

    /// True if only padding, or the region's end, lies between a chunk and `end`, an offset in its
    /// last page.
    pub(crate) fn is_free_after(&self, chunk: usize, end: u64) -> bool {
        let next = chunk + 1;
        // A chunk that is appended later may follow in the last page.
        let is_last = |chunk| chunk >= self.chunks() && !self.grows;
        is_last(next) || self.is_padding(next) && (is_last(next + 1) || self.offsets_of(next).end >= end)
    }

    /// True if only padding lies between `start`, an offset in a chunk's first page, and the chunk.
    pub(crate) fn is_free_before(&self, chunk: usize, start: u64) -> bool {
        chunk > 0 && self.is_padding(chunk - 1) && self.offsets_of(chunk - 1).start <= start
    }

    /// The padding that has bytes of a range of offsets: those bytes.
    pub(crate) fn padding_in(&self, offsets: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let chunks = if self.padding.is_empty() { 0..0 } else { self.chunks_in(offsets) };
        let padding = chunks.filter(|&chunk| self.is_padding(chunk)).map(|chunk| self.offsets_of(chunk));
        padding.map(|of| of.start.max(offsets.start)..of.end.min(offsets.end))
    }

    pub(crate) fn is_padding(&self, chunk: usize) -> bool {
        self.padding.binary_search(&(chunk as u32)).is_ok()
    }

    /// The chunk that holds the byte at `offset`. The offset must be in the region.
    pub(crate) fn locate(&self, offset: u64) -> usize {
        let bucket = (offset >> self.shift) as usize;
        // Each table is looked at once: a further look would ask for its length again.
        let buckets: &[u32] = &self.buckets;
        let starts: &[u64] = &self.starts;
        let low = buckets[bucket] as usize;
        let high = buckets.get(bucket + 1).map_or_else(|| starts.len() - 2, |&next| next as usize);
        // The other search takes a third of the time, and too much of a signal handler's stack without optimisation.
        if cfg!(debug_assertions) {
            return leading(low + 1, high + 1, |chunk| starts[chunk] <= offset) - 1;
        }
        low + starts[low + 1..=high].partition_point(|&start| start <= offset)
    }

    /// Prefetches the tables that a lookup reads, if they are small.
    pub(crate) fn prefetch(&self) {
        prefetch(self);
        if self.chunks() <= FEW_CHUNKS {
            prefetch(&self.buckets[..]);
            prefetch(&self.starts[..]);
            prefetch(&self.origins[..]);
            prefetch(&self.sources[..]);
        }
    }

    /// The bytes from `start` to `end` or to the end of their chunk.
    pub(crate) fn piece_at(&self, start: u64, end: u64) -> Piece<'_> {
        match self.replaced.get() {
            None => self.piece(self.locate(start), &(start..end)),
            Some(replaced) => self.piece_beside(replaced, start, end),
        }
    }

    /// The pieces that `offsets` consist of, up to the last chunk.
    pub(crate) fn pieces(&self, offsets: Range<u64>) -> impl Iterator<Item = Piece<'_>> {
        let first = self.locate(offsets.start);
        let (mut rest, end) = (first..self.chunks(), offsets.end.min(self.total()));
        let mut at = offsets.start;
        iter::from_fn(move || {
            let replaced = self.replaced.get();
            let piece = match replaced.filter(|_| at < end) {
                Some(replaced) => self.piece_beside(replaced, at, end),
                None if replaced.is_some() => return None,
                None => {
                    let chunk = rest.next().filter(|&chunk| self.starts[chunk] < offsets.end)?;
                    self.piece(chunk, &offsets)
                }
            };
            at += piece.bytes;
            Some(piece)
        })
    }

    /// Whether a source prefers reads of some size.
    pub(crate) fn has_read_units(&self) -> bool {
        !self.units.is_empty()
    }

    /// The offsets in the region of the bytes around `offset` that its source prefers to read at
    /// once, as far as the chunk has them. `None` if the source has no preference.
    pub(crate) fn read_unit(&self, offset: u64) -> Option<Range<u64>> {
        let chunk = self.locate(offset);
        let (origin, size) = self.unit_of(chunk);
        let own = self.offsets_of(chunk);
        let unit = (origin + (offset - own.start)) & !(size - 1);
        let start = own.start + unit.saturating_sub(origin);
        let end = own.start.saturating_add(unit.saturating_add(size) - origin).min(own.end);
        (size > 1).then_some(start..end)
    }

    /// The length of a read of one source from `offset` on: at most `most`, but it ends with a
    /// [unit](Self::read_unit) of the source, also if that is farther.
    pub(crate) fn read_length(&self, offset: u64, most: u64) -> u64 {
        if !self.has_read_units() {
            return most;
        }
        let chunk = self.locate(offset);
        let (origin, size) = self.unit_of(chunk);
        let start = origin + (offset - self.starts[chunk]);
        let end = start.saturating_add(most) & !(size - 1);
        if end > start { end - start } else { (start | (size - 1)) - start + 1 }
    }

    /// A chunk's first byte in its source, and the size of the source's unit of reads.
    fn unit_of(&self, chunk: usize) -> (u64, u64) {
        let Origin { offset, source } = self.origins[chunk];
        (offset, 1 << self.units.get(source as usize).unwrap_or(&0))
    }

    /// The offsets of a chunk in the region.
    pub(crate) fn offsets_of(&self, chunk: usize) -> Range<u64> {
        self.starts[chunk]..self.starts[chunk + 1]
    }

    pub(crate) fn backing_of(&self, chunk: usize) -> &Backing {
        &self.sources[self.origins[chunk].source as usize]
    }

    /// True if a chunk has donated pages.
    pub(crate) fn has_donated(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Backing::Donated(_)))
    }

    /// Unlocks donated pages, because the kernel does not move locked pages into a region that is
    /// not locked.
    pub(crate) fn unlock_donated(&self) -> Result<(), Errno> {
        self.sources.iter().try_for_each(|source| match source {
            Backing::Donated(donated) => donated.unlock(),
            _ => Ok(()),
        })
    }

    /// Drops the sources whose chunks are all mapped in place. The kernel keeps the pages of a
    /// mapping, so that a region of thousands of files needs no descriptor for each.
    pub(crate) fn drop_mapped_sources(&mut self, is_shown: impl Fn(Range<u64>) -> bool) {
        let mut needed = vec![false; self.sources.len()];
        for chunk in 0..self.chunks() {
            let source = self.origins[chunk].source as usize;
            needed[source] = needed[source] || !is_shown(self.offsets_of(chunk));
        }
        self.sources.edit(|sources| {
            for (source, _) in sources.iter_mut().zip(needed).filter(|(_, needed)| !needed) {
                if let Some(mapped) = source.when_mapped() {
                    *source = Backing::Mapped(Arc::new(mapped));
                }
            }
        });
    }

    /// True if memory among the sources can be released.
    pub(crate) fn has_releasable(&self, which: Releasables) -> bool {
        self.sources
            .iter()
            .any(|source| matches!(source, Backing::Memory(memory) if memory.can_release(which)))
    }

    /// Makes memory among the sources releasable. True for each source that is.
    pub(crate) fn make_releasable(&mut self, which: Releasables) -> Vec<bool> {
        let make_releasable = |source: &mut Backing| {
            let Backing::Memory(memory) = source else { return false };
            let releases = memory.can_release(which);
            if releases {
                memory.make_releasable();
            }
            releases
        };
        self.sources.edit(|sources| sources.iter_mut().map(make_releasable).collect())
    }

    /// The memory of a source, if it is in memory.
    pub(crate) fn memory_of(&self, source: usize) -> Option<&Memory> {
        match &self.sources[source] {
            Backing::Memory(memory) => Some(memory),
            _ => None,
        }
    }

    /// Drops the sources that are releasable. Returns the number of their bytes.
    pub(crate) fn release_all(&self) -> u64 {
        let release = |memory: &Memory| match memory.release() {
            Released::Bytes(bytes) => {
                memory.take_released().into_iter().for_each(discard);
                bytes
            }
            Released::Busy | Released::No => 0,
        };
        (0..self.sources.len()).filter_map(|source| self.memory_of(source)).map(release).sum()
    }

    /// The number of bytes that the sources in memory keep allocated.
    pub(crate) fn kept_bytes(&self) -> u64 {
        (0..self.sources.len()).filter_map(|source| self.memory_of(source)).map(Memory::kept_bytes).sum()
    }

    /// The chunks that have bytes of a range of offsets, in order.
    pub(crate) fn chunks_in(&self, offsets: &Range<u64>) -> Range<usize> {
        let first = self.locate(offsets.start);
        let starts: &[u64] = &self.starts;
        let starts = &starts[first..starts.len() - 1];
        first..first + starts.partition_point(|&start| start < offsets.end)
    }

    /// As [`chunks_in`](Self::chunks_in), for a range that has few chunks, or whose chunks the caller looks
    /// at one by one.
    pub(crate) fn few_chunks_in(&self, offsets: &Range<u64>) -> impl Iterator<Item = usize> + '_ {
        let end = offsets.end;
        (self.locate(offsets.start)..self.chunks()).take_while(move |&chunk| self.starts[chunk] < end)
    }

    /// The number of a chunk's source, which chunks of one source share.
    pub(crate) fn source_of(&self, chunk: usize) -> usize {
        self.origins[chunk].source as usize
    }

    /// Drops the sources whose bytes the build has copied, because no page reads them any more.
    pub(crate) fn drop_copied_sources(&mut self) {
        let copied = |source: &mut Backing| {
            let rest = source.when_copied()?;
            Some(mem::replace(source, Backing::Mapped(Arc::new(rest))))
        };
        let copied: Vec<_> = self.sources.edit(|sources| sources.iter_mut().filter_map(copied).collect());
        copied.into_iter().for_each(discard);
    }

    /// The sources in memory of this process, with their addresses.
    pub(crate) fn memory(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.sources.iter().enumerate().filter_map(|(number, source)| match source {
            Backing::Memory(memory) => Some((number, memory.addresses()?)),
            _ => None,
        })
    }

    /// The number of the first chunk of a source.
    pub(crate) fn first_chunk_of(&self, source: usize) -> usize {
        let chunk = self.origins.iter().position(|origin| origin.source as usize == source);
        self.number_of(chunk.unwrap_or(0))
    }

    /// True if a source has a property.
    pub(crate) fn has_source(&self, property: impl Fn(&Backing) -> bool) -> bool {
        self.sources.iter().any(property)
    }

    /// The kinds of the sources of its chunks.
    pub(crate) fn source_kinds(&self) -> SourceKinds {
        let kinds = SourceKinds::default();
        self.sources.iter().for_each(|source| kinds.note(source));
        kinds
    }

    /// True if a chunk can only be copied.
    pub(crate) fn has_copied(&self) -> bool {
        self.sources
            .iter()
            .any(|source| matches!(source, Backing::Memory(_) | Backing::Read(_) | Backing::Fetched(_)))
            || self.has_immutable_files() && (0..self.chunks()).any(|chunk| self.is_read(chunk))
    }

    /// True if a chunk of an immutable file is read and not mapped, because it has another offset in
    /// its page than in the file.
    fn is_read(&self, chunk: usize) -> bool {
        let page = PageSize::system().bytes() as u64;
        matches!(self.backing_of(chunk), Backing::Immutable(_))
            && (self.starts[chunk] ^ self.source_offset(chunk)) % page != 0
    }

    /// True if a chunk is of an immutable file.
    pub(crate) fn has_immutable_files(&self) -> bool {
        self.sources.iter().any(|source| match source {
            Backing::Immutable(_) => true,
            Backing::Mapped(mapped) => mapped.grounds().is_some(),
            _ => false,
        })
    }

    /// True if a chunk is a memfd that is filled later.
    pub(crate) fn has_lazy(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Backing::Shared(Shared::Lazy(_))))
    }

    /// The number and source name of the first chunk whose bytes other processes may change.
    pub(crate) fn first_shared(&self) -> Option<(usize, String)> {
        self.first_of(|backing| matches!(backing, Backing::Shared(_)))
    }

    /// The number of the first chunk whose bytes read as zeros if its source fails.
    pub(crate) fn first_zeroed(&self) -> Option<usize> {
        self.policies.iter().find(|(_, policy)| *policy == OnFailure::Zeros).map(|(run, _)| run.start)
    }

    /// The first chunk of donated pages, with their name.
    pub(crate) fn first_donated(&self) -> Option<(usize, String)> {
        self.first_of(|backing| matches!(backing, Backing::Donated(_)))
    }

    /// The first chunk whose bytes may change, with its source.
    pub(crate) fn first_unstable(&self) -> Option<(usize, String)> {
        self.first_of(|backing| !backing.is_stable())
    }

    fn first_of(&self, is: impl Fn(&Backing) -> bool) -> Option<(usize, String)> {
        // There are far fewer sources than chunks.
        self.sources.iter().find(|source| is(source))?;
        let chunk = (0..self.chunks()).find(|&chunk| is(self.backing_of(chunk)))?;
        Some((self.number_of(chunk), self.backing_of(chunk).source().name()))
    }

    /// The number and source name of the first chunk to which written pages cannot go. Padding has no
    /// bytes of worth.
    pub(crate) fn first_unwritable(&self) -> Option<(usize, String)> {
        let is_lost = |&chunk: &usize| self.backing_of(chunk).writer().is_none() && !self.is_padding(chunk);
        let chunk = (0..self.chunks()).find(is_lost)?;
        Some((self.number_of(chunk), self.backing_of(chunk).source().name()))
    }

    /// The number and source name of the first chunk that is memory to which others write.
    pub(crate) fn first_written_by_others(&self) -> Option<(usize, String)> {
        self.sources.iter().find(|&source| source.is_shared_in_place())?;
        let chunk = (0..self.chunks()).find(|&chunk| self.backing_of(chunk).is_shared_in_place())?;
        Some((self.number_of(chunk), self.backing_of(chunk).source().name()))
    }

    /// The offset of a chunk's first byte in its source.
    pub(crate) fn source_offset(&self, chunk: usize) -> u64 {
        self.origins[chunk].offset
    }

    /// True if a chunk begins in its source where the chunk before it ends.
    pub(crate) fn continues(&self, chunk: usize) -> bool {
        let before = self.offsets_of(chunk - 1);
        let (last, this) = (self.origins[chunk - 1], self.origins[chunk]);
        last.source == this.source && last.offset + (before.end - before.start) == this.offset
    }

    fn piece(&self, chunk: usize, within: &Range<u64>) -> Piece<'_> {
        let starts: &[u64] = &self.starts;
        let start = starts[chunk].max(within.start);
        Piece {
            chunk: self.number_of(chunk),
            backing: self.backing_of(chunk),
            offset: self.source_offset(chunk) + (start - starts[chunk]),
            bytes: starts[chunk + 1].min(within.end) - start,
        }
    }

    /// Builds the buckets: one for about four chunks.
    fn index(&mut self) {
        self.index_for(self.total());
    }

    /// As [`index`](Self::index), for a layout that will have `end` bytes.
    fn index_for(&mut self, end: u64) {
        let wanted = (self.chunks() as u64 / 4).max(1);
        self.shift = (u64::BITS - (end / wanted).leading_zeros()).min(u64::BITS - 1);
        let (starts, count): (&[u64], _) = (&self.starts, self.buckets_for(self.total()));
        let mut buckets = Vec::with_capacity(count);
        let mut chunk = 0;
        for bucket in 0..count as u64 {
            while starts[chunk + 1] <= bucket << self.shift {
                chunk += 1;
            }
            buckets.push(chunk as u32);
        }
        self.buckets = AppendVec::from(buckets);
    }

    /// The number of buckets of the first `end` bytes.
    const fn buckets_for(&self, end: u64) -> usize {
        if end == 0 { 0 } else { ((end - 1) >> self.shift) as usize + 1 }
    }
}

/// The end of the numbers from `low` on, and below `high`, for which `is_before` holds: it holds for none after them.
/// A search of the standard library is quicker, but takes four times the stack in a debug build, and signal handlers
/// locate chunks.
fn leading(mut low: usize, mut high: usize, is_before: impl Fn(usize) -> bool) -> usize {
    while low < high {
        let middle = low.midpoint(high);
        if is_before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// The tables of so many chunks take a few cache lines.
const FEW_CHUNKS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;
    use crate::space::Chunk;
    use proptest::prelude::*;

    fn layout(lengths: &[u64]) -> Layout {
        let mut layout = LayoutBuilder::default();
        for &bytes in lengths {
            layout.push(Chunk::hole(bytes)).unwrap();
        }
        layout.finish(false).unwrap()
    }

    proptest! {
        #[test]
        fn every_offset_is_located_as_by_counting(lengths in prop::collection::vec(1u64..300, 1..200)) {
            let layout = layout(&lengths);
            let mut start = 0;
            for (chunk, bytes) in lengths.iter().enumerate() {
                prop_assert_eq!(layout.locate(start), chunk);
                prop_assert_eq!(layout.locate(start + bytes - 1), chunk);
                start += bytes;
            }
            prop_assert_eq!(layout.total(), start);
        }

        #[test]
        fn lengths_of_any_size_are_located(exponents in prop::collection::vec(0u32..55, 1..100)) {
            let lengths: Vec<u64> = exponents.iter().map(|&exponent| 1 << exponent).collect();
            let layout = layout(&lengths);
            for chunk in 0..lengths.len() {
                let own = layout.offsets_of(chunk);
                prop_assert_eq!(layout.locate(own.start), chunk);
                prop_assert_eq!(layout.locate(own.end - 1), chunk);
            }
        }

        #[test]
        fn pieces_cover_what_was_asked(
            lengths in prop::collection::vec(1u64..50, 1..50), cut in (0u64..1000, 1u64..1000),
        ) {
            let layout = layout(&lengths);
            let start = cut.0 % layout.total();
            let end = (start + cut.1).min(layout.total());
            let sum: u64 = layout.pieces(start..end).map(|piece| piece.bytes).sum();
            prop_assert_eq!(sum, end - start);
        }
    }

    /// A source without bytes that prefers reads of 64 bytes.
    pub(super) struct Units;

    impl Source for Units {
        fn size(&self) -> u64 {
            1000
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Ok(())
        }
        fn granularity(&self) -> u64 {
            50
        }
    }

    #[test]
    fn a_unit_of_reads_is_aligned_in_its_source_and_ends_with_its_chunk() {
        let mut layout = LayoutBuilder::default();
        layout.push(Chunk::from(vec![0u8; 10])).unwrap();
        let layout = layout.finish(false).unwrap();
        assert_eq!(layout.read_unit(0), None);
        let mut layout = LayoutBuilder::default();
        layout.push(Chunk::from(vec![0u8; 10])).unwrap();
        layout.push(Chunk::source(Arc::new(Units)).range(100..300)).unwrap();
        layout.push(Chunk::source(Arc::new(Units))).unwrap();
        let layout = layout.finish(false).unwrap();
        let expected = [(9, None), (10, Some(10..38)), (38, Some(38..102)), (101, Some(38..102))];
        for (offset, unit) in expected.into_iter().chain([(205, Some(166..210)), (210, Some(210..274))]) {
            assert_eq!(layout.read_unit(offset), unit, "at {offset}");
        }
        assert_eq!(layout.read_unit(1209), Some(1170..1210));
        let lengths = [(5, 1000, 1000), (10, 100, 92), (10, 92, 92), (10, 91, 28), (10, 1, 28), (38, 64, 64)];
        for (offset, most, length) in lengths {
            assert_eq!(layout.read_length(offset, most), length, "at most {most} at {offset}");
        }
    }
}
