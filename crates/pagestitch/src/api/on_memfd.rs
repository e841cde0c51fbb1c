//! Regions whose pages are those of a memfd, so that other processes can map them.
//!
//! ```text
//!   region (this process)   registered: a touch of a missing page is a fault, and its fill ─┐
//!   memfd                                         the pages, at the same offsets ◀──────────┘
//!   other process           maps file(): a filled page is the same page; a missing one is zeros
//! ```
//!
//! A fill (`UFFDIO_COPY`) adds the page to the memfd with all of its bytes, or finds it there. So the
//! memfd decides which of two fills wins, and no process sees a page half filled.

use crate::api::{Builder, SharedRegion};
use std::fs::File;

impl<S> Builder<S> {
    /// Makes the pages of the region those of a memfd, so that other processes can map them: a
    /// vhost-user back end, another VMM. [`SharedRegion::file`] returns the memfd. Default: the pages are
    /// private.
    ///
    /// A page is in the memfd as soon as it is filled, and a byte that any process writes there is seen by
    /// all. The region is a [`SharedRegion`], by [`build_shared`](Builder::build_shared).
    ///
    /// # A page that another process touches first is zeros
    ///
    /// Only the mapping of this region has faults that are served. **Through another mapping, a missing
    /// page reads as zeros, and the zeros stay**: the page is in the memfd from then on, and this region
    /// shows it, too. The same holds for the other bytes of a page that another process writes first,
    /// also by `write(2)`. (`read(2)` gives zeros, too, and leaves the page missing.) Do one of these:
    ///
    /// * [Populate](crate::AnyRegion::populate) the region, or the ranges that the other process may
    ///   touch, before it gets the descriptor.
    /// * The other process registers its own mapping for missing pages, and sends its userfaultfd (for
    ///   vhost-user this is the postcopy extension). Serve it as an
    ///   [`AdoptedRegion`](crate::AdoptedRegion) of the same chunks: its fills go to the same memfd.
    ///
    /// # Pages
    ///
    /// * **Discards.** `fallocate(2)` with `FALLOC_FL_PUNCH_HOLE`, by any process, and `MADV_REMOVE` take
    ///   a page out of the memfd: the next touch here fills it from its source again. `MADV_DONTNEED`
    ///   does not: the memfd keeps the page.
    /// * **Length.** Whole pages, sealed: no process can shorten it.
    /// * **Holes** take memory when they are touched.
    /// * **Failed pages** are poisoned here. Through another mapping they read as zeros.
    /// * **Nothing in place.** Sealed memfds, immutable files and donated pages are copied. Memory to which
    ///   others write is refused, unless it is mapped [copy-on-write](crate::Chunk::copy_on_write).
    ///   Blocks are copied page by page, because the kernel moves private pages only.
    /// * **[`track_changes`](Self::track_changes)** finds the writes to this mapping. Writes of other
    ///   processes have no record: vhost-user back ends log theirs (`VHOST_USER_SET_LOG_BASE`).
    /// * **Huge pages** of tmpfs must be off (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`: `never`
    ///   or `advise`), because a huge page is in the memfd as a whole.
    /// * A child of `fork(2)` does not have the region. It can map the memfd.
    /// * Not for adopted memory and [`Eager`](crate::Eager), and not with [`budget`](Self::budget),
    ///   [`write_back`](Self::write_back), [`release_sources`](Self::release_sources),
    ///   [`inherit_on_fork`](Self::inherit_on_fork) and [`report_discards`](Self::report_discards).
    ///
    /// ```
    /// use pagestitch::{Pool, Region};
    /// use std::os::unix::fs::FileExt;
    ///
    /// let builder = Region::builder().chunk(vec![7u8; 1 << 20]).writable().on_memfd();
    /// let guest = builder.build_shared(&Pool::new()?)?;
    /// guest.write_at(5_000, b"new")?;                             // through the mapping of this process
    /// guest.populate(..)?;                                        // before another process touches it
    /// let memfd = guest.file().expect("it is on a memfd").try_clone()?;   // send it: SCM_RIGHTS, see unix(7)
    /// let mut seen = [0; 4];
    /// memfd.read_exact_at(&mut seen, 5_000)?;
    /// assert_eq!(&seen, b"new\x07");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_memfd(mut self) -> Self {
        self.options.on_memfd = true;
        self
    }
}

impl SharedRegion {
    /// The memfd that has the region's pages, at the same offsets, if the region is built
    /// [`on_memfd`](Builder::on_memfd): the byte at an offset of the region lies at that offset of the
    /// memfd. The memfd has whole pages, so it may be longer than the region.
    ///
    /// A page that is read or written through it before the region has filled it is
    /// zeros there, as [`on_memfd`](Builder::on_memfd) explains.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let pool = Pool::new()?;
    /// let build = |builder: pagestitch::Builder| builder.chunk(vec![7u8; 5_000]).build_shared(&pool);
    /// assert_eq!(build(Region::builder().on_memfd())?.file().unwrap().metadata()?.len(), 8_192);
    /// assert!(build(Region::builder())?.file().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.view().memfd()
    }
}
