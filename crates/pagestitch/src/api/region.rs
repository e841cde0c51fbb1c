//! A region: scattered chunks as one contiguous range of addresses, filled on first touch.

use crate::api::refused::refused;
use crate::api::{AnyRegion, Changes};
use crate::error::Error;
use crate::metrics::Metrics;
use pagestitch_kernel::{Errno, StableView};
use std::fmt;
use std::fs::File;
use std::ops::{Deref, Index};
use std::ptr::NonNull;
use std::slice::SliceIndex;

/// Scattered memory as one contiguous slice, filled page by page on first touch.
///
/// ```text
///   as_slice():  [ a a a a b b c c c c c c 0 0 0 ]     one range of addresses
///                  │     │   │           │
///                 Vec  &[u8] file       hole           the chunks, where they always were
/// ```
///
/// The first touch of a page, by any thread, copies its bytes from the sources. Before that, the
/// region reads no source and uses no memory for the page. A page whose source fails never reads as
/// zeros: touching it raises SIGBUS, and [`read_at`](Self::read_at) and
/// [`populate`](AnyRegion::populate) return the source's error.
///
/// The methods that regions of all kinds share are those of [`AnyRegion`].
///
/// # System calls
///
/// Where [`serves_system_calls`](Self::serves_system_calls) is false (an ordinary user), the kernel
/// cannot touch absent pages: `write(2)` from one fails with `EFAULT`. Call
/// [`populate`](AnyRegion::populate) before such a system call.
///
/// # Children
///
/// A forked child can access only the pages that are mapped in place, unless the region is built
/// with [`inherit_on_fork`](crate::Builder::inherit_on_fork). Touching another page raises SIGSEGV
/// in the child, and the addresses stay reserved there.
///
/// A raw `clone(2)` runs no fork handlers, so in such a child other mappings may take the region's
/// addresses: the child must not use a pointer into the region.
///
/// `fork(2)` waits for a build or drop of a region in progress. A fork handler
/// (`pthread_atfork(3)`) must therefore not take a lock that is held around a build or drop.
///
/// # Locked memory
///
/// * `mlockall(MCL_FUTURE)` neither fills nor locks a region: its pages come from the sources on
///   first touch, and can be swapped out.
/// * `mlock2(MLOCK_ONFAULT)` on the region locks each page when it is filled. Whole blocks are then
///   copied in, because the kernel moves pages only between mappings that are locked alike.
/// * Files and memfds that are mapped in place are locked as any mapping is.
/// * `mlockall(MCL_CURRENT)` touches every page of a region that a pool serves: it returns when the
///   region is filled.
///
/// # Drop
///
/// Dropping waits for source reads in progress, then releases everything. A thread that waits in a
/// fault of the region at that moment gets SIGSEGV, never zeros. (It uses a raw pointer: safe code
/// holds a borrow.) The addresses then stay reserved for one more second, or for 10 ms if the
/// process has no others left; a later build or drop of a region releases them. The addresses of a
/// region that is served [inline](crate::Inline) always stay reserved that long.
///
/// # Hand-over
///
/// A region is `AsRef<[u8]>`, `Send` and `Sync`, and its bytes keep their address. So it becomes the
/// owner of its bytes where an API takes one, without a copy: in `bytes`, in Arrow buffers, as the
/// [memory](crate::source::Memory) of another region. `examples/hand_over.rs` reads tensors of a
/// safetensors file as Arrow buffers.
///
/// ```
/// use pagestitch::{Pool, Region};
/// use std::io::{BufRead, Cursor, Seek, SeekFrom};
///
/// let pool = Pool::new()?;
/// let build = || Region::builder().chunk("first line\nsec").chunk("ond line\n").build(&pool);
///
/// let mut reader = Cursor::new(build()?);                         // Read, BufRead, Seek
/// reader.seek(SeekFrom::Start(11))?;
/// assert_eq!(reader.lines().next().unwrap()?, "second line");
///
/// let bytes = bytes::Bytes::from_owner(build()?);                 // shared, sliced, sent to tasks
/// let line = bytes.slice(11..22);
/// drop(bytes);
/// assert_eq!(line, "second line");                                // `line` keeps the region
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Example
///
/// ```
/// use pagestitch::{Chunk, Pool, Region};
///
/// let pool = Pool::new()?;
/// let region = Region::builder()
///     .chunk(b"scattered ".to_vec())
///     .chunk(Chunk::hole(4096))
///     .chunk(b"memory".to_vec())
///     .build(&pool)?;
/// assert_eq!(&region.as_slice()[..10], b"scattered ");
/// assert_eq!(&region.as_slice()[10 + 4096..], b"memory");
/// # Ok::<(), pagestitch::Error>(())
/// ```
pub struct Region {
    view: StableView,
    any: AnyRegion,
    /// True if pages of files are mapped in place: a touch of one may be a signal.
    has_files: bool,
}

impl Region {
    pub(super) fn new(mut view: StableView, any: AnyRegion) -> Self {
        let has_files = any.served.layout.has_immutable_files();
        // So that a touch reads no other memory of the region's before its byte.
        view.hide_from(any.len());
        Self { view, any, has_files }
    }

    /// The bytes. Touching an absent page blocks until the page is filled, or raises SIGBUS if its
    /// source fails.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[9_999], 7);                    // one page is filled
    /// assert_eq!(region.as_slice().chunks(100).count(), 100);     // a slice as any other: nothing is touched here
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.view.as_slice()
    }

    /// The bytes of a chunk, numbered as in [`chunk_range`](AnyRegion::chunk_range). `None` if the
    /// region has fewer chunks. Reads nothing before a byte is touched.
    #[must_use]
    pub fn chunk_slice(&self, chunk: usize) -> Option<&[u8]> {
        let range = self.any.chunk_range(chunk)?;
        Some(&self.as_slice()[range.start as usize..range.end as usize])
    }

    /// The bytes for writing; `None` unless the region is built
    /// [`writable`](crate::Builder::writable). Writes stay in the region and never reach the
    /// sources.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let mut region = Region::builder().chunk(vec![7u8; 10_000]).writable().build(&Pool::new()?)?;
    /// region.as_mut_slice().expect("it is writable")[..5].copy_from_slice(b"hello");
    /// assert_eq!(&region.as_slice()[..6], b"hello\x07");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// No slice can be held meanwhile:
    ///
    /// ```compile_fail,E0502
    /// # use pagestitch::{Pool, Region};
    /// # let mut region = Region::builder().chunk("text").writable().build(&Pool::new()?)?;
    /// let held = region.as_slice();
    /// region.as_mut_slice().expect("writable")[0] = b'T';
    /// assert_eq!(held, b"text");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        self.view.as_mut_slice()
    }

    /// Writes `bytes` from `offset` on, after it has filled absent pages. Unlike a write to
    /// [`as_mut_slice`](Self::as_mut_slice), it returns the error of a source that fails. Many
    /// writers at once use a [`SharedRegion`](crate::SharedRegion::write_at).
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let mut region = Region::builder().chunk("a byte").writable().build(&Pool::new()?)?;
    /// region.write_at(2, b"text")?;
    /// assert_eq!(region.as_slice(), b"a text");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// No slice can be held meanwhile:
    ///
    /// ```compile_fail,E0502
    /// # use pagestitch::{Pool, Region};
    /// # let mut region = Region::builder().chunk("a byte").writable().build(&Pool::new()?)?;
    /// let held = region.as_slice();
    /// region.write_at(2, b"text")?;
    /// assert_eq!(held, b"a byte");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at); [`ErrorKind::ReadOnly`](crate::ErrorKind::ReadOnly) if the
    /// region was not built [`writable`](crate::Builder::writable).
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        if self.as_mut_slice().is_none() {
            return Err(self.any.read_only());
        }
        let range = self.any.filled(offset, bytes.len())?;
        if self.has_files {
            match self.view.write_at(offset, bytes) {
                // As for a read.
                Err(Errno::EPERM | Errno::ENOSYS) => {}
                answer => return answer.map_err(|errno| refused(&self.any, "written", &range, errno)),
            }
        }
        let all = self.as_mut_slice().expect("it is writable");
        all[range.start as usize..range.end as usize].copy_from_slice(bytes);
        Ok(())
    }

    /// The address of the first byte. Valid until the region is dropped.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// let for_a_c_library = (region.as_ptr(), region.len());
    /// # let _ = for_a_c_library;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.view.as_ptr()
    }

    /// True if system calls can read and write absent pages; see [above](Self#system-calls).
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// use std::io::Write;
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// if !region.serves_system_calls() {
    ///     region.populate(..)?;                                   // or write(2) fails with EFAULT
    /// }
    /// std::fs::File::create("/dev/null")?.write_all(region.as_slice())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn serves_system_calls(&self) -> bool {
        self.any.fills_for_system_calls()
    }

    /// Copies bytes from `offset` on into `into`. Absent pages are filled first.
    ///
    /// If the region maps [immutable files](crate::source::ImmutableFile), the kernel copies, so that
    /// a page that cannot be read from the disk is an error and no signal. That takes about a
    /// microsecond more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SourceFailed`](crate::ErrorKind::SourceFailed) names the chunk whose source
    /// failed; [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) if the range leaves the
    /// region.
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// let mut bytes = [0; 4];
    /// match region.read_at(5_000, &mut bytes) {
    ///     Ok(()) => assert_eq!(bytes, [7; 4]),
    ///     Err(error) if error.kind() == ErrorKind::SourceFailed => eprintln!("{error}"),      // no signal
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        if self.any.served.residence.is_some() {
            return self.read_parts(offset, into);
        }
        let range = self.any.filled(offset, into.len())?;
        if self.has_files {
            match self.view.read_at(offset, into) {
                // The kernel copies for no process here: this one does, without the protection.
                Err(Errno::EPERM | Errno::ENOSYS) => {}
                answer => return answer.map_err(|errno| refused(&self.any, "read", &range, errno)),
            }
        }
        into.copy_from_slice(&self.as_slice()[range.start as usize..range.end as usize]);
        Ok(())
    }

    /// Reads part by part in a region with a budget, where the first pages of a long range leave before the last
    /// ones come. The kernel copies, because a page that has left and that its source does not give again is an
    /// error, and a touch of it a signal.
    fn read_parts(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        /// A part is small beside the least budget.
        const PART: usize = 1 << 18;
        /// A page stays for as long as it takes to fill a large part of the budget.
        const TRIES: u32 = 100;
        self.any.inside_of(offset, into.len())?;
        let page = self.any.served.page_size().bytes();
        let (mut done, mut size, mut tries) = (0, PART, 1);
        while done < into.len() {
            let (start, end) = (offset + done as u64, into.len().min(done + size));
            let part = &mut into[done..end];
            let range = self.any.filled(start, part.len())?;
            match self.view.read_at(start, part) {
                Ok(()) => (done, tries) = (end, 1),
                // Where only faults of user code are served, the kernel does not wait for a page that has left.
                // Other threads that read as much may take these pages away before all of them are there.
                Err(Errno::EFAULT) if size > page => size = page.max(size / 2),
                Err(Errno::EFAULT) if tries < TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                // The kernel copies for no process here.
                Err(Errno::EPERM | Errno::ENOSYS) => {
                    part.copy_from_slice(&self.as_slice()[range.start as usize..range.end as usize]);
                    done = end;
                }
                Err(errno) => return Err(refused(&self.any, "read", &range, errno)),
            }
        }
        Ok(())
    }

    /// Writes the [changes](AnyRegion::changes) since the last call to a sparse file as long as the region:
    /// a page that was written lies at its offset, and every other page is a hole. Returns the ranges.
    ///
    /// Replaces the contents of the file, and does not sync it. Such a file is a diff of a snapshot: the
    /// crate `pagestitch-firecracker` restores guests from a base and diffs, with the ranges as its
    /// extents.
    ///
    /// # Errors
    ///
    /// As [`changes`](AnyRegion::changes) and [`read_at`](Self::read_at); [`ErrorKind::Io`](crate::ErrorKind::Io) if the file
    /// cannot be written. After an error, the changes are left for the next call.
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, Pool, Region};
    /// # use std::os::unix::fs::FileExt;
    /// let builder = Region::builder().chunk(vec![7u8; 1 << 20]).writable().track_changes();
    /// let mut region = match builder.build(&Pool::new()?) {
    ///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),  // Linux before 6.7
    ///     built => built?,
    /// };
    /// region.write_at(10_000, b"written")?;
    /// # let folder = std::env::temp_dir().join(format!("pagestitch-doc-{}", std::process::id()));
    /// # std::fs::create_dir_all(&folder)?;
    /// # let path = folder.join("build.diff");
    /// let diff = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    /// assert!(region.save_changes(&diff)?.eq([8_192..12_288]));
    /// let mut bytes = [0; 9];
    /// diff.read_exact_at(&mut bytes, 9_999)?;
    /// assert_eq!(&bytes, b"\x07written\x07");
    /// # std::fs::remove_dir_all(&folder)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_changes(&self, file: &File) -> Result<Changes, Error> {
        self.any.save_changes(file, |offset, into| self.read_at(offset, into))
    }

    /// Its bytes, for changes that exclude slices of them, and the rest.
    pub(super) const fn parts_mut(&mut self) -> (&mut StableView, &AnyRegion) {
        (&mut self.view, &self.any)
    }

    pub(super) const fn stable_view(&self) -> &StableView {
        &self.view
    }

    /// Releases everything, as dropping does, and returns the final counters.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[5_000], 7);
    /// assert_eq!(region.close().pages_installed(), 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// No slice can be held any more:
    ///
    /// ```compile_fail,E0505
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk("text").build(&Pool::new()?)?;
    /// let held = region.as_slice();
    /// let metrics = region.close();
    /// assert_eq!(held, b"text");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use = "without the metrics, drop the region"]
    pub fn close(self) -> Metrics {
        self.any.close()
    }

    /// Ends the region as [`close`](Self::close) does, and returns the error of the last flush, if the
    /// region is built [`write_back`](crate::Builder::write_back). Of other regions it returns the
    /// counters alone.
    ///
    /// # Errors
    ///
    /// As [`flush`](AnyRegion::flush). The pages that were not written are lost with the region. A
    /// program that wants to try again calls `flush(..)` before.
    ///
    /// ```
    /// # use pagestitch::{Chunk, ErrorKind, Pool, Region, WriteBack};
    /// # use std::sync::{Arc, Mutex};
    /// let bytes = Arc::new(Mutex::new(vec![7u8; 10_000]));
    /// let chunk = Chunk::writable(Arc::clone(&bytes));
    /// let builder = Region::builder().chunk(chunk).write_back(WriteBack::ToSource);
    /// let mut region = match builder.build(&Pool::new()?) {
    ///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),  // Linux before 6.7
    ///     built => built?,
    /// };
    /// region.write_at(5_000, b"row")?;
    /// region.finish()?;                                           // all writes are in the source
    /// assert_eq!(&bytes.lock().unwrap()[5_000..5_003], b"row");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn finish(self) -> Result<Metrics, Error> {
        self.any.finish()
    }
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// A part of the bytes, as of [`as_slice`](Self::as_slice).
///
/// ```
/// # use pagestitch::{Pool, Region};
/// let region = Region::builder().chunk("scattered ").chunk("memory").build(&Pool::new()?)?;
/// assert_eq!((region[10], &region[10..]), (b'm', &b"memory"[..]));
/// # Ok::<(), pagestitch::Error>(())
/// ```
///
/// # Panics
///
/// If the part leaves the region, as that of a slice.
impl<I: SliceIndex<[u8]>> Index<I> for Region {
    type Output = I::Output;

    fn index(&self, part: I) -> &I::Output {
        &self.as_slice()[part]
    }
}

impl Deref for Region {
    type Target = AnyRegion;

    fn deref(&self) -> &AnyRegion {
        &self.any
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.any.describe("Region", f)
    }
}
