//! The cost of building a region, and of locating a byte.

use crate::case::{Case, Options, Sample};
use pagestitch::source::Memory;
use pagestitch::{Chunk, Pool, Region};
use std::fs;
use std::hint::black_box;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let most: u64 = if options.quick { 10_000 } else { 10_000_000 };
    let pool = Pool::builder().workers(1).start().expect("a pool");
    let shared = Memory::from(vec![1u8; 1 << 20]);
    let mut cases = Vec::new();
    let sizes = std::iter::successors(Some(1000), |chunks| Some(chunks * 10));
    for chunks in sizes.take_while(|&chunks| chunks <= most) {
        let build = {
            let (pool, shared) = (pool.clone(), shared.clone());
            move || of_parts(&shared, chunks, &pool)
        };
        let locate = build.clone();
        let buffers = pool.clone();
        let mut case = |system: &'static str, run: Box<dyn FnMut(u64) -> Sample>| {
            let case = Case::new(system, run).at(chunks.to_string()).chunks_of(PART as usize);
            cases.push(case.against_point("1000"));
        };
        case(
            "parts of one memory",
            Box::new(move |_| {
                let before = resident();
                let mut after = 0;
                let sample = Sample::of(chunks as usize, (chunks * PART) as usize, || {
                    let region = build();
                    after = resident();
                    region
                });
                Sample { bytes_each: Some((after - before) as f64 / chunks as f64), ..sample }
            }),
        );
        case(
            "heap buffers",
            Box::new(move |_| {
                // The buffers are made outside the measurement, which covers the region alone.
                let own: Vec<Vec<u8>> = (0..chunks).map(|_| vec![1; PART as usize]).collect();
                Sample::of(chunks as usize, (chunks * PART) as usize, || {
                    Region::builder().chunks(own).build(&buffers).expect("a region")
                })
            }),
        );
        case(
            "locate",
            Box::new(move |seed| {
                let region = locate();
                let mut random = fastrand::Rng::with_seed(seed);
                let offsets: Vec<u64> = (0..LOOKUPS).map(|_| random.u64(..chunks * PART)).collect();
                Sample::of(LOOKUPS, 0, || {
                    black_box(
                        offsets.iter().map(|&offset| region.chunk_at(offset).unwrap_or(0)).sum::<usize>(),
                    )
                })
            }),
        );
    }
    cases
}

fn of_parts(memory: &Memory, chunks: u64, pool: &Pool) -> Region {
    let part = |i: u64| {
        let start = i * 7919 % 1_000_000;
        Chunk::from(memory.clone()).range(start..start + PART)
    };
    Region::builder().chunks((0..chunks).map(part)).build(pool).expect("a region")
}

/// The resident bytes of this process.
fn resident() -> i64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok()).unwrap_or(0) * 4096
}

const PART: u64 = 48;
const LOOKUPS: usize = 100_000;
