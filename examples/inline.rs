//! A region without a serving thread: the thread that touches a page fills it.
//! `cargo run --release --example inline`.

use pagestitch::source::Memory;
use pagestitch::{Chunk, Error, Inline, Pool, Readahead, Region};
use std::hint::black_box;
use std::time::Instant;

const PAGE: usize = 4096;
const PAGES: usize = 2000;

fn main() -> Result<(), Error> {
    // Records of odd sizes, from heap buffers.
    let records: Vec<Memory> =
        (0..PAGES).map(|i| Memory::from(vec![i as u8 | 1; PAGE - 100 + i % 200])).collect();
    let chunks = || records.iter().map(|record| Chunk::from(record.clone()));

    let inline = Region::builder().chunks(chunks()).build(Inline)?;
    let pool = Pool::new()?;
    let pooled = Region::builder().chunks(chunks()).readahead(Readahead::None).build(&pool)?;

    for (name, region) in [("inline", &inline), ("a pool", &pooled)] {
        let started = Instant::now();
        // All pages, in an order that readahead cannot predict.
        for i in 0..PAGES - 100 {
            black_box(region.as_slice()[i * 7919 % (PAGES - 100) * PAGE]);
        }
        let each = started.elapsed() / (PAGES as u32 - 100);
        println!("{name}: {each:?} a first touch, {} faults", region.metrics().faults);
    }

    // A page must be present before a system call reads it, because the kernel cannot call our
    // signal handler for it.
    assert!(!inline.serves_system_calls());
    inline.populate(..)?;
    println!("the same bytes: {}", inline.as_slice() == pooled.as_slice());
    Ok(())
}
