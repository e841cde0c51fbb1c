//! Bytes in a file that does not change: mapped in place where source and region are aligned, read
//! elsewhere.

use super::Source;
use super::file::{path_of, read_exact};
use crate::error::Error;
#[cfg(doc)]
use crate::error::ErrorKind;
use pagestitch_kernel::Access;
use pagestitch_kernel::immutable::StableFile;
use pagestitch_kernel::shared::SharedFile;
use std::any::Any;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A regular file that does not change while it is mapped: the quick way to a file as a `&[u8]`,
/// for weights, indexes, and other files that are written once.
///
/// If a chunk starts at the same offset within a page in the file and in the region, the region maps
/// the file's own pages: no copy, no fault to a worker, no memory beside the page cache.
/// [`page_aligned`](crate::Builder::page_aligned) places each chunk so, in pages of its own, also one
/// that starts or ends inside a page. Other chunks, and pages in which chunks meet that do not continue
/// each other in the file, are read with `pread(2)` on first touch. Cloning shares the file, which needs
/// no descriptor once all of its chunks are mapped.
///
/// The grounds on which the bytes do not change are either
///
/// * a **promise** of the caller: [`open`](Self::open) is `unsafe`, as a memory map of a file is
///   everywhere; or
/// * a **seal**: a file with [fs-verity] never changes, so [`open_verity`](Self::open_verity) is safe.
///
/// # A write to the region
///
/// In a [`writable`](crate::Builder::writable) region, the first write to a page copies it. The file
/// never changes.
///
/// # If the promise is broken
///
/// * A file that is **truncated**: a touch of a page past its new end is SIGBUS. The rest of its new
///   last page reads as zeros.
/// * A file that is **written to**, in place: the bytes change under a `&[u8]`, which is undefined
///   behaviour.
/// * A file that is **replaced** (`rename(2)`) or removed breaks no promise: the region keeps the old
///   file.
///
/// # If the disk fails
///
/// A page that cannot be read, or that does not match its hash of fs-verity, is SIGBUS for the
/// thread that touches it. [`read_at`](crate::Region::read_at) of the region returns an error
/// instead.
///
/// ```
/// use pagestitch::source::ImmutableFile;
/// use pagestitch::{Chunk, Pool, Region};
///
/// // SAFETY: nothing writes to the program's own file while it runs.
/// let program = unsafe { ImmutableFile::open("/proc/self/exe") }?;
/// let region = Region::builder()
///     .page_aligned()
///     .chunk(program.clone())
///     .chunk(Chunk::from(program).range(1..4))
///     .require_zero_copy()
///     .build(&Pool::new()?)?;
/// let name = region.offset_of(1).expect("the second chunk") as usize;
/// assert_eq!(&region.as_slice()[name..name + 3], b"ELF");
/// assert_eq!(region.close().bytes_copied, 0);
/// # Ok::<(), pagestitch::Error>(())
/// ```
///
/// [fs-verity]: https://docs.kernel.org/filesystems/fsverity.html
#[derive(Clone)]
pub struct ImmutableFile(Arc<Inner>);

struct Inner {
    stable: StableFile,
    /// Shared with the remainder of the file in a region.
    path: Arc<Path>,
}

impl ImmutableFile {
    /// Opens a file for reading, of which the caller promises that it does not change. If the soft
    /// limit on descriptors is reached, raises it to the hard limit.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the file cannot be opened; [`ErrorKind::UnusableFile`] if it is empty, or
    /// no regular file: a directory, a block device (use a [`FileSource`](super::FileSource)), a
    /// pipe, a file of `/proc`.
    ///
    /// # Safety
    ///
    /// - As long as the file, a clone of it or a region with a chunk of it lives, no process writes
    ///   to the file, punches a hole into it or shortens it.
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let file = open(path)?;
        // SAFETY: the caller promises that no process changes the bytes of the file.
        Ok(Self::of(unsafe { StableFile::promised(file) }, path))
    }

    /// As [`open`](Self::open), for a file or memfd that is already open.
    ///
    /// ```no_run
    /// use pagestitch::source::{ImmutableFile, SharedFile};
    /// # fn receive() -> std::os::fd::OwnedFd { unimplemented!() }
    ///
    /// let received = SharedFile::try_from(receive())?;                    // from another process
    /// // SAFETY: the sender has promised that no process changes the file from now on.
    /// let weights = unsafe { ImmutableFile::assume(received) };
    /// # let _ = weights;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Safety
    ///
    /// As [`open`](Self::open).
    #[must_use]
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn assume(file: SharedFile) -> Self {
        let path = path_of(file.file()).unwrap_or_else(|_| PathBuf::from("file"));
        // SAFETY: the caller promises that no process changes the bytes of the file.
        Self::of(unsafe { StableFile::promised(file) }, path)
    }

    /// Opens a file that has fs-verity: the kernel refuses to write to it for good, and checks each
    /// page that it reads from the disk.
    ///
    /// ```no_run
    /// use pagestitch::source::ImmutableFile;
    /// use pagestitch::{Pool, Region};
    ///
    /// // Once, as its owner: fsverity enable shard-0
    /// let region = Region::builder().chunk(ImmutableFile::open_verity("shard-0")?).build(&Pool::new()?)?;
    /// let bytes: &[u8] = region.as_slice();
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`ErrorKind::UnusableFile`] if the file has no fs-verity, or lies on
    /// a file system that this kernel does not check: ext4, f2fs and btrfs are checked, a FUSE server
    /// or an overlay only claims it. fs-verity needs Linux 5.4, with `CONFIG_FS_VERITY`; btrfs
    /// Linux 5.15.
    pub fn open_verity(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let stable = StableFile::with_verity(open(path)?);
        Ok(Self::of(stable.map_err(|error| Error::io("cannot use", path, error))?, path))
    }

    fn of(stable: StableFile, path: impl Into<Arc<Path>>) -> Self {
        Self(Arc::new(Inner { stable, path: path.into() }))
    }

    pub(super) fn path(&self) -> &Arc<Path> {
        &self.0.path
    }

    pub(crate) fn stable(&self) -> &StableFile {
        &self.0.stable
    }

    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

fn open(path: &Path) -> Result<SharedFile, Error> {
    Ok(SharedFile::open(path, Access::ReadOnly)?)
}

/// Pages that cannot be mapped in place are read with `pread(2)` on first touch.
impl Source for ImmutableFile {
    fn size(&self) -> u64 {
        self.0.stable.len()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        read_exact(self.0.stable.file(), offset, into)
    }

    fn name(&self) -> String {
        self.0.path.display().to_string()
    }

    fn direct(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

/// The source that a wrapper wraps, unless it is a file. A wrapper limits, repeats or keeps the reads
/// of a file, because these take time and can fail.
pub(super) fn no_file(wrapped: Option<&dyn Any>) -> Option<&dyn Any> {
    wrapped.filter(|source| !source.is::<ImmutableFile>())
}

impl fmt::Debug for ImmutableFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.name(), self.size())
    }
}
