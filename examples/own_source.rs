//! A source of your own: a sparse object store whose blocks are fetched when their pages are
//! touched. `cargo run --example own_source`.

use pagestitch::{Chunk, Error, OnFailure, Pool, Region, Source};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const BLOCK: u64 = 64 << 10;

/// An object of numbered blocks, like in a remote store. A block that was never stored is lost, so
/// a read of it is an error, not zeros.
struct ObjectStore {
    blocks: BTreeMap<u64, Vec<u8>>,
    size: u64,
    fetched: AtomicU64,
}

impl ObjectStore {
    fn with_blocks(count: u64, missing: Option<u64>) -> Self {
        let kept = (0..count).filter(|&index| Some(index) != missing);
        let blocks = kept.map(|index| (index, vec![index as u8 + 1; BLOCK as usize])).collect();
        Self { blocks, size: count * BLOCK, fetched: AtomicU64::new(0) }
    }
}

impl Source for ObjectStore {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let (index, within) = (offset / BLOCK, (offset % BLOCK) as usize);
            let block =
                self.blocks.get(&index).ok_or_else(|| io::Error::other(format!("block {index} is lost")))?;
            let len = into.len().min(block.len() - within);
            let (head, tail) = into.split_at_mut(len);
            head.copy_from_slice(&block[within..within + len]);
            self.fetched.fetch_add(1, Ordering::Relaxed);
            (into, offset) = (tail, offset + len as u64);
        }
        Ok(())
    }

    fn name(&self) -> String {
        String::from("object store")
    }
}

fn main() -> Result<(), Error> {
    let store = Arc::new(ObjectStore::with_blocks(100, Some(7)));
    // Where userfaultfd is denied, the build fills the region instead of four workers.
    let server = Pool::builder().workers(4).name("store").start_or_eager()?;
    // A header in front of the store, so that its blocks start inside pages, which is no problem.
    let region = Region::builder()
        .name("object")
        .chunk(b"HEADER".to_vec())
        // Poison is the default of a pool. Without it, a lost block would fail a build that fills.
        .chunk(Chunk::source(Arc::clone(&store)).on_failure(OnFailure::Poison))
        .build(&server)?;

    let at = 6 + 42 * BLOCK as usize + 1000;
    println!("byte {at} of {}: {}", region.len(), region.as_slice()[at]);
    println!("blocks fetched so far: {}", store.fetched.load(Ordering::Relaxed));

    // A read of a lost block returns an error. A touch of it raises SIGBUS, and never sees zeros.
    let error = region.read_at(6 + 7 * BLOCK, &mut [0; 10]).expect_err("block 7 is lost");
    println!("as expected: {error}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_keeps_the_contract_of_a_source() {
        let expected: Vec<u8> = (0..3u8).flat_map(|index| vec![index + 1; BLOCK as usize]).collect();
        pagestitch_testkit::conformance::check(Arc::new(ObjectStore::with_blocks(3, None)), &expected);
    }
}
