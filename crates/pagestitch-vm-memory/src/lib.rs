//! Guest memory of [`vm_memory`] whose pages come by page faults.
//!
//! A [`GuestRegion`] is a [`pagestitch::SharedRegion`] at a guest address. A
//! [`GuestRegionCollection`](vm_memory::GuestRegionCollection) of them is guest memory, as a
//! `GuestMemoryMmap` is: devices, loaders and virtio queues read and write it. A page is absent until
//! it is touched: by the VMM, by a virtual CPU, by a device model in the kernel.
//!
//! ```
//! use pagestitch::source::FileSource;
//! use pagestitch::{Chunk, Pool, Region};
//! use pagestitch_vm_memory::GuestRegion;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionCollection};
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("guest.mem");
//! # std::fs::write(&path, vec![7; 1 << 20])?;
//! let pool = Pool::new()?;
//! let snapshot = FileSource::open(&path)?;                        // 1 MiB of it is low memory
//! let low = Region::builder().name("low").chunk(snapshot).writable().build_shared(&pool)?;
//! let high = Region::builder().name("high").chunk(Chunk::hole(1 << 30)).writable().build_shared(&pool)?;
//! let memory = GuestRegionCollection::from_regions(vec![
//!     GuestRegion::new(low, GuestAddress(0))?,
//!     GuestRegion::new(high, GuestAddress(1 << 32))?,
//! ])?;
//! assert_eq!(memory.read_obj::<u32>(GuestAddress(0x8000))?, 0x0707_0707);    // reads one page of the file
//! memory.write_obj(1u64, GuestAddress((1 << 32) + 8))?;
//! assert!(memory.find_region(GuestAddress(1 << 31)).is_none());   // a hole between the regions
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Pages that cannot be filled
//!
//! `vm_memory` accesses memory through pointers, and has no error for a page. If a source fails for a
//! page, the page is poisoned, and **an access is SIGBUS**, never zeros. A VMM that must go on calls
//! [`populate`](pagestitch::AnyRegion::populate) for a range before it touches the range, which returns
//! the error, or chooses an [`OnFailure`](pagestitch::OnFailure) for the chunk. A virtual CPU that
//! touches such a page leaves `KVM_RUN` with EFAULT.
//!
//! # Faults of the kernel
//!
//! KVM, vhost and `read(2)` into guest memory ([`read_volatile_from`](vm_memory::Bytes::read_volatile_from))
//! touch pages in the kernel. Their faults are served unless the process may serve faults of user code
//! only: [`serves_system_calls`](pagestitch::SharedRegion::serves_system_calls) tells. Where it is false,
//! populate the pages before, or have the pool open `/dev/userfaultfd`.
//!
//! # Dirty pages
//!
//! [`GuestRegion::tracked`] has a bitmap of dirty pages, [`DirtyPages`]. The kernel keeps the record of
//! all writes to the mapping, those of virtual CPUs, too; a [scan](GuestRegion::scan) for each round
//! adds them to the bitmap, and a query is one load.
//!
//! # Other processes
//!
//! A region that is built [`on_memfd`](pagestitch::Builder::on_memfd) has a
//! [`file_offset`](vm_memory::GuestMemoryRegion::file_offset), which vhost-user front ends send to their
//! back ends. **A page that a back end touches before this process has filled it is zeros**: populate
//! the region before the back end gets the descriptor, or serve the userfaultfd of the back end, as
//! [`on_memfd`](pagestitch::Builder::on_memfd) explains.

mod dirty;
mod error;
mod region;

pub use dirty::{DirtyPages, DirtySlice};
pub use error::GuestRegionError;
pub use region::GuestRegion;
pub use vm_memory;
