//! Bytes in a memfd that is filled later: one copy in memory, for all processes that map it.
//!
//! ```text
//!   process A  region ──┐  a page is touched: if the memfd lacks it, fill it; then map it
//!   process B  region ──┼──▶ memfd ◀── fill: A, or B, or another process
//!   process C  region ──┘
//! ```

use super::Source;
use super::file::read_exact;
use crate::error::{Error, ErrorKind, FailureReason};
use pagestitch_kernel::PageSize;
use pagestitch_kernel::shared::SharedFile;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::{fmt, io};

/// Fills a memfd on demand.
pub trait FillMemfd: Send + Sync {
    /// Writes the bytes of `range` (in bytes) into `memfd`, or has another process do so, and
    /// returns when the memfd has them.
    ///
    /// The range consists of whole pages, except at the memfd's end. Fill each page at once, with
    /// `pwrite(2)` or `UFFDIO_COPY`: a page that is written through a mapping is present from its
    /// first byte on, and other processes may then read zeros in the rest.
    ///
    /// Any thread may call it, for pages that the memfd lacked a moment ago. Several processes may
    /// call it at once for the same pages. It must not touch a region that maps the memfd.
    ///
    /// # Errors
    ///
    /// The reason why not all of `range` could be filled; it becomes the error of the touched page.
    fn fill(&self, memfd: &SharedFile, range: Range<u64>) -> io::Result<()>;
}

/// A memfd, or a file of a tmpfs, that is filled later and shared with other processes. Mapped in
/// place since Linux 5.14; copied before.
///
/// # Pages
///
/// The kernel's page cache records which pages are filled, for all processes that share the memfd.
/// Each page must therefore become present by itself:
///
/// * **No huge pages.** Writing one byte of a huge page makes 2 MiB present, the rest of them
///   zeros. A file that may have huge pages is refused ([`ErrorKind::UnusableFile`]): on a tmpfs mounted
///   with `huge=always` or `huge=within_size`; a memfd while
///   `/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `always`, `within_size` or `force`; on
///   hugetlbfs. If these settings change later, pages touched from then on fail with that reason.
///   Pages that another process filled under other settings, before this process checked, cannot be
///   told from others.
/// * **No `MADV_HUGEPAGE` and no `MADV_COLLAPSE`** on the memfd, in any process, until all of it is
///   filled. Since Linux 6.4 the kernel refuses to collapse pages that a region maps in place.
///   Before 6.4, and where no region maps them, a collapse fills holes with zeros.
/// * Space allocated with `fallocate(2)` counts as not filled.
///
/// ```
/// use std::io;
/// use std::ops::Range;
/// use std::os::unix::fs::FileExt;
/// use std::sync::Arc;
/// use pagestitch::source::{FillMemfd, LazyMemfd, SharedFile, UnsealedMemfd};
/// use pagestitch::{Pool, Region};
///
/// struct Sevens;
/// impl FillMemfd for Sevens {
///     fn fill(&self, memfd: &SharedFile, range: Range<u64>) -> io::Result<()> {
///         memfd.file().write_all_at(&vec![7; (range.end - range.start) as usize], range.start)
///     }
/// }
///
/// let memfd = UnsealedMemfd::create("cache", 1 << 20)?;
/// let lazy = LazyMemfd::new(memfd.file().try_clone()?.into(), Arc::new(Sevens))?;
/// let region = Region::builder().chunk(lazy).build_shared(&Pool::new()?)?;
/// let mut bytes = [0; 3];
/// region.read_at(500_000, &mut bytes)?;
/// assert_eq!(bytes, [7; 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct LazyMemfd {
    shared: Arc<SharedFile>,
    filler: Arc<dyn FillMemfd>,
}

impl LazyMemfd {
    /// Takes a descriptor of a memfd, open for writing too.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::UnusableFile`] if the file cannot be mapped shared and written to, lies on a disk, or
    /// may have [huge pages](Self#pages).
    pub fn new(memfd: OwnedFd, filler: Arc<dyn FillMemfd>) -> Result<Self, Error> {
        let unusable = |error| Error::of_descriptor("cannot use the descriptor", error);
        let shared = SharedFile::try_from(memfd).map_err(unusable)?;
        if !shared.is_writable() {
            let what = "cannot use the descriptor: a memfd that is filled later must be open for writing too";
            return Err(Error::new(ErrorKind::UnusableFile, what));
        }
        if !shared.cache().is_in_memory() {
            let what =
                "cannot use the descriptor: only a memfd or a file of a tmpfs records which pages are filled";
            return Err(Error::new(ErrorKind::UnusableFile, what));
        }
        let lazy = Self { shared: Arc::new(shared), filler };
        lazy.refuse_huge_pages().map_err(unusable)?;
        Ok(lazy)
    }

    /// The memfd.
    #[must_use]
    pub fn memfd(&self) -> &SharedFile {
        &self.shared
    }

    /// Fills the absent pages of a range of bytes.
    pub(crate) fn fill(&self, range: Range<u64>) -> io::Result<()> {
        // Checked before any page counts as present, and before any is written.
        self.refuse_huge_pages()?;
        // Whole pages, because a page filled in part would count as present. The last page may
        // reach past the memfd's end.
        let page = PageSize::system();
        let pages = page.offsets(page.covering(&range));
        let mut rest = pages.start..pages.end.min(self.shared.len());
        while let Some(hole) = self.shared.next_hole(&rest)? {
            rest.start = hole.end;
            self.filler.fill(&self.shared, hole)?;
            // Huge pages may have been switched on meanwhile.
            self.refuse_huge_pages()?;
        }
        Ok(())
    }

    /// Fails if the memfd may have huge pages. One written byte makes a huge page present as a
    /// whole, so the page cache could not tell filled pages from absent ones.
    fn refuse_huge_pages(&self) -> io::Result<()> {
        refuse_huge_pages(self.shared.page_bytes()?)
    }

    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }
}

/// Fails if a memfd may have huge pages, because its pages have so many bytes.
pub(crate) fn refuse_huge_pages(bytes: u64) -> io::Result<()> {
    if bytes <= PageSize::system().bytes() as u64 {
        return Ok(());
    }
    let what = format!(
        "the memfd may have pages of {bytes} bytes, which one write makes present, with zeros in the rest: mount its tmpfs with \
         huge=never, set /sys/kernel/mm/transparent_hugepage/shmem_enabled to never or advise, create it without MFD_HUGETLB"
    );
    Err(FailureReason::HugePages.error(what))
}

/// Used where the memfd cannot be mapped in place.
impl Source for LazyMemfd {
    fn size(&self) -> u64 {
        self.shared.len()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.fill(offset..offset + into.len() as u64)?;
        read_exact(self.shared.file(), offset, into)
    }

    fn name(&self) -> String {
        String::from("lazy memfd")
    }
}

impl fmt::Debug for LazyMemfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.name(), self.size())
    }
}
