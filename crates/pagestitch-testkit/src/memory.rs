//! What an application may do to memory that others serve: calls that split a mapping, and memfds of huge pages.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pagestitch::Region;
use pagestitch_kernel::PageSize;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

/// A call on a part of a mapping. The kernel splits the mapping at both ends, as a rule, and no byte changes.
#[derive(Debug, Clone, Copy)]
pub enum Split {
    /// `madvise(2)` with advice about readahead, or none.
    Advise(bool),
    /// `mprotect(2)`: the part can be read only.
    Protect,
    /// `mlock2(2)` of the pages that are there and come, or `munlock(2)`.
    Lock(bool),
    /// `madvise(MADV_PAGEOUT)`: pages go to the swap space, where there is one. Nothing is split.
    PageOut,
}

impl Split {
    /// Splits the mapping of whole pages inside a range of a region.
    ///
    /// # Panics
    ///
    /// If the range is not inside.
    pub fn region(self, region: &Region, bytes: Range<usize>) {
        assert!(bytes.end <= region.len(), "inside");
        let page = PageSize::system().bytes();
        let (start, end) = (bytes.start.next_multiple_of(page), bytes.end / page * page);
        if start < end {
            let address = region.as_ptr().map_addr(|base| base.checked_add(start).expect("inside"));
            self.at(address.cast(), end - start);
        }
    }

    /// A refusal (no such advice, a limit on locked memory) splits nothing, which is no error.
    pub(crate) fn at(self, address: NonNull<libc::c_void>, bytes: usize) {
        let address = address.as_ptr();
        // SAFETY: whole pages of a mapping of the caller's. Advice changes no byte.
        #[expect(unsafe_code, reason = "what an application may call is what is tested")]
        let advise = |advice| unsafe { libc::madvise(address, bytes, advice) };
        // SAFETY: as above; the pages stay readable.
        #[expect(unsafe_code, reason = "as above")]
        let protect = || unsafe { libc::mprotect(address, bytes, libc::PROT_READ) };
        // SAFETY: as above; a lock changes no byte.
        #[expect(unsafe_code, reason = "as above")]
        let lock = || unsafe { libc::mlock2(address, bytes, libc::MLOCK_ONFAULT as _) };
        // SAFETY: as above.
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

/// A sealed memfd of huge pages that holds these bytes, and zeros up to the end of its last page.
///
/// # Errors
///
/// `ENOMEM` where no huge pages are reserved (`vm.nr_hugepages`); `EINVAL` where the kernel has none.
///
/// # Panics
///
/// If there are no bytes.
pub fn huge_memfd(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags =
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create("huge", flags)?);
    let len = NonZeroUsize::new(bytes.len().next_multiple_of(pagestitch_kernel::page::HUGE)).expect("bytes");
    file.set_len(len.get() as u64)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, wherever the kernel likes. It reserves its pages: a write to it finds them.
    #[expect(unsafe_code, reason = "hugetlbfs has no write(2)")]
    let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: the mapping has as many bytes at least, and no other code refers to it.
    #[expect(unsafe_code, reason = "as above")]
    unsafe {
        start.cast::<u8>().copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
    }
    // SAFETY: the mapping is not used any more.
    #[expect(unsafe_code, reason = "as above")]
    unsafe { munmap(start, len.get()) }?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}
