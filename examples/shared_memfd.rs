//! One memory with several views: a memfd mapped into two regions, and written through both.
//! `cargo run --example shared_memfd`.

use pagestitch::source::{SharedFile, UnsealedMemfd};
use pagestitch::{Chunk, Region, best_server};
use std::error::Error;
use std::sync::Arc;

const PAGE: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let memfd = UnsealedMemfd::create("blackboard", 4 * PAGE)?;
    let shared = Arc::new(SharedFile::try_from(&memfd)?);
    let page = |page: u64| Chunk::from(Arc::clone(&shared)).range(page * PAGE..(page + 1) * PAGE);

    // Other processes may change these bytes, so there is no slice of them: the region is a shared
    // one.
    let server = best_server()?;
    let build = |order: [u64; 4]| {
        Region::builder().chunks(order.map(page)).writable().require_zero_copy().build_shared(&server)
    };
    let (forwards, backwards) = (build([0, 1, 2, 3])?, build([3, 2, 1, 0])?);

    forwards.write_at(3 * PAGE, b"written at the end of one")?;
    let mut seen = [0; 25];
    backwards.read_at(0, &mut seen)?;
    println!("{}, read at the start of the other", String::from_utf8_lossy(&seen));
    assert_eq!(&seen, b"written at the end of one");
    assert_eq!(forwards.close().bytes_copied + backwards.close().bytes_copied, 0);
    Ok(())
}
