//! Scattered pieces as one slice: `cargo run --example quickstart`.

use pagestitch::source::FileSource;
use pagestitch::{Chunk, Error, Region, best_server};
use std::sync::Arc;

fn main() -> Result<(), Error> {
    // Pieces of all kinds, anywhere in memory and on disk, of any length.
    let heap: Vec<u8> = b"From the heap, ".to_vec();
    let shared: Arc<[u8]> = Arc::from(*b"from a shared buffer, ");
    let mapped = bytes::Bytes::from_static(b"from the program itself, ");
    let file = FileSource::open("/proc/self/exe")?;

    // A pool, or the server Eager where userfaultfd is denied.
    let server = best_server()?;
    println!("{server}");
    let region = Region::builder()
        .name("quickstart")
        .chunk(heap)
        .chunk(shared)
        .chunk(mapped)
        .chunk(Chunk::from(file).range(1..4)) // the letters ELF
        .chunk(Chunk::hole(1 << 30)) // a gigabyte without memory
        .chunk(b" and a gigabyte further on.".to_vec())
        .build(&server)?;

    // One contiguous slice. If a pool serves it, no byte has been copied yet.
    let bytes: &[u8] = region.as_slice();
    println!(
        "{} bytes at {:p}, {} pages filled",
        bytes.len(),
        bytes.as_ptr(),
        region.metrics().pages_installed()
    );

    // The touch of a byte then fills its page.
    let text = String::from_utf8_lossy(&bytes[..65]);
    println!("{text}{}", String::from_utf8_lossy(&bytes[bytes.len() - 27..]));
    assert_eq!(text, "From the heap, from a shared buffer, from the program itself, ELF");

    println!("\n{}", region.plan());
    Ok(())
}
