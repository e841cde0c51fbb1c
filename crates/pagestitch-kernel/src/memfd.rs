//! Sealed memfds: memory with a descriptor that any process can map and none can change.
//!
//! ```
//! use std::os::unix::fs::FileExt;
//! use pagestitch_kernel::memfd::UnsealedMemfd;
//!
//! let memfd = UnsealedMemfd::create("numbers", 8192)?;
//! memfd.file().write_all_at(&[7; 8192], 0)?;
//! let sealed = memfd.seal()?;
//! assert_eq!(sealed.as_ref()[8191], 7);
//! # Ok::<(), std::io::Error>(())
//! ```

use crate::granule::granule_of;
use crate::mapping::OwnedMapping;
use crate::page::PageSize;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice;

/// A memfd that may still be written.
#[derive(Debug)]
pub struct UnsealedMemfd {
    file: File,
}

impl UnsealedMemfd {
    /// A memfd of `bytes` zeros. See `memfd_create(2)`.
    ///
    /// # Errors
    ///
    /// The error of `memfd_create(2)`: a name with a NUL or of more than 249 bytes, no free
    /// descriptor, no memory.
    pub fn create(name: &str, bytes: u64) -> io::Result<Self> {
        let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(bytes)?;
        Ok(Self { file })
    }

    /// The file, to write the bytes with.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Seals it against growing, shrinking and further seals. Its bytes can be written, and its pages
    /// discarded, by each process that has it.
    ///
    /// # Errors
    ///
    /// `EPERM` if it is sealed already.
    pub fn fix_length(&self) -> io::Result<()> {
        let length = SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
        fcntl(&self.file, FcntlArg::F_ADD_SEALS(length))?;
        Ok(())
    }

    /// Seals it against writing, growing, shrinking and further seals.
    ///
    /// # Errors
    ///
    /// `EBUSY` while the memfd is mapped writable.
    pub fn seal(self) -> io::Result<SealedMemfd> {
        let all = SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_GROW | NEEDED;
        fcntl(&self.file, FcntlArg::F_ADD_SEALS(all))?;
        SealedMemfd::try_from(OwnedFd::from(self.file))
    }

    /// As [`seal`](Self::seal), without a mapping of its own: a [`View`](crate::View) maps it.
    ///
    /// # Errors
    ///
    /// As [`seal`](Self::seal).
    pub fn seal_unmapped(self) -> io::Result<SealedFile> {
        let all = SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_GROW | NEEDED;
        fcntl(&self.file, FcntlArg::F_ADD_SEALS(all))?;
        let len = self.file.metadata()?.len();
        let granule = granule_of(&self.file)?;
        Ok(SealedFile { fd: self.file.into(), len, granule })
    }
}

/// A memfd whose bytes can neither change nor go away, and that this process has not mapped.
#[derive(Debug)]
pub struct SealedFile {
    /// Invariant: its seals forbid each process to write or shorten it.
    fd: OwnedFd,
    len: u64,
    granule: PageSize,
}

impl SealedFile {
    /// The number of its bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// True if it has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The unit in which the kernel maps it.
    #[must_use]
    pub const fn granule(&self) -> PageSize {
        self.granule
    }
}

impl AsFd for SealedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A memfd of this process or another one, whose bytes can neither change nor go away.
#[derive(Debug)]
pub struct SealedMemfd {
    fd: OwnedFd,
    /// The whole memfd. Invariant: its seals forbid each process to write or shorten it.
    mapping: OwnedMapping,
    len: usize,
    granule: PageSize,
}

impl SealedMemfd {
    /// The number of its bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// The unit in which the kernel maps it: the system's page, or its huge page if it was made
    /// with `MFD_HUGETLB`.
    #[must_use]
    pub const fn granule(&self) -> PageSize {
        self.granule
    }

    /// Always false, because an empty memfd is refused.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Takes a descriptor, also one that another process has sent, if it is sealed against writing and
/// shrinking.
impl TryFrom<OwnedFd> for SealedMemfd {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        // EINVAL: the file is no memfd.
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
        if !seals.contains(NEEDED) {
            let why = "the memfd is not sealed against writing and shrinking: add F_SEAL_WRITE and F_SEAL_SHRINK first";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let file = File::from(fd);
        let bytes = usize::try_from(file.metadata()?.len()).ok().and_then(NonZeroUsize::new);
        let bytes = bytes.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the memfd is empty: give it a length before it is sealed",
            )
        })?;
        let granule = granule_of(&file)?;
        let mapping = OwnedMapping::of_file(file.as_fd(), bytes)?;
        Ok(Self { fd: file.into(), mapping, len: bytes.get(), granule })
    }
}

impl AsRef<[u8]> for SealedMemfd {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping is readable as long as `self` lives, and by the field's invariant no
        // process writes to its bytes.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.mapping.start().as_ptr().cast(), self.len)
        }
    }
}

impl AsFd for SealedMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const NEEDED: SealFlag = SealFlag::F_SEAL_WRITE.union(SealFlag::F_SEAL_SHRINK);

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sealed_memfd_refuses_writers_and_keeps_its_bytes() {
        let memfd = UnsealedMemfd::create("test", 10_000).unwrap();
        memfd.file().write_all_at(b"bytes", 9_000).unwrap();
        let other = memfd.file().try_clone().unwrap();
        let sealed = memfd.seal().unwrap();
        assert!(other.write_all_at(b"other", 9_000).is_err());
        assert!(other.set_len(5).is_err());
        assert_eq!((&sealed.as_ref()[9_000..9_005], sealed.len()), (&b"bytes"[..], 10_000));
    }

    #[test]
    fn an_unsealed_memfd_is_refused_with_the_remedy() {
        let open = UnsealedMemfd::create("open", 10).unwrap();
        for file in [open.file().try_clone().unwrap(), File::open("/proc/self/exe").unwrap()] {
            let error = SealedMemfd::try_from(OwnedFd::from(file)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        }
        assert!(UnsealedMemfd::create("empty", 0).unwrap().seal().is_err());
    }
}
