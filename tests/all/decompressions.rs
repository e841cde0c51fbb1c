//! The work that a region asks of a source in compressed blocks: a block costs the same for each
//! byte of it that is read.

use crate::PAGE;
use pagestitch::source::{Cached, Fetch, FileSource, Reply};
use pagestitch::{Builder, Chunk, Pool, Readahead, Region, Source};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// A file of compressed blocks. A read decompresses each block that it overlaps.
struct Compressed {
    /// The number of decompressions of each block.
    decompressed: Vec<AtomicU64>,
}

impl Default for Compressed {
    fn default() -> Self {
        Self { decompressed: (0..BLOCKS).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Compressed {
    fn each(&self) -> impl Iterator<Item = u64> {
        self.decompressed.iter().map(|times| times.load(Ordering::SeqCst))
    }

    fn decompressions(&self) -> u64 {
        self.each().sum()
    }
}

impl Source for Compressed {
    fn size(&self) -> u64 {
        (BLOCKS * BLOCK) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let (mut at, mut rest) = (offset as usize, into);
        while !rest.is_empty() {
            self.decompressed[at / BLOCK].fetch_add(1, Ordering::SeqCst);
            let (now, later) = rest.split_at_mut(rest.len().min(BLOCK - at % BLOCK));
            now.fill(byte_of(at / BLOCK));
            (at, rest) = (at + now.len(), later);
        }
        Ok(())
    }

    fn granularity(&self) -> u64 {
        BLOCK as u64
    }
}

/// The byte that fills a block; never zero.
fn byte_of(block: usize) -> u8 {
    (block % 255) as u8 + 1
}

/// Different blocks in a random order.
fn random_blocks() -> impl Iterator<Item = usize> {
    (0..READ).map(|i| i * 1_597 % BLOCKS)
}

/// The bytes of a block.
fn bytes_of(block: usize) -> Range<usize> {
    block * BLOCK..(block + 1) * BLOCK
}

/// Builds a region of all blocks, with or without a cache.
fn build(builder: Builder, source: &Arc<Compressed>, is_cached: bool) -> Region {
    let chunk = match is_cached {
        true => Chunk::source(Arc::new(Cached::new(Arc::clone(source), 16 << 20))),
        false => Chunk::source(Arc::clone(source)),
    };
    builder.chunk(chunk).build(&Pool::new().unwrap()).unwrap()
}

fn assert_block(region: &Region, offset: usize, block: usize) {
    let bytes = &region.as_slice()[offset + block * BLOCK..][..BLOCK];
    assert!(*bytes == [byte_of(block); BLOCK], "block {block}");
}

#[test]
fn random_blocks_are_decompressed_once() {
    for is_cached in [false, true] {
        let source = Arc::<Compressed>::default();
        let region = build(Region::builder().readahead(Readahead::None), &source, is_cached);
        random_blocks().for_each(|block| assert_block(&region, 0, block));
        assert_eq!(source.decompressions(), READ as u64, "cached: {is_cached}");
        assert_eq!(region.metrics().faults, READ as u64, "one fault a block, cached: {is_cached}");
    }
}

/// The blocks that are filled ahead are decompressed for nothing, if their reader never comes. Their number
/// depends on the time that faults take: 2 MiB are filled once their faults have cost as much as that.
#[test]
fn readahead_decompresses_no_block_twice() {
    for is_cached in [false, true] {
        let source = Arc::<Compressed>::default();
        let region = build(Region::builder(), &source, is_cached);
        random_blocks().for_each(|block| assert_block(&region, 0, block));
        println!("{} decompressions with readahead, cached: {is_cached}", source.decompressions());
        assert!(source.each().all(|times| times <= 1), "cached: {is_cached}");
        assert!(random_blocks().all(|block| source.each().nth(block) == Some(1)), "cached: {is_cached}");
    }
}

#[test]
fn a_byte_of_a_block_costs_as_much_as_the_block() {
    let source = Arc::<Compressed>::default();
    let region = build(Region::builder().readahead(Readahead::None), &source, false);
    for (step, block) in random_blocks().enumerate() {
        let at = bytes_of(block).start + step * 401 % BLOCK;
        assert_eq!(region.as_slice()[at], byte_of(block));
    }
    random_blocks().for_each(|block| assert_block(&region, 0, block));
    assert_eq!(source.decompressions(), READ as u64);
}

#[test]
fn threads_that_read_the_same_blocks_decompress_them_once() {
    let source = Arc::<Compressed>::default();
    let region = build(Region::builder().readahead(Readahead::None), &source, false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| random_blocks().for_each(|block| assert_block(&region, 0, block)));
        }
    });
    assert_eq!(source.decompressions(), READ as u64);
}

#[test]
fn populate_decompresses_each_block_once() {
    let source = Arc::<Compressed>::default();
    let region = build(Region::builder(), &source, false);
    for block in random_blocks() {
        let Range { start, end } = bytes_of(block);
        region.populate(start as u64..end as u64).unwrap();
    }
    assert_eq!(source.decompressions(), READ as u64);
}

/// Two blocks meet in the pages at the ends of a block. Such a page is filled alone, from both. With a
/// cache each block is decompressed once: the 200 blocks, and their neighbours.
#[test]
fn blocks_that_end_inside_pages_cost_their_neighbours_too() {
    const BEFORE: usize = PAGE / 2;
    for (is_cached, most) in [(true, 3), (false, 5)] {
        let source = Arc::<Compressed>::default();
        let builder = Region::builder().readahead(Readahead::None).chunk(vec![7u8; BEFORE]);
        let region = build(builder, &source, is_cached);
        random_blocks().for_each(|block| assert_block(&region, BEFORE, block));
        let seen = source.decompressions();
        println!("{seen} decompressions of blocks that end inside pages, cached: {is_cached}");
        assert!(seen <= READ as u64 * most, "{seen}, cached: {is_cached}");
    }
}

/// A chunk for each block, of a source of its own, with an end inside a page.
#[test]
fn blocks_with_padding_behind_them_are_decompressed_once() {
    const BYTES: usize = BLOCK - 500;
    for readahead in [Readahead::None, Readahead::Adaptive] {
        let blocks: Vec<_> = (0..BLOCKS / 4).map(|_| Arc::<Compressed>::default()).collect();
        let chunks = blocks.iter().map(|block| Chunk::source(Arc::clone(block)).range(..BYTES as u64));
        let builder = Region::builder().readahead(readahead).page_aligned().chunks(chunks);
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        let read = || random_blocks().map(|block| block % blocks.len());
        for block in read() {
            let bytes = &region.as_slice()[block * BLOCK..][..BLOCK];
            assert!(bytes[..BYTES].iter().all(|&byte| byte == 1) && bytes[BYTES..] == [0; BLOCK - BYTES]);
        }
        let seen: u64 = blocks.iter().map(|block| block.decompressions()).sum();
        println!("{seen} decompressions of blocks with padding behind them, {readahead:?}");
        if readahead == Readahead::None {
            assert_eq!(seen, read().collect::<BTreeSet<_>>().len() as u64);
        }
        region.populate(..).unwrap();
        assert!(blocks.iter().all(|block| block.decompressions() == 1));
    }
}

/// So many bytes `byte`, in units of 64 KiB.
struct Units(u64, u8);

impl Source for Units {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(self.1);
        Ok(())
    }

    fn granularity(&self) -> u64 {
        BLOCK as u64
    }
}

impl Fetch for Units {
    fn size(&self) -> u64 {
        self.0
    }

    fn fetch(&self, _: u64, reply: Reply) {
        // A request for less than a page is a second one for the same bytes.
        assert!(reply.len() >= PAGE, "{} bytes", reply.len());
        let bytes = vec![self.1; reply.len()];
        reply.answer(&bytes);
    }

    fn granularity(&self) -> u64 {
        BLOCK as u64
    }
}

/// A chunk that ends with a page says nothing of the next page, which ends another chunk.
#[test]
fn a_chunk_that_ends_inside_a_page_has_its_bytes_whatever_is_before_it() {
    let file = || {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 4 * PAGE]).unwrap();
        Chunk::from(Arc::new(FileSource::open(file.path()).unwrap()))
    };
    let units = |bytes, byte| Chunk::source(Arc::new(Units(bytes, byte)));
    for before in [file(), units(4 * PAGE as u64, 1)] {
        for builder in [Region::builder(), Region::builder().page_aligned()] {
            let builder = builder.chunk(before.clone()).chunk(units(100, 2));
            let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
            region.populate(..).unwrap();
            let mut read = [0; 100];
            region.read_at(4 * PAGE as u64, &mut read).unwrap();
            assert_eq!(read, [2; 100]);
        }
    }
    let region = Region::builder().chunk(units(5 * PAGE as u64 + 700, 1));
    let mut region = region.build(&Pool::new().unwrap()).unwrap();
    region.replace(5 * PAGE as u64..5 * PAGE as u64 + 700, vec![9u8; 700]).unwrap();
    region.populate(..).unwrap();
    assert!(region[5 * PAGE..] == [9; 700] && region[..5 * PAGE].iter().all(|&byte| byte == 1));
}

/// A reply has whole pages, so the last page of the chunk is not fetched with the others.
#[test]
fn a_fetch_of_a_chunk_that_ends_inside_a_page_is_one_request() {
    let chunk = Chunk::fetch(Arc::new(Units(5 * PAGE as u64 + 700, 7)));
    let region = Region::builder().chunk(chunk).build(&Pool::new().unwrap()).unwrap();
    assert!(region[..5 * PAGE].iter().all(|&byte| byte == 7));
}

const BLOCK: usize = 64 << 10;
const BLOCKS: usize = 4096;
const READ: usize = 200;
