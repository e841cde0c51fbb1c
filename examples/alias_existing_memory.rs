//! "I have non-contiguous chunks of memory. Can I make them appear contiguous, at another address,
//! without a copy?" `cargo run --example alias_existing_memory`. The answers, one after the other:
//!
//! 1. Shared memory can be mapped a second time, even without its descriptor.
//! 2. Private memory can be mapped through its frames, which are pinned, if /dev/mem permits it.
//! 3. The pages of memory that you can give up can be moved.
//! 4. All other memory is copied once, when it is touched.

use pagestitch::source::{Alias, Memory, Pages, Physical, SharedFile, UnsealedMemfd};
use pagestitch::{Access, BestServer, Region, SharedRegion, best_server};
use std::error::Error;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

const BYTES: usize = 4 * 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let server = best_server()?;
    shared_memory(&server)?;
    let mut private = Pages::new(BYTES)?;
    private.fill(b'p');
    if let Err(why) = through_its_frames(&mut private, &server) {
        println!("2. private memory, through its frames: {why}");
    }
    match Region::builder().chunk(private).require_zero_copy().build(&server) {
        Ok(region) => {
            assert_eq!(region.as_slice()[BYTES - 1], b'p');
            println!("3. private memory, donated: {} bytes copied", region.close().bytes_copied);
        }
        // Without userfaultfd, donated pages are copied.
        Err(why) => println!("3. private memory, donated: {why}"),
    }
    let region = Region::builder().chunk(Memory::from(vec![b'c'; BYTES])).build(&server)?;
    assert_eq!(region.as_slice()[BYTES - 1], b'c');
    println!("4. any memory, copied on first touch: {} bytes copied", region.close().bytes_copied);
    Ok(())
}

#[expect(unsafe_code, reason = "a second way to memory")]
fn shared_memory(server: &BestServer) -> Result<(), Box<dyn Error>> {
    // A shared mapping somewhere in the program, without its descriptor.
    let memfd = UnsealedMemfd::create("existing", BYTES as u64)?;
    memfd.file().write_all_at(&[b's'; BYTES], 0)?;
    let file = SharedFile::try_from(&memfd)?;
    let existing: SharedRegion = Region::builder().chunk(file).build_shared(server)?;
    drop(memfd);

    // SAFETY: no reference to the bytes of the mapping exists.
    let alias = unsafe { Alias::of(existing.as_ptr(), BYTES) }?;
    let region = Region::builder().chunk(alias).require_zero_copy().build_shared(server)?;
    assert_eq!(region.view().touch(BYTES - 1), b's');
    println!("1. shared memory, mapped a second time: {} bytes copied", region.close().bytes_copied);
    Ok(())
}

#[expect(unsafe_code, reason = "a second way to memory")]
fn through_its_frames(private: &mut Pages, server: &BestServer) -> Result<(), Box<dyn Error>> {
    let start = NonNull::from(&mut private[0]);
    // SAFETY: the memory of `private` stays in place longer than the region, and is only read
    // meanwhile.
    let frames = unsafe { Physical::own_memory(start, BYTES, Access::ReadOnly) }?;
    let region = Region::builder().chunks(frames).require_zero_copy().build_shared(server)?;
    assert_eq!(region.view().touch(BYTES - 1), b'p');
    println!("2. private memory, through its frames: {} bytes copied", region.close().bytes_copied);
    Ok(())
}
