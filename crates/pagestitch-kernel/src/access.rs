//! The accesses that a mapping allows.

use nix::sys::mman::ProtFlags;

/// The accesses to a region's bytes that this process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads. A byte never changes once its page is filled.
    ReadOnly,
    /// Reads by agreement: safe code never writes, but the mapping is writable, because the kernel
    /// moves pages only between writable mappings
    /// ([`Uffd::move_donated`](crate::Uffd::move_donated)). The hardware does not stop a write
    /// through a stray pointer.
    LogicallyReadOnly,
    /// Reads and writes. Writes stay private to the region.
    Writable,
}

impl Access {
    pub(crate) const fn protection(self) -> ProtFlags {
        match self {
            Self::ReadOnly => ProtFlags::PROT_READ,
            Self::LogicallyReadOnly | Self::Writable => ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE),
        }
    }
}
