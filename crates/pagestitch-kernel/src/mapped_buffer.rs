//! A buffer that lies outside of the allocator's memory: a thread takes one although another thread, which waits
//! for it, holds the lock of the allocator.

use crate::errno::Errno;
use crate::mapping::OwnedMapping;
use crate::page::PageSize;
use nix::sys::mman::ProtFlags;
use std::num::NonZeroUsize;
use std::{fmt, slice};

/// A buffer of whole pages. Its bytes are 0 at first; a page that is not touched takes no memory.
///
/// ```
/// use pagestitch_kernel::PageSize;
/// use pagestitch_kernel::mapped_buffer::MappedBuffer;
/// use std::num::NonZeroUsize;
///
/// let mut buffer = MappedBuffer::new(NonZeroUsize::MIN)?;
/// assert!(buffer.bytes().iter().all(|&byte| byte == 0));
/// assert_eq!(buffer.bytes().len(), PageSize::system().bytes());
/// # Ok::<(), pagestitch_kernel::Errno>(())
/// ```
pub struct MappedBuffer(OwnedMapping);

impl MappedBuffer {
    /// A buffer of so many pages.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`: `ENOMEM`.
    ///
    /// # Panics
    ///
    /// If the pages have more bytes than there are addresses.
    pub fn new(pages: NonZeroUsize) -> Result<Self, Errno> {
        let page = NonZeroUsize::new(PageSize::system().bytes())
            .expect("a page has bytes, because its size is a power of two");
        let bytes = pages.checked_mul(page).expect("a buffer has fewer bytes than there are addresses");
        OwnedMapping::new(bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map(Self)
    }

    /// The bytes of all pages.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is owned, readable and writable, and `self` is borrowed mutably.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts_mut(self.0.start().as_ptr().cast(), self.0.bytes())
        }
    }
}

impl fmt::Debug for MappedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedBuffer").field("bytes", &self.0.bytes()).finish()
    }
}
