//! Any mix of chunks shows their bytes end to end, to any number of threads.

use crate::donated::pages_of;
use crate::shared::memfd_of;
use crate::{PAGE, pattern, touch};
use pagestitch::source::{FillMemfd, LazyMemfd, Memory, SharedFile};
use pagestitch::{Chunk, Pool, Region};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use proptest::prelude::*;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};

const SIZE: usize = 16 * PAGE;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Memory,
    Sealed,
    Shared,
    CopyOnWrite,
    Donated,
    Lazy,
    Read,
    Hole,
}

/// A chunk: its kind, its start in its source, and its length.
type Piece = (Kind, usize, usize);

fn piece() -> impl Strategy<Value = Piece> {
    use Kind::*;
    let kind = prop::sample::select(vec![Memory, Sealed, Shared, CopyOnWrite, Donated, Lazy, Read, Hole]);
    // Half of the chunks lie on page boundaries.
    let aligned = (0..8usize, 1..8usize).prop_map(|(start, pages)| (start * PAGE, pages * PAGE));
    let ragged = (0..SIZE / 2, 1..SIZE / 2);
    (kind, prop_oneof![aligned, ragged]).prop_map(|(kind, (start, bytes))| (kind, start, bytes))
}

struct Writer;

impl FillMemfd for Writer {
    fn fill(&self, memfd: &SharedFile, range: Range<u64>) -> io::Result<()> {
        memfd.file().write_all_at(&BYTES[range.start as usize..range.end as usize], range.start)
    }
}

static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(77, SIZE));

fn chunk_of((kind, start, bytes): Piece) -> (Chunk, Vec<u8>) {
    let range = start as u64..(start + bytes) as u64;
    let chunk = match kind {
        Kind::Memory => Chunk::from(Memory::from(BYTES.clone())),
        Kind::Sealed => Chunk::from(crate::zero_copy::memfd(&BYTES)),
        Kind::Shared => Chunk::from(memfd_of(&BYTES).0),
        Kind::CopyOnWrite => Chunk::copy_on_write(memfd_of(&BYTES).0),
        Kind::Donated => Chunk::from(pages_of(&BYTES)),
        Kind::Lazy => {
            let memfd = memfd_of(&vec![0; SIZE]).1;
            // Sparse again, because a lazy memfd does not fill the pages that it holds.
            memfd.set_len(0).unwrap();
            memfd.set_len(SIZE as u64).unwrap();
            Chunk::from(LazyMemfd::new(memfd.into(), Arc::new(Writer)).unwrap())
        }
        Kind::Read => Chunk::source(Arc::new(Scripted::new(SIZE as u64))),
        Kind::Hole => Chunk::hole(SIZE as u64),
    };
    let expected = match kind {
        Kind::Read => range.clone().map(byte_at).collect(),
        Kind::Hole => vec![0; bytes],
        _ => BYTES[start..start + bytes].to_vec(),
    };
    (chunk.range(range), expected)
}

proptest! {
    #[test]
    fn any_mix_of_chunks_is_its_bytes_end_to_end(
        pieces in prop::collection::vec(piece(), 1..12), threads in 1usize..9, aligned: bool, writable: bool,
    ) {
        let (chunks, expected): (Vec<_>, Vec<_>) = pieces.into_iter().map(chunk_of).unzip();
        let mut builder = Region::builder();
        if aligned {
            builder = builder.page_aligned();
        }
        if writable {
            builder = builder.writable();
        }
        let region = builder.chunks(chunks).build_shared(&Pool::builder().workers(2).start().unwrap()).unwrap();
        let base = region.as_ptr().addr().get();
        let places: Vec<_> = (0..expected.len()).map(|chunk| region.offset_of(chunk).unwrap() as usize).collect();
        scope(|scope| {
            for thread in 0..threads {
                let (places, expected) = (&places, &expected);
                scope.spawn(move || {
                    // Each thread begins elsewhere, and all touch everything.
                    for turn in 0..expected.len() {
                        let chunk = (turn + thread) % expected.len();
                        for byte in (0..expected[chunk].len()).step_by(509).chain([expected[chunk].len() - 1]) {
                            assert_eq!(touch(base + places[chunk] + byte), expected[chunk][byte], "chunk {chunk}, byte {byte}");
                        }
                    }
                });
            }
        });
        for (place, expected) in places.into_iter().zip(&expected) {
            let mut seen = vec![0; expected.len()];
            region.read_at(place as u64, &mut seen).unwrap();
            prop_assert!(seen == *expected);
        }
        let planned = region.plan().gathered_pages();
        let seen = region.close();
        prop_assert_eq!((seen.pages_poisoned, seen.pages_gathered), (0, planned));
    }
}
