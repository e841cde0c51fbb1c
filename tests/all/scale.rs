//! A region costs what is used of it, not what it spans.

use pagestitch::source::Memory;
use pagestitch::{Chunk, Pool, Region};
use std::fs;

#[test]
fn a_tebibyte_of_holes_is_reserved_served_and_dropped() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let region = Region::builder()
        .chunk(vec![1u8; 100])
        .chunk(Chunk::hole(1 << 40))
        .chunk(vec![2u8; 100])
        .build(&pool)
        .unwrap();
    let before = resident_kib();
    let bytes = region.as_slice();
    assert_eq!((bytes[0], bytes[1 << 39], bytes[bytes.len() - 1]), (1, 0, 2));
    assert!(resident_kib() < before + 1024, "a few pages were touched");
}

#[test]
fn many_chunks_of_one_memory_cost_at_most_32_bytes_each() {
    const CHUNKS: u64 = 1_000_000;
    let memory = Memory::from((0..1 << 20).map(|i| (i % 251) as u8 | 1).collect::<Vec<u8>>());
    let before = resident_kib();
    let chunks = (0..CHUNKS)
        .map(|i| Chunk::from(memory.clone()).range(i * 7919 % 1_000_000..i * 7919 % 1_000_000 + 37));
    let region =
        Region::builder().chunks(chunks).build(&Pool::builder().workers(1).start().unwrap()).unwrap();
    let each = (resident_kib() - before) as f64 * 1024.0 / CHUNKS as f64;
    assert_eq!(region.len() as u64, CHUNKS * 37);
    for chunk in (0..CHUNKS).step_by(9973) {
        let source = (chunk * 7919 % 1_000_000 + 5) as usize;
        assert_eq!(region.as_slice()[(chunk * 37 + 5) as usize], (source % 251) as u8 | 1);
    }
    // A growing Vec may hold twice what it uses; the capacity beyond is not resident, as it was never written.
    assert!(each <= 32.0, "{each} bytes a chunk");
}

fn resident_kib() -> i64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
