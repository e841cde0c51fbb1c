//! Bytes in a file, read with `pread(2)`.

use super::Source;
use crate::error::{Error, ErrorKind, FailureReason};
use nix::libc::O_NONBLOCK;
use pagestitch_kernel::Access;
use pagestitch_kernel::limits::with_descriptors;
use pagestitch_kernel::shared::readable;
use std::fs;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A regular file or block device, read with `pread(2)` when its pages are touched.
///
/// If the file does not change, an [`ImmutableFile`](super::ImmutableFile) costs a small part of
/// this, because it copies nothing.
///
/// Its length is that at the open. If the file has been truncated when a page is read, the page
/// fails; it never reads as zeros. Later changes of the file do not change a page that has been
/// read.
///
/// ```
/// use pagestitch::source::FileSource;
/// use pagestitch::{Chunk, Pool, Region};
/// use std::sync::Arc;
///
/// let file = Arc::new(FileSource::open("/proc/self/exe")?);   // one descriptor for any number of chunks
/// let parts = [Chunk::from(Arc::clone(&file)).range(1..4), Chunk::from(file).range(0..4)];
/// let region = Region::builder().chunks(parts).build(&Pool::new()?)?;
/// assert_eq!(region.as_slice(), b"ELF\x7fELF");
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug)]
pub struct FileSource {
    file: Arc<fs::File>,
    size: u64,
    path: PathBuf,
}

impl FileSource {
    /// Opens a file for reading. If the soft limit on descriptors is reached, raises it to the hard
    /// limit.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the file cannot be opened; [`ErrorKind::UnusableFile`] for a directory or
    /// a pipe.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        Self::from_file(open(path, Access::ReadOnly)?, path)
    }

    /// Uses a file that is already open for reading. `path` names it in plans and errors.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); a file that is open with `O_WRONLY`, `O_PATH` or `O_DIRECT`.
    ///
    /// ```
    /// use pagestitch::source::FileSource;
    /// use std::fs::File;
    ///
    /// let received = File::open("/proc/self/exe")?;
    /// let source = FileSource::from_file(received, "the program")?;       // the name is for plans and errors
    /// # let _ = source;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_file(mut file: fs::File, path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let (size, _) = check(&mut file, &path)?;
        Ok(Self { file: Arc::new(file), size, path })
    }

    /// The open file, which readers of its own may keep.
    pub(super) const fn file(&self) -> &Arc<fs::File> {
        &self.file
    }
}

/// Opens a regular file or block device for these accesses. If the soft limit on descriptors is
/// reached, raises it to the hard limit.
pub(super) fn open(path: &Path, access: Access) -> Result<fs::File, Error> {
    let mut options = fs::OpenOptions::new();
    // Non-blocking, because the open of a named pipe would wait for its other end. Files ignore it.
    options.read(true).write(access == Access::Writable).custom_flags(O_NONBLOCK);
    with_descriptors(|| options.open(path)).map_err(|error| Error::io("cannot open", path, error))
}

/// The length of an open file that can be read at any offset, and the accesses that its descriptor
/// allows. `path` names the file in errors.
pub(super) fn check(file: &mut fs::File, path: &Path) -> Result<(u64, Access), Error> {
    let unusable =
        |why: &str| Error::new(ErrorKind::UnusableFile, format!("{} {why}", path.display())).at_path(path);
    let failed = |error| Error::io("cannot use", path, error);
    let metadata = file.metadata().map_err(failed)?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(unusable("is a directory: name a file in it"));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(unusable("cannot be read at an offset: use a regular file or a block device"));
    }
    let access = readable(file).map_err(|error| unusable(&format!("is {error}")))?;
    // A block device's metadata has length 0; seeking finds its end.
    let size = if kind.is_file() { metadata.len() } else { file.seek(SeekFrom::End(0)).map_err(failed)? };
    Ok((size, access))
}

/// Uses a file that is already open for reading, as [`from_file`](FileSource::from_file), under the
/// path that it has now.
impl TryFrom<fs::File> for FileSource {
    type Error = Error;

    fn try_from(file: fs::File) -> Result<Self, Error> {
        let path = path_of(&file).unwrap_or_else(|_| PathBuf::from("an open file"));
        Self::from_file(file, path)
    }
}

/// The path of an open file; of a memfd, `/memfd:NAME`.
pub(super) fn path_of(file: &impl AsRawFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        read_exact(&self.file, offset, into)
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// Reads all of `into`, or finds that the file was truncated.
pub(super) fn read_exact(file: &fs::File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    file.read_exact_at(into, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => FailureReason::Truncated.error(format!(
            "the file ends before byte {}: it was truncated while in use, or has fewer bytes than its length, as files of sysfs have",
            offset + into.len() as u64
        )),
        _ => error,
    })
}
