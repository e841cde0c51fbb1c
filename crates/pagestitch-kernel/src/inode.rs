//! The inode of an open file, and its file system.
//!
//! `fstatfs(2)` takes more time than the open of a file, because a file system adds up counters of all
//! CPUs. So it is called once for the files of a mount. The number of the mount comes with the inode
//! (`STATX_MNT_ID_UNIQUE`, Linux 6.8): no later mount has the same one, and a mount keeps its file
//! system. Without the number, each file is asked.

use crate::errno::Errno;
use crate::granule::{granule_in, maps_all_files};
use crate::page::PageSize;
use nix::libc;
use nix::sys::statfs::{HUGETLBFS_MAGIC, PROC_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

/// The properties of an inode that decide whether, and how, its file is mapped.
pub(crate) struct Inode {
    mode: libc::mode_t,
    pub(crate) len: u64,
    /// The user that owns it.
    pub(crate) owner: u32,
    /// The numbers of its device and of the inode.
    pub(crate) identity: (u64, u64),
    mount: Option<u64>,
}

impl Inode {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        // The kernel, or a filter of system calls, may refuse statx(2).
        if let Some(inode) = with_mount(file) {
            return Ok(inode);
        }
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        let (mode, len, owner) = (metadata.mode(), metadata.len(), metadata.uid());
        Ok(Self { mode, len, owner, identity, mount: None })
    }

    /// The type of the inode: `S_IFREG` for a regular file.
    pub(crate) const fn kind(&self) -> libc::mode_t {
        self.mode & libc::S_IFMT
    }

    /// The file system of the inode, whose file is given.
    pub(crate) fn file_system(&self, file: &File) -> Result<FileSystem, Errno> {
        static LAST: Mutex<Option<(u64, FileSystem)>> = Mutex::new(None);
        // Another thread may hold the lock at a fork, so that a child must not wait for it.
        let (Some(mount), Ok(mut last)) = (self.mount, LAST.try_lock()) else { return FileSystem::of(file) };
        match *last {
            Some((known, system)) if known == mount => Ok(system),
            _ => FileSystem::of(file).inspect(|&system| *last = Some((mount, system))),
        }
    }
}

/// The properties of a file system that hold for all of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileSystem {
    /// The unit in which the kernel maps its files.
    pub(crate) granule: PageSize,
    /// True if it maps all files, so that the mapping of one cannot be refused.
    pub(crate) maps_all_files: bool,
    /// True if the pages of its files are the only copy of their bytes.
    pub(crate) is_in_memory: bool,
    pub(crate) is_proc: bool,
}

impl FileSystem {
    fn of(file: &File) -> Result<Self, Errno> {
        let statistics = fstatfs(file).map_err(Errno::of)?;
        Ok(Self {
            granule: granule_in(&statistics)?,
            maps_all_files: maps_all_files(&statistics),
            is_in_memory: [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&statistics.filesystem_type()),
            is_proc: statistics.filesystem_type() == PROC_SUPER_MAGIC,
        })
    }
}

/// The inode with the number of its mount, if the kernel tells it.
#[cfg(all(target_env = "gnu", not(miri)))]
fn with_mount(file: &File) -> Option<Inode> {
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd;

    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let wanted = libc::STATX_BASIC_STATS | MNT_ID_UNIQUE;
    let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: the kernel reads the empty path, and writes at most a `statx` to `answer`.
    #[expect(unsafe_code, reason = "statx")]
    let done = unsafe { libc::statx(fd, c"".as_ptr(), flags, wanted, answer.as_mut_ptr()) };
    // SAFETY: a `statx` is integers, and all bytes of `answer` are zero or written by the kernel.
    #[expect(unsafe_code, reason = "a zeroed C struct")]
    let answer = unsafe { answer.assume_init() };
    (done == 0 && answer.stx_mask & wanted == wanted).then(|| Inode {
        mode: libc::mode_t::from(answer.stx_mode),
        len: answer.stx_size,
        owner: answer.stx_uid,
        identity: (libc::makedev(answer.stx_dev_major, answer.stx_dev_minor), answer.stx_ino),
        mount: Some(answer.stx_mnt_id),
    })
}

/// Other C libraries have no `statx`, or only newer versions do.
#[cfg(not(all(target_env = "gnu", not(miri))))]
fn with_mount(_file: &File) -> Option<Inode> {
    None
}

/// `STATX_MNT_ID_UNIQUE` of `linux/stat.h`, which older versions of the crate `libc` lack.
#[cfg(all(target_env = "gnu", not(miri)))]
const MNT_ID_UNIQUE: libc::c_uint = 0x4000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_that_of_the_standard_library() {
        for path in ["/proc/self/exe", "/proc/version", "/sys/kernel/mm", "/dev/null"] {
            let Ok(file) = File::open(path) else { continue };
            let (inode, metadata) = (Inode::of(&file).unwrap(), file.metadata().unwrap());
            assert_eq!(inode.identity, (metadata.dev(), metadata.ino()), "{path}");
            assert_eq!((inode.mode, inode.len), (metadata.mode(), metadata.len()), "{path}");
        }
    }

    /// The second file of each mount, and the first one after another mount.
    #[test]
    fn files_of_several_mounts_have_the_file_system_of_their_own() {
        let files = ["/proc/version", "/proc/self/exe", "/proc/self/maps", "/proc/self/exe"];
        for file in files.into_iter().cycle().take(12).map(|path| File::open(path).unwrap()) {
            let inode = Inode::of(&file).unwrap();
            assert_eq!(inode.file_system(&file).unwrap(), FileSystem::of(&file).unwrap());
        }
    }
}
