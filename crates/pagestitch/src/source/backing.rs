//! A source as the planner and the fill see it.

use super::contract::Source;
use super::shared::{Mapped, Shared, SharedKind};
use super::{Fetched, Hole, Memfd, Memory};
use pagestitch_kernel::PageSize;
use pagestitch_kernel::pages::Donated;
use std::fmt;
use std::sync::Arc;

/// A source as the planner and the fill see it: what can be done with it better than to read it.
#[derive(Clone)]
pub(crate) enum Backing {
    Memory(Memory),
    Memfd(Memfd),
    Donated(Arc<Donated>),
    Shared(Shared),
    Hole(Hole),
    Read(Arc<dyn Source>),
    Fetched(Fetched),
    Mapped(Arc<Mapped>),
}

impl Backing {
    /// What is left of a source that is not needed any more, where it is one with a descriptor. A file without a name that others can
    /// cut short keeps its descriptor: nothing else tells why its bytes cannot be had.
    pub(crate) fn when_mapped(&self) -> Option<Mapped> {
        match self {
            Self::Memfd(memfd) => Some(Mapped::sealed(memfd)),
            Self::Shared(Shared::File(file, sharing)) => Mapped::file(file, *sharing),
            _ => None,
        }
    }

    pub(crate) fn source(&self) -> &dyn Source {
        match self {
            Self::Memory(memory) => memory,
            Self::Memfd(memfd) => memfd,
            Self::Donated(donated) => donated.as_ref(),
            Self::Shared(shared) => shared.source(),
            Self::Hole(hole) => hole,
            Self::Read(source) => source.as_ref(),
            Self::Fetched(source) => source,
            Self::Mapped(mapped) => mapped.as_ref(),
        }
    }

    /// Whether it has pages of its own, which may stand in a region as they are.
    pub(crate) const fn has_pages(&self) -> bool {
        matches!(self, Self::Memfd(_) | Self::Donated(_) | Self::Shared(_) | Self::Mapped(_))
    }

    /// What its pages are shown in multiples of.
    pub(crate) fn granule(&self) -> PageSize {
        match self {
            Self::Memfd(memfd) => memfd.sealed().granule(),
            Self::Shared(Shared::File(file, _)) => file.granule(),
            Self::Shared(Shared::Lazy(memfd)) => memfd.memfd().granule(),
            _ => PageSize::system(),
        }
    }

    /// How many mappings it takes at most to show a part of it.
    pub(crate) fn mappings(&self) -> usize {
        match self {
            Self::Shared(Shared::Alias(alias)) => alias.mappings(),
            _ => 1,
        }
    }

    /// What tells that two chunks have the same source; `None` if it cannot be shared, so need not be looked up.
    pub(crate) fn identity(&self) -> Option<Identity> {
        let of = |kind, address| Some(Identity { kind, address, len: 0 });
        match self {
            Self::Memory(memory) => {
                memory.identity().map(|(address, len)| Identity { kind: Kind::Memory, address, len })
            }
            Self::Memfd(memfd) => of(Kind::Memfd, memfd.identity()),
            Self::Donated(donated) => of(Kind::Donated, Arc::as_ptr(donated).addr()),
            Self::Shared(shared) => of(Kind::Shared(shared.kind()), shared.identity()),
            Self::Hole(_) => of(Kind::Hole, 0),
            Self::Read(source) => of(Kind::Read, Arc::as_ptr(source).addr()),
            Self::Fetched(source) => of(Kind::Fetched, Arc::as_ptr(&source.0).addr()),
            Self::Mapped(_) => None,
        }
    }
}

/// A source among those of a region: two chunks with the same one are of the same source, and read it the same way. The same
/// `Arc` can be a [`Source`] and a [`Fetch`], whose bytes differ, so its address alone does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    kind: Kind,
    address: usize,
    /// Of memory, which is known by where it lies.
    len: u64,
}

/// Which way a source is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Memory,
    Memfd,
    Donated,
    Shared(SharedKind),
    Hole,
    Read,
    Fetched,
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.source().name(), self.source().size())
    }
}
