//! Sources whose bytes other processes may change while they are mapped: files, unsealed memfds,
//! other mappings, physical memory.
//!
//! Only a [`SharedRegion`](crate::SharedRegion), which gives out no `&[u8]`, can hold them.

use super::ImmutableFile;
use super::Source;
use super::file::{path_of, read_exact};
use super::lazy::LazyMemfd;
use crate::guard::guarded;
use crate::method::{Method, PlanReason};
use nix::libc::O_NONBLOCK;
use pagestitch_kernel::file_readahead::FileCache;
use pagestitch_kernel::immutable::Grounds;
use pagestitch_kernel::physical::Physical;
use pagestitch_kernel::shared::{Alias, SharedFile, Sharing};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// A source whose bytes other processes may change.
#[derive(Clone)]
pub(crate) enum Shared {
    File(Arc<SharedFile>, Sharing),
    Alias(Arc<Alias>),
    Physical(Arc<Physical>),
    Lazy(LazyMemfd),
}

impl Shared {
    pub(super) fn source(&self) -> &dyn Source {
        match self {
            Self::File(file, _) => file.as_ref(),
            Self::Alias(alias) => alias.as_ref(),
            Self::Physical(physical) => physical.as_ref(),
            Self::Lazy(memfd) => memfd,
        }
    }

    /// The address that distinguishes the source from others of its kind.
    pub(super) fn identity(&self) -> usize {
        match self {
            Self::File(file, _) => Arc::as_ptr(file).addr(),
            Self::Alias(alias) => Arc::as_ptr(alias).addr(),
            Self::Physical(physical) => Arc::as_ptr(physical).addr(),
            Self::Lazy(memfd) => memfd.identity(),
        }
    }

    /// The way in which the source is mapped.
    pub(super) const fn kind(&self) -> SharedKind {
        match self {
            Self::File(_, Sharing::Shared) => SharedKind::File,
            Self::File(_, Sharing::CopyOnWrite) => SharedKind::CopyOnWrite,
            Self::Alias(_) => SharedKind::Alias,
            Self::Physical(_) => SharedKind::Physical,
            Self::Lazy(_) => SharedKind::Lazy,
        }
    }
}

/// The remainder of a source that its region needs no more. This keeps its name for plans and errors.
///
/// * The chunks of a file or memfd are all mapped in place. Its descriptor is closed, because the
///   mappings keep its pages.
/// * The build has copied all bytes of another source.
#[derive(Debug)]
pub(crate) struct Mapped {
    name: Name,
    size: u64,
    kind: MappedKind,
    /// The device and inode of a file that has a name.
    file: Option<(u64, u64)>,
    /// The page cache of such a file.
    cache: Option<FileCache>,
}

/// The name of a source. The path of an immutable file becomes text only for a plan or an error.
#[derive(Debug)]
enum Name {
    Text(String),
    Path(Arc<Path>),
}

/// The kinds of sources of which only the mappings, or the copies, are left.
#[derive(Debug, Clone, Copy)]
enum MappedKind {
    Sealed,
    Shared(Sharing),
    Immutable(Grounds),
    /// With the plan of its chunks.
    Copied(Method, PlanReason),
}

impl Mapped {
    /// The name and size of a sealed memfd.
    pub(super) fn sealed(memfd: &dyn Source) -> Self {
        let name = Name::Text(memfd.name());
        Self { name, size: memfd.size(), kind: MappedKind::Sealed, file: None, cache: None }
    }

    /// The name, size and identity of a file; `None` for one without a name.
    pub(super) fn file(file: &SharedFile, sharing: Sharing) -> Option<Self> {
        let identity = identity(file.file())?;
        let (name, kind) = (Name::Text(file.name()), MappedKind::Shared(sharing));
        Some(Self { name, size: file.size(), kind, file: Some(identity), cache: Some(file.cache()) })
    }

    /// The name, size and identity of an immutable file.
    pub(super) fn immutable(file: &ImmutableFile) -> Self {
        let (stable, name) = (file.stable(), Name::Path(Arc::clone(file.path())));
        let kind = MappedKind::Immutable(stable.grounds());
        Self { name, size: file.size(), kind, file: Some(stable.identity()), cache: Some(stable.cache()) }
    }

    /// The name and size of a source whose bytes are copied.
    pub(super) fn copied(source: &dyn Source, method: Method, reason: PlanReason) -> Self {
        let name = guarded(|| source.name());
        let name = Name::Text(name.unwrap_or_else(|said| format!("a source whose name panics: {said}")));
        let size = guarded(|| source.size()).unwrap_or(0);
        Self { name, size, kind: MappedKind::Copied(method, reason), file: None, cache: None }
    }

    /// The plan of its chunks, if their bytes are copied.
    pub(crate) const fn plan_of_copies(&self) -> Option<(Method, PlanReason)> {
        match self.kind {
            MappedKind::Copied(method, reason) => Some((method, reason)),
            MappedKind::Sealed | MappedKind::Shared(_) | MappedKind::Immutable(_) => None,
        }
    }

    /// The page cache of a file that has a name.
    pub(crate) const fn cache(&self) -> Option<FileCache> {
        self.cache
    }

    /// True if a write to the mapping is one to the source.
    pub(super) const fn is_shared_in_place(&self) -> bool {
        matches!(self.kind, MappedKind::Shared(Sharing::Shared))
    }

    pub(crate) fn is_copy_on_write(&self) -> bool {
        matches!(self.kind, MappedKind::Shared(Sharing::CopyOnWrite))
    }

    /// The grounds on which an immutable file does not change.
    pub(crate) const fn grounds(&self) -> Option<Grounds> {
        match self.kind {
            MappedKind::Immutable(grounds) => Some(grounds),
            MappedKind::Sealed | MappedKind::Shared(_) | MappedKind::Copied(..) => None,
        }
    }

    /// Opens the file again, to find out why its bytes cannot be accessed. `None` if another file
    /// has its name now.
    pub(crate) fn reopen(&self) -> Option<fs::File> {
        let known = self.file?;
        let options = fs::OpenOptions::new().read(true).custom_flags(O_NONBLOCK).clone();
        let path = match &self.name {
            Name::Text(name) => Path::new(name),
            Name::Path(path) => path,
        };
        let file = options.open(path).ok()?;
        (identity(&file)? == known).then_some(file)
    }
}

/// Device and inode of a file that has a name.
fn identity(file: &fs::File) -> Option<(u64, u64)> {
    let metadata = file.metadata().ok()?;
    (metadata.nlink() > 0).then(|| (metadata.dev(), metadata.ino()))
}

/// Never read, because none of its pages is ever filled.
impl Source for Mapped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("its pages are mapped in place, and its descriptor is closed"))
    }

    fn name(&self) -> String {
        match &self.name {
            Name::Text(name) => name.clone(),
            Name::Path(path) => path.display().to_string(),
        }
    }
}

/// The ways in which shared sources are mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SharedKind {
    File,
    CopyOnWrite,
    Alias,
    Physical,
    Lazy,
}

/// Pages that cannot be mapped in place are read with `pread(2)` on first touch.
impl Source for SharedFile {
    fn size(&self) -> u64 {
        self.len()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        read_exact(self.file(), offset, into)
    }

    /// The target of the descriptor: a path, or `/memfd:NAME`.
    fn name(&self) -> String {
        path_of(self.file()).map_or_else(|_| String::from("shared file"), |path| path.display().to_string())
    }
}

/// Pages that cannot be mapped in place are copied on first touch.
impl Source for Alias {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ok(Self::read_at(self, offset, into)?)
    }

    fn name(&self) -> String {
        String::from("alias")
    }
}

/// Pages that cannot be mapped in place are copied on first touch.
impl Source for Physical {
    fn size(&self) -> u64 {
        self.len()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ok(Self::read_at(self, offset, into)?)
    }

    fn name(&self) -> String {
        Self::name(self).to_owned()
    }
}
