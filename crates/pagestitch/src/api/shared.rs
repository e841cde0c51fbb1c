//! A region whose bytes other processes may change while it is mapped.

use crate::api::refused::refused;
use crate::api::{AnyRegion, Changes};
use crate::error::Error;
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::metrics::Metrics;
use pagestitch_kernel::{Errno, View};
use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::ptr::NonNull;

/// Scattered memory as one contiguous range of addresses, with sources that other processes may
/// change: files, unsealed memfds, aliases of other mappings, physical memory. Whole pages of such
/// a source that have the same offset within a page in the region are *the same memory*: no copy.
///
/// No safe `&[u8]` exists of bytes that may change. [`read_at`](Self::read_at) and
/// [`write_at`](Self::write_at) let the kernel copy them. [`as_ptr`](Self::as_ptr) serves code that
/// works with raw pointers (a VMM, a C library). [`view`](Self::view) has an `unsafe` slice, for
/// callers that can rule out writers.
///
/// A page that cannot be mapped in place is copied on first touch, and does not change afterwards.
/// [`plan`](AnyRegion::plan) lists such pages, and
/// [`require_zero_copy`](crate::Builder::require_zero_copy) makes them an error of the build.
/// Touching a page past the end of a truncated file raises SIGBUS; `read_at` of it fails.
///
/// The methods that regions of all kinds share are those of [`AnyRegion`].
///
/// ```
/// use pagestitch::source::{SharedFile, UnsealedMemfd};
/// use pagestitch::{Chunk, Pool, Region};
/// use std::os::unix::fs::FileExt;
/// use std::sync::Arc;
///
/// let memfd = UnsealedMemfd::create("ring", 8192)?;
/// let shared = Arc::new(SharedFile::try_from(&memfd)?);
/// let ring = Region::builder()                       // the same 8 KiB twice in a row: a ring without a seam
///     .chunk(Arc::clone(&shared))
///     .chunk(shared)
///     .writable()
///     .require_zero_copy()
///     .build_shared(&Pool::new()?)?;
/// ring.write_at(8190, b"seam")?;
/// let mut start = [0; 2];
/// memfd.file().read_exact_at(&mut start, 0)?;
/// assert_eq!(&start, b"am");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SharedRegion {
    view: View,
    any: AnyRegion,
}

impl SharedRegion {
    pub(super) const fn new(view: View, any: AnyRegion) -> Self {
        Self { view, any }
    }

    /// The address of the first byte. Valid until the region is dropped.
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Pool, Region};
    /// # let file = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// # let region = Region::builder().chunk(file).build_shared(&Pool::new()?)?;
    /// let for_a_vmm = (region.as_ptr(), region.len());
    /// # let _ = for_a_vmm;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.view.as_ptr()
    }

    /// The bytes, page by page, with an `unsafe` slice of them.
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Pool, Region};
    /// # let file = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// # let region = Region::builder().chunk(file).build_shared(&Pool::new()?)?;
    /// assert_eq!(region.view().touch(0), 0x7f);                   // one byte, by a volatile read
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// As [`Region::serves_system_calls`](crate::Region::serves_system_calls).
    #[must_use]
    pub fn serves_system_calls(&self) -> bool {
        self.any.fills_for_system_calls()
    }

    /// Copies the current bytes from `offset` on into `into`. Absent pages are filled first.
    ///
    /// # Errors
    ///
    /// As [`Region::read_at`](crate::Region::read_at); also [`ErrorKind::SourceFailed`] if a file
    /// that is mapped there was truncated.
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Pool, Region};
    /// # let file = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// # let region = Region::builder().chunk(file).build_shared(&Pool::new()?)?;
    /// let mut magic = [0; 4];
    /// region.read_at(0, &mut magic)?;
    /// assert_eq!(&magic, b"\x7fELF");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let range = self.any.filled(offset, into.len())?;
        match self.shown(&range, || self.view.read_at(offset, into)) {
            Err(Errno::EFAULT) if self.any.served.loses_pages() => {
                self.page_by_page(&range, "read", |part| {
                    let inside = (part.start - offset) as usize..(part.end - offset) as usize;
                    self.view.read_at(part.start, &mut into[inside])
                })
            }
            read => read.map_err(|errno| refused(&self.any, "read", &range, errno)),
        }
    }

    /// Fills pages one by one and has `access` copy bytes of each. A page of a region with a budget may
    /// leave between its fill and the access, and the kernel does not fill it again where only faults of
    /// user code are served: then both are repeated.
    fn page_by_page(
        &self,
        range: &Range<u64>,
        done: &str,
        mut access: impl FnMut(&Range<u64>) -> Result<(), Errno>,
    ) -> Result<(), Error> {
        /// A page stays for as long as it takes to fill a large part of the budget.
        const TRIES: u32 = 100;
        let page = self.any.served.page_size().bytes() as u64;
        let (mut at, mut tries) = (range.start, 1);
        while at < range.end {
            let part = at..range.end.min((at / page + 1) * page);
            self.any.filled(part.start, (part.end - part.start) as usize)?;
            match access(&part) {
                Ok(()) => (at, tries) = (part.end, 1),
                Err(Errno::EFAULT) if tries < TRIES => tries += 1,
                Err(errno) => return Err(refused(&self.any, done, &part, errno)),
            }
        }
        Ok(())
    }

    /// Writes `bytes` from `offset` on. In pages that are mapped in place, other users of the file,
    /// the mapping or the physical memory see them. Writes to copied pages, and to
    /// [copy-on-write](crate::Chunk::copy_on_write) chunks, stay in the region.
    ///
    /// Several threads may write at once; where their writes overlap, either may win. The caller of
    /// [`View::as_slice`] has promised that no thread writes.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at); [`ErrorKind::ReadOnly`] if the region was not built
    /// [`writable`](crate::Builder::writable).
    ///
    /// ```
    /// # use pagestitch::source::{SharedFile, UnsealedMemfd};
    /// # use pagestitch::{Chunk, Pool, Region};
    /// # use std::os::unix::fs::FileExt;
    /// let memfd = UnsealedMemfd::create("state", 8192)?;
    /// let file = SharedFile::try_from(&memfd)?;
    /// let region = Region::builder().chunk(file).writable().build_shared(&Pool::new()?)?;
    /// region.write_at(5_000, b"seen")?;
    /// let mut seen = [0; 4];
    /// memfd.file().read_exact_at(&mut seen, 5_000)?;              // by all that have the memfd
    /// assert_eq!(&seen, b"seen");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let range = self.any.filled(offset, bytes.len())?;
        self.refuse_writes_around_chunks(&range)?;
        let write = |part: &Range<u64>| {
            self.any.let_write(part);
            let inside = (part.start - offset) as usize..(part.end - offset) as usize;
            let write = || self.view.write_at(part.start, &bytes[inside]);
            match self.any.served.written.as_deref() {
                Some(written) => written.beside_scans(self.any.served.page_size().covering(part), write),
                None => write(),
            }
        };
        match self.shown(&range, || write(&range)) {
            Err(Errno::EFAULT) if self.any.served.residence.is_some() => {
                self.page_by_page(&range, "written", write)
            }
            written => written.map_err(|errno| refused(&self.any, "written", &range, errno)),
        }
    }

    /// Refuses a write to padding in a page that shows a source in place: it would change bytes of the source that
    /// belong to no chunk.
    fn refuse_writes_around_chunks(&self, range: &Range<u64>) -> Result<(), Error> {
        let served = &self.any.served;
        let layout = &served.layout;
        for padding in layout.padding_in(range) {
            let pages = served.page_size().covering(&padding);
            let shown = pages.iter().find_map(|page| Some(served.in_place.prefix(page.span())?.1));
            if let Some(shown) = shown.filter(|shown| layout.backing_of(shown.chunk).is_shared_in_place()) {
                let source = layout.backing_of(shown.chunk).source().name();
                let what = format!(
                    "bytes {}..{} are padding in pages that show {source}, and a write would change it outside its chunks: write the ranges of chunks (chunk_ranges())",
                    padding.start, padding.end
                );
                return Err(Error::new(crate::ErrorKind::OutOfRange, what).inside(&served.name));
            }
        }
        Ok(())
    }

    /// Runs a kernel access, and repeats it once if lazy pages have left the kernel's page table.
    ///
    /// Reclaim or a collapse takes out pages that the memfd still has. For an ordinary user, the
    /// kernel's own access does not map them again, so this maps them before the second try.
    fn shown(&self, range: &Range<u64>, mut access: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
        match access() {
            Err(Errno::EFAULT) if self.any.served.mark_lazy_absent(range) => {
                let _ = self.any.populate(range.clone());
                access()
            }
            answer => answer,
        }
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
    /// As [`changes`](AnyRegion::changes) and [`read_at`](Self::read_at); [`ErrorKind::Io`] if the file
    /// cannot be written. After an error, the changes are left for the next call.
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, Pool, Region};
    /// # use std::os::unix::fs::FileExt;
    /// let builder = Region::builder().chunk(vec![7u8; 1 << 20]).writable().track_changes();
    /// let region = match builder.build_shared(&Pool::new()?) {
    ///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),  // Linux before 6.7
    ///     built => built?,
    /// };
    /// region.write_at(10_000, b"written")?;
    /// # let folder = std::env::temp_dir().join(format!("pagestitch-doc-{}", std::process::id()));
    /// # std::fs::create_dir_all(&folder)?;
    /// # let path = folder.join("build_shared.diff");
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

    /// As [`Region::close`](crate::Region::close).
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
    /// let region = match builder.build_shared(&Pool::new()?) {
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

impl Deref for SharedRegion {
    type Target = AnyRegion;

    fn deref(&self) -> &AnyRegion {
        &self.any
    }
}

impl fmt::Debug for SharedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.any.describe("SharedRegion", f)
    }
}
