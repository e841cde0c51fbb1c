//! What bytes a range holds. A source knows nothing of pages, faults or userfaultfd.
//!
//! | source | bytes | how a page gets them |
//! |---|---|---|
//! | [`Memory`] | at a stable address, owned or lent | copied straight from where they lie |
//! | [`Memfd`] | in a sealed memfd | in place; copied straight where pages do not agree |
//! | [`Pages`] | given up by their owner | moved; copied where pages do not agree |
//! | [`SharedFile`] | in a regular file or an unsealed memfd | in place, and changing; else read |
//! | [`Alias`] | in a shared mapping without a descriptor | in place, and changing; else copied |
//! | [`Physical`] | in `/dev/mem`, or a PCI resource | in place, and changing; else copied |
//! | [`LazyMemfd`] | in a memfd that is filled later | in place, when it has them |
//! | [`FileSource`] | in a file, read at an offset | read into staging, then copied |
//! | [`Hole`] | zeros | the kernel's zero page |
//! | your own [`Fetch`] | from whoever answers later | fetched while others go on, then copied |
//! | your own [`Source`] | wherever you get them | read into staging, then copied |

mod donated;
mod fetch;
mod file;
mod hole;
mod lazy;
mod memfd;
mod memory;
mod shared;

pub use crate::error::Failure;
pub(crate) use donated::gone;
pub(crate) use fetch::{Complete, Fetched};
pub use fetch::{Fetch, Reply};
pub use file::FileSource;
pub use hole::Hole;
pub use lazy::{FillMemfd, LazyMemfd};
pub use memfd::Memfd;
pub use memory::Memory;
pub(crate) use memory::MemoryBytes;
pub use pagestitch_kernel::memfd::UnsealedMemfd;
pub use pagestitch_kernel::pages::{Donated, Pages};
pub use pagestitch_kernel::physical::{Caching, Physical, PhysicalError};
pub use pagestitch_kernel::shared::{Alias, AliasError, SharedFile};
use shared::SharedKind;
pub(crate) use shared::{Mapped, Shared};

use pagestitch_kernel::PageSize;
use std::sync::Arc;
use std::{fmt, io};

/// Bytes that can be read at an offset: the one thing to implement to bring your own.
///
/// # Contract
///
/// * **Threads.** Methods are called from any thread: the pool's workers, and whoever calls
///   [`Region::populate`](crate::Region::populate) or [`Region::read_at`](crate::Region::read_at); several at once, also
///   for the same offset.
/// * **How often.** [`read_at`](Self::read_at) is called once for each page in the ordinary case, and for several pages at once
///   when more is asked for. It is called again for a page that was let go (`MADV_DONTNEED`) and touched anew.
///   The answer must not depend on how a range is split.
/// * **Blocking.** It may block: it then occupies the worker that called it, not the region. While a region is
///   dropped, the drop waits for calls in progress.
/// * **Failing.** An error becomes the page's error: who touches the page gets SIGBUS, `read_at` and `populate` of
///   the region return it. A panic is turned into such an error, also one of [`name`](Source::name), of the error or of a destructor.
/// * **Hanging.** A call that takes 10 ms or more holds up a thread, which the pool replaces up to
///   [`max_workers`](crate::PoolBuilder::max_workers).
/// * **Never** touch a region that the same pool serves, not even another one: the worker would wait for itself.
///
/// `pagestitch-testkit` has a conformance suite that checks what can be checked of this.
///
/// # Example
///
/// ```
/// use std::io;
/// use pagestitch::Source;
///
/// /// The same byte over and over.
/// struct Pattern(u8, u64);
///
/// impl Source for Pattern {
///     fn size(&self) -> u64 {
///         self.1
///     }
///     fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
///         into.fill(self.0);
///         Ok(())
///     }
/// }
/// ```
pub trait Source: Send + Sync {
    /// How many bytes there are. Asked when a chunk is made; a later change is not noticed.
    fn size(&self) -> u64;

    /// Fills all of `into` with the bytes from `offset` on.
    ///
    /// `offset + into.len()` is at most [`size`](Self::size). `into` holds arbitrary bytes before.
    ///
    /// # Errors
    ///
    /// Whatever kept it from filling *all* of `into`.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// What to call it in plans and errors: a path, a key, a kind. By default `"source"`.
    fn name(&self) -> String {
        String::from("source")
    }
}

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
