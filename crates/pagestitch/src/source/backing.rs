//! The kinds of sources, as the planner and the fill distinguish them.

use super::contract::Source;
use super::shared::{Mapped, Shared, SharedKind};
use super::stable::StableSource;
use super::writable::{WritableFile, WritableSource};
use super::{Fetched, FileSource, Hole, ImmutableFile, Memfd, Memory};
use crate::method::{Method, PlanReason};
use pagestitch_kernel::PageSize;
use pagestitch_kernel::direct_read::DirectFile;
use pagestitch_kernel::file_read::fill_from;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::pages::Donated;
use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A source by kind. Each kind allows a better method than reading, except for `Read`.
#[derive(Clone)]
pub(crate) enum Backing {
    Memory(Memory),
    Memfd(Memfd),
    Immutable(ImmutableFile),
    Donated(Arc<Donated>),
    Shared(Shared),
    Hole(Hole),
    Read(ReadSource),
    Fetched(Fetched),
    Mapped(Arc<Mapped>),
}

impl Backing {
    /// A source that is read, or the source that it wraps if that needs no read.
    pub(crate) fn of_source<S: Source + ?Sized + 'static>(source: Arc<S>) -> Self {
        source.direct().and_then(Self::direct).unwrap_or_else(|| Self::Read(ReadSource::of(source)))
    }

    /// A source to which written pages go.
    pub(crate) fn of_writable<S: WritableSource + ?Sized + 'static>(source: Arc<S>) -> Self {
        let file = (&source as &dyn Any).downcast_ref::<Arc<WritableFile>>().cloned();
        let writer: Arc<dyn WritableSource> = Arc::new(Arc::clone(&source));
        Self::Read(ReadSource::new(source, Beside::Writer(writer, file)))
    }

    /// The source, if written pages go there.
    pub(crate) fn writer(&self) -> Option<&dyn WritableSource> {
        match self {
            Self::Read(read) => match &read.0.beside {
                Beside::Writer(writer, _) => Some(&**writer),
                _ => None,
            },
            _ => None,
        }
    }

    fn direct(source: &dyn Any) -> Option<Self> {
        let memory = || source.downcast_ref::<Memory>().cloned().map(Self::Memory);
        let memfd = || source.downcast_ref::<Memfd>().cloned().map(Self::Memfd);
        let hole = || source.downcast_ref::<Hole>().copied().map(Self::Hole);
        let immutable = || source.downcast_ref::<ImmutableFile>().cloned().map(Self::Immutable);
        memory().or_else(memfd).or_else(hole).or_else(immutable)
    }

    /// The remainder of a source whose chunks are all mapped in place, so that its descriptor can
    /// be closed; `None` if it has no descriptor to close, or keeps it. A shared file without a
    /// name keeps it, because only its descriptor tells later why its bytes cannot be accessed.
    pub(crate) fn when_mapped(&self) -> Option<Mapped> {
        match self {
            Self::Memfd(memfd) => Some(Mapped::sealed(memfd)),
            Self::Immutable(file) => Some(Mapped::immutable(file)),
            Self::Shared(Shared::File(file, sharing)) => Mapped::file(file, *sharing),
            _ => None,
        }
    }

    /// The remainder of a source whose bytes the build has copied; `None` if its pages are mapped, or if
    /// nothing is gained.
    pub(crate) fn when_copied(&self) -> Option<Mapped> {
        let (method, reason) = match self {
            Self::Memory(_) => (Method::Copy, PlanReason::Memory),
            Self::Read(_) => (Method::Buffered, PlanReason::Read),
            Self::Fetched(_) => (Method::Buffered, PlanReason::Fetched),
            Self::Donated(_) | Self::Shared(Shared::Lazy(_)) => (Method::Buffered, PlanReason::FilledByBuild),
            _ => return None,
        };
        Some(Mapped::copied(self.source(), method, reason))
    }

    pub(crate) fn source(&self) -> &dyn Source {
        match self {
            Self::Memory(memory) => memory,
            Self::Memfd(memfd) => memfd,
            Self::Immutable(file) => file,
            Self::Donated(donated) => donated.as_ref(),
            Self::Shared(shared) => shared.source(),
            Self::Hole(hole) => hole,
            Self::Read(read) => &read.0.source,
            Self::Fetched(fetched) => fetched,
            Self::Mapped(mapped) => mapped.as_ref(),
        }
    }

    /// The file whose bytes are those of the source, at the same offsets, without any code of it.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Immutable(file) => Some(file.stable().file().as_fd()),
            _ => self.read_file().map(|source| source.file().as_fd()),
        }
    }

    /// As [`file`](Self::file), if it is read in the way of a [`FileSource`].
    fn read_file(&self) -> Option<&FileSource> {
        let Self::Read(read) = self else { return None };
        match &read.0.beside {
            Beside::File(source) => Some(source),
            Beside::Writer(_, file) => file.as_ref().map(|file| file.reads()),
            Beside::None | Beside::Promise => None,
        }
    }

    /// The file that takes written pages, without any code of a source.
    pub(crate) fn file_to_write(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Read(read) => match &read.0.beside {
                Beside::Writer(_, file) => file.as_ref().map(|file| file.reads().file().as_fd()),
                _ => None,
            },
            _ => None,
        }
    }

    /// The file that is read around the page cache. It has the bytes of the source at the same offsets.
    pub(crate) fn direct_file(&self) -> Option<&DirectFile> {
        self.read_file().and_then(FileSource::direct_file)
    }

    /// True if code of the user, another process or another machine may decide how long a read of the source takes.
    /// Memory may be that of another region, or of a file on FUSE.
    pub(crate) fn may_hang(&self) -> bool {
        match self {
            Self::Read(_) => !self.direct_file().is_some_and(DirectFile::is_on_disk),
            Self::Memory(_) | Self::Immutable(_) | Self::Fetched(_) | Self::Shared(_) => true,
            Self::Memfd(_) | Self::Donated(_) | Self::Hole(_) | Self::Mapped(_) => false,
        }
    }

    /// Fills `into` from the [file](Self::file), in a signal handler. `Some(false)` if the read fails; `None` if there
    /// is no file.
    pub(crate) fn fill_in_handler(&self, offset: u64, into: &mut [u8]) -> Option<bool> {
        match self.read_file() {
            Some(source) => Some(source.fill_in_handler(offset, into)),
            None => self.file().map(|file| fill_from(file, offset, into)),
        }
    }

    /// A source that vouches for its bytes, or the source that it wraps if that needs no read.
    pub(crate) fn of_stable<S: StableSource + ?Sized + 'static>(source: Arc<S>) -> Self {
        let direct = source.direct().and_then(Self::direct);
        direct.unwrap_or_else(|| Self::Read(ReadSource::new(source, Beside::Promise)))
    }

    /// True if pages of the source are shown in place, and a write to them is one to the source.
    pub(crate) fn is_shared_in_place(&self) -> bool {
        match self {
            Self::Shared(shared) => shared.kind() != SharedKind::CopyOnWrite,
            Self::Mapped(mapped) => mapped.is_shared_in_place(),
            _ => false,
        }
    }

    /// True if each read of a range gives the same bytes, because they cannot change.
    pub(crate) fn is_stable(&self) -> bool {
        match self {
            Self::Memory(_) | Self::Memfd(_) | Self::Immutable(_) | Self::Hole(_) | Self::Mapped(_) => true,
            Self::Read(read) => matches!(read.0.beside, Beside::Promise),
            Self::Donated(_) | Self::Shared(_) | Self::Fetched(_) => false,
        }
    }

    /// Whether the source has pages of its own, which a region can map or take over.
    pub(crate) const fn has_pages(&self) -> bool {
        matches!(
            self,
            Self::Memfd(_) | Self::Immutable(_) | Self::Donated(_) | Self::Shared(_) | Self::Mapped(_)
        )
    }

    /// True if the source's pages lie in the kernel's page cache, which may hold huge pages.
    pub(crate) const fn is_in_page_cache(&self) -> bool {
        matches!(self, Self::Memfd(_) | Self::Immutable(_) | Self::Shared(Shared::File(..)))
    }

    /// The unit in which the source's pages are mapped.
    pub(crate) fn granule(&self) -> PageSize {
        match self {
            Self::Memfd(memfd) => memfd.sealed().granule(),
            Self::Immutable(file) => file.stable().granule(),
            Self::Shared(Shared::File(file, _)) => file.granule(),
            Self::Shared(Shared::Lazy(memfd)) => memfd.memfd().granule(),
            _ => PageSize::system(),
        }
    }

    /// The size of a read that the source prefers, as a power of two; 0 for no preference.
    pub(crate) fn read_unit_shift(&self) -> u8 {
        match self {
            Self::Read(_) | Self::Fetched(_) => {
                let unit = self.source().granularity().clamp(1, HUGE as u64);
                unit.next_power_of_two().trailing_zeros() as u8
            }
            _ => 0,
        }
    }

    /// The most mappings that a part of the source takes.
    pub(crate) fn mappings(&self) -> usize {
        match self {
            Self::Shared(Shared::Alias(alias)) => alias.mappings(),
            _ => 1,
        }
    }

    /// The key by which two chunks have the same source; `None` if no other chunk can have it, so
    /// that no lookup is needed.
    #[inline]
    pub(crate) fn identity(&self) -> Option<Identity> {
        // Apart from the other kinds, because there may be millions of chunks of memory.
        let Self::Memory(memory) = self else { return self.identity_of_handle() };
        memory.identity().map(|(address, len)| Identity { kind: Kind::Memory, address, len })
    }

    /// The [identity](Self::identity) of a source that is not memory of this process.
    fn identity_of_handle(&self) -> Option<Identity> {
        let of = |kind, address| Some(Identity { kind, address, len: 0 });
        match self {
            Self::Memfd(memfd) => of(Kind::Memfd, memfd.identity()),
            Self::Immutable(file) => of(Kind::Immutable, file.identity()),
            Self::Donated(donated) => of(Kind::Donated, Arc::as_ptr(donated).addr()),
            Self::Shared(shared) => of(Kind::Shared(shared.kind()), shared.identity()),
            Self::Hole(_) => of(Kind::Hole, 0),
            Self::Read(read) => of(read.0.beside.kind(), read.0.address),
            Self::Fetched(fetched) => of(Kind::Fetched, fetched.address()),
            Self::Memory(_) | Self::Mapped(_) => None,
        }
    }
}

/// A source that is read. A pointer alone, because each source of a layout takes as much memory as the
/// largest kind, and there may be millions.
#[derive(Clone)]
pub(crate) struct ReadSource(Arc<Reading<dyn Source>>);

/// A source that is read, with what is known of it.
struct Reading<S: ?Sized> {
    /// The address of the user's source. The `Arc` around it is another one for each chunk.
    address: usize,
    beside: Beside,
    source: S,
}

/// The ability that a source has beside reads.
enum Beside {
    None,
    /// The same source, a file. A wrapper of one has none, because its own code must run.
    File(Arc<FileSource>),
    /// The same source, if written pages go there; and once more, if it is a file.
    Writer(Arc<dyn WritableSource>, Option<Arc<WritableFile>>),
    /// It is a [`StableSource`].
    Promise,
}

impl Beside {
    const fn kind(&self) -> Kind {
        match self {
            Self::None | Self::File(_) => Kind::Read,
            Self::Writer(..) => Kind::Written,
            Self::Promise => Kind::Stable,
        }
    }
}

impl ReadSource {
    fn of<S: Source + ?Sized + 'static>(source: Arc<S>) -> Self {
        let file = (&source as &dyn Any).downcast_ref::<Arc<FileSource>>();
        let beside = file.map_or(Beside::None, |source| Beside::File(Arc::clone(source)));
        Self::new(source, beside)
    }

    fn new<S: Source + ?Sized + 'static>(source: Arc<S>, beside: Beside) -> Self {
        let address = Arc::as_ptr(&source).addr();
        // An unsized source cannot become a `dyn Source`, but the `Arc` around it can.
        Self(Arc::new(Reading { address, beside, source }))
    }
}

/// Identifies a source of a region: two chunks with equal identities read the same source in the
/// same way. One `Arc` can implement both [`Source`] and [`Fetch`](super::Fetch) with different
/// bytes, so its address alone is not enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    kind: Kind,
    address: usize,
    /// Of memory, which its address and length identify; 0 for other kinds.
    len: u64,
}

/// The way in which a source is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Memory,
    Memfd,
    Immutable,
    Donated,
    Shared(SharedKind),
    Hole,
    Read,
    Written,
    Stable,
    Fetched,
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.source().name(), self.source().size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_takes_no_more_of_a_layout_than_bytes_in_memory() {
        assert!(size_of::<Backing>() <= size_of::<bytes::Bytes>() + size_of::<usize>());
    }
}
