//! Reads around the page cache (`O_DIRECT`), at any offset and of any length.
//!
//! The kernel takes such reads only at whole blocks of the disk, into aligned memory. Other reads pass
//! through a buffer on the stack, which has room for a page that begins inside a block.

use crate::errno::Errno;
use crate::file_read::fill_from;
use nix::libc;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

/// A file that is read around the page cache.
#[derive(Debug)]
pub struct DirectFile {
    file: Arc<File>,
    /// The unit of offsets, lengths and addresses: a power of two, at most that of [`Block`].
    align: usize,
    is_on_disk: bool,
}

/// Memory for whole blocks of a disk.
#[repr(align(4096))]
struct Block([u8; ROOM]);

impl DirectFile {
    /// Opens a file that is open for reading once more.
    ///
    /// ```no_run
    /// use pagestitch_kernel::direct_read::DirectFile;
    /// use std::fs::File;
    ///
    /// let direct = DirectFile::reopen(&File::open("/proc/self/exe")?)?;
    /// let mut magic = [0; 3];
    /// direct.read_exact_at(1, &mut magic)?;
    /// assert_eq!(&magic, b"ELF");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `EINVAL` from a file system without such reads, or with blocks of more than 4096 bytes; the errors
    /// of `open(2)`.
    pub fn reopen(file: &File) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
        let align = alignment(&file)?;
        let is_on_disk = is_on_disk(&file)?;
        let direct = Self { file: Arc::new(file), align, is_on_disk };
        // Some file systems refuse the read and not the open.
        direct.file.read_at(&mut Block::new().0[..align], 0)?;
        Ok(direct)
    }

    /// True if the disk can write the bytes from `offset` on to `into` without a copy.
    ///
    /// ```no_run
    /// # use pagestitch_kernel::direct_read::DirectFile;
    /// # let direct = DirectFile::reopen(&std::fs::File::open("/proc/self/exe")?)?;
    /// assert!(!direct.is_aligned(1, &[0; 3]));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn is_aligned(&self, offset: u64, into: &[u8]) -> bool {
        let whole = |number: usize| number % self.align == 0;
        whole(into.as_ptr().addr()) && whole(into.len()) && whole(offset as usize)
    }

    /// True if no program and no other machine decides how long a read takes: on ext4, xfs, btrfs and f2fs, and for
    /// a block device.
    ///
    /// ```no_run
    /// # use pagestitch_kernel::direct_read::DirectFile;
    /// # let direct = DirectFile::reopen(&std::fs::File::open("/proc/self/exe")?)?;
    /// if !direct.is_on_disk() {
    ///     println!("a FUSE or network file system may hang");
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub const fn is_on_disk(&self) -> bool {
        self.is_on_disk
    }

    /// True if a block of the disk begins at `offset`.
    ///
    /// ```no_run
    /// # use pagestitch_kernel::direct_read::DirectFile;
    /// # let direct = DirectFile::reopen(&std::fs::File::open("/proc/self/exe")?)?;
    /// assert!(direct.has_block_at(4096) && !direct.has_block_at(1));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub const fn has_block_at(&self, offset: u64) -> bool {
        offset % self.align as u64 == 0
    }

    /// As [`fill_from`], which a signal handler may call: false also unless the bytes are
    /// [aligned](Self::is_aligned).
    ///
    /// ```no_run
    /// # use pagestitch_kernel::direct_read::DirectFile;
    /// # let direct = DirectFile::reopen(&std::fs::File::open("/proc/self/exe")?)?;
    /// assert!(!direct.fill_from(1, &mut [0; 3]));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn fill_from(&self, offset: u64, into: &mut [u8]) -> bool {
        self.is_aligned(offset, into) && fill_from(self.file.as_fd(), offset, into)
    }

    pub(crate) const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Fills all of `into` with the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// The errors of `pread(2)`; [`io::ErrorKind::UnexpectedEof`] if the file ends before.
    pub fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.is_aligned(offset, into) {
            return self.file.read_exact_at(into, offset);
        }
        let (mut block, mut done) = (Block::new(), 0);
        while done < into.len() {
            let at = offset + done as u64;
            let inside = at as usize % self.align;
            let wanted = (inside + into.len() - done).next_multiple_of(self.align).min(ROOM);
            let read = match self.file.read_at(&mut block.0[..wanted], at - inside as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            let bytes = read.saturating_sub(inside).min(into.len() - done);
            if bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into[done..done + bytes].copy_from_slice(&block.0[inside..inside + bytes]);
            done += bytes;
        }
        Ok(())
    }
}

impl Block {
    const fn new() -> Self {
        Self([0; ROOM])
    }
}

fn is_on_disk(file: &File) -> io::Result<bool> {
    let on_disk = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC];
    let system = fstatfs(file).map_err(io::Error::from)?.filesystem_type();
    Ok(on_disk.contains(&system) || file.metadata()?.file_type().is_block_device())
}

/// The alignment that direct reads of a file need. Before Linux 6.1 the kernel does not tell: a page then.
fn alignment(file: &File) -> io::Result<usize> {
    let mut told = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string of C, and the kernel writes the one structure.
    #[expect(unsafe_code, reason = "statx")]
    let answer = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            told.as_mut_ptr(),
        )
    };
    Errno::result(answer).map_err(io::Error::from)?;
    // SAFETY: any bytes are such a structure, and all of them are set.
    #[expect(unsafe_code, reason = "the kernel's answer")]
    let told = unsafe { told.assume_init() };
    if told.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(ALIGN_MAX);
    }
    let align = told.stx_dio_mem_align.max(told.stx_dio_offset_align) as usize;
    let is_usable = align.is_power_of_two() && align <= ALIGN_MAX;
    is_usable.then_some(align).ok_or_else(|| io::Error::from(Errno::EINVAL))
}

/// Reads bytes of a file, and keeps none of them in the page cache that was not there before: for long
/// reads, which take less time through the cache. Linux 6.14, and a file system that takes part: ext4, xfs,
/// btrfs.
///
/// # Errors
///
/// `EOPNOTSUPP` where the kernel or the file system cannot; the errors of `pread(2)`.
///
/// ```
/// use pagestitch_kernel::direct_read::read_uncached;
/// use std::fs::File;
/// use std::os::fd::AsFd;
///
/// let (program, mut magic) = (File::open("/proc/self/exe")?, [0; 3]);
/// match read_uncached(program.as_fd(), 1, &mut magic) {
///     Ok(3) => assert_eq!(&magic, b"ELF"),
///     _ => println!("use read_at()"),
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn read_uncached(file: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> io::Result<usize> {
    let vector = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: the kernel writes to `into` alone, which is borrowed mutably.
    #[expect(unsafe_code, reason = "preadv2")]
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset as i64, RWF_DONTCACHE) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

const F2FS_SUPER_MAGIC: FsType = FsType(libc::F2FS_SUPER_MAGIC as _);
const RWF_DONTCACHE: libc::c_int = 0x80;
const ALIGN_MAX: usize = 4096;
/// A page, and the block in which it begins.
const ROOM: usize = 8192;
