//! Any chunks, any number of threads and each way to read: a region shows the bytes of its pieces
//! laid end to end.

use crate::pattern;
use crate::zero_copy::memfd;
use bytes::Bytes;
use pagestitch::source::{Fetch, FileSource, Memfd, Memory, Reply};
use pagestitch::{Chunk, ErrorKind, Pool, Region, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use proptest::prelude::*;
use std::io::Write;
use std::sync::{Arc, LazyLock};

/// The kind of a chunk.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Vec,
    Boxed,
    Arc,
    Bytes,
    Static,
    Owner,
    Shared,
    File,
    Memfd,
    MemfdInPlace,
    Hole,
    Own,
}

const KINDS: [Kind; 12] = {
    use Kind::{Arc, Boxed, Bytes, File, Hole, Memfd, MemfdInPlace, Own, Owner, Shared, Static, Vec};
    [Vec, Boxed, Arc, Bytes, Static, Owner, Shared, File, Memfd, MemfdInPlace, Hole, Own]
};

/// A chunk: its kind, its start in its source, and its length.
type Description = (Kind, usize, usize);

const SOURCE_BYTES: usize = 64 << 10;
static STATIC: LazyLock<&'static [u8]> = LazyLock::new(|| pattern(3, SOURCE_BYTES).leak());
static SHARED: LazyLock<Memory> = LazyLock::new(|| Memory::from(pattern(4, SOURCE_BYTES)));
static MEMFD: LazyLock<Memfd> = LazyLock::new(|| memfd(&pattern(6, SOURCE_BYTES)));
static FILE: LazyLock<Arc<FileSource>> = LazyLock::new(|| {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(5, SOURCE_BYTES)).unwrap();
    Arc::new(FileSource::open(file.path()).unwrap())
});

/// The chunk and its expected bytes.
fn make(&(kind, start, len): &Description) -> (Chunk, Vec<u8>) {
    let range = start as u64..(start + len) as u64;
    let part = |seed| pattern(seed, SOURCE_BYTES)[start..start + len].to_vec();
    let own = pattern((start * 31 + len) as u64, len);
    match kind {
        Kind::Vec => (own.clone().into(), own),
        Kind::Boxed => (own.clone().into_boxed_slice().into(), own),
        Kind::Arc => (Arc::<[u8]>::from(own.clone()).into(), own),
        Kind::Bytes => (Bytes::from(own.clone()).into(), own),
        Kind::Static => (Chunk::from(*STATIC).range(range), part(3)),
        Kind::Owner => (Memory::new(String::from_utf8_lossy(&own).into_owned()).into(), {
            String::from_utf8_lossy(&own).into_owned().into_bytes()
        }),
        Kind::Shared => (Chunk::from(SHARED.clone()).range(range), part(4)),
        Kind::File => (Chunk::from(Arc::clone(&FILE)).range(range), part(5)),
        // The chunks before it decide its place in a page, so that it is in place only now and
        // then.
        Kind::Memfd => (Chunk::from(MEMFD.clone()).range(range), part(6)),
        Kind::MemfdInPlace => {
            let start = start & !4095;
            let chunk = Chunk::from(MEMFD.clone()).range(start as u64..(start + len) as u64);
            (chunk, pattern(6, SOURCE_BYTES)[start..start + len].to_vec())
        }
        Kind::Hole => (Chunk::hole(len as u64), vec![0; len]),
        Kind::Own => {
            let source = Arc::new(Scripted::new(SOURCE_BYTES as u64));
            (Chunk::source(source).range(range.clone()), range.map(byte_at).collect())
        }
    }
}

fn descriptions() -> impl Strategy<Value = Vec<Description>> {
    // Some lengths are whole pages, so that the next chunk begins on a page.
    let whole_pages = (1usize..5).prop_map(|pages| pages * 4096);
    let len = prop_oneof![0usize..10, 10usize..300, 3000usize..20_000, whole_pages];
    prop::collection::vec((prop::sample::select(&KINDS[..]), 0usize..40_000, len), 1..60)
}

/// Offsets of 0..len in a random order, a few in each page.
fn shuffled(len: usize, seed: u64) -> Vec<usize> {
    let mut offsets: Vec<usize> = (0..len).step_by(1021).chain([len - 1]).collect();
    let random = pattern(seed, offsets.len() * 8);
    let mut keys = random.chunks_exact(8).map(|key| u64::from_le_bytes(key.try_into().unwrap()));
    offsets.sort_by_cached_key(|_| keys.next());
    offsets
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn a_region_shows_its_chunks_end_to_end(
        descriptions in descriptions(), threads in 1usize..=8, workers in 1usize..=3, seed in any::<u64>(),
    ) {
        let pool = Pool::builder().workers(workers).start().unwrap();
        let empty = descriptions.iter().position(|&(_, _, len)| len == 0);
        if let Some(index) = empty {
            let chunks = descriptions.iter().map(|description| make(description).0);
            let error = Region::builder().chunks(chunks).build(&pool).unwrap_err();
            prop_assert_eq!((error.kind(), error.chunk()), (ErrorKind::InvalidChunk, Some(index)));
        }
        let full: Vec<_> = descriptions.iter().filter(|(_, _, len)| *len > 0).collect();
        prop_assume!(!full.is_empty());
        let (chunks, bytes): (Vec<_>, Vec<_>) = full.into_iter().map(make).unzip();
        let expected = bytes.concat();
        let region = Region::builder().chunks(chunks.clone()).build(&pool).unwrap();
        prop_assert_eq!(region.len(), expected.len());
        scope(|scope| {
            for thread in 0..threads as u64 {
                let (region, expected) = (&region, &expected);
                scope.spawn(move || check(region, expected, seed ^ thread, thread % 4));
            }
        });
        prop_assert!(region.as_slice() == expected);
        drop(region);
        // A populate alone: the threads above mixed it with other ways.
        let region = Region::builder().chunks(chunks).build(&pool).unwrap();
        region.populate(..).unwrap();
        prop_assert_eq!(region.metrics().faults, 0);
        prop_assert!(region.as_slice() == expected);
        prop_assert_eq!(region.metrics().faults, 0, "all pages were filled");
    }

    #[test]
    fn a_region_shows_borrowed_memory(lens in prop::collection::vec(1usize..9000, 1..20), seed in any::<u64>()) {
        let pool = Pool::builder().workers(2).start().unwrap();
        let pieces: Vec<Vec<u8>> = lens.iter().enumerate().map(|(i, &len)| pattern(seed ^ i as u64, len)).collect();
        pagestitch::scope(|scope| {
            let builder = pieces.iter().fold(scope.region(), |builder, piece| builder.borrow(piece));
            let region = builder.build(&pool).unwrap();
            assert!(region.as_slice() == pieces.concat());
        });
    }
}

/// The number of cases. A guest without hardware virtualisation is slow and sets a lower one.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}

/// Reads everything in a random order, in one of four ways.
fn check(region: &Region, expected: &[u8], seed: u64, way: u64) {
    for offset in shuffled(expected.len(), seed) {
        let end = (offset + 5000).min(expected.len());
        let (from, to) = (offset as u64, end as u64);
        match way {
            0 => assert_eq!(region.as_slice()[offset], expected[offset], "byte {offset}"),
            1 => {
                let mut into = vec![0; end - offset];
                region.read_at(from, &mut into).unwrap();
                assert!(into == expected[offset..end], "read_at({offset})");
            }
            2 => {
                region.populate(from..to).unwrap();
                assert!(region.as_slice()[offset..end] == expected[offset..end], "populate({offset}..{end})");
            }
            _ => {
                assert_eq!(crate::touch(region.as_ptr().expose_provenance().get() + offset), expected[offset])
            }
        }
    }
}

#[test]
fn a_writable_region_keeps_writes_and_leaves_the_source_alone() {
    let pool = Pool::new().unwrap();
    let memory = Memory::from(pattern(9, 20_000));
    let mut region = Region::builder().writable().chunk(memory.clone()).build(&pool).unwrap();
    region.as_mut_slice().unwrap()[12_345] = 0;
    let untouched = Region::builder().chunk(memory).build(&pool).unwrap();
    let (mut expected, seen) = (pattern(9, 20_000), untouched.as_slice());
    assert!(seen == expected);
    expected[12_345] = 0;
    assert!(region.as_slice() == expected);
}

/// A source whose bytes tell which of its two traits was called.
struct Both;

impl Source for Both {
    fn size(&self) -> u64 {
        20_000
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(1);
        Ok(())
    }
}

impl Fetch for Both {
    fn size(&self) -> u64 {
        10_000
    }

    fn fetch(&self, _offset: u64, reply: Reply) {
        let bytes = vec![2; reply.len()];
        reply.answer(&bytes);
    }
}

#[test]
fn an_arc_that_is_source_and_fetch_is_read_as_each_chunk_declares() {
    let both = Arc::new(Both);
    let chunks = || (Chunk::source(Arc::clone(&both)), Chunk::fetch(Arc::clone(&both)));
    let expected = [vec![1; 20_000], vec![2; 10_000]];
    let (read, fetched) = chunks();
    let region = Region::builder().chunk(read).chunk(fetched).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == expected.concat());
    let (read, fetched) = chunks();
    let region = Region::builder().chunk(fetched).chunk(read).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice()[..10_000] == expected[1] && region.as_slice()[10_000..] == expected[0]);
}

#[test]
fn a_read_only_region_cannot_be_written() {
    let mut region = Region::builder().chunk(vec![1u8]).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_mut_slice().is_none());
}

#[test]
fn a_range_outside_the_region_is_an_error_that_names_the_range() {
    let region = Region::builder().name("small").chunk(vec![1u8; 10]).build(&Pool::new().unwrap()).unwrap();
    let error = region.read_at(5, &mut [0; 6]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    for result in [region.populate(11..), region.populate(..=10), region.read_at(u64::MAX, &mut [0; 2])] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    region.populate(10..).unwrap();
    region.read_at(10, &mut []).unwrap();
}
