//! What a process may do with mapped bytes.

use nix::sys::mman::ProtFlags;

/// What the process may do with a region's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read them. Nothing changes a byte once it is there.
    ReadOnly,
    /// Read them, too. The mapping can be written to, as the kernel moves pages only between such
    /// ([`Uffd::move_donated`](crate::Uffd::move_donated)): it does not stop a stray pointer.
    LogicallyReadOnly,
    /// Read and write them; writes stay private to the region.
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
