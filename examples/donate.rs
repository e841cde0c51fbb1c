//! Donated memory is not copied, because its pages move. `cargo run --release --example donate`.
//!
//! Four buffers of 16 MiB become one slice of 64 MiB in the same page frames.

use pagestitch::source::Pages;
use pagestitch::{Pool, Region};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut buffers = Vec::new();
    for number in 1..=4_u8 {
        let mut pages = Pages::new(16 << 20)?; // page-aligned, in huge pages if the system has them
        pages.fill(number);
        buffers.push(pages);
    }

    let region = Region::builder().chunks(buffers).writable().require_zero_copy().build(&Pool::new()?)?;
    println!("{}", region.plan());
    let sum: u64 = region.as_slice().iter().map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, (1 + 2 + 3 + 4) << 24);

    let seen = region.close();
    println!(
        "{} pages moved on {} faults ({} when the region was built), {} bytes copied",
        seen.pages_moved, seen.faults, seen.pages_in_place, seen.bytes_copied
    );
    assert_eq!(seen.bytes_copied, 0);
    Ok(())
}
