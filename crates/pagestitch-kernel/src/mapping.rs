//! An owned mapping, which its drop unmaps. Reservations, buffers and tables stand on it.

use crate::errno::Errno;
use crate::fork::ForkGeneration;
use crate::page::{HUGE, PageSize};
use crate::ranges;
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

/// A mapping that this process owns.
#[derive(Debug)]
pub(crate) struct OwnedMapping {
    /// Invariant: `bytes` bytes are mapped from here on, by a function below, and were not unmapped
    /// since.
    start: NonNull<c_void>,
    bytes: NonZeroUsize,
    generation: ForkGeneration,
    /// True if children of fork do not inherit it.
    hidden: bool,
    /// True if threads may wait in it during its drop.
    lingers: AtomicBool,
}

// SAFETY: mapped memory belongs to no thread. The owner of the mapping decides which code accesses
// its bytes.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl Send for OwnedMapping {}
// SAFETY: `&OwnedMapping` gives out addresses only, and no reference to the bytes.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl Sync for OwnedMapping {}

impl OwnedMapping {
    /// Maps fresh zero pages without reserving swap for them. A page that is never touched takes no
    /// memory, even in a process that locks its memory.
    pub(crate) fn new(bytes: NonZeroUsize, protection: ProtFlags) -> Result<Self, Errno> {
        let mapping = Self::closed(bytes)?;
        mapping.open(protection)?;
        Ok(mapping)
    }

    /// As [`new`](Self::new), at a multiple of [`HUGE`] if it has at least as many bytes, so that
    /// the kernel can use huge pages.
    pub(crate) fn aligned(bytes: NonZeroUsize, protection: ProtFlags) -> Result<Self, Errno> {
        let mapping = Self::closed_aligned(bytes)?;
        mapping.open(protection)?;
        Ok(mapping)
    }

    /// Reserves addresses that are closed to every access until [`open`](Self::open).
    ///
    /// Under `mlockall(MCL_FUTURE)` the kernel fills an accessible mapping with zero pages at once:
    /// before a uffd can be registered there, and all of a table of which few pages are ever
    /// touched. It cannot fill a closed mapping. Opened later, the mapping is not locked.
    fn closed(bytes: NonZeroUsize) -> Result<Self, Errno> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address of a new mapping, which replaces no other.
        #[expect(unsafe_code, reason = "mmap")]
        let map = || unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) }.map_err(Errno::of);
        let start = match map() {
            Err(Errno::ENOMEM | Errno::EAGAIN) if ranges::release_all() => map(),
            answer => answer,
        }?;
        let mapping = Self::at_address(start, bytes, ForkGeneration::current());
        unlock(mapping.start, mapping.bytes())?;
        Ok(mapping)
    }

    /// As [`closed`](Self::closed), at a multiple of [`HUGE`] if it has at least as many bytes.
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
            // SAFETY: the offset is inside the mapping made above.
            #[expect(unsafe_code, reason = "an address inside an owned mapping")]
            let edge_start = unsafe { start.byte_add(edge.start) };
            // SAFETY: whole pages of the mapping made above, whose address no other code has.
            #[expect(unsafe_code, reason = "munmap")]
            unsafe { munmap(edge_start, edge.len()) }.map_err(Errno::of)?;
        }
        // SAFETY: the offset is inside the mapping made above.
        #[expect(unsafe_code, reason = "an address inside an owned mapping")]
        let start = unsafe { start.byte_add(first) };
        Ok(Self::at_address(start, bytes, generation))
    }

    /// Unmaps all but the last `pages` pages.
    ///
    /// # Panics
    ///
    /// If the mapping has not more pages.
    pub(crate) fn into_last(self, pages: NonZeroUsize) -> Result<Self, Errno> {
        let addresses = self.addresses();
        let bytes = NonZeroUsize::new(pages.get() * PageSize::system().bytes()).expect("pages have bytes");
        assert!(bytes.get() < addresses.len(), "{pages} pages of a mapping of {} bytes", addresses.len());
        let whole = ManuallyDrop::new(self);
        let start = whole.at(addresses.len() - bytes.get());
        // SAFETY: whole pages of the owned mapping. No reference to its bytes outlives it.
        #[expect(unsafe_code, reason = "munmap")]
        let unmapped = unsafe { munmap(whole.start, addresses.len() - bytes.get()) }.map_err(Errno::of);
        if let Err(errno) = unmapped {
            drop(ManuallyDrop::into_inner(whole));
            return Err(errno);
        }
        Ok(Self::at_address(start, bytes, whole.generation))
    }

    /// Opens the whole mapping to accesses. `ENOMEM` if the kernel counts writable memory and the
    /// mapping exceeds the limit (`RLIMIT_DATA`, `vm.overcommit_memory=2`).
    pub(crate) fn open(&self, protection: ProtFlags) -> Result<(), Errno> {
        if protection == ProtFlags::PROT_NONE {
            return Ok(());
        }
        // SAFETY: the mapping is owned, and the call only adds accesses to it.
        #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
        unsafe {
            mprotect(self.start, self.bytes(), protection).map_err(Errno::of)
        }
    }

    /// As [`open`](Self::open), for `bytes` bytes from `offset` on.
    ///
    /// # Panics
    ///
    /// If the part is not inside the mapping.
    pub(crate) fn open_part(&self, offset: usize, bytes: usize, protection: ProtFlags) -> Result<(), Errno> {
        assert!(bytes <= self.addresses().len() - offset, "{bytes} bytes at {offset} of a mapping");
        // SAFETY: the part is inside the owned mapping, and the call only adds accesses to it.
        #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
        unsafe {
            mprotect(self.at(offset), bytes, protection).map_err(Errno::of)
        }
    }

    const fn at_address(start: NonNull<c_void>, bytes: NonZeroUsize, generation: ForkGeneration) -> Self {
        Self { start, bytes, generation, hidden: false, lingers: AtomicBool::new(false) }
    }

    /// Hides the mapping from children of `fork(2)`, and keeps other mappings away from its
    /// addresses there.
    pub(crate) fn do_not_fork(&mut self) -> Result<(), Errno> {
        self.advise(MmapAdvise::MADV_DONTFORK)?;
        ranges::hide(self.addresses());
        self.hidden = true;
        Ok(())
    }

    /// Notes that threads wait in the mapping. After the drop, its addresses stay closed for a
    /// while.
    pub(crate) fn linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }

    pub(crate) fn addresses(&self) -> Range<usize> {
        let start = self.start.addr().get();
        start..start + self.bytes().next_multiple_of(PageSize::system().bytes())
    }

    /// Gives the kernel an advice for the whole mapping. See `madvise(2)`.
    pub(crate) fn advise(&self, advice: MmapAdvise) -> Result<(), Errno> {
        debug_assert!(
            !matches!(advice, MmapAdvise::MADV_DONTNEED | MmapAdvise::MADV_FREE),
            "takes bytes away"
        );
        // SAFETY: the mapping is owned, and the advice changes none of its bytes.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe {
            madvise(self.start, self.bytes(), advice).map_err(Errno::of)
        }
    }

    /// The address of the byte at `offset`.
    ///
    /// # Panics
    ///
    /// If `offset` is past the end.
    pub(crate) fn at(&self, offset: usize) -> NonNull<c_void> {
        assert!(offset <= self.bytes(), "byte {offset} of a mapping of {}", self.bytes());
        // SAFETY: the address is inside the mapping, or one past its end.
        #[expect(unsafe_code, reason = "an address inside an owned mapping")]
        unsafe {
            self.start.byte_add(offset)
        }
    }

    /// Maps anonymous memory with these flags.
    pub(crate) fn anonymous(
        bytes: NonZeroUsize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        // SAFETY: no caller passes a flag that fixes the address, so the new mapping replaces no
        // other.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap_anonymous(None, bytes, protection, flags) }.map_err(Errno::of)?;
        Ok(Self::at_address(start, bytes, ForkGeneration::current()))
    }

    /// Maps a file's bytes for reading. The caller decides whether other processes may write to the
    /// file, and so whether the bytes may become a `&[u8]`.
    pub(crate) fn of_file(file: BorrowedFd<'_>, bytes: NonZeroUsize) -> Result<Self, Errno> {
        // Private, because a shared mapping of a memfd sealed against writing is EPERM before Linux
        // 6.7. A private mapping that is only read shows the file's own pages too, and needs no
        // huge page in reserve for a copy.
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        Self::of_file_at(file, 0, bytes, ProtFlags::PROT_READ, flags)
    }

    /// Maps a file's bytes from `offset` on.
    pub(crate) fn of_file_at(
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: NonZeroUsize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        Self::of_file_near(None, file, offset, bytes, protection, flags)
    }

    /// As [`of_file_at`](Self::of_file_at), at the address `hint` if it is free.
    pub(crate) fn of_file_near(
        hint: Option<NonZeroUsize>,
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: NonZeroUsize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: no caller passes a flag that fixes the address, so the new mapping replaces no
        // other.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(hint, bytes, protection, flags, file, offset) }.map_err(Errno::of)?;
        Ok(Self::at_address(start, bytes, ForkGeneration::current()))
    }

    #[inline]
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
            // A forked child has either no such mapping or a copy that ends with the child. Another
            // mapping may be at the address.
            return;
        }
        if self.hidden {
            ranges::forget(self.start.addr().get());
        }
        if self.lingers.load(Ordering::Relaxed) {
            ranges::set_aside(self.addresses());
            return;
        }
        // SAFETY: by the field's invariant the mapping is owned, and no reference to its bytes
        // outlives the owner.
        #[expect(unsafe_code, reason = "munmap")]
        let answer = unsafe { munmap(self.start, self.bytes()) };
        debug_assert!(answer.is_ok(), "munmap of an owned mapping: {answer:?}");
    }
}

/// Unlocks pages, so that the kernel does not fill them with zeros when they are opened.
pub(crate) fn unlock(start: NonNull<c_void>, bytes: usize) -> Result<(), Errno> {
    // SAFETY: munlock(2) lets the kernel swap pages out, and changes no byte of them.
    #[expect(unsafe_code, reason = "munlock")]
    unsafe {
        munlock(start, bytes).map_err(Errno::of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_mapping_begins_at_a_huge_page() {
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
