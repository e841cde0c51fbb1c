//! Memory that others may change while it is shown: files, memfds that are not sealed, mappings whose descriptor is
//! unknown.
//!
//! What changes behind a reader's back is nothing for a `&[u8]`. It is read and written by the kernel, on behalf of
//! this process: a race is none there, and a page past a file's end is an error and not a signal.

use crate::access::Access;
use crate::granule::granule_of;
use crate::limits::with_descriptors;
use crate::mapping::OwnedMapping;
use crate::page::{AddressRange, HUGE, PageSize};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_void};
use nix::sys::mman::ProtFlags;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::{fmt, fs, io};

/// A regular file or a memfd, of this process or another's.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    len: u64,
    writable: bool,
    granule: PageSize,
}

impl SharedFile {
    /// Opens a file, for writing too where it is to be shown writable and shared. Where the soft limit on descriptors is in the way, it is
    /// raised to the hard one.
    ///
    /// # Errors
    ///
    /// What `open(2)` says, and whatever is not a regular file or is empty.
    pub fn open(path: impl AsRef<Path>, access: Access) -> io::Result<Self> {
        // Non-blocking, or opening a named pipe would wait for somebody to write to it. Files do not care.
        let mut options = fs::OpenOptions::new();
        options.read(true).write(access == Access::Writable).custom_flags(OFlag::O_NONBLOCK.bits());
        let path = path.as_ref();
        Self::try_from(OwnedFd::from(with_descriptors(|| options.open(path))?))
    }

    /// How many bytes it had when it was taken.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none: such a file is refused.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it is mapped in multiples of: the system's page size, or that of its huge pages where it is of hugetlbfs.
    #[must_use]
    pub const fn granule(&self) -> PageSize {
        self.granule
    }

    /// Whether its descriptor allows writing to it.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    /// The first part of `range` that the file has no bytes for: of a memfd, pages that were never written.
    ///
    /// The time depends on the pages of the range, not on how much the file has: `SEEK_DATA` stops at the first page that is
    /// there, where `SEEK_HOLE` walks all pages that follow each other.
    ///
    /// # Errors
    ///
    /// The errno of `lseek(2)`; none is known to occur for a memfd.
    pub fn next_hole(&self, range: &Range<u64>) -> Result<Option<Range<u64>>, Errno> {
        let page = PageSize::system().bytes() as u64;
        let mut at = range.start;
        while at < range.end {
            let data = match lseek(&self.file, at as i64, Whence::SeekData) {
                Ok(data) => data as u64,
                // Nothing but a hole up to the end.
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

    /// Whether the file is one of tmpfs or hugetlbfs, as memfds are: its pages are the only place of its bytes.
    ///
    /// # Errors
    ///
    /// The errno of `fstatfs(2)`.
    pub fn is_in_memory(&self) -> Result<bool, Errno> {
        let kind = fstatfs(&self.file)?.filesystem_type();
        Ok([TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&kind))
    }

    /// The size of the pages that a write to the file may bring, in bytes: those of tmpfs are larger than the system's where huge
    /// pages are on *now* (`huge=` of its mount; of a memfd, `shmem_enabled`). A page is present as a whole from its first byte on.
    ///
    /// # Errors
    ///
    /// The errno of `fstat(2)`.
    pub fn page_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blksize())
    }

    /// To read it at an offset.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

/// Takes a descriptor, received from another process perhaps, if it is one that can be mapped for what it holds.
impl TryFrom<OwnedFd> for SharedFile {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let metadata = file.metadata()?;
        // A device may give meanings of its own to being mapped.
        if !metadata.is_file() {
            return refuse("neither a regular file nor a memfd");
        }
        if metadata.len() == 0 {
            return refuse("empty: there is nothing to show");
        }
        let mode = readable(&file)?;
        let granule = granule_of(&file)?;
        Ok(Self { len: metadata.len(), writable: mode == OFlag::O_RDWR, file, granule })
    }
}

/// The access mode of a descriptor that can be read from at any offset into any buffer.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] with the reason: `O_WRONLY`, `O_PATH`, `O_DIRECT`.
pub fn readable(file: &impl AsFd) -> io::Result<OFlag> {
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
    Ok(flags & OFlag::O_ACCMODE)
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Who sees what is written to a file's pages in a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Everybody who has the file: `MAP_SHARED`.
    Shared,
    /// Nobody: a page that is written to becomes this view's own. `MAP_PRIVATE`.
    CopyOnWrite,
}

/// A second mapping of a *shared* mapping whose descriptor is not known: `mremap(2)` with an old size of 0.
#[derive(Debug)]
pub struct Alias {
    pub(crate) mapping: OwnedMapping,
    /// Where each mapping that it was made of ends, ascending. What is duplicated of one goes on in its file, not in the next mapping.
    ends: Vec<usize>,
}

impl Alias {
    /// Makes an alias of `bytes` bytes at `start`. It outlives the mapping that it was made of.
    ///
    /// # Errors
    ///
    /// [`AliasError`] says what is in the way and what would work instead.
    ///
    /// # Safety
    ///
    /// - Nobody has, as long as the alias lives, a `&mut [u8]` to the bytes, nor a `&[u8]` if they are written to.
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
        // What is to be replaced, part by part: until then it holds the place.
        let mapping = OwnedMapping::new(bytes, ProtFlags::PROT_NONE).map_err(refused)?;
        let ends = parts.iter().map(|part| part.end() - address).collect();
        for part in parts {
            let to = mapping.at(part.start() - address);
            duplicate(part, to).map_err(refused)?;
        }
        Ok(Self { mapping, ends })
    }

    /// How many mappings it was made of: as many show it a second time.
    #[must_use]
    pub const fn mappings(&self) -> usize {
        self.ends.len()
    }

    /// The end of the mapping that holds the byte at `offset`.
    pub(crate) fn end_of(&self, offset: usize) -> usize {
        self.ends[self.ends.partition_point(|&end| end <= offset)]
    }

    /// How many bytes it has: a multiple of the page size.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.mapping.bytes()
    }

    /// Whether it has none: such an alias cannot be made.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.mapping.bytes() == 0
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// `EFAULT` where they cannot be read: past the end of a file that was truncated.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        crate::copy::read(&self.mapping, offset, into)
    }
}

/// Maps the pages of a shared mapping a second time, over `to`.
pub(crate) fn duplicate(part: AddressRange, to: NonNull<c_void>) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let from = std::ptr::with_exposed_provenance_mut::<c_void>(part.start());
    // SAFETY: an old size of 0 leaves `part` as it is; `to` lies in a mapping of the caller's that nobody looks at.
    #[expect(unsafe_code, reason = "mremap")]
    let answer = unsafe { libc::mremap(from, 0, part.bytes(), flags, to.as_ptr()) };
    if answer == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// Huge pages of hugetlbfs are mapped as wholes: what is duplicated of them would replace what is behind it.
fn refuse_huge(range: AddressRange, maps: &str) -> Result<(), AliasError> {
    let met = maps.lines().filter_map(mapping_of).filter(|(start, end, _)| {
        *start < range.end() && range.start() < *end && (start | end).is_multiple_of(HUGE)
    });
    for (start, _, _) in met {
        if is_huge(start) {
            return Err(AliasError::Huge { address: start.max(range.start()) });
        }
    }
    Ok(())
}

/// Whether the shared mapping of at least [`HUGE`] bytes that begins at `start` has to be duplicated in huge pages: asked by
/// duplicating its second small page.
fn is_huge(start: usize) -> bool {
    let page = PageSize::system().bytes();
    let from = std::ptr::with_exposed_provenance_mut::<c_void>(start + page);
    // SAFETY: an old size of 0 leaves what is there as it is, and the kernel chooses where the second mapping is.
    #[expect(unsafe_code, reason = "mremap")]
    let answer = unsafe { libc::mremap(from, 0, page, libc::MREMAP_MAYMOVE) };
    if answer == libc::MAP_FAILED {
        return Errno::last() == Errno::EINVAL;
    }
    // SAFETY: the page that was just mapped, which nobody has seen.
    #[expect(unsafe_code, reason = "munmap")]
    let _ = unsafe { libc::munmap(answer, page) };
    false
}

/// The parts of a range, a mapping each, if all of them are shared.
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

/// Start, end, and whether it is shared, of a line of `/proc/self/maps`: `7f00-7f10 rw-s ...`.
fn mapping_of(line: &str) -> Option<(usize, usize, bool)> {
    let (addresses, rest) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    Some((address(start)?, address(end)?, rest.as_bytes().get(3) == Some(&b's')))
}

/// Why there is no alias of some memory, and what would work instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AliasError {
    /// Not whole pages.
    Unaligned {
        /// Its first address.
        start: usize,
        /// Its length.
        bytes: usize,
        /// What both have to be multiples of.
        page: PageSize,
    },
    /// There is private memory in it.
    Private {
        /// The first such address.
        address: usize,
    },
    /// There are huge pages of hugetlbfs in it, or a device's memory.
    Huge {
        /// The first such address.
        address: usize,
    },
    /// There is nothing mapped in part of it.
    Unmapped {
        /// The first such address.
        address: usize,
    },
    /// The kernel refused.
    Refused {
        /// Its first address.
        start: usize,
        /// Its length.
        bytes: usize,
        /// What the kernel said.
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
            Self::Unmapped { address } => write!(f, "there is nothing mapped at {address:#x}"),
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
