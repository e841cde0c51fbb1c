//! A region without a copy: pages of a sealed memfd, in another order, as one slice.
//! `cargo run --example sealed_memfd`.

use pagestitch::source::{Memfd, UnsealedMemfd};
use pagestitch::{Chunk, Region, best_server};
use std::error::Error;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    // A memfd of ten pages, filled and sealed. No process can change it from now on, so a slice of
    // it is safe.
    let unsealed = UnsealedMemfd::create("pages", 10 * PAGE)?;
    for page in 0..10 {
        unsealed.file().write_all_at(format!("page {page} ").as_bytes(), page * PAGE)?;
    }
    let memfd = Memfd::from(unsealed.seal()?);

    // The same pages backwards. If one of them needed a copy, the build would fail with its name
    // and the reason.
    let backwards =
        (0..10).rev().map(|page| Chunk::from(memfd.clone()).range(page * PAGE..(page + 1) * PAGE));
    let region =
        Region::builder().name("backwards").chunks(backwards).require_zero_copy().build(&best_server()?)?;

    for page in region.as_slice().chunks(PAGE as usize) {
        print!("{}", String::from_utf8_lossy(&page[..7]));
    }
    println!("\n\n{}", region.plan());
    let metrics = region.close();
    println!(
        "{} pages in place, {} faults, {} bytes copied",
        metrics.pages_in_place, metrics.faults, metrics.bytes_copied
    );
    assert_eq!((metrics.pages_in_place, metrics.faults, metrics.bytes_copied), (10, 0, 0));
    Ok(())
}
