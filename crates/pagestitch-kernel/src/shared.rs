//! Memory that other processes may change while it is shown: files, memfds that are not sealed,
//! mappings whose descriptor is unknown.
//!
//! No `&[u8]` may refer to it. The kernel reads and writes it on behalf of this process: it has no
//! data races, and a page past a file's end is an error and not a signal.

use crate::access::Access;
use crate::errno::Errno;
use crate::file_readahead::FileCache;
use crate::inode::{FileSystem, Inode};
use crate::limits::{Limit, with_descriptors};
use crate::mapping::OwnedMapping;
use crate::memfd::UnsealedMemfd;
use crate::page::{AddressRange, HUGE, PageSize};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_void};
use nix::sys::mman::ProtFlags;
use nix::unistd::{Whence, geteuid, lseek};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::{fmt, fs, io};

/// A regular file or a memfd, of this process or another one.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    len: u64,
    writable: bool,
    granule: PageSize,
    /// True if its file system maps all files, so that a mapping of this one cannot be refused.
    surely_maps: bool,
    identity: (u64, u64),
    cache: FileCache,
}

impl SharedFile {
    /// Opens a file, for writing too if `access` is writable. If the soft limit on descriptors
    /// stops it, raises that limit to the hard one.
    ///
    /// # Errors
    ///
    /// [`FileError`] names the file: the error of `open(2)`; the file is not a regular one, or it is
    /// empty.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self, FileError> {
        // Non-blocking, because the open of a named pipe waits for a writer. The flag has no effect
        // on regular files.
        let mut options = fs::OpenOptions::new();
        options.read(true).write(access == Access::Writable).custom_flags(OFlag::O_NONBLOCK.bits());
        let path = path.as_ref();
        // The flags of this open refuse none of the uses that `readable` checks.
        let opened = with_descriptors(|| options.open(path)).and_then(|file| Self::of(file, |_| Ok(access)));
        opened.map_err(|error| FileError { path: path.to_owned(), error })
    }

    /// Takes an open file. `access_of` tells how it is open, and refuses flags that do not suit.
    fn of(file: File, access_of: impl FnOnce(&File) -> io::Result<Access>) -> io::Result<Self> {
        let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let inode = Inode::of(&file)?;
        if let Some(why) = not_mappable(&inode) {
            return refuse(why);
        }
        let system = inode.file_system(&file)?;
        let Inode { len, owner, identity, .. } = inode;
        if len == 0 {
            return refuse(match system.is_proc {
                true => "a file of /proc has no length and cannot be mapped: copy its bytes into memory",
                false => "the file is empty: give it a length first",
            });
        }
        let writable = access_of(&file)? == Access::Writable;
        let FileSystem { granule, maps_all_files: surely_maps, is_in_memory, .. } = system;
        let shows_residency = writable || owner == geteuid().as_raw();
        let cache = FileCache::new(identity.0, is_in_memory, shows_residency);
        Ok(Self { file, len, writable, granule, surely_maps, identity, cache })
    }

    /// The number of bytes that it had when it was taken.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Always false, because an empty file is refused.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The unit in which the kernel maps it: the system's page, or the huge page of a file in
    /// hugetlbfs.
    #[must_use]
    pub const fn granule(&self) -> PageSize {
        self.granule
    }

    /// True if its descriptor allows writes.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    /// True if the kernel does not refuse to map it.
    pub(crate) const fn surely_maps(&self) -> bool {
        self.surely_maps
    }

    /// Its page cache.
    #[must_use]
    pub const fn cache(&self) -> FileCache {
        self.cache
    }

    /// The numbers of its device and its inode, which no other file has at the same time.
    #[must_use]
    pub const fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The first part of `range` without bytes in the file: in a memfd, pages that were never
    /// written.
    ///
    /// The time depends on the pages of the range and not on the length of the file, because
    /// `SEEK_DATA` stops at the first present page, while `SEEK_HOLE` walks all pages of a run.
    ///
    /// # Errors
    ///
    /// The errno of `lseek(2)`; none is known to occur for a memfd.
    pub fn next_hole(&self, range: &Range<u64>) -> Result<Option<Range<u64>>, Errno> {
        let page = PageSize::system().bytes() as u64;
        let mut at = range.start;
        while at < range.end {
            let data = match lseek(&self.file, at as i64, Whence::SeekData).map_err(Errno::of) {
                Ok(data) => data as u64,
                // ENXIO: the file has a hole up to its end.
                Err(Errno::ENXIO) => u64::MAX,
                Err(errno) => return Err(errno),
            };
            if data > at {
                return Ok(Some(at..data.min(range.end)));
            }
            at = (at / page + 1) * page;
        }
        Ok(None)
    }

    /// The size of the pages, in bytes, that a write to the file may allocate. The pages of tmpfs
    /// are larger than the system's while its huge pages are *on* (`huge=` of its mount; for a
    /// memfd, `shmem_enabled`). A page is present as a whole from its first byte on.
    ///
    /// # Errors
    ///
    /// The errno of `fstat(2)`.
    pub fn page_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blksize())
    }

    /// The file, to read it at an offset.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

/// A file that cannot be opened, or cannot be mapped.
#[derive(Debug)]
pub struct FileError {
    /// The path of the file.
    pub path: PathBuf,
    /// The reason.
    pub error: io::Error,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot open {}: {}", self.path.display(), self.error)?;
        match self.error.raw_os_error() {
            Some(libc::EMFILE) => write!(f, "; {}", Limit::of_descriptors()),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for FileError {}

/// The reason, with its kind and number, and without the path.
impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        error.error
    }
}

/// Takes a descriptor, also one that another process has sent, if a mapping of its file shows the
/// bytes of the file.
impl TryFrom<OwnedFd> for SharedFile {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        Self::of(File::from(fd), readable)
    }
}

/// The reason why a mapping of an inode does not show the bytes of a file; `None` if it does.
fn not_mappable(inode: &Inode) -> Option<&'static str> {
    match inode.kind() {
        libc::S_IFREG => None,
        libc::S_IFDIR => Some("a directory: name a file in it"),
        libc::S_IFBLK => Some("a block device is read and not mapped: use a FileSource"),
        // A mapping of a device may mean anything.
        _ => Some("neither a regular file nor a memfd: open one of these, or copy the bytes into memory"),
    }
}

/// Takes an open file.
impl TryFrom<File> for SharedFile {
    type Error = io::Error;

    fn try_from(file: File) -> io::Result<Self> {
        Self::try_from(OwnedFd::from(file))
    }
}

/// Takes a second descriptor of the memfd, so that its file can be read and written meanwhile.
impl TryFrom<&UnsealedMemfd> for SharedFile {
    type Error = io::Error;

    fn try_from(memfd: &UnsealedMemfd) -> io::Result<Self> {
        Self::try_from(memfd.file().try_clone()?)
    }
}

/// The access to a file through a descriptor that can be read at any offset into any buffer.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] with the reason: `O_WRONLY`, `O_PATH`, `O_DIRECT`.
pub fn readable(file: &impl AsFd) -> io::Result<Access> {
    let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_PATH) {
        return refuse("open with O_PATH, which only names a file: open it for reading");
    }
    if flags & OFlag::O_ACCMODE == OFlag::O_WRONLY {
        return refuse("open for writing only: open it for reading too");
    }
    if flags.contains(OFlag::O_DIRECT) {
        return refuse("open with O_DIRECT, which reads aligned blocks only: open it without");
    }
    let writable = flags & OFlag::O_ACCMODE == OFlag::O_RDWR;
    Ok(if writable { Access::Writable } else { Access::ReadOnly })
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The readers of bytes that a view writes to a file's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// All processes that have the file: `MAP_SHARED`.
    Shared,
    /// This view alone: a written page becomes its own. `MAP_PRIVATE`.
    CopyOnWrite,
}

/// A second mapping of a *shared* mapping whose descriptor is unknown: `mremap(2)` with an old size
/// of 0.
#[derive(Debug)]
pub struct Alias {
    pub(crate) mapping: OwnedMapping,
    /// The end of each mapping that it was made of, ascending. A duplicate does not continue in the
    /// next mapping but in its own file.
    ends: Vec<usize>,
}

impl Alias {
    /// Makes an alias of `bytes` bytes at `start`. It outlives the mapping that it was made of.
    ///
    /// # Errors
    ///
    /// [`AliasError`] names the obstacle and an alternative.
    ///
    /// # Safety
    ///
    /// - As long as the alias lives, no `&mut [u8]` to the bytes exists, and no `&[u8]` if they are
    ///   written to.
    #[expect(unsafe_code, reason = "makes a second way to memory that may have references to it")]
    pub unsafe fn of(start: NonNull<u8>, bytes: usize) -> Result<Self, AliasError> {
        let address = start.addr().get();
        let page = PageSize::system();
        let range = AddressRange::new(address, bytes, page).filter(|range| range.bytes() > 0);
        let range = range.ok_or(AliasError::Unaligned { start: address, bytes, page })?;
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let parts = shared_parts(range, &maps)?;
        refuse_huge(range, &maps)?;
        let refused = |errno| AliasError::Refused { start: address, bytes, errno };
        let bytes = std::num::NonZeroUsize::new(bytes).expect("checked above");
        // Holds the addresses until the parts replace it.
        let mapping = OwnedMapping::new(bytes, ProtFlags::PROT_NONE).map_err(refused)?;
        let ends = parts.iter().map(|part| part.end() - address).collect();
        for part in parts {
            let to = mapping.at(part.start() - address);
            duplicate(part, to).map_err(refused)?;
        }
        Ok(Self { mapping, ends })
    }

    /// The number of mappings that it was made of. Each view of it has as many.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.ends.len()
    }

    /// The end of the mapping that holds the byte at `offset`.
    pub(crate) fn end_of(&self, offset: usize) -> usize {
        self.ends[self.ends.partition_point(|&end| end <= offset)]
    }

    /// The number of its bytes, a multiple of the page size.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.mapping.bytes()
    }

    /// Always false, because an empty alias cannot be made.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.mapping.bytes() == 0
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// `EFAULT` if they are past the end of a truncated file.
    ///
    /// # Panics
    ///
    /// If the bytes are not inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        crate::copy::read(&self.mapping, offset, into)
    }
}

/// Maps the pages of a shared mapping a second time, over `to`.
pub(crate) fn duplicate(part: AddressRange, to: NonNull<c_void>) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let from = std::ptr::with_exposed_provenance_mut::<c_void>(part.start());
    // SAFETY: an old size of 0 leaves `part` unchanged. `to` is inside a mapping of the caller, and
    // no reference to its bytes exists.
    #[expect(unsafe_code, reason = "mremap")]
    let answer = unsafe { libc::mremap(from, 0, part.bytes(), flags, to.as_ptr()) };
    if answer == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// Refuses huge pages of hugetlbfs: the kernel maps them as wholes, and would replace more than the
/// duplicated part.
fn refuse_huge(range: AddressRange, maps: &str) -> Result<(), AliasError> {
    let met = maps
        .lines()
        .filter_map(mapping_of)
        .filter(|(start, end, _)| *start < range.end() && range.start() < *end && (start | end) % HUGE == 0);
    for (start, _, _) in met {
        if is_huge(start) {
            return Err(AliasError::Huge { address: start.max(range.start()) });
        }
    }
    Ok(())
}

/// True if the shared mapping at `start`, of at least [`HUGE`] bytes, can only be duplicated in
/// huge pages. Tries to duplicate its second small page.
fn is_huge(start: usize) -> bool {
    let page = PageSize::system().bytes();
    let from = std::ptr::with_exposed_provenance_mut::<c_void>(start + page);
    // SAFETY: an old size of 0 leaves the mapping unchanged, and the kernel chooses the address of
    // the new one.
    #[expect(unsafe_code, reason = "mremap")]
    let answer = unsafe { libc::mremap(from, 0, page, libc::MREMAP_MAYMOVE) };
    if answer == libc::MAP_FAILED {
        return Errno::last() == Errno::EINVAL;
    }
    // SAFETY: the page was mapped above, and no other code has its address.
    #[expect(unsafe_code, reason = "munmap")]
    let _ = unsafe { libc::munmap(answer, page) };
    false
}

/// The parts of a range, one for each mapping, if all of them are shared.
fn shared_parts(range: AddressRange, maps: &str) -> Result<Vec<AddressRange>, AliasError> {
    let mut parts = Vec::new();
    let mut next = range.start();
    for (start, end, shared) in maps.lines().filter_map(mapping_of) {
        if end <= next || start >= range.end() {
            continue;
        }
        if start > next {
            break;
        }
        if !shared {
            return Err(AliasError::Private { address: next });
        }
        let end = end.min(range.end());
        parts
            .push(AddressRange::new(next, end - next, PageSize::system()).expect("mappings are whole pages"));
        next = end;
    }
    if next < range.end() { Err(AliasError::Unmapped { address: next }) } else { Ok(parts) }
}

/// The start, the end, and whether it is shared, of a line of `/proc/self/maps`: `7f00-7f10 rw-s
/// ...`.
fn mapping_of(line: &str) -> Option<(usize, usize, bool)> {
    let (addresses, rest) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    Some((address(start)?, address(end)?, rest.as_bytes().get(3) == Some(&b's')))
}

/// The obstacle to an alias. Its message names an alternative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AliasError {
    /// The memory is not whole pages.
    Unaligned {
        /// Its first address.
        start: usize,
        /// Its length.
        bytes: usize,
        /// The page size, of which both must be multiples.
        page: PageSize,
    },
    /// Part of the memory is private.
    Private {
        /// The first private address.
        address: usize,
    },
    /// Part of the memory is in huge pages of hugetlbfs, or a device's.
    Huge {
        /// The first such address.
        address: usize,
    },
    /// Nothing is mapped in part of the memory.
    Unmapped {
        /// The first address without a mapping.
        address: usize,
    },
    /// The kernel refused the second mapping.
    Refused {
        /// Its first address.
        start: usize,
        /// Its length.
        bytes: usize,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl fmt::Display for AliasError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unaligned { start, bytes, page } => write!(
                f,
                "{bytes} bytes at {start:#x} are not whole pages of {page}: an alias has whole pages; copy the edges"
            ),
            Self::Private { address } => write!(
                f,
                "the memory at {address:#x} is private to this process and cannot be mapped twice: donate it \
                 (Pages), have it copied (Memory), or allocate it in a memfd"
            ),
            Self::Huge { address } => write!(
                f,
                "the memory at {address:#x} is in huge pages of hugetlbfs, or a device's, and cannot be mapped twice a page at a \
                 time: show its descriptor (SharedFile, Memfd, Physical)"
            ),
            Self::Unmapped { address } => {
                write!(f, "nothing is mapped at {address:#x}: make the alias of mapped memory only")
            }
            Self::Refused { start, bytes, errno } => {
                write!(f, "cannot map {bytes} bytes at {start:#x} a second time: {errno}")
            }
        }
    }
}

impl std::error::Error for AliasError {}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "10000-20000 rw-s 00000000 00:01 7 /memfd:a\n\
                        20000-28000 r--s 00000000 00:01 8 /memfd:b\n\
                        30000-38000 rw-p 00000000 00:00 0 \n";

    fn parts(start: usize, bytes: usize) -> Result<Vec<(usize, usize)>, AliasError> {
        let range = AddressRange::new(start, bytes, PageSize::system()).unwrap();
        shared_parts(range, MAPS).map(|parts| parts.iter().map(|part| (part.start(), part.end())).collect())
    }

    #[test]
    fn an_alias_is_cut_at_the_mappings_that_it_crosses() {
        assert_eq!(parts(0x12000, 0x2000), Ok(vec![(0x12000, 0x14000)]));
        assert_eq!(parts(0x1f000, 0x3000), Ok(vec![(0x1f000, 0x20000), (0x20000, 0x22000)]));
    }

    #[test]
    fn an_alias_of_private_memory_or_a_gap_is_refused_by_its_address() {
        assert_eq!(parts(0x30000, 0x1000), Err(AliasError::Private { address: 0x30000 }));
        assert_eq!(parts(0x27000, 0x2000), Err(AliasError::Unmapped { address: 0x28000 }));
        assert_eq!(parts(0x1000, 0x1000), Err(AliasError::Unmapped { address: 0x1000 }));
    }
}
