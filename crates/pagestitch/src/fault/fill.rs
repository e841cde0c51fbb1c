//! Fill: finds the bytes of a span of pages, from one chunk or several.
//!
//! ```text
//!   page:    |----- 0 -----|----- 1 -----|----- 2 -----|----- 3 -----|
//!   chunks:  [ a            a            a  ][b ][ c       c       c  ...
//!   fill:     copy          copy          gathered      buffered / copy
//! ```
//!
//! A page inside one chunk uses the cheapest method that its source allows. A page that several
//! chunks share, or that the region's end cuts, is gathered in a buffer. A whole block is staged:
//! filled in a huge page that moves in at once. Only a failing source makes it allocate.

use crate::error::{Failure, FailureReason};
use crate::fault::error::InstallError;
use crate::guard::{discard, guarded};
use crate::policy::OnFailure;
use crate::source::{Backing, MemoryBytes, Source};
use crate::space::{Layout, Mapping, Piece};
use pagestitch_kernel::pages::Donated;
use pagestitch_kernel::{Errno, Page, PageSize, Span, Staging};
use std::io;
use std::ops::Range;

/// The bytes of the leading `pages` pages of the requested span.
pub(crate) struct Filled<'a> {
    pub(crate) pages: usize,
    pub(crate) content: Content<'a>,
}

/// The place of the bytes of some pages.
pub(crate) enum Content<'a> {
    /// In a source's own memory.
    Copy(MemoryBytes<'a>, Range<usize>),
    /// In the buffer, read from one source.
    Buffered(&'a [u8]),
    /// In the buffer, gathered from several chunks.
    Gathered(&'a [u8]),
    /// In a staged huge page that can move.
    StagedMove(&'a mut Staging),
    /// In donated pages that can move, from an offset in bytes on.
    Move(&'a Donated, u64),
    /// In the memfd that is mapped there: the kernel only has to map its pages.
    Continue,
    /// The bytes are zeros.
    Zero,
    /// Nowhere else than in the region, because their source is released.
    Released,
}

/// The buffers of a thread that fills pages. Created before its first fault, so that faults
/// allocate nothing.
#[derive(Debug)]
pub(crate) struct Buffers {
    pages: WholePages,
    block: Staging,
}

impl Buffers {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self { pages: WholePages::new(PAGES), block: Staging::new()? })
    }
}

/// A buffer of whole pages. It begins at a multiple of the page size, because the disk writes to no other without a copy
/// (`O_DIRECT`), and because the kernel copies faster from there.
#[derive(Debug)]
struct WholePages {
    room: Vec<u8>,
    start: usize,
}

impl WholePages {
    fn new(pages: usize) -> Self {
        let page = PageSize::system().bytes();
        let room = vec![0; (pages + 1) * page];
        let start = room.as_ptr().align_offset(page);
        Self { room, start }
    }

    /// The bytes of all pages.
    fn bytes(&mut self) -> &mut [u8] {
        let end = self.room.len() - PageSize::system().bytes();
        &mut self.room[self.start..][..end]
    }
}

/// Finds the bytes of the leading pages of a span that one method can install, at least one page.
///
/// If a source fails for several pages at once, the error is [`InstallError::Several`]: some of them
/// may be readable alone.
pub(crate) fn fill<'a>(
    region: &'a Mapping,
    span: Span,
    buffers: &'a mut Buffers,
) -> Result<Filled<'a>, InstallError> {
    find(region, span, buffers).inspect_err(|error| {
        if !matches!(error, InstallError::Several(_)) {
            region.counters.local().source_errors.add(1);
        }
    })
}

fn find<'a>(region: &'a Mapping, span: Span, buffers: &'a mut Buffers) -> Result<Filled<'a>, InstallError> {
    let (layout, page): (&Layout, _) = (&region.layout, region.page_size());
    let span = region.target.contiguous(span);
    if page.bytes() > PageSize::system().bytes() {
        return Ok(fill_huge(region, span.prefix(1), buffers.block.fresh())?);
    }
    let (span, removed) = as_it_is(region, span);
    if removed {
        return Ok(Filled { pages: span.pages, content: Content::Zero });
    }
    let Buffers { pages, block } = buffers;
    let staging = pages.bytes();
    let stages = |whole: &Span| stage(layout, page.offsets(*whole), block).is_some();
    if let Some(whole) = region.stageable_block(span).filter(stages) {
        return Ok(Filled { pages: whole.pages, content: Content::StagedMove(block) });
    }
    let offsets = page.offsets(span);
    let piece = layout.piece_at(offsets.start, offsets.end);
    if let Some((pages, memfd, offset)) = region.lazy_pages(span) {
        let bytes = page.bytes() as u64 * pages as u64;
        asked(|| memfd.fill(offset..offset + bytes)).map_err(|error| piece.failed(error))?;
        return Ok(Filled { pages, content: Content::Continue });
    }
    if let Some((pages, donated, offset)) = region.movable_pages(span) {
        return Ok(Filled { pages, content: Content::Move(donated, offset) });
    }
    let whole = usize::try_from(piece.bytes / page.bytes() as u64).unwrap_or(usize::MAX).min(span.pages);
    if whole == 0 {
        return Ok(gather(layout, page.offsets(span.prefix(1)), staging)?);
    }
    match piece.backing {
        Backing::Hole(_) => Ok(Filled { pages: whole, content: Content::Zero }),
        Backing::Memory(memory) => {
            let bytes = memory.bytes().map_err(|error| piece.failed(error))?;
            // The chunk lies inside its memory, so its offsets fit a usize.
            let start = piece.offset as usize;
            let content = Content::Copy(bytes, start..start + whole * page.bytes());
            Ok(Filled { pages: whole, content })
        }
        Backing::Memfd(memfd) => {
            let bytes = MemoryBytes::Owned(memfd.sealed().as_ref());
            let start = piece.offset as usize;
            let content = Content::Copy(bytes, start..start + whole * page.bytes());
            Ok(Filled { pages: whole, content })
        }
        Backing::Read(_)
        | Backing::Immutable(_)
        | Backing::Fetched(_)
        | Backing::Donated(_)
        | Backing::Shared(_)
        | Backing::Mapped(_) => {
            let buffers = (staging, block);
            let is_cut = piece.bytes % page.bytes() as u64 != 0;
            let is_tail = is_cut && whole < span.pages && region.ends_unit(Page(span.first.0 + whole));
            let most = (whole + usize::from(is_tail)) as u64 * page.bytes() as u64;
            let most = most.min(layout.read_length(offsets.start, buffers.0.len() as u64));
            read_pages(&piece, page, most as usize, buffers)
        }
    }
}

/// Reads as many pages of a piece as `most` bytes hold, at least one. The last one ends with zeros, if the piece ends
/// inside of it.
fn read_pages<'a>(
    piece: &Piece<'_>,
    page: PageSize,
    most: usize,
    (buffer, block): (&'a mut [u8], &'a mut Staging),
) -> Result<Filled<'a>, InstallError> {
    let source = piece.backing.source();
    let pages = (most / page.bytes()).max(1);
    // Only a source that prefers large reads needs the large buffer.
    let buffer = if pages * page.bytes() > buffer.len() { block.fresh() } else { buffer };
    let buffer = &mut buffer[..pages * page.bytes()];
    let (bytes, padding) = buffer.split_at_mut(buffer.len().min(piece.bytes as usize));
    padding.fill(0);
    match read(source, piece.offset, bytes) {
        Ok(()) => Ok(Filled { pages, content: Content::Buffered(buffer) }),
        Err(error) if pages > 1 => {
            discard(error);
            Err(InstallError::Several(pages))
        }
        Err(error) => Err(piece.failed(error).into()),
    }
}

/// Reads a page that lies in one chunk.
pub(super) fn read_page<'a>(region: &Mapping, page: Page, buffers: &'a mut Buffers) -> io::Result<&'a [u8]> {
    let (size, into) = (region.page_size(), buffers.pages.bytes());
    let offsets = size.offsets(page.span());
    let piece = region.layout.piece_at(offsets.start, offsets.end);
    let into = &mut into[..size.bytes()];
    read(piece.backing.source(), piece.offset, into).map(|()| &*into)
}

/// The first page of a span whose source is released is in the region, or was discarded there.
pub(crate) fn in_region<'a>(error: InstallError) -> Result<Filled<'a>, InstallError> {
    match error {
        InstallError::Source(failure) if failure.reason == FailureReason::Released => {
            Ok(Filled { pages: 1, content: Content::Released })
        }
        error => Err(error),
    }
}

/// The leading pages of a span that are alike: all discarded by their owner, and zeros since
/// (true), or none of them.
fn as_it_is(region: &Mapping, span: Span) -> (Span, bool) {
    let Some(adopted) = region.target.foreign() else { return (span, false) };
    let (pages, removed) = adopted.discarded_prefix(span);
    (span.prefix(pages), removed)
}

/// Fills one page of hugetlbfs. The kernel has no zero page of that size, so zeros are copied too.
fn fill_huge<'a>(region: &'a Mapping, span: Span, fresh: &'a mut [u8]) -> Result<Filled<'a>, Failure> {
    let page = &mut fresh[..region.page_size().bytes()];
    if as_it_is(region, span).1 {
        return Ok(Filled { pages: 1, content: Content::Gathered(page) });
    }
    gather(&region.layout, region.page_size().offsets(span), page)
}

/// Fills a whole block from one chunk or several. `None` if other methods are better: for pages of
/// zeros, which need no memory; for pages that can move or be mapped themselves; if huge pages cost
/// too much at the moment; and if a source fails, to find out for which page.
fn stage(layout: &Layout, offsets: Range<u64>, block: &mut Staging) -> Option<()> {
    if !layout.pieces(offsets.clone()).all(|piece| is_staged(&piece)) {
        return None;
    }
    let mut into = block.fresh_if_cheap()?;
    for piece in layout.pieces(offsets) {
        let (now, later) = into.split_at_mut(piece.bytes as usize);
        // A fresh block holds zeros.
        if !matches!(piece.backing, Backing::Hole(_)) {
            read(piece.backing.source(), piece.offset, now).map_err(discard).ok()?;
        }
        into = later;
    }
    Some(())
}

/// True if a piece does not keep its block from being staged.
const fn is_staged(piece: &Piece<'_>) -> bool {
    match piece.backing {
        Backing::Hole(_) => piece.bytes < HOLE_MAX as u64,
        Backing::Donated(_) | Backing::Shared(_) | Backing::Fetched(_) | Backing::Mapped(_) => false,
        Backing::Memory(_) | Backing::Memfd(_) | Backing::Immutable(_) | Backing::Read(_) => true,
    }
}

/// Finds the bytes of one page for the faulting thread, in a signal handler: without a lock, an
/// allocation or code of a source. `None` if they must be gathered, or read from a file.
pub(crate) fn fill_inline(region: &Mapping, page: Page) -> Option<Content<'_>> {
    let offsets = region.page_size().offsets(page.span());
    if let Some((_, donated, offset)) = region.movable_pages(page.span()) {
        return Some(Content::Move(donated, offset));
    }
    let piece = region.layout.piece_at(offsets.start, offsets.end);
    let (start, size) = (piece.offset as usize, region.page_size().bytes());
    match piece.backing {
        _ if piece.bytes < size as u64 => None,
        Backing::Hole(_) => Some(Content::Zero),
        backing => Some(Content::Copy(stable_bytes(backing)?, start..start + size)),
    }
}

/// Gathers or reads one page under the same rules. `None` if the scope of borrowed memory has ended,
/// a source is released, or a file cannot be read.
pub(crate) fn gather_inline<'a>(region: &Mapping, page: Page, buffer: &'a mut [u8]) -> Option<Content<'a>> {
    let (mut filled, mut pieces) = (0, 0);
    for piece in region.layout.pieces(region.page_size().offsets(page.span())) {
        let now = filled;
        filled += piece.bytes as usize;
        pieces += 1;
        if !gather_piece(&piece, &mut buffer[now..filled]) {
            region.counters.local().source_errors.add(1);
            return None;
        }
    }
    if (filled, pieces) == (buffer.len(), 1) {
        return Some(Content::Buffered(buffer));
    }
    buffer[filled..].fill(0);
    Some(Content::Gathered(buffer))
}

/// False if the scope of borrowed memory has ended, the source is released, or the file cannot be
/// read.
fn gather_piece(piece: &Piece<'_>, into: &mut [u8]) -> bool {
    if matches!(piece.backing, Backing::Hole(_)) {
        into.fill(0);
        return true;
    }
    if let Some(is_filled) = piece.backing.fill_in_handler(piece.offset, into) {
        return is_filled;
    }
    let Some(bytes) = stable_bytes(piece.backing) else { return false };
    let start = piece.offset as usize;
    into.copy_from_slice(&bytes[start..start + into.len()]);
    true
}

/// The bytes of a source that has them at a stable address.
fn stable_bytes(backing: &Backing) -> Option<MemoryBytes<'_>> {
    match backing {
        Backing::Memory(memory) => memory.bytes_if_any(),
        Backing::Memfd(memfd) => Some(MemoryBytes::Owned(memfd.sealed().as_ref())),
        Backing::Hole(_)
        | Backing::Immutable(_)
        | Backing::Donated(_)
        | Backing::Shared(_)
        | Backing::Read(_)
        | Backing::Fetched(_)
        | Backing::Mapped(_) => None,
    }
}

/// Gathers one page, with zeros for failing chunks whose policy is [`OnFailure::Zeros`].
pub(crate) fn fill_zeroing<'a>(
    region: &'a Mapping,
    page: Page,
    buffers: &'a mut Buffers,
) -> Result<Filled<'a>, Failure> {
    let size = region.page_size().bytes();
    let staging = buffers.pages.bytes();
    let staging = if size > staging.len() { buffers.block.fresh() } else { staging };
    gather_or(&region.layout, region.page_size().offsets(page.span()), staging, |failure, into| {
        let is_lost = failure.reason == FailureReason::Released;
        if is_lost || region.layout.on_failure(failure.chunk) != OnFailure::Zeros {
            return Err(failure);
        }
        into.fill(0);
        Ok(())
    })
}

/// Assembles one page from the chunks that share it. Bytes past the last chunk are zero.
fn gather<'a>(layout: &'a Layout, offsets: Range<u64>, staging: &'a mut [u8]) -> Result<Filled<'a>, Failure> {
    gather_or(layout, offsets, staging, |failure, _| Err(failure))
}

/// As [`gather`]; `otherwise` fills the bytes of a chunk whose source fails, or fails the page.
fn gather_or<'a>(
    layout: &Layout,
    offsets: Range<u64>,
    staging: &'a mut [u8],
    mut otherwise: impl FnMut(Failure, &mut [u8]) -> Result<(), Failure>,
) -> Result<Filled<'a>, Failure> {
    let size = (offsets.end - offsets.start) as usize;
    let mut filled = 0;
    for piece in layout.pieces(offsets) {
        let into = &mut staging[filled..filled + piece.bytes as usize];
        if let Err(error) = read(piece.backing.source(), piece.offset, into) {
            otherwise(piece.failed(error), into)?;
        }
        filled += piece.bytes as usize;
    }
    staging[filled..size].fill(0);
    Ok(Filled { pages: 1, content: Content::Gathered(&staging[..size]) })
}

fn read(source: &dyn Source, offset: u64, into: &mut [u8]) -> io::Result<()> {
    asked(|| source.read_at(offset, into))
}

/// Calls a source; its panic becomes an error instead of ending the thread.
pub(crate) fn asked(ask: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let panicked = |said| Err(FailureReason::Panicked.error(format!("the source panicked: {said}")));
    guarded(ask).unwrap_or_else(panicked)
}

/// The most pages that one read of a source fills if no block is staged, and the source prefers no
/// larger reads.
const PAGES: usize = 64;
/// Holes shorter than this many bytes do not keep a block from being staged.
const HOLE_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_of_whole_pages_begins_and_ends_at_pages() {
        let page = PageSize::system().bytes();
        for pages in [1, PAGES] {
            let mut buffer = WholePages::new(pages);
            let bytes = buffer.bytes();
            assert_eq!((bytes.as_ptr().addr() % page, bytes.len()), (0, pages * page));
        }
    }
}
