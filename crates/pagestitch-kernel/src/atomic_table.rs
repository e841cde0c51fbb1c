//! Tables that take memory only where they are touched.

use crate::errno::Errno;
use crate::sync::atomic::AtomicU64;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Deref;

/// A table of atomic words, zero at first. Its length costs address space only: a page of the table
/// takes memory once it is touched. The table for a region of a tebibyte costs as much as the used
/// part of the region. A small table is allocated, because a mapping costs five system calls.
pub struct AtomicTable {
    table: Table,
}

impl AtomicTable {
    /// A table of `len` words.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if the process can map no more.
    pub fn new(len: NonZeroUsize) -> Result<Self, Errno> {
        Table::new(len).map(|table| Self { table })
    }
}

impl Deref for AtomicTable {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        self.table.words()
    }
}

impl fmt::Debug for AtomicTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtomicTable").field("len", &self.len()).finish()
    }
}

#[cfg(any(miri, shuttle))]
use in_vec::Table;
#[cfg(not(any(miri, shuttle)))]
use lazy::Table;

#[cfg(not(any(miri, shuttle)))]
mod lazy {
    use super::{AtomicU64, Errno, NonZeroUsize};
    use crate::mapping::OwnedMapping;
    use crate::page::HUGE;
    use nix::sys::mman::{MmapAdvise, ProtFlags};
    use std::ptr::NonNull;
    use std::slice;

    pub(super) struct Table {
        /// Invariant: `len` initialised words from here on, in `_memory`.
        start: NonNull<AtomicU64>,
        len: usize,
        _memory: Memory,
    }

    /// The owner of the words.
    enum Memory {
        Allocated(#[expect(dead_code, reason = "owns the words")] Vec<AtomicU64>),
        Mapped(#[expect(dead_code, reason = "owns the words")] OwnedMapping),
    }

    // SAFETY: the table owns its words, which are atomic.
    #[expect(unsafe_code, reason = "owns memory through a raw pointer")]
    unsafe impl Send for Table {}
    // SAFETY: as above.
    #[expect(unsafe_code, reason = "owns memory through a raw pointer")]
    unsafe impl Sync for Table {}

    impl Table {
        pub(super) fn new(len: NonZeroUsize) -> Result<Self, Errno> {
            let bytes = len.checked_mul(WORD).ok_or(Errno::ENOMEM)?;
            if bytes.get() <= SMALL {
                return Ok(Self::allocated(len.get()));
            }
            let mapping = OwnedMapping::new(bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
            if bytes.get() >= HUGE {
                // One touched word must not cost a huge page. EINVAL on a kernel without huge pages.
                let _ = mapping.advise(MmapAdvise::MADV_NOHUGEPAGE);
            }
            Ok(Self { start: mapping.start().cast(), len: len.get(), _memory: Memory::Mapped(mapping) })
        }

        fn allocated(len: usize) -> Self {
            let words: Vec<_> = (0..len).map(|_| AtomicU64::new(0)).collect();
            let start = NonNull::from(words.as_slice()).cast();
            Self { start, len, _memory: Memory::Allocated(words) }
        }

        #[inline]
        pub(super) fn words(&self) -> &[AtomicU64] {
            // SAFETY: by the field's invariant these are `len` initialised words, which live as long
            // as `self`. All writes to them are atomic.
            #[expect(unsafe_code, reason = "owned memory becomes a slice")]
            unsafe {
                slice::from_raw_parts(self.start.as_ptr(), self.len)
            }
        }
    }

    const WORD: NonZeroUsize = NonZeroUsize::new(size_of::<AtomicU64>()).unwrap();
    /// The most bytes of a table that is allocated.
    const SMALL: usize = 16 << 10;
}

/// For Miri, which cannot map memory, and shuttle, whose atomics the words must be.
#[cfg(any(miri, shuttle))]
mod in_vec {
    use super::{AtomicU64, Errno, NonZeroUsize};

    pub(super) struct Table(Vec<AtomicU64>);

    impl Table {
        #[expect(clippy::unnecessary_wraps, reason = "the signature of the mapped table")]
        pub(super) fn new(len: NonZeroUsize) -> Result<Self, Errno> {
            Ok(Self((0..len.get()).map(|_| AtomicU64::new(0)).collect()))
        }

        pub(super) fn words(&self) -> &[AtomicU64] {
            &self.0
        }
    }
}

#[cfg(all(test, not(any(miri, shuttle))))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_huge_table_takes_memory_only_where_it_is_touched() {
        let words = AtomicTable::new(NonZeroUsize::new(1 << 36).unwrap()).unwrap(); // 512 GiB of addresses
        words[(1 << 36) - 1].store(5, Ordering::Relaxed);
        assert_eq!(words[(1 << 36) - 1].load(Ordering::Relaxed), 5);
        assert_eq!(words[1 << 35].load(Ordering::Relaxed), 0);
    }
}
