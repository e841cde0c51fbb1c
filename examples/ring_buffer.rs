//! A ring without a seam: one memfd, mapped twice in a row. `cargo run --example ring_buffer`.
//!
//! A write beyond the end appears at the start, so no record is split.

use pagestitch::source::{SharedFile, UnsealedMemfd};
use pagestitch::{Region, SharedRegion, best_server};
use std::error::Error;
use std::sync::Arc;

const CAPACITY: u64 = 2 * 4096;

struct Ring {
    bytes: SharedRegion,
    head: u64,
    tail: u64,
}

impl Ring {
    fn new() -> Result<Self, Box<dyn Error>> {
        let memfd = UnsealedMemfd::create("ring", CAPACITY)?;
        let shared = Arc::new(SharedFile::try_from(&memfd)?);
        let twice = Region::builder().chunk(Arc::clone(&shared)).chunk(shared).writable().require_zero_copy();
        Ok(Self { bytes: twice.build_shared(&best_server()?)?, head: 0, tail: 0 })
    }

    /// Writes a record in one piece, even across the end of the memory. Returns false if the ring
    /// is full.
    fn push(&mut self, record: &[u8]) -> Result<bool, pagestitch::Error> {
        if self.head - self.tail + record.len() as u64 > CAPACITY {
            return Ok(false);
        }
        self.bytes.write_at(self.head % CAPACITY, record)?;
        self.head += record.len() as u64;
        Ok(true)
    }

    fn pop(&mut self, record: &mut [u8]) -> Result<bool, pagestitch::Error> {
        if self.tail + record.len() as u64 > self.head {
            return Ok(false);
        }
        self.bytes.read_at(self.tail % CAPACITY, record)?;
        self.tail += record.len() as u64;
        Ok(true)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut ring = Ring::new()?;
    let mut seams = 0;
    for number in 0..100_000_u64 {
        // 24 does not divide the page size, so some records cross the end.
        let record = [number, !number, number.rotate_left(17)].map(u64::to_le_bytes).concat();
        seams += u64::from(ring.head % CAPACITY + 24 > CAPACITY);
        assert!(ring.push(&record)?);
        let mut seen = [0; 24];
        assert!(ring.pop(&mut seen)?);
        assert_eq!(seen, *record);
    }
    println!("100,000 records through {CAPACITY} bytes, {seams} of them across the seam, none of them split");
    assert_eq!(ring.bytes.close().faults, 0);
    Ok(())
}
