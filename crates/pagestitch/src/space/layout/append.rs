//! Chunks that are appended to a layout while threads look up.

use crate::error::Error;
use crate::source::{Backing, Hole};
use crate::space::Chunk;
use crate::space::layout::builder::check;
use crate::space::layout::{Layout, Origin};
use pagestitch_kernel::append_vec::AppendVec;
use std::ops::Range;

impl Layout {
    /// Checks the chunk that is appended next.
    pub(crate) fn check_next(&self, chunk: &Chunk) -> Result<(), Error> {
        check(self.next_number(), &chunk.backing, &chunk.range)
    }

    /// Appends padding and a chunk to a shared layout. False if there is no room: append it to a
    /// [`grown`](Self::grown) copy. One thread appends at a time.
    pub(crate) fn append(&self, padding: u64, chunk: &Chunk) -> bool {
        let Chunk { backing, range, on_failure, align: _ } = chunk;
        let number = self.next_number();
        let end = self.total() + padding + (range.end - range.start);
        let unit = backing.read_unit_shift();
        // The table of units has an entry for each source up to the last one with a unit.
        let units = if unit > 0 { self.sources.len() + 3 - self.units.len() } else { 0 };
        let buckets = self.buckets_for(end).saturating_sub(self.buckets.len());
        let has_room =
            [self.starts.spare(), self.origins.spare(), self.sources.spare()].iter().all(|&room| room > 2)
                && self.padding.spare() > 0
                && self.policies.spare() > 0
                && self.units.spare() >= units
                && self.buckets.spare() >= buckets;
        if !has_room {
            return false;
        }
        if padding > 0 {
            add(&self.padding, self.chunks() as u32);
            self.append_one(Backing::Hole(Hole), &(0..padding));
        }
        if let Some(chosen) = on_failure {
            add(&self.policies, (number..number + 1, *chosen));
        }
        if unit > 0 {
            (self.units.len()..self.sources.len()).for_each(|_| add(&self.units, 0));
            add(&self.units, unit);
        }
        self.append_one(backing.clone(), range);
        true
    }

    fn append_one(&self, backing: Backing, range: &Range<u64>) {
        let (chunk, source) = (self.chunks() as u32, self.sources.len() as u32);
        let end = self.total() + (range.end - range.start);
        add(&self.sources, backing);
        add(&self.origins, Origin { offset: range.start, source });
        add(&self.starts, end);
        (self.buckets.len()..self.buckets_for(end)).for_each(|_| add(&self.buckets, chunk));
    }

    /// A copy with room for twice as many chunks, and for offsets up to twice as far as `end`.
    pub(crate) fn grown(&self, end: u64) -> Self {
        let more = self.chunks().max(GROWN_MIN);
        let mut copy = Self {
            starts: self.starts.copy_with_room(more),
            origins: self.origins.copy_with_room(more),
            sources: self.sources.copy_with_room(more),
            units: self.units.copy_with_room(2 * more),
            padding: self.padding.copy_with_room(more),
            policies: self.policies.copy_with_room(more),
            grows: true,
            replaced: self.replaced.clone(),
            ..Self::default()
        };
        copy.index_for(end);
        let buckets =
            copy.buckets.copy_with_room(copy.buckets_for(end.saturating_mul(2)) - copy.buckets.len());
        copy.buckets = buckets;
        copy
    }

    /// A copy of the first chunks.
    pub(crate) fn first(&self, chunks: usize) -> Self {
        let mut copy = self.grown(self.total());
        copy.starts.edit(|starts| starts.truncate(chunks + 1));
        copy.origins.edit(|origins| origins.truncate(chunks));
        copy.padding.edit(|padding| padding.retain(|&chunk| (chunk as usize) < chunks));
        let numbers = copy.next_number();
        copy.policies.edit(|policies| policies.retain(|(run, _)| run.start < numbers));
        copy.index();
        copy
    }
}

/// Appends an entry for which there is room.
fn add<T>(entries: &AppendVec<T>, entry: T) {
    let added = entries.append(entry);
    debug_assert!(added.is_ok(), "the room is checked before");
}

/// A layout that grows has room for at least as many more chunks.
const GROWN_MIN: usize = 64;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::space::layout::LayoutBuilder;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    /// A reader that looks at a table again may see another chunk.
    #[test]
    fn a_layout_has_a_length_and_chunks_while_others_are_appended() {
        let mut built = LayoutBuilder::default();
        built.push(Chunk::hole(100)).unwrap();
        let mut layout = built.finish(false).unwrap();
        // With room for thousands of chunks.
        (0..8).for_each(|_| {
            while layout.append(0, &Chunk::hole(1)) {}
            layout = layout.grown(1 << 20);
        });
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while layout.append(0, &Chunk::hole(1)) {}
                is_over.store(true, Ordering::SeqCst);
            });
            while !is_over.load(Ordering::SeqCst) {
                assert!(layout.total() >= 100);
                assert_eq!(layout.chunks_in(&(0..100)), 0..1);
                assert_eq!(layout.pieces(0..100).count(), 1);
            }
        });
    }
}
