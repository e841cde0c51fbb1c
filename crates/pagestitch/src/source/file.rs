//! Bytes in a file, read with `pread(2)`.

use super::Source;
use crate::error::{Error, ErrorKind, FailureReason};
use nix::libc::{EINVAL, EOPNOTSUPP, O_NONBLOCK};
use pagestitch_kernel::Access;
use pagestitch_kernel::direct_read::{DirectFile, read_uncached};
use pagestitch_kernel::file_read::fill_from;
use pagestitch_kernel::limits::with_descriptors;
use pagestitch_kernel::shared::readable;
use std::fs;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
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
    /// The same file for reads around the page cache, if the user has asked for them.
    direct: Option<DirectFile>,
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
        Ok(Self::new(file, size, path))
    }

    /// Reads around the page cache, so that bytes in a region take no memory twice: for files larger than
    /// memory, most of all in a region with a [`budget`](crate::Builder::budget).
    ///
    /// Reads of few pages, and of a MiB or more ahead of a sequential reader, go to the disk at once
    /// (`O_DIRECT`). A touch of a page then waits for the disk, also if the page was read before, unless the
    /// region has it. Reads between, and long ones that do not begin and end with a block of the disk, pass
    /// through the page cache without staying there (`RWF_DONTCACHE`, Linux 6.14; through the page cache as
    /// usual before). A region that is served [`Inline`](crate::Inline) reads a page from the disk, if all
    /// of it is one part of the file that begins with a block of the disk, and any other page through the page cache.
    ///
    /// If several threads wait for pages, one worker of a [`Pool`](crate::Pool) reads all of them at once, by an
    /// `io_uring(7)` (Linux 6.1; a container may forbid it). Elsewhere the pool starts more workers, which wait for the
    /// disk, up to 16. Neither happens where a fault of the region may hang: if the region has other chunks than such
    /// files on ext4, xfs, btrfs or f2fs, sealed memfds and holes; with
    /// [`on_page_failure`](crate::Builder::on_page_failure), or a budget with
    /// [`write_back`](crate::Builder::write_back). A worker then waits for each read.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::UnusableFile`] on a file system without such reads, and [`ErrorKind::Io`] if the file
    /// cannot be opened once more. Use the file without this then: its bytes are the same.
    ///
    /// ```
    /// use pagestitch::source::FileSource;
    /// use pagestitch::{Budget, Pool, SharedRegion};
    ///
    /// # let path = std::env::current_exe().expect("a program");
    /// let file = FileSource::open(&path)?.direct().or_else(|_| FileSource::open(&path))?;
    /// let budget = Budget::bytes(16 << 20)?;
    /// let pool = Pool::builder().workers(2).start()?;
    /// let region = SharedRegion::builder().chunk(file).budget(&budget).build_shared(&pool)?;
    /// let mut magic = [0; 4];
    /// region.read_at(0, &mut magic)?;
    /// assert_eq!(&magic, b"\x7fELF");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn direct(mut self) -> Result<Self, Error> {
        let direct = DirectFile::reopen(&self.file).map_err(|error| match error.raw_os_error() {
            Some(EINVAL | EOPNOTSUPP) => {
                let what = format!(
                    "{} lies on a file system without reads around the page cache: leave out direct()",
                    self.path.display()
                );
                Error::new(ErrorKind::UnusableFile, what).at_path(&self.path)
            }
            _ => Error::io("cannot open for direct reads", &self.path, error),
        })?;
        self.direct = Some(direct);
        Ok(self)
    }

    /// Reads all of `into` through the page cache, of which nothing new is kept if the kernel can.
    fn read_uncached(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match read_uncached(self.file.as_fd(), offset + done as u64, &mut into[done..]) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // The end of the file, an error or an older kernel: the usual read tells.
        if done < into.len() {
            read_exact(&self.file, offset + done as u64, &mut into[done..])
        } else {
            Ok(())
        }
    }

    pub(super) fn new(file: fs::File, size: u64, path: PathBuf) -> Self {
        Self { file: Arc::new(file), size, path, direct: None }
    }

    /// The file, for reads through the page cache.
    pub(super) fn file(&self) -> &fs::File {
        &self.file
    }

    /// The file for reads around the page cache.
    pub(super) const fn direct_file(&self) -> Option<&DirectFile> {
        self.direct.as_ref()
    }

    /// Fills `into` in a signal handler. False if the read fails.
    pub(super) fn fill_in_handler(&self, offset: u64, into: &mut [u8]) -> bool {
        let is_filled = self.direct.as_ref().is_some_and(|direct| direct.fill_from(offset, into));
        is_filled || fill_from(self.file.as_fd(), offset, into)
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
        // A read into a buffer, which is then copied to the page. A copy straight from a mapping of the file
        // would show zeros where a truncated file ends within a page, and would not tell the reason of a failure.
        match &self.direct {
            None => read_exact(&self.file, offset, into),
            Some(direct) if into.len() <= DIRECT_MAX || is_block(direct, offset, into) => {
                direct.read_exact_at(offset, into).map_err(|error| of_end(error, offset, into.len()))
            }
            Some(_) => self.read_uncached(offset, into),
        }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// Reads all of `into`, or finds that the file was truncated.
pub(super) fn read_exact(file: &fs::File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    file.read_exact_at(into, offset).map_err(|error| of_end(error, offset, into.len()))
}

/// The error of a read; if the file ends before, with the reason.
fn of_end(error: io::Error, offset: u64, bytes: usize) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => FailureReason::Truncated.error(format!(
            "the file ends before byte {}: it was truncated while in use, or has fewer bytes than its length, as files of sysfs have",
            offset + bytes as u64
        )),
        _ => error,
    }
}

/// True for a read of a block that the disk writes to memory without a copy.
fn is_block(direct: &DirectFile, offset: u64, into: &[u8]) -> bool {
    into.len() >= BLOCK_MIN && direct.is_aligned(offset, into)
}

/// The most bytes of a short read that goes around the page cache: longer ones take less time through it,
/// because the kernel reads ahead.
const DIRECT_MAX: usize = 64 << 10;
/// The least bytes of a long read that goes around the page cache: the disk is busy for so long that a copy
/// of the bytes takes more time than the kernel's readahead saves.
const BLOCK_MIN: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no direct reads")]
    fn direct_reads_of_any_length_have_the_bytes_of_the_file() {
        let path = std::env::temp_dir().join(format!("pagestitch-direct-{}", std::process::id()));
        let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let direct = FileSource::open(&path).unwrap().direct();
        fs::remove_file(&path).unwrap();
        // Not on each file system.
        let Ok(direct) = direct else { return };
        let mut room = vec![0; (2 << 20) + 8192];
        let aligned = room.as_ptr().align_offset(4096);
        for (offset, length) in
            [(0, 2 << 20), (4096, 1 << 20), (8192, 256 << 10), (4096, 4096), (1, 2 << 20), (7, 100)]
        {
            for start in [aligned, aligned + 1] {
                direct.read_at(offset as u64, &mut room[start..][..length]).unwrap();
                assert!(room[start..][..length] == bytes[offset..][..length], "{length} bytes at {offset}");
            }
        }
    }

    /// The kernel reads a part of the last page, and tells the end of the file there.
    #[test]
    fn a_direct_read_of_a_file_that_was_truncated_inside_a_page_tells_it() {
        let path = std::env::temp_dir().join(format!("pagestitch-truncated-{}", std::process::id()));
        fs::write(&path, [7; 8192]).unwrap();
        let direct = FileSource::open(&path).unwrap().direct();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4196).unwrap();
        fs::remove_file(&path).unwrap();
        // Not on each file system.
        let Ok(direct) = direct else { return };
        let mut room = vec![0; 3 * 4096];
        let start = room.as_ptr().align_offset(4096);
        for start in [start, start + 1] {
            let error = direct.read_at(0, &mut room[start..][..8192]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
            assert_eq!(room[start + 4195], 7);
        }
    }
}
