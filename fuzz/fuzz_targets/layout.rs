//! Chunks of any length, at any offset of any source, read as the same list of bytes.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pagestitch::{Chunk, Inline, Region};
use std::sync::Arc;

#[derive(Debug, Arbitrary)]
struct Piece {
    source: u8,
    start: u16,
    bytes: u16,
}

#[derive(Debug, Arbitrary)]
struct Case {
    pieces: Vec<Piece>,
    aligned: bool,
    reads: Vec<(u32, u16)>,
}

fuzz_target!(|case: Case| {
    let sources: Vec<Arc<[u8]>> = (1..4_u8)
        .map(|source| (0..70_000_u32).map(|at| (at / 7) as u8 ^ source.wrapping_mul(83)).collect())
        .collect();
    let mut model: Vec<u8> = Vec::new();
    let mut offsets = Vec::new();
    let mut builder = Region::builder();
    if case.aligned {
        builder = builder.page_aligned();
    }
    for piece in case.pieces.iter().take(200).filter(|piece| piece.bytes > 0) {
        if case.aligned {
            model.resize(model.len().next_multiple_of(4096), 0);
        }
        offsets.push(model.len() as u64);
        let (start, bytes) = (piece.start as usize % 4000, piece.bytes as usize);
        match sources.get(piece.source as usize % 4) {
            Some(source) => {
                model.extend(&source[start..start + bytes]);
                builder = builder
                    .chunk(Chunk::from(Arc::clone(source)).range(start as u64..(start + bytes) as u64));
            }
            None => {
                model.resize(model.len() + bytes, 0);
                builder = builder.chunk(Chunk::hole(bytes as u64));
            }
        }
    }
    let Ok(region) = builder.build(Inline) else { return assert!(model.is_empty()) };
    assert_eq!(region.len(), model.len());
    for (chunk, &offset) in offsets.iter().enumerate() {
        assert_eq!((region.offset_of(chunk), region.chunk_at(offset)), (Some(offset), Some(chunk)));
    }
    for &(at, bytes) in case.reads.iter().take(20) {
        let at = at as usize % model.len();
        let end = model.len().min(at + bytes as usize);
        let mut read = vec![0; end - at];
        region.read_at(at as u64, &mut read).expect("memory does not fail");
        assert!(read == model[at..end]);
        assert!(region.as_slice()[at..end] == model[at..end]);
    }
    assert!(region.read_at(model.len() as u64, &mut [0]).is_err());
});
