//! The features of a userfaultfd, as `UFFDIO_API` numbers them.

use std::fmt;
use std::ops::{BitAnd, BitOr};

/// A set of userfaultfd features, as `UFFDIO_API` numbers them. It keeps bits that this version
/// does not know.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// Write-protect faults on anonymous memory.
    pub const WRITE_PROTECT: Self = Self(1 << 0);
    /// Fork events.
    pub const EVENT_FORK: Self = Self(1 << 1);
    /// Remap events.
    pub const EVENT_REMAP: Self = Self(1 << 2);
    /// Remove events (`MADV_DONTNEED`, `MADV_REMOVE`).
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Missing faults on hugetlbfs.
    pub const MISSING_HUGETLBFS: Self = Self(1 << 4);
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// Unmap events.
    pub const EVENT_UNMAP: Self = Self(1 << 6);
    /// SIGBUS to the faulting thread instead of an event.
    pub const SIGBUS: Self = Self(1 << 7);
    /// The faulting thread's id in the event.
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Minor faults on hugetlbfs.
    pub const MINOR_HUGETLBFS: Self = Self(1 << 9);
    /// Minor faults on shared memory.
    pub const MINOR_SHMEM: Self = Self(1 << 10);
    /// The exact address of a fault instead of the address of its page.
    pub const EXACT_ADDRESS: Self = Self(1 << 11);
    /// Write-protect faults on hugetlbfs and shared memory.
    pub const WRITE_PROTECT_SHMEM: Self = Self(1 << 12);
    /// Write protection of absent pages.
    pub const WRITE_PROTECT_UNPOPULATED: Self = Self(1 << 13);
    /// `UFFDIO_POISON`.
    pub const POISON: Self = Self(1 << 14);
    /// Write-protect faults that the kernel resolves itself.
    pub const WRITE_PROTECT_ASYNC: Self = Self(1 << 15);
    /// `UFFDIO_MOVE`.
    pub const MOVE: Self = Self(1 << 16);

    /// The set with these bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Its bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The set without the features of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// True if all of `other` is in it.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitAnd for Features {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({:#x})", self.0)
    }
}
