//! Files whose bytes do not change while they are mapped: by a promise of the caller, or by
//! fs-verity, with which the kernel refuses each write to the file for good.

use crate::errno::Errno;
use crate::file_readahead::FileCache;
use crate::page::PageSize;
use crate::shared::SharedFile;
use nix::libc;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, fstatfs};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// A regular file or a memfd whose bytes do not change as long as this value, or a mapping made of
/// it, lives.
#[derive(Debug)]
pub struct StableFile {
    /// Invariant: its bytes do not change, by the grounds below.
    file: SharedFile,
    grounds: Grounds,
}

/// The grounds on which the bytes of a file do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grounds {
    /// The caller of [`StableFile::promised`] has promised it.
    Promise,
    /// The file has fs-verity: the kernel refuses writes, and checks each page that it reads from
    /// the disk against a hash.
    Verity,
}

impl StableFile {
    /// Takes a file of which the caller promises that its bytes do not change.
    ///
    /// # Safety
    ///
    /// - As long as the returned value or a mapping made of it lives, no process writes to the file,
    ///   punches a hole into it or shortens it, by any descriptor or mapping. To replace the *name*
    ///   of the file (`rename(2)`, `unlink(2)`) is allowed.
    #[must_use]
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub const unsafe fn promised(file: SharedFile) -> Self {
        Self { file, grounds: Grounds::Promise }
    }

    /// Takes a file that fs-verity protects.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the file has no fs-verity, or its file system cannot prove
    /// it: only ext4, f2fs and btrfs check the bytes in this kernel. (A FUSE server and the lower
    /// layers of overlayfs can answer for a file whose bytes change.) The error of the ioctl.
    pub fn with_verity(file: SharedFile) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let kind = fstatfs(&file).map_err(Errno::of)?.filesystem_type();
        if !CHECKING.contains(&kind) {
            return refuse(
                "its file system is not known to check fs-verity: use ext4, f2fs or btrfs, or promise that the file does not change",
            );
        }
        match measure(file.file()) {
            // Before it had fs-verity, another process may have shortened it.
            Ok(()) if file.file().metadata()?.len() != file.len() => {
                refuse("its length has changed since it was opened: open it again")
            }
            Ok(()) => Ok(Self { file, grounds: Grounds::Verity }),
            Err(Errno::ENODATA) => refuse(
                "it has no fs-verity: enable it (fsverity enable FILE), or promise that the file does not change",
            ),
            Err(Errno::ENOTTY | Errno::EOPNOTSUPP) => refuse(
                "its file system has no fs-verity here: enable the feature (tune2fs -O verity; CONFIG_FS_VERITY), or promise that \
                 the file does not change",
            ),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The grounds on which its bytes do not change.
    #[must_use]
    pub const fn grounds(&self) -> Grounds {
        self.grounds
    }

    /// The number of its bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.file.len()
    }

    /// Always false, because an empty file is refused.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.file.is_empty()
    }

    /// As [`SharedFile::identity`].
    #[must_use]
    pub const fn identity(&self) -> (u64, u64) {
        self.file.identity()
    }

    /// As [`SharedFile::cache`].
    #[must_use]
    pub const fn cache(&self) -> FileCache {
        self.file.cache()
    }

    /// As [`SharedFile::granule`].
    #[must_use]
    pub const fn granule(&self) -> PageSize {
        self.file.granule()
    }

    /// As [`SharedFile::surely_maps`].
    pub(crate) const fn surely_maps(&self) -> bool {
        self.file.surely_maps()
    }

    /// The file, to read it at an offset.
    #[must_use]
    pub const fn file(&self) -> &File {
        self.file.file()
    }
}

impl AsFd for StableFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Asks the kernel for the digest of a file, which only a file with fs-verity has. `ENODATA`: the
/// file has none.
fn measure(file: &File) -> Result<(), Errno> {
    let mut digest = Digest { algorithm: 0, size: DIGEST_MAX as u16, bytes: [0; DIGEST_MAX] };
    // SAFETY: the kernel writes the header and at most `size` bytes after it, all inside `digest`.
    #[expect(unsafe_code, reason = "ioctl")]
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), MEASURE_VERITY, &raw mut digest) };
    Errno::result(answer).map(drop)
}

/// `struct fsverity_digest` of `linux/fsverity.h`, with room for the longest digest.
#[repr(C)]
struct Digest {
    algorithm: u16,
    size: u16,
    bytes: [u8; DIGEST_MAX],
}

/// SHA-512; no other algorithm of fs-verity has a longer digest.
const DIGEST_MAX: usize = 64;
/// `FS_IOC_MEASURE_VERITY`: `_IOWR('f', 134, struct fsverity_digest)`, whose header has 4 bytes.
const MEASURE_VERITY: libc::Ioctl = (0xc004_6686_u32) as libc::Ioctl;
/// The file systems that check fs-verity in the kernel.
const CHECKING: [FsType; 3] = [EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;

    #[test]
    fn a_file_without_fs_verity_is_refused_with_the_remedy() {
        for path in ["/proc/self/exe", "/dev/shm/pagestitch-verity"] {
            if path.starts_with("/dev/shm") {
                std::fs::write(path, "bytes").unwrap();
            }
            let error = StableFile::with_verity(SharedFile::open(path, Access::ReadOnly).unwrap());
            let error = error.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}: {error}");
        }
        std::fs::remove_file("/dev/shm/pagestitch-verity").unwrap();
    }
}
