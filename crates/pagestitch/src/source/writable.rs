//! Sources that take bytes back.

use super::contract::Source;
use super::file::{self, FileSource};
use crate::error::{Error, ErrorKind, FailureReason};
use crate::guard::guarded;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use pagestitch_kernel::Access;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A source that takes bytes back: written pages of a region that is built
/// [`write_back`](crate::Builder::write_back) go there.
///
/// # Contract
///
/// * **Threads.** The callers of [`flush`](crate::AnyRegion::flush), and of the region's drop, call
///   [`write_at`](Self::write_at) and [`sync`](Self::sync), one at a time for each region. Reads may
///   come at the same time. If the region has a [budget](crate::Builder::budget), workers and other threads
///   that need room write too, several at a time, and never the same bytes.
/// * **Never** touch any region that the same pool serves, or that has the same budget, in
///   [`write_at`](Self::write_at) or [`sync`](Self::sync): the touch may wait for the very thread that writes.
/// * **No touch** of the region, or of another one of its budget, below a lock that
///   [`write_at`](Self::write_at) takes: the touch may have to wait for a write.
/// * **Reads see writes.** After a write, [`read_at`](Source::read_at) returns its bytes, because a
///   page that is discarded is read again.
/// * **Failing.** An error leaves the pages dirty. A panic counts as an error.
///
/// `std::sync::Mutex<Vec<u8>>` and `RwLock<Vec<u8>>` are such sources, and so is a [`WritableFile`].
///
/// ```
/// use pagestitch::source::WritableSource;
/// use pagestitch::{Chunk, Source};
/// use std::io;
/// use std::sync::{Arc, Mutex};
///
/// /// A store that keeps its bytes in memory, and counts the calls of sync.
/// struct Store(Mutex<(Vec<u8>, usize)>);
///
/// impl Source for Store {
///     fn size(&self) -> u64 {
///         self.0.lock().unwrap().0.len() as u64
///     }
///     fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
///         into.copy_from_slice(&self.0.lock().unwrap().0[offset as usize..][..into.len()]);
///         Ok(())
///     }
/// }
///
/// impl WritableSource for Store {
///     fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
///         self.0.lock().unwrap().0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
///         Ok(bytes.len())
///     }
///     fn sync(&self) -> io::Result<()> {
///         self.0.lock().unwrap().1 += 1;
///         Ok(())
///     }
/// }
/// let chunk = Chunk::writable(Arc::new(Store(Mutex::new((vec![7; 10_000], 0)))));
/// # let _ = chunk;
/// ```
pub trait WritableSource: Source {
    /// Writes the first bytes of `bytes` at `offset`, at least one; returns their number. The rest is
    /// written by further calls.
    ///
    /// # Errors
    ///
    /// The reason why none was written. [`io::ErrorKind::Interrupted`] repeats the call.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Returns when all written bytes are where they outlive the process, or the machine.
    ///
    /// # Errors
    ///
    /// Bytes that were written may be lost. The region returns the error for each later flush of the
    /// range. A source of several regions tells each of them, because each may have lost some.
    fn sync(&self) -> io::Result<()>;
}

/// A pointer to such a source is one.
impl<S: WritableSource + ?Sized> WritableSource for Arc<S> {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        (**self).write_at(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }
}

/// Calls the source of written pages; its panic is an error.
pub(crate) fn ask_writer(
    writer: Option<&dyn WritableSource>,
    call: impl FnOnce(&dyn WritableSource) -> io::Result<()>,
) -> io::Result<()> {
    let Some(writer) = writer else { return Ok(()) };
    let panicked = |said| Err(FailureReason::Panicked.error(format!("the source panicked: {said}")));
    guarded(|| call(writer)).unwrap_or_else(panicked)
}

/// Writes all bytes, in as many calls as it takes.
pub(crate) fn write_all(source: &dyn WritableSource, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match source.write_at(offset + done as u64, &bytes[done..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written.min(bytes.len() - done),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A file, memfd or block device that is read with `pread(2)` and written with `pwrite(2)`. It does
/// not grow.
///
/// A sync that fails makes all later ones fail, because the kernel tells of lost bytes once (`fsync(2)`), and any
/// region that has the file may have written them. Open the file again, and see what it has.
///
/// ```
/// use pagestitch::source::{UnsealedMemfd, WritableFile};
/// use pagestitch::Chunk;
/// use std::sync::Arc;
///
/// let memfd = UnsealedMemfd::create("table", 1 << 20)?.file().try_clone()?;
/// let chunk = Chunk::writable(Arc::new(WritableFile::from_file(memfd, "table")?));
/// # let _ = chunk;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct WritableFile {
    reads: FileSource,
    /// The errno of the first sync that has failed; 0 for none. Locked by each sync, because the kernel tells one
    /// caller, and no other one may return before that is noted.
    failed_sync: Mutex<i32>,
}

impl WritableFile {
    /// Opens a file for reading and writing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the file cannot be opened; [`ErrorKind::UnusableFile`] for a directory or
    /// a pipe.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        Self::from_file(file::open(path, Access::Writable)?, path)
    }

    /// Uses a file that is already open for reading and writing. `path` names it in plans and errors.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`ErrorKind::UnusableFile`] also for a file that is open for reading or
    /// for writing only, or with `O_PATH` or `O_DIRECT`.
    pub fn from_file(mut file: fs::File, path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        match file::check(&mut file, &path)? {
            (size, Access::Writable) => {
                let reads = FileSource::new(file, size, path);
                Ok(Self { reads, failed_sync: Mutex::new(0) })
            }
            _ => {
                let what = format!("{} is open for reading only: open it for writing too", path.display());
                Err(Error::new(ErrorKind::UnusableFile, what).at_path(&path))
            }
        }
    }

    /// Pages are read around the page cache, as by [`FileSource::direct`], so that memory is not spent twice. Written
    /// pages pass through the page cache, and the next [`sync`](WritableSource::sync), as of a
    /// [`flush`](crate::AnyRegion::flush), frees them there, with all other pages of the file. A page that is
    /// written back and touched again at once waits for the disk twice.
    ///
    /// # Errors
    ///
    /// As [`FileSource::direct`].
    ///
    /// ```
    /// use pagestitch::source::WritableFile;
    /// use std::fs::File;
    ///
    /// # let path = std::env::temp_dir().join(format!("pagestitch-writable-{}", std::process::id()));
    /// # File::create(&path)?.set_len(1 << 20)?;
    /// let table = WritableFile::open(&path)?.direct().or_else(|_| WritableFile::open(&path))?;
    /// # drop(table);
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn direct(self) -> Result<Self, Error> {
        Ok(Self { reads: self.reads.direct()?, ..self })
    }

    /// The file, as it is read.
    pub(super) const fn reads(&self) -> &FileSource {
        &self.reads
    }

    /// Syncs, unless a sync has failed before.
    fn sync_once(&self) -> io::Result<()> {
        let mut failed = self.failed_sync.lock().unwrap_or_else(PoisonError::into_inner);
        if *failed == 0 {
            let synced = self.reads.file().sync_data();
            *failed = synced.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
        }
        match *failed {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Source for WritableFile {
    fn size(&self) -> u64 {
        self.reads.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.reads.read_at(offset, into)
    }

    fn name(&self) -> String {
        self.reads.name()
    }
}

impl WritableSource for WritableFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        // A truncated file must not grow again with a hole in it.
        let file = self.reads.file();
        let metadata = file.metadata()?;
        let room = if metadata.is_file() { metadata.len().saturating_sub(offset) } else { u64::MAX };
        if room == 0 {
            let what = format!("the file ends at byte {}: it was truncated while in use", metadata.len());
            return Err(FailureReason::Truncated.error(what));
        }
        let bytes = &bytes[..bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
        file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_once()?;
        if self.reads.direct_file().is_some() {
            // The disk has them. A refusal costs memory, and no byte.
            let _ = posix_fadvise(self.reads.file(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        Ok(())
    }
}

/// Implements both traits for a lock around bytes. A poisoned lock is used on, because a copy of bytes
/// leaves no state behind.
macro_rules! source_for_locks {
    ($($lock:ident $read:ident $write:ident),*) => {$(
        /// The bytes of the owner, which may read them at any time. The length does not change.
        impl Source for $lock<Vec<u8>> {
            fn size(&self) -> u64 {
                self.$read().unwrap_or_else(PoisonError::into_inner).len() as u64
            }

            fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
                let bytes = self.$read().unwrap_or_else(PoisonError::into_inner);
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let wanted = bytes.get(start..).and_then(|rest| rest.get(..into.len()));
                into.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }

            fn name(&self) -> String {
                String::from("memory")
            }
        }

        /// Copies the bytes in. There is nothing to sync.
        impl WritableSource for $lock<Vec<u8>> {
            fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<usize> {
                let mut bytes = self.$write().unwrap_or_else(PoisonError::into_inner);
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let into = bytes.get_mut(start..).and_then(|rest| rest.get_mut(..from.len()));
                into.ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(from);
                Ok(from.len())
            }

            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
        }
    )*};
}

source_for_locks!(Mutex lock lock, RwLock read write);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_read_and_written_at_an_offset_are_refused() {
        let path = std::env::temp_dir().join(format!("pagestitch-writable-{}", std::process::id()));
        fs::write(&path, "bytes").unwrap();
        let open = |read, write| fs::OpenOptions::new().read(read).write(write).open(&path).unwrap();
        assert_eq!(WritableFile::from_file(open(true, true), "f").unwrap().size(), 5);
        for (file, why) in [
            (open(true, false), "f is open for reading only: open it for writing too"),
            (open(false, true), "f is open for writing only: open it for reading too"),
            (fs::File::open("/").unwrap(), "f is a directory: name a file in it"),
            (
                fs::File::open("/dev/null").unwrap(),
                "f cannot be read at an offset: use a regular file or a block device",
            ),
        ] {
            let error = WritableFile::from_file(file, "f").unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::UnusableFile, why));
        }
        fs::remove_file(&path).unwrap();
    }
}
