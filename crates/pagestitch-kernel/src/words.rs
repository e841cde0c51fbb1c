//! Tables that cost nothing until they are touched.

use crate::mapping::Mapping;
use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, ProtFlags};
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::slice;
use std::sync::atomic::AtomicU64;

/// A table of atomic words, zero at first. Its size costs address space; only the pages that are touched cost
/// memory, so a table for a region of a tebibyte is as cheap as the part of the region that is used.
pub struct Words {
    mapping: Mapping,
    len: usize,
}

impl Words {
    /// A table of `len` words.
    ///
    /// # Errors
    ///
    /// `ENOMEM` where the process may map no more.
    pub fn new(len: NonZeroUsize) -> Result<Self, Errno> {
        let bytes = len.checked_mul(WORD).ok_or(Errno::ENOMEM)?;
        let mapping = Mapping::new(bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        // One word is not to cost two megabytes. Where there are no huge pages anyway: EINVAL.
        let _ = mapping.advise(MmapAdvise::MADV_NOHUGEPAGE);
        Ok(Self { mapping, len: len.get() })
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words of zeros or of what was stored, page-aligned, and lives as long as `self`.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.mapping.start().as_ptr().cast(), self.len)
        }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Words").field("len", &self.len).finish()
    }
}

const WORD: NonZeroUsize = NonZeroUsize::new(size_of::<AtomicU64>()).unwrap();

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_huge_table_costs_only_what_is_touched() {
        let words = Words::new(NonZeroUsize::new(1 << 36).unwrap()).unwrap(); // 512 GiB of addresses
        words[(1 << 36) - 1].store(5, Ordering::Relaxed);
        assert_eq!(words[(1 << 36) - 1].load(Ordering::Relaxed), 5);
        assert_eq!(words[1 << 35].load(Ordering::Relaxed), 0);
    }
}
