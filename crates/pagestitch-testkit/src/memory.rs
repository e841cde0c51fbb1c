//! The calls of an application on served memory: calls that split or discard parts of a mapping,
//! and memfds of huge pages.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use pagestitch::{Region, SharedRegion};
use pagestitch_kernel::PageSize;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// A call on a part of a mapping. The kernel usually splits the mapping at both ends of the part,
/// and no byte changes.
#[derive(Debug, Clone, Copy)]
pub enum Split {
    /// `madvise(2)` with random or normal readahead.
    Advise(bool),
    /// `mprotect(2)`: the part becomes read-only.
    Protect,
    /// `mlock2(2)` of present and later pages, or `munlock(2)`.
    Lock(bool),
    /// `madvise(MADV_PAGEOUT)`: pages go to swap space, if there is any. This splits nothing.
    PageOut,
}

impl Split {
    /// Splits the mapping at the whole pages inside a range of a region.
    ///
    /// # Panics
    ///
    /// If the range is outside the region.
    pub fn region(self, region: &Region, bytes: Range<usize>) {
        if let Some((address, bytes)) = whole_pages(region.as_ptr(), region.len(), bytes) {
            self.at(address, bytes);
        }
    }

    /// As [`region`](Self::region), for a region that changes.
    ///
    /// # Panics
    ///
    /// If the range is outside the region.
    pub fn shared(self, region: &SharedRegion, bytes: Range<usize>) {
        if let Some((address, bytes)) = whole_pages(region.as_ptr(), region.len(), bytes) {
            self.at(address, bytes);
        }
    }

    /// If the kernel refuses (no such advice, a limit on locked memory), the mapping stays as it
    /// is, which is no error.
    pub(crate) fn at(self, address: NonNull<libc::c_void>, bytes: usize) {
        let address = address.as_ptr();
        // SAFETY: the pages belong to a mapping of the caller. Advice changes no byte of them.
        #[expect(unsafe_code, reason = "tests make the calls of an application")]
        let advise = |advice| unsafe { libc::madvise(address, bytes, advice) };
        // SAFETY: the same pages, which stay readable.
        #[expect(unsafe_code, reason = "as above")]
        let protect = || unsafe { libc::mprotect(address, bytes, libc::PROT_READ) };
        // SAFETY: the same pages; a lock changes no byte.
        #[expect(unsafe_code, reason = "as above")]
        let lock = || unsafe { libc::mlock2(address, bytes, libc::MLOCK_ONFAULT as _) };
        // SAFETY: the same pages; the end of a lock changes no byte.
        #[expect(unsafe_code, reason = "as above")]
        let unlock = || unsafe { libc::munlock(address, bytes) };
        let _ = match self {
            Self::Advise(true) => advise(libc::MADV_RANDOM),
            Self::Advise(false) => advise(libc::MADV_NORMAL),
            Self::PageOut => advise(libc::MADV_PAGEOUT),
            Self::Protect => protect(),
            Self::Lock(true) => lock(),
            Self::Lock(false) => unlock(),
        };
    }
}

/// Discards the whole pages inside a range of a region (`madvise(MADV_DONTNEED)`). The region fills them
/// again when they are touched, if it is built with `keep_sources()`; else a touch may be SIGBUS.
///
/// # Panics
///
/// If the range is outside the region.
pub fn discard(region: &Region, bytes: Range<usize>) {
    discard_pages(whole_pages(region.as_ptr(), region.len(), bytes));
}

/// As [`discard`], for a region that changes. Written bytes are gone.
///
/// # Panics
///
/// If the range is outside the region.
pub fn discard_shared(region: &SharedRegion, bytes: Range<usize>) {
    discard_pages(whole_pages(region.as_ptr(), region.len(), bytes));
}

fn discard_pages(pages: Option<(NonNull<libc::c_void>, usize)>) {
    let Some((address, bytes)) = pages else { return };
    // SAFETY: discards pages of a region, which are filled with the same bytes when they are touched, or a
    // touch is a signal. Until then a read waits.
    #[expect(unsafe_code, reason = "madvise")]
    let _ = unsafe { madvise(address, bytes, MmapAdvise::MADV_DONTNEED) };
}

/// The whole pages inside a range of a region of `len` bytes.
fn whole_pages(base: NonNull<u8>, len: usize, bytes: Range<usize>) -> Option<(NonNull<libc::c_void>, usize)> {
    assert!(bytes.end <= len, "inside");
    let page = PageSize::system().bytes();
    let (start, end) = (bytes.start.next_multiple_of(page), bytes.end / page * page);
    let address = base.map_addr(|base| base.checked_add(start).expect("inside"));
    (start < end).then_some((address.cast(), end.saturating_sub(start)))
}

/// The word at an offset of a region that is writable.
///
/// # Panics
///
/// If the offset is not that of an aligned word inside the region.
#[must_use]
pub fn word_of(region: &SharedRegion, offset: usize) -> &AtomicU64 {
    assert!(offset % 8 == 0 && offset + 8 <= region.len(), "a word of the region");
    let word = region.as_ptr().as_ptr().wrapping_add(offset).cast::<u64>();
    // SAFETY: the word is inside the region, aligned, and lives as long as the region. Threads and the kernel
    // change its bytes at any time, which atomics allow.
    #[expect(unsafe_code, reason = "threads of an application write through the pointer")]
    unsafe {
        AtomicU64::from_ptr(word)
    }
}

/// Makes a sealed memfd of huge pages with these bytes, and zeros up to the end of its last page.
///
/// # Errors
///
/// `ENOMEM` if no huge pages are reserved (`vm.nr_hugepages`); `EINVAL` if the kernel has none.
///
/// # Panics
///
/// If `bytes` is empty.
pub fn huge_memfd(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags =
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create("huge", flags)?);
    let len = NonZeroUsize::new(bytes.len().next_multiple_of(pagestitch_kernel::page::HUGE)).expect("bytes");
    file.set_len(len.get() as u64)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: makes a new mapping at a free address. Its pages are reserved, so that a write finds
    // them.
    #[expect(unsafe_code, reason = "hugetlbfs has no write(2)")]
    let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: writes into the new mapping above, which is at least as long as `bytes`; no other
    // code refers to it.
    #[expect(unsafe_code, reason = "as above")]
    unsafe {
        start.cast::<u8>().copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
    }
    // SAFETY: unmaps the new mapping above, to which no pointer exists any more.
    #[expect(unsafe_code, reason = "as above")]
    unsafe { munmap(start, len.get()) }?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}
