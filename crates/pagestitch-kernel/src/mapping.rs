//! An owned mapping: unmapped when dropped. The ground under reservations, buffers and tables.

use crate::fork::Maker;
use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

/// Private memory of this process.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Invariant: the start of `bytes` bytes that were mapped by [`Mapping::new`] and not unmapped since.
    start: NonNull<c_void>,
    bytes: NonZeroUsize,
    maker: Maker,
}

// SAFETY: the mapping is memory without thread affinity; who may access its bytes is its owners' concern.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out addresses only.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps fresh zero pages, without reserving swap for them: what is never touched costs nothing.
    pub(crate) fn new(bytes: NonZeroUsize, protection: ProtFlags) -> Result<Self, Errno> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel chooses replaces nothing.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap_anonymous(None, bytes, protection, flags) }?;
        Ok(Self { start, bytes, maker: Maker::current() })
    }

    /// Maps a file's bytes for reading. What they are worth as `&[u8]` depends on who may write to the file.
    pub(crate) fn of_file(file: BorrowedFd<'_>, bytes: NonZeroUsize) -> Result<Self, Errno> {
        // Private: before Linux 6.7 a shared mapping of a memfd sealed against writing is EPERM. Who only reads
        // sees the file's own pages either way.
        // SAFETY: a new mapping where the kernel chooses replaces nothing.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(None, bytes, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, file, 0) }?;
        Ok(Self { start, bytes, maker: Maker::current() })
    }

    pub(crate) const fn start(&self) -> NonNull<c_void> {
        self.start
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes.get()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.maker.is_current() {
            // A forked child has no such mapping, or a copy that ends with it. Something else may be there by now.
            return;
        }
        // SAFETY: by the field's invariant it is ours, and with the owner gone nobody refers to it.
        #[expect(unsafe_code, reason = "munmap")]
        let answer = unsafe { munmap(self.start, self.bytes()) };
        debug_assert!(answer.is_ok(), "munmap of an owned mapping: {answer:?}");
    }
}
