//! A VMM of rust-vmm restores a guest: its memory is a snapshot file behind page faults, a vhost-user back
//! end maps the same pages, and a diff has the pages that the guest has written.
//! `cargo run --example guest_memory`.

use pagestitch::source::FileSource;
use pagestitch::{ErrorKind, Pool, Readahead, Region};
use pagestitch_vm_memory::GuestRegion;
use pagestitch_vm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionCollection};
use std::error::Error;
use std::os::unix::fs::FileExt;

const BYTES: usize = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join(format!("pagestitch-guest-memory-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("guest.mem"), vec![7; BYTES])?;

    let snapshot = FileSource::open(folder.join("guest.mem"))?;
    let builder = Region::builder().name("guest").chunk(snapshot).writable().readahead(Readahead::None);
    let guest = match builder.on_memfd().track_changes().build_shared(&Pool::new()?) {
        // Linux before 6.7 keeps no record of writes.
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            println!("{error}");
            return Ok(());
        }
        built => GuestRegion::tracked(built?, GuestAddress(0))?,
    };
    let memory = GuestRegionCollection::from_regions(vec![guest])?;

    // Devices read and write guest memory: each page is read from the snapshot when it is touched.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x10_0000))?, 0x0707_0707_0707_0707);
    memory.write_slice(b"a reply for the guest", GuestAddress(0x20_0ff0))?;
    let guest = memory.iter().next().expect("one region");
    println!("{} of {} pages are filled", guest.region().metrics().pages_installed(), BYTES / 4096);

    // A back end gets the descriptor. A page that it touches before it is filled would be zeros.
    guest.region().populate(0x30_0000..0x40_0000)?;
    let back_end = guest.shared_file()?;
    back_end.file().write_all_at(b"by the back end", back_end.start() + 0x30_0000)?;
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x30_0000))?, b'b');

    // One scan for each round of a migration, or for a diff.
    guest.scan()?;
    let dirty = guest.dirty_pages().take();
    println!("written by this process: {dirty:x?}");
    assert_eq!(dirty.iter().map(|run| run.len()).sum::<usize>(), 2 * 4096);
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
