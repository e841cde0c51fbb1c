//! The chunks of a region that is described, and their alignment.

use super::Builder;
use crate::error::Error;
use crate::space::{Chunk, IntoChunk, LayoutBuilder};
use pagestitch_kernel::PageSize;

impl<S> Builder<S> {
    /// Starts each later chunk in a page of its own, at the same offset within the page as in its
    /// source, so that it can be mapped in place. Padding fills the gaps;
    /// [`offset_of`](crate::AnyRegion::offset_of) returns where a chunk starts.
    ///
    /// Padding in a page that shows a source in place has the bytes that the source has around the chunk. A write
    /// to it through a pointer changes the source, and [`write_at`](crate::SharedRegion::write_at) refuses it.
    /// The bytes of other padding mean nothing.
    ///
    /// A chunk of a file or memfd that is as long as a huge page (2 MiB) starts at the same offset in a
    /// huge page. Where the page cache has huge pages, the kernel then maps 2 MiB with one fault, as
    /// it does for a plain `mmap`. The padding takes addresses and no memory.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().page_aligned().chunk(vec![1u8; 5]).chunk(vec![2u8; 5]).build(&Pool::new()?)?;
    /// assert_eq!(region.offset_of(1), Some(4096));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn page_aligned(mut self) -> Self {
        self.aligned = true;
        self
    }

    /// Starts each later chunk at a multiple of `bytes`, or of the chunk's own
    /// [alignment](Chunk::align) if that is larger. Default: 1, end to end.
    ///
    /// With [`page_aligned`](Self::page_aligned), a chunk whose offset in its source is no multiple
    /// starts at the start of a page instead, and is not mapped in place.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let tensors = [vec![1u8; 100], vec![2u8; 7], vec![3u8; 64]];
    /// let region = Region::builder().align(64).chunks(tensors).build(&Pool::new()?)?;
    /// assert!(region.chunk_ranges().eq([0..100, 128..135, 192..256]));
    /// assert_eq!(region.chunk_slice(1), Some(&[2; 7][..]));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn align(mut self, bytes: u64) -> Self {
        self.align = bytes;
        self
    }

    /// Appends a chunk. [`IntoChunk`] lists the types that it takes.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Pool, Region};
    /// let region = Region::builder()
    ///     .chunk(vec![1u8; 5_000])                                // an owner of bytes
    ///     .chunk(Chunk::from(vec![2u8; 5_000]).range(100..200))   // a part of one
    ///     .chunk(Chunk::hole(1 << 30))
    ///     .build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[4_999..5_001], [1, 2]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn chunk(mut self, chunk: impl IntoChunk) -> Self {
        self.push(chunk);
        self
    }

    /// Appends chunks, in order.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let rows = (0..1000u16).map(|row| row.to_le_bytes().to_vec());
    /// let region = Region::builder().chunks(rows).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[2 * 999..], 999u16.to_le_bytes());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn chunks(mut self, chunks: impl IntoIterator<Item = impl IntoChunk>) -> Self {
        let chunks = chunks.into_iter();
        if let Ok(layout) = &mut self.layout {
            layout.reserve(chunks.size_hint().0);
        }
        chunks.for_each(|chunk| self.push(chunk));
        self
    }

    fn push(&mut self, chunk: impl IntoChunk) {
        if let Ok(layout) = &mut self.layout {
            let laid = match chunk.into_chunk() {
                // Most chunks lie end to end, and there may be millions of them.
                Ok(chunk) if (self.align, chunk.align, self.aligned) == (1, 1, false) => layout.push(chunk),
                Ok(chunk) => lay_aligned(layout, chunk, self.align, self.aligned),
                Err(error) => Err(error.inside_chunk(layout.next_number())),
            };
            if let Err(error) = laid {
                self.layout = Err(error);
            }
        }
    }
}

/// Appends a chunk, after the padding that it needs.
fn lay_aligned(layout: &mut LayoutBuilder, chunk: Chunk, align: u64, own_page: bool) -> Result<(), Error> {
    let align = chunk.align_with(align, layout.next_number())?;
    layout.pad_for(&chunk, align, own_page.then_some(PageSize::system()))?;
    layout.push(chunk)
}
