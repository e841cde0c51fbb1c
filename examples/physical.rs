//! Physical memory as part of a region: `cargo run --example physical -- 0x8000000+65536`, as root,
//! for a range that was reserved at boot (`memmap=16M$0x8000000`); or the memory of a device:
//! `cargo run --example physical -- /sys/bus/pci/devices/0000:00:04.0/resource2`.
//!
//! Without an argument it reads the ROM of the first mebibyte, or prints the obstacle and its
//! remedy.

use pagestitch::source::{Caching, Physical, PhysicalError};
use pagestitch::{Access, Chunk, Pool, Region};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let what = std::env::args().nth(1).unwrap_or_else(|| String::from("0xf0000+65536"));
    let physical = match open(&what)? {
        Ok(physical) => physical,
        Err(refused) => {
            println!("{refused}");
            return Ok(());
        }
    };
    // A header before it, on a page of its own, so that one range of addresses holds heap memory
    // and physical memory.
    let header = Chunk::from(b"what is in ".to_vec());
    let builder = Region::builder().name("physical").page_aligned().chunk(header).chunk(physical);
    let region = builder.build_shared(&Pool::new()?)?;
    println!("{}", region.plan());
    let mut start = [0; 16];
    region.read_at(region.offset_of(1).expect("two chunks"), &mut start)?;
    println!("{what} begins with {start:02x?}");
    Ok(())
}

#[expect(unsafe_code, reason = "physical memory")]
fn open(what: &str) -> Result<Result<Physical, PhysicalError>, Box<dyn Error>> {
    if what.starts_with('/') {
        // SAFETY: the caller of this example vouches that the memory of the device can be read.
        return Ok(unsafe { Physical::pci_resource(what, Access::ReadOnly, Caching::Uncached) });
    }
    let (start, bytes) = what.split_once('+').ok_or("say 0xADDRESS+BYTES, or a PCI resource's path")?;
    let start = start.strip_prefix("0x").ok_or("an address begins with 0x")?;
    let (start, bytes) = (u64::from_str_radix(start, 16)?, bytes.parse::<u64>()?);
    let end = start.checked_add(bytes).ok_or("it ends past 2^64")?;
    // SAFETY: the caller of this example vouches that the range of physical memory can be read.
    Ok(unsafe { Physical::dev_mem(start..end, Access::ReadOnly, Caching::Cached) })
}
