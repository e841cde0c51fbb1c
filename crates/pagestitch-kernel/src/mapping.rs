//! An owned mapping: unmapped when dropped. The ground under reservations, buffers and tables.

use crate::fork::ForkGeneration;
use crate::page::{HUGE, PageSize};
use crate::ranges;
use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{
    MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munlock, munmap,
};
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

/// Private memory of this process.
#[derive(Debug)]
pub(crate) struct OwnedMapping {
    /// Invariant: the start of `bytes` bytes that were mapped by one of the functions below, and not unmapped since.
    start: NonNull<c_void>,
    bytes: NonZeroUsize,
    generation: ForkGeneration,
    /// Whether children of fork do not have it.
    hidden: bool,
    /// Whether threads may wait in it when it is dropped.
    lingers: AtomicBool,
}

// SAFETY: the mapping is memory without thread affinity; who may access its bytes is its owners' concern.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl Send for OwnedMapping {}
// SAFETY: as above; `&OwnedMapping` gives out addresses only.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl Sync for OwnedMapping {}

impl OwnedMapping {
    /// Maps fresh zero pages, without reserving swap for them: what is never touched costs nothing, also in a process that locks its
    /// memory.
    pub(crate) fn new(bytes: NonZeroUsize, protection: ProtFlags) -> Result<Self, Errno> {
        let mapping = Self::closed(bytes)?;
        mapping.open(protection)?;
        Ok(mapping)
    }

    /// The same, at a multiple of [`HUGE`] if it is as large: the kernel can then have huge pages in it.
    pub(crate) fn aligned(bytes: NonZeroUsize, protection: ProtFlags) -> Result<Self, Errno> {
        let mapping = Self::closed_aligned(bytes)?;
        mapping.open(protection)?;
        Ok(mapping)
    }

    /// Reserves addresses that are closed to every access until they are [opened](Self::open).
    ///
    /// Under `mlockall(MCL_FUTURE)` the kernel populates what is mapped for access, with zeros: before a uffd can be registered, and
    /// all pages of a table of which few are ever touched. Closed addresses cannot be populated, and are not locked when they are opened.
    fn closed(bytes: NonZeroUsize) -> Result<Self, Errno> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel chooses replaces nothing.
        #[expect(unsafe_code, reason = "mmap")]
        let map = || unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) };
        let start = match map() {
            Err(Errno::ENOMEM | Errno::EAGAIN) if ranges::release_all() => map(),
            answer => answer,
        }?;
        let mapping = Self::at_address(start, bytes, ForkGeneration::current());
        unlock(mapping.start, mapping.bytes())?;
        Ok(mapping)
    }

    /// The same, at a multiple of [`HUGE`] if it is as large.
    pub(crate) fn closed_aligned(bytes: NonZeroUsize) -> Result<Self, Errno> {
        if bytes.get() < HUGE {
            return Self::closed(bytes);
        }
        let page = PageSize::system().bytes();
        let roomy = bytes.checked_add(HUGE - page).ok_or(Errno::ENOMEM)?;
        let Self { start, bytes: all, generation, .. } = *ManuallyDrop::new(Self::closed(roomy)?);
        let first = start.addr().get().next_multiple_of(HUGE) - start.addr().get();
        let end = first + bytes.get().next_multiple_of(page);
        for edge in
            [0..first, end..all.get().next_multiple_of(page)].into_iter().filter(|edge| !edge.is_empty())
        {
            // SAFETY: the offset is inside the mapping that was just made.
            #[expect(unsafe_code, reason = "an address inside an owned mapping")]
            let edge_start = unsafe { start.byte_add(edge.start) };
            // SAFETY: whole pages of the mapping that was just made, which nobody has seen.
            #[expect(unsafe_code, reason = "munmap")]
            unsafe { munmap(edge_start, edge.len()) }?;
        }
        // SAFETY: the offset is inside the mapping that was just made.
        #[expect(unsafe_code, reason = "an address inside an owned mapping")]
        let start = unsafe { start.byte_add(first) };
        Ok(Self::at_address(start, bytes, generation))
    }

    /// Lets all of it be accessed. `ENOMEM` where writable memory is counted, and there may be no more (`RLIMIT_DATA`,
    /// `vm.overcommit_memory=2`).
    pub(crate) fn open(&self, protection: ProtFlags) -> Result<(), Errno> {
        if protection == ProtFlags::PROT_NONE {
            return Ok(());
        }
        // SAFETY: our own mapping, which only gains accesses.
        #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
        unsafe {
            mprotect(self.start, self.bytes(), protection)
        }
    }

    const fn at_address(start: NonNull<c_void>, bytes: NonZeroUsize, generation: ForkGeneration) -> Self {
        Self { start, bytes, generation, hidden: false, lingers: AtomicBool::new(false) }
    }

    /// Keeps the mapping from children of `fork(2)`, and its addresses from other mappings there.
    pub(crate) fn do_not_fork(&mut self) -> Result<(), Errno> {
        self.advise(MmapAdvise::MADV_DONTFORK)?;
        ranges::hide(self.addresses());
        self.hidden = true;
        Ok(())
    }

    /// Threads wait in it: when it is dropped, its addresses are not given to another mapping at once.
    pub(crate) fn linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }

    pub(crate) fn addresses(&self) -> Range<usize> {
        let start = self.start.addr().get();
        start..start + self.bytes().next_multiple_of(PageSize::system().bytes())
    }

    /// Advises the kernel of what is to become of the whole mapping. See `madvise(2)`.
    pub(crate) fn advise(&self, advice: MmapAdvise) -> Result<(), Errno> {
        debug_assert!(
            !matches!(advice, MmapAdvise::MADV_DONTNEED | MmapAdvise::MADV_FREE),
            "takes bytes away"
        );
        // SAFETY: our own mapping, and an advice that leaves its bytes as they are.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe {
            madvise(self.start, self.bytes(), advice)
        }
    }

    /// The address of the byte at `offset`.
    ///
    /// # Panics
    ///
    /// If that is past its end.
    pub(crate) fn at(&self, offset: usize) -> NonNull<c_void> {
        assert!(offset <= self.bytes(), "byte {offset} of a mapping of {}", self.bytes());
        // SAFETY: inside the mapping, or one past its end.
        #[expect(unsafe_code, reason = "an address inside an owned mapping")]
        unsafe {
            self.start.byte_add(offset)
        }
    }

    /// Maps anonymous memory as the flags say.
    pub(crate) fn anonymous(
        bytes: NonZeroUsize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        // SAFETY: a new mapping where the kernel chooses replaces nothing: the callers' flags do not say where.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap_anonymous(None, bytes, protection, flags) }?;
        Ok(Self::at_address(start, bytes, ForkGeneration::current()))
    }

    /// Maps a file's bytes for reading. What they are worth as `&[u8]` depends on who may write to the file.
    pub(crate) fn of_file(file: BorrowedFd<'_>, bytes: NonZeroUsize) -> Result<Self, Errno> {
        // Private: before Linux 6.7 a shared mapping of a memfd sealed against writing is EPERM. Who only reads
        // sees the file's own pages either way, and needs no huge page reserved for a copy.
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        Self::of_file_at(file, 0, bytes, ProtFlags::PROT_READ, flags)
    }

    /// Maps a file's bytes from an offset on.
    pub(crate) fn of_file_at(
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: NonZeroUsize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: a new mapping where the kernel chooses replaces nothing.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(None, bytes, protection, flags, file, offset) }?;
        Ok(Self::at_address(start, bytes, ForkGeneration::current()))
    }

    pub(crate) const fn start(&self) -> NonNull<c_void> {
        self.start
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes.get()
    }
}

impl Drop for OwnedMapping {
    fn drop(&mut self) {
        if !self.generation.is_current() {
            // A forked child has no such mapping, or a copy that ends with it. Something else may be there by now.
            return;
        }
        if self.hidden {
            ranges::forget(self.start.addr().get());
        }
        if self.lingers.load(Ordering::Relaxed) {
            ranges::set_aside(self.addresses());
            return;
        }
        // SAFETY: by the field's invariant it is ours, and with the owner gone nobody refers to it.
        #[expect(unsafe_code, reason = "munmap")]
        let answer = unsafe { munmap(self.start, self.bytes()) };
        debug_assert!(answer.is_ok(), "munmap of an owned mapping: {answer:?}");
    }
}

/// Pages there are locked no longer, and the kernel populates none when they are opened.
pub(crate) fn unlock(start: NonNull<c_void>, bytes: usize) -> Result<(), Errno> {
    // SAFETY: whether pages may be swapped out changes none of their bytes.
    #[expect(unsafe_code, reason = "munlock")]
    unsafe {
        munlock(start, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_large_begins_at_a_huge_page() {
        for bytes in [HUGE, HUGE + 4096, 5 * HUGE - 1] {
            let bytes = NonZeroUsize::new(bytes).unwrap();
            for _ in 0..3 {
                let mapping = OwnedMapping::aligned(bytes, ProtFlags::PROT_READ).unwrap();
                assert_eq!(mapping.start().addr().get() % HUGE, 0);
                assert_eq!(mapping.bytes(), bytes.get());
            }
        }
    }
}
