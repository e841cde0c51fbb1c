//! The lookups of a layout with replaced pages, and the replacement of pages.

use crate::error::Error;
use crate::space::Chunk;
use crate::space::layout::builder::check;
use crate::space::layout::replaced::{Replaced, Replacing};
use crate::space::layout::{Layout, Piece};
use pagestitch_kernel::{Errno, PageSize};
use std::sync::Arc;

impl Layout {
    /// Checks the chunk that replaces the bytes at an offset.
    pub(crate) fn check_at(&self, offset: u64, chunk: &Chunk) -> Result<(), Error> {
        check(self.number_at(offset), &chunk.backing, &chunk.range)
    }

    /// The number of the chunk with the byte at an offset.
    pub(crate) fn number_at(&self, offset: u64) -> usize {
        self.number_of(self.locate(offset))
    }

    /// The right to replace bytes, of one thread at a time. `pages`: the most pages of the region.
    pub(crate) fn replacing(&self, page: PageSize, pages: usize) -> Result<Replacing<'_>, Errno> {
        if self.replaced.get().is_none() {
            let _ = self.replaced.set(Arc::new(Replaced::new(page, pages)?));
        }
        let replaced: &Replaced = self.replaced.get().expect("it is there by now");
        Ok(replaced.replacing())
    }

    /// As [`piece_at`](Self::piece_at), in a layout with replaced pages.
    #[cold]
    pub(super) fn piece_beside<'l>(&'l self, replaced: &'l Replaced, start: u64, end: u64) -> Piece<'l> {
        let (number, end) = replaced.run(start, end);
        let chunk = self.locate(start);
        let Some(number) = number else { return self.piece(chunk, &(start..end)) };
        let (backing, offset) = replaced.bytes_of(number, start);
        Piece { chunk: self.number_of(chunk), backing, offset, bytes: end.min(self.total()) - start }
    }

    /// True if pages may get other bytes while threads read them.
    pub(crate) fn has_replaced(&self) -> bool {
        self.replaced.get().is_some()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::source::Backing;
    use crate::space::layout::LayoutBuilder;
    use pagestitch_kernel::{Page, Span};

    #[test]
    fn pages_have_the_bytes_that_replaced_them_last() {
        let page = PageSize::system();
        let (size, mut layout) = (page.bytes() as u64, LayoutBuilder::default());
        layout.push(Chunk::hole(5 * size + 100)).unwrap();
        layout.push(Chunk::from(vec![1u8; 2 * size as usize])).unwrap();
        let layout = layout.finish(false).unwrap();
        let set = |first: usize, pages: usize, chunk: Option<&Chunk>| {
            let replacing = layout.replacing(page, 8).unwrap();
            let range = size * first as u64..size * (first + pages) as u64;
            replacing.set(Span { first: Page(first), pages }, &range, chunk);
        };
        let chunk = Chunk::from(vec![2u8; 10 * size as usize]).range(3..3 + 4 * size);
        set(2, 4, Some(&chunk));
        set(3, 1, None);
        let pieces: Vec<_> = layout
            .pieces(0..8 * size)
            .map(|piece| (piece.chunk, matches!(piece.backing, Backing::Hole(_)), piece.offset, piece.bytes))
            .collect();
        let expected = [
            (0, true, 0, 2 * size),
            (0, false, 3, size),
            (0, true, 0, size),
            (0, false, 3 + 2 * size, 2 * size),
            (1, false, size - 100, size + 100),
        ];
        assert_eq!(pieces, expected);
        assert_eq!(layout.grown(100 * size).pieces(0..8 * size).count(), 5, "a longer version has them too");
    }
}
