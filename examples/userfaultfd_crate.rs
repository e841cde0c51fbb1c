//! Memory that the program registers with the `userfaultfd` crate, served by a pool in place of the
//! program's own handler. `cargo run --example userfaultfd_crate`. The feature `userfaultfd` of
//! pagestitch has the conversions.

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};
use pagestitch::{AdoptedMemory, OwnMemory, Pool, Region};
use std::error::Error;
use std::num::NonZeroUsize;
use userfaultfd::UffdBuilder;

const BYTES: NonZeroUsize = NonZeroUsize::new(1 << 20).expect("not zero");

#[expect(unsafe_code, reason = "the program has its own mapping")]
fn main() -> Result<(), Box<dyn Error>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: makes a new mapping at a free address.
    let memory = unsafe { mmap_anonymous(None, BYTES, protection, MapFlags::MAP_PRIVATE) }?;
    // SAFETY: children of fork do not inherit the mapping, which no reference refers to.
    unsafe { madvise(memory, BYTES.get(), MmapAdvise::MADV_DONTFORK) }?;
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(true).create()?;
    uffd.register(memory.as_ptr(), BYTES.get())?;

    // SAFETY: no byte of the mapping was read before it was registered.
    let promise = unsafe { OwnMemory::promise() };
    let adopted =
        AdoptedMemory::try_from((uffd, promise))?.range(memory.as_ptr().expose_provenance(), 1 << 20);
    let region = Region::builder()
        .chunks((0..16_u8).map(|i| vec![i + 1; 1 << 16]))
        .build_adopted(adopted, &Pool::new()?)?;

    // SAFETY: the bytes of the mapping do not change once they are there, and a read waits for them.
    let bytes = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), BYTES.get()) };
    assert!((0..16).all(|i| usize::from(bytes[i << 16]) == i + 1));
    println!("read {} faults of memory that the userfaultfd crate has registered", region.metrics().faults);
    region.finish()?; // fills the rest; the mapping stays
    Ok(())
}
