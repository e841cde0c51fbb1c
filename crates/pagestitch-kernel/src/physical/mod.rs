//! Physical memory: ranges of `/dev/mem`, resource files of PCI devices, and this process's own
//! pages by their frames.
//!
//! ```no_run
//! use pagestitch_kernel::physical::{Caching, Physical};
//! use pagestitch_kernel::Access;
//!
//! # #[expect(unsafe_code, reason = "physical memory")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 64 MiB that the kernel does not use: memmap=64M$0x8000000 on its command line.
//! // SAFETY: no other process uses that memory, and a read of it has no side effect.
//! let memory = unsafe { Physical::dev_mem(0x800_0000..0xc00_0000, Access::ReadOnly, Caching::Cached) }?;
//! let mut header = [0; 8];
//! memory.read_at(0, &mut header)?;
//! # Ok(())
//! # }
//! ```
//!
//! | file | its subject |
//! |---|---|
//! | `refusal` | the reason why the kernel refuses, from its own tables |
//! | `own_memory` | private memory of this process: pinned, its frames looked up |
//! | `pin` | a pin of pages in their frames |

mod own_memory;
mod pin;
mod refusal;

pub use refusal::{PhysicalError, Refusal};

use crate::access::Access;
use crate::copy;
use crate::errno::Errno;
use crate::mapping::OwnedMapping;
use crate::page::PageSize;
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use pin::Pin;
use refusal::DEV_MEM;
use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// Whether accesses go through the CPU's caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Caching {
    /// Through the caches, if the range is memory: the kernel's default.
    #[default]
    Cached,
    /// Past the caches (`O_SYNC`): for the registers of a device.
    Uncached,
}

/// A range of physical memory that can be mapped: whole pages.
///
/// Making one is `unsafe`, because a read of a device may have side effects, and a write to unknown
/// memory may do anything. Use is safe, because its maker has vouched for it.
#[derive(Debug)]
pub struct Physical {
    file: Arc<File>,
    /// The range in the file. In `/dev/mem`, offsets are physical addresses.
    range: Range<u64>,
    access: Access,
    name: String,
    /// Keeps the pages in their frames.
    _pin: Option<Arc<Pin>>,
}

impl Physical {
    /// A range of physical addresses, through `/dev/mem`. See `mem(4)`.
    ///
    /// # Errors
    ///
    /// [`PhysicalError`] names the range, the reason (no node, no capability,
    /// `CONFIG_STRICT_DEVMEM`, a driver that owns it, lockdown, a mapping with other caching) and
    /// the remedy.
    ///
    /// # Safety
    ///
    /// - Reads of the range, and writes to it if `access` allows them, break no assumption of Rust
    ///   or the kernel: the range is reserved memory, or a device that allows accesses of eight
    ///   bytes and of one byte.
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn dev_mem(
        range: Range<u64>,
        access: Access,
        caching: Caching,
    ) -> Result<Self, PhysicalError> {
        let name = format!("physical {:#x}..{:#x}", range.start, range.end);
        refusal::before_dev_mem(&name)?;
        let file = open(Path::new(DEV_MEM), access, caching)
            .map_err(|errno| refusal::of_open(&name, Path::new(DEV_MEM), errno))?;
        Self::tried(Arc::new(file), range, access, name, None)
    }

    /// A memory resource (BAR) of a PCI device: all of `/sys/bus/pci/devices/ADDRESS/resourceN`.
    ///
    /// # Errors
    ///
    /// [`PhysicalError`], as [`dev_mem`](Self::dev_mem); a resource of I/O ports; a device that
    /// does not decode memory.
    ///
    /// # Safety
    ///
    /// - As for [`dev_mem`](Self::dev_mem).
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn pci_resource(
        path: impl AsRef<Path>,
        access: Access,
        caching: Caching,
    ) -> Result<Self, PhysicalError> {
        let path = path.as_ref();
        let name = format!("PCI resource {}", path.display());
        let file = open(path, access, caching).map_err(|errno| refusal::of_open(&name, path, errno))?;
        let bytes = file.metadata().map_or(0, |metadata| metadata.len());
        refusal::before_pci(&name, path, bytes)?;
        Self::tried(Arc::new(file), 0..bytes, access, name, None)
    }

    /// Maps the range once, so that a refusal comes here and not later.
    fn tried(
        file: Arc<File>,
        range: Range<u64>,
        access: Access,
        name: String,
        pin: Option<Arc<Pin>>,
    ) -> Result<Self, PhysicalError> {
        let page = PageSize::system().bytes() as u64;
        if range.start >= range.end || range.start % page != 0 || range.end % page != 0 {
            return Err(PhysicalError { name, refusal: Refusal::NotWholePages });
        }
        let this = Self { file, range, access, name, _pin: pin };
        match this.map(0..this.len()) {
            Ok(_) => Ok(this),
            Err(errno) => Err(refusal::of_mapping(&this.name, &this.range, this.is_dev_mem(), errno)),
        }
    }

    /// The number of its bytes, a multiple of the page size.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Always false, because an empty range is refused.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.range.start == self.range.end
    }

    /// The accesses that it allows.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// Its name: its addresses, or its path.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Copies bytes out, in accesses of eight bytes where they are aligned.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`.
    ///
    /// # Panics
    ///
    /// If the bytes are not inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        if into.is_empty() {
            return Ok(());
        }
        let (mapping, inside) = self.map_around(offset, into.len())?;
        let from = mapping.at(inside).cast::<u8>();
        // SAFETY: as many bytes are mapped for reading, and the maker of `self` has vouched for
        // reads of them.
        #[expect(unsafe_code, reason = "reads through a raw pointer")]
        unsafe {
            copy::read_words(from.as_ptr(), into)
        };
        Ok(())
    }

    /// Writes bytes, in accesses of eight bytes where they are aligned.
    ///
    /// # Errors
    ///
    /// `EACCES` if it allows only reads; the errno of `mmap(2)`.
    ///
    /// # Panics
    ///
    /// If the bytes are not inside.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        if self.access != Access::Writable {
            return Err(Errno::EACCES);
        }
        if from.is_empty() {
            return Ok(());
        }
        let (mapping, inside) = self.map_around(offset, from.len())?;
        let to = mapping.at(inside).cast::<u8>();
        // SAFETY: as many bytes are mapped for writing, and the maker of `self` has vouched for
        // writes to them.
        #[expect(unsafe_code, reason = "writes through a raw pointer")]
        unsafe {
            copy::write_words(to.as_ptr(), from)
        };
        Ok(())
    }

    pub(crate) const fn file_offset(&self, offset: u64) -> u64 {
        self.range.start + offset
    }

    pub(crate) const fn file_end(&self) -> u64 {
        self.range.end
    }

    /// A mapping of the pages around some bytes, and the place of the first byte in it.
    fn map_around(&self, offset: u64, bytes: usize) -> Result<(OwnedMapping, usize), Errno> {
        let end = offset.checked_add(bytes as u64).filter(|&end| end <= self.len());
        let end = end.unwrap_or_else(|| panic!("{bytes} bytes from {offset} are not inside {}", self.name));
        let page = PageSize::system();
        let pages = page.offsets(page.covering(&(offset..end)));
        let inside = (offset - pages.start) as usize;
        Ok((self.map(pages)?, inside))
    }

    fn map(&self, offsets: Range<u64>) -> Result<OwnedMapping, Errno> {
        let bytes = usize::try_from(offsets.end - offsets.start).ok().and_then(NonZeroUsize::new);
        let bytes = bytes.ok_or(Errno::ENOMEM)?;
        let start = self.file_offset(offsets.start);
        let protection: ProtFlags = self.access.protection();
        OwnedMapping::of_file_at(self.file.as_fd(), start, bytes, protection, MapFlags::MAP_SHARED)
    }

    fn is_dev_mem(&self) -> bool {
        !self.name.starts_with("PCI")
    }
}

impl AsFd for Physical {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(path: &Path, access: Access, caching: Caching) -> Result<File, Errno> {
    let flags = match caching {
        Caching::Cached => OFlag::O_CLOEXEC,
        Caching::Uncached => OFlag::O_CLOEXEC | OFlag::O_SYNC,
    };
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::Writable).custom_flags(flags.bits());
    options.open(path).map_err(Errno::of)
}
