//! A source whose blocks are kept for several readers.

use super::block_cache::{Answer, BlockCache, BlockId, BlockRead, Found, Waiter};
use super::immutable::no_file;
use super::{Complete, Fetch, Reply, Source};
use crate::error::FailureReason;
use crate::guard::{guarded, quietly};
use bytes::Bytes;
use crossbeam_channel::bounded;
use pagestitch_kernel::page::HUGE;
use parking_lot::Mutex;
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, io};

/// A wrapper that reads its source in whole, aligned blocks and keeps them, so that regions and
/// guests that share the source read a block once.
///
/// * **Block.** The source's [`granularity`](Source::granularity), or 64 KiB if it has none; or
///   [`block`](Self::block). The last block ends with the source.
/// * **Concurrent misses** of a block are one read, whose bytes all of them get. An error is not
///   kept: the next request reads the block again. A source that implements both [`Source`] and
///   [`Fetch`] has blocks of its own for each.
/// * **Memory.** At most the given capacity, in blocks that are kept or being read; at least one
///   block. Least recently used blocks are removed, roughly. While the blocks that are being read
///   fill the capacity, further misses are read without being kept. Each thread that copies out of
///   a block may keep that block for the moment. A request across several blocks of a [`Fetch`] has
///   a buffer of its own.
/// * **Failures** are those of the source. If the read of a block fails, each request for a part of
///   the block reads its own bytes once more, alone, so that only the bad page fails. Wrap
///   [`Retrying`](super::Retrying) inside: it repeats the read of a block once for all that wait.
/// * **Signals.** A request waits for the thread that reads its block. So a signal handler that
///   interrupts a thread in [`populate`](crate::AnyRegion::populate),
///   [`read_at`](crate::Region::read_at) or [`retry_failed`](crate::AnyRegion::retry_failed) must touch
///   no absent page of this source: it could wait forever for the thread that it has interrupted.
///   Block the signal around these calls.
///
/// The bytes of the source must not change. A page table or the kernel's page cache already keeps
/// the bytes of mapped files and of one region: cache sources that are slow and shared.
///
/// ```
/// use pagestitch::source::{Cached, FileSource};
/// use pagestitch::{Chunk, Pool, Region};
/// use std::sync::Arc;
///
/// let image = Arc::new(Cached::new(FileSource::open("/proc/self/exe")?, 16 << 20));
/// let pool = Pool::new()?;
/// for _guest in 0..3 {
///     let region = Region::builder().chunk(Chunk::source(Arc::clone(&image))).build(&pool)?;
///     assert_eq!(&region.as_slice()[1..4], b"ELF");                // the file is read once
/// }
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Clone)]
pub struct Cached<S> {
    inner: Arc<S>,
    capacity: u64,
    cache: Arc<BlockCache>,
}

impl<S> Cached<S> {
    /// Keeps blocks of `source`, of at most `capacity` bytes together. Clones share the blocks.
    #[must_use]
    pub fn new(source: S, capacity: u64) -> Self {
        let cache = Arc::new(BlockCache::new(OnceLock::new()));
        Self { inner: Arc::new(source), capacity, cache }
    }

    /// Sets the size of a block: rounded up to a power of two, from 512 bytes to 2 MiB. Starts with
    /// an empty cache.
    ///
    /// ```
    /// use pagestitch::source::{Cached, FileSource};
    ///
    /// let image = Cached::new(FileSource::open("/proc/self/exe")?, 64 << 20).block(256 << 10);
    /// # let _ = image;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn block(self, bytes: u64) -> Self {
        Self { cache: Arc::new(BlockCache::new(OnceLock::from(rounded(bytes)))), ..self }
    }

    fn blocks(&self, size: u64, granularity: impl FnOnce() -> u64) -> Blocks {
        let block = self.cache.block_size(|| match granularity() {
            0 | 1 => DEFAULT_BLOCK,
            preferred => rounded(preferred),
        });
        let most = usize::try_from(self.capacity / block).unwrap_or(usize::MAX).max(1);
        Blocks { block, most, size }
    }
}

/// The division of a source into blocks.
#[derive(Clone, Copy)]
struct Blocks {
    block: u64,
    /// The number of blocks that fit in the cache.
    most: usize,
    size: u64,
}

/// A part of a block that a request needs.
struct Part {
    number: u64,
    /// In the block.
    bytes: Range<usize>,
    /// In the request.
    at: usize,
}

impl Blocks {
    /// The parts of the blocks that hold `len` bytes at `offset`.
    fn parts(self, offset: u64, len: usize) -> impl Iterator<Item = Part> {
        let end = offset + len as u64;
        let last = if len == 0 { 0 } else { end.div_ceil(self.block) };
        let numbers = offset / self.block..last;
        numbers.map(move |number| {
            let start = number * self.block;
            let from = offset.max(start);
            let bytes = (from - start) as usize..(end - start).min(self.block) as usize;
            Part { number, bytes, at: (from - offset) as usize }
        })
    }

    /// The offset and the length of a block.
    fn place(self, number: u64) -> (u64, usize) {
        let start = number * self.block;
        (start, self.block.min(self.size.saturating_sub(start)) as usize)
    }

    /// Whether a part is its whole block, so that a read of the part alone fails as the block did.
    fn is_whole(self, part: &Part) -> bool {
        part.bytes.len() == self.place(part.number).1
    }
}

impl<S: Source> Cached<S> {
    /// The bytes of a block; `None` if it has no room.
    fn block_of(&self, blocks: Blocks, number: u64) -> io::Result<Option<Bytes>> {
        let mut waits = None;
        let found = self.cache.find(BlockId::Read(number), blocks.most, || {
            let (sender, answer) = bounded(1);
            waits = Some(answer);
            Box::new(move |answer| drop(sender.send(answer)))
        });
        match found {
            Found::Kept(block) => Ok(Some(block)),
            Found::Waits => {
                let answer = waits.expect("a waiter was made").recv();
                match answer.expect("each waiter gets an answer") {
                    Answer::Ready(block) => Ok(Some(block)),
                    Answer::Failed(error) | Answer::Retry(_, error) => Err(error),
                }
            }
            Found::Absent(read) => self.read_block(read, blocks.place(number)).map(Some),
            Found::NoRoom => Ok(None),
        }
    }

    fn read_block(&self, read: BlockRead, (start, len): (u64, usize)) -> io::Result<Bytes> {
        let mut bytes = vec![0; len];
        let panicked = |said| Err(FailureReason::Panicked.error(format!("the source panicked: {said}")));
        match guarded(|| self.inner.read_at(start, &mut bytes)).unwrap_or_else(panicked) {
            Ok(()) => {
                let block = Bytes::from(bytes);
                read.finish(&block);
                Ok(block)
            }
            Err(error) => {
                read.fail(&error);
                Err(error)
            }
        }
    }
}

impl<S: Source> Source for Cached<S> {
    forward!(self => self.inner; size, name);

    fn direct(&self) -> Option<&dyn Any> {
        no_file(self.inner.direct())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let blocks = self.blocks(self.inner.size(), || self.inner.granularity());
        for part in blocks.parts(offset, into.len()) {
            let (start, rest) = (offset + part.at as u64, &mut into[part.at..]);
            let own = ..part.bytes.len();
            match self.block_of(blocks, part.number) {
                Ok(Some(block)) => {
                    rest[own].copy_from_slice(block.get(part.bytes).ok_or(io::ErrorKind::UnexpectedEof)?);
                }
                Ok(None) => self.inner.read_at(start, &mut rest[own])?,
                Err(error) if blocks.is_whole(&part) => return Err(error),
                // The bad byte of the block may be outside the request. One read for all that is
                // left, however many blocks are bad.
                Err(_) => return self.inner.read_at(start, rest),
            }
        }
        Ok(())
    }

    /// The size of a block.
    fn granularity(&self) -> u64 {
        self.blocks(0, || self.inner.granularity()).block
    }
}

impl<S: Fetch> Cached<S> {
    /// Passes a block to `waiter`. `failures` counts those of its request.
    fn fetch_block(&self, blocks: Blocks, number: u64, failures: u32, waiter: Waiter) {
        let mut own = Some(waiter);
        let found =
            self.cache.find(BlockId::Fetched(number), blocks.most, || own.take().expect("it is called once"));
        let Some(waiter) = own else { return };
        let read = match found {
            Found::Kept(block) => return waiter(Answer::Ready(block)),
            Found::Absent(read) => Some(read),
            Found::NoRoom | Found::Waits => None,
        };
        let (start, len) = blocks.place(number);
        let fetching = Box::new(Fetching { read, waiter });
        self.inner.fetch(start, Reply::to_pages(fetching, len).after(failures));
    }
}

impl<S: Fetch + 'static> Fetch for Cached<S> {
    forward!(self => self.inner; size, name);

    fn fetch(&self, offset: u64, reply: Reply) {
        let blocks = self.blocks(self.inner.size(), || self.inner.granularity());
        let failures = reply.failures();
        let mut parts = blocks.parts(offset, reply.len());
        let Some(first) = parts.next() else { return reply.complete(Ok(&[])) };
        let request = Request { source: Arc::clone(&self.inner), offset, reply };
        let Some(second) = parts.next() else {
            let number = first.number;
            let is_whole = blocks.is_whole(&first);
            let waiter = Box::new(move |answer| request.answer(first.bytes, is_whole, answer));
            return self.fetch_block(blocks, number, failures, waiter);
        };
        let len = request.reply.len();
        let gather = Arc::new(Mutex::new(Some(Gather { bytes: vec![0; len], missing: len, request })));
        for part in [first, second].into_iter().chain(parts) {
            let gather = Arc::clone(&gather);
            let number = part.number;
            let is_whole = blocks.is_whole(&part);
            let waiter = Box::new(move |answer| add(&gather, &part, is_whole, answer));
            self.fetch_block(blocks, number, failures, waiter);
        }
    }

    /// The size of a block.
    fn granularity(&self) -> u64 {
        self.blocks(0, || self.inner.granularity()).block
    }
}

/// A request that is answered from blocks, or by the source alone after the failure of a block.
struct Request<S> {
    source: Arc<S>,
    offset: u64,
    reply: Reply,
}

impl<S: Fetch> Request<S> {
    /// Answers with `bytes` of the only block that the request needs.
    fn answer(self, bytes: Range<usize>, is_whole: bool, answer: Answer) {
        match answer {
            Answer::Ready(block) => {
                self.reply.complete(block.get(bytes).ok_or_else(|| io::ErrorKind::UnexpectedEof.into()));
            }
            Answer::Failed(error) => self.block_failed(is_whole, error),
            Answer::Retry(pause, error) => self.reply.retry_after(pause, error),
        }
    }

    /// Fails if the request needs the whole block. Otherwise the bad byte of the block may be
    /// outside the request, so the source gets the request alone.
    fn block_failed(self, is_whole: bool, error: io::Error) {
        if is_whole {
            return self.reply.fail(error);
        }
        // A source that panics drops the reply, which fails this request. The others that wait for
        // the block still get their answer.
        quietly(|| self.source.fetch(self.offset, self.reply));
    }
}

/// A request whose bytes lie in several blocks.
struct Gather<S> {
    bytes: Vec<u8>,
    missing: usize,
    request: Request<S>,
}

/// Adds a part to a request, and answers it with the last part, or with the first failure.
fn add<S: Fetch>(gather: &Mutex<Option<Gather<S>>>, part: &Part, is_whole: bool, answer: Answer) {
    let mut state = gather.lock();
    // After a failure, the other parts have no request any more.
    let Some(Gather { bytes, missing, .. }) = state.as_mut() else { return };
    let from = match &answer {
        Answer::Ready(block) => block.get(part.bytes.clone()),
        _ => None,
    };
    if let Some(from) = from {
        bytes[part.at..][..from.len()].copy_from_slice(from);
        *missing -= from.len();
        if *missing > 0 {
            return;
        }
    }
    let ended = state.take();
    drop(state);
    let Some(Gather { bytes, missing, request }) = ended else { return };
    match answer {
        Answer::Ready(_) if missing == 0 => request.reply.answer(&bytes),
        Answer::Ready(_) => request.reply.fail(io::ErrorKind::UnexpectedEof.into()),
        Answer::Failed(error) => request.block_failed(is_whole, error),
        Answer::Retry(pause, error) => request.reply.retry_after(pause, error),
    }
}

/// A block that the source fetches.
struct Fetching {
    /// `None` if the block is not kept.
    read: Option<BlockRead>,
    waiter: Waiter,
}

impl Complete for Fetching {
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>) {
        let Self { read, waiter } = *self;
        match answer {
            Ok(bytes) => {
                let block = Bytes::copy_from_slice(bytes);
                if let Some(read) = read {
                    read.finish(&block);
                }
                waiter(Answer::Ready(block));
            }
            Err(error) => {
                if let Some(read) = read {
                    read.fail(&error);
                }
                waiter(Answer::Failed(error));
            }
        }
    }

    fn retry(self: Box<Self>, pause: Duration, error: io::Error) {
        let Self { read, waiter } = *self;
        if let Some(read) = read {
            read.retry(pause, &error);
        }
        waiter(Answer::Retry(pause, error));
    }
}

impl<S> fmt::Debug for Cached<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl fmt::Debug for Fetching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.read)
    }
}

fn rounded(block: u64) -> u64 {
    block.clamp(512, HUGE as u64).next_power_of_two()
}

/// The block of a source without a granularity.
const DEFAULT_BLOCK: u64 = 64 << 10;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_request_cover_it_block_by_block() {
        let blocks = Blocks { block: 512, most: 1, size: 1300 };
        let parts = |offset, len| -> Vec<_> {
            blocks.parts(offset, len).map(|part| (part.number, part.bytes, part.at)).collect()
        };
        assert_eq!(parts(0, 512), [(0, 0..512, 0)]);
        assert_eq!(parts(500, 700), [(0, 500..512, 0), (1, 0..512, 12), (2, 0..176, 524)]);
        assert_eq!(parts(1299, 1), [(2, 275..276, 0)]);
        assert_eq!(parts(700, 0), []);
        assert_eq!((blocks.place(1), blocks.place(2)), ((512, 512), (1024, 276)));
    }

    #[test]
    fn the_size_of_a_block_is_a_power_of_two() {
        let block = |bytes| Cached::new(super::super::Hole, 0).block(bytes).granularity();
        assert_eq!([0, 513, 4096, 65_537, u64::MAX].map(block), [512, 1024, 4096, 131_072, HUGE as u64]);
        assert_eq!(Cached::new(super::super::Hole, 0).granularity(), DEFAULT_BLOCK);
    }
}
