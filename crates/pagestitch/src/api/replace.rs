//! Other bytes for pages of a region, while other threads touch them.

use crate::api::{AnyRegion, Region, SharedRegion};
use crate::error::{Error, ErrorKind};
use crate::serve::{self, DropPages};
use crate::space::{Chunk, IntoChunk};
use std::ops::RangeBounds;

impl Region {
    /// Gives a range of whole pages the bytes of a chunk of the same length. The region keeps its address
    /// and its length, and its other pages stay as they are.
    ///
    /// The pages are filled on first touch, as those of the build. Written bytes of the range are gone.
    /// Chunks keep their numbers and places: an error of a page names the chunk of the build, with the
    /// new source. [`plan`](AnyRegion::plan) shows the build. The sources of the build stay alive until
    /// the region [releases](crate::Builder::release_sources) them or is dropped; replacements are kept.
    ///
    /// * **Whole pages**: the range begins and ends at a multiple of the page size, or ends with the
    ///   region. A region with a [`capacity`](crate::Builder::capacity) has no such end.
    /// * **Copied pages only**: pages that are shown in place, or that were donated, cannot be replaced.
    ///   Nor can pages of an [`Eager`](crate::Eager) region, which never fault.
    /// * **Not with** [`track_changes`](crate::Builder::track_changes),
    ///   [`write_back`](crate::Builder::write_back), [`on_memfd`](crate::Builder::on_memfd) and
    ///   [`inherit_on_fork`](crate::Builder::inherit_on_fork); a region of a [`Manual`](crate::Manual)
    ///   needs [`report_discards(false)`](crate::Builder::report_discards).
    /// * **In a budget**, the bytes of the chunk must not change; inline, it is no file.
    ///
    /// # Errors
    ///
    /// After an error the region has its bytes as before.
    ///
    /// * [`ErrorKind::OutOfRange`]: the range leaves the region, or is not whole pages.
    /// * [`ErrorKind::InvalidChunk`]: the chunk has another length, or cannot take this place; the error
    ///   tells the reason. [`ErrorKind::SharedSource`]: other processes may change it.
    /// * [`ErrorKind::OptionConflict`], [`ErrorKind::UnsuitableServer`]: the region cannot replace these
    ///   pages. [`ErrorKind::ForkedChild`]: it belongs to the parent process.
    /// * [`ErrorKind::Kernel`]: pages of the range are locked.
    ///
    /// ```
    /// use pagestitch::{Pool, Region};
    ///
    /// let mut region = Region::builder().chunk(vec![1u8; 3 * 4096]).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[5000], 1);
    /// region.replace(4096..8192, vec![2u8; 4096])?;
    /// assert_eq!([4095, 4096, 8191, 8192].map(|offset| region.as_slice()[offset]), [1, 2, 2, 1]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// No slice can be held across it:
    ///
    /// ```compile_fail,E0502
    /// # use pagestitch::{Pool, Region};
    /// # let mut region = Region::builder().chunk(vec![1u8; 3 * 4096]).build(&Pool::new()?)?;
    /// let held = region.as_slice();
    /// region.replace(4096..8192, vec![2u8; 4096])?;
    /// assert_eq!(held[5000], 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn replace(&mut self, range: impl RangeBounds<u64>, chunk: impl IntoChunk) -> Result<(), Error> {
        let (view, any) = self.parts_mut();
        let chunk = any.to_append_unshared(chunk, "replacement")?;
        any.replace_pages(range, Some(&chunk), &mut |span| view.discard(span))
    }

    /// Makes a range of whole pages zeros, and frees their memory. As [`replace`](Self::replace) with a
    /// [hole](Chunk::hole) of its length.
    ///
    /// # Errors
    ///
    /// As [`replace`](Self::replace).
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let mut region = Region::builder().chunk(vec![1u8; 10_000]).build(&Pool::new()?)?;
    /// region.populate(..)?;
    /// region.discard(4096..)?;
    /// assert_eq!([4095, 4096, 9999].map(|offset| region.as_slice()[offset]), [1, 0, 0]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn discard(&mut self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        let (view, any) = self.parts_mut();
        any.replace_pages(range, None, &mut |span| view.discard(span))
    }
}

impl SharedRegion {
    /// As [`Region::replace`], while other threads read the region: each page has its old bytes or its new
    /// ones. Sources that other processes may change are taken too, and copied on first touch.
    ///
    /// Code that holds a slice of [`view`](Self::view) has promised that its bytes do not change, so it
    /// must not replace them.
    ///
    /// # Errors
    ///
    /// As [`Region::replace`].
    ///
    /// ```
    /// use pagestitch::{Pool, SharedRegion};
    ///
    /// let region = SharedRegion::builder().chunk(vec![1u8; 8192]).build_shared(&Pool::new()?)?;
    /// region.replace(..4096, vec![2u8; 4096])?;
    /// let mut bytes = [0; 2];
    /// region.read_at(4095, &mut bytes)?;
    /// assert_eq!(bytes, [2, 1]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn replace(&self, range: impl RangeBounds<u64>, chunk: impl IntoChunk) -> Result<(), Error> {
        let chunk = self.to_append(chunk)?;
        self.replace_pages(range, Some(&chunk), &mut |span| self.view().discard(span))
    }

    /// As [`Region::discard`], while other threads read the region.
    ///
    /// # Errors
    ///
    /// As [`Region::replace`].
    ///
    /// ```
    /// # use pagestitch::{Pool, SharedRegion};
    /// let region = SharedRegion::builder().chunk(vec![1u8; 8192]).build_shared(&Pool::new()?)?;
    /// region.discard(..4096)?;
    /// let mut bytes = [7; 2];
    /// region.read_at(4095, &mut bytes)?;
    /// assert_eq!(bytes, [0, 1]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn discard(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.replace_pages(range, None, &mut |span| self.view().discard(span))
    }
}

impl AnyRegion {
    fn replace_pages(
        &self,
        range: impl RangeBounds<u64>,
        chunk: Option<&Chunk>,
        drop_pages: DropPages<'_>,
    ) -> Result<(), Error> {
        let (name, range) = (self.name(), self.offsets(range)?);
        let refused = |kind, why: &str| Err(Error::new(kind, format!("region {name}: {why}")));
        if !self.server.is_of_this_process() {
            return refused(
                ErrorKind::ForkedChild,
                "it belongs to the parent process: replace its bytes there",
            );
        }
        if self.served.children.is_some() {
            let why = "forked children are filled from the same bytes: leave out inherit_on_fork()";
            return refused(ErrorKind::OptionConflict, why);
        }
        serve::replace(&self.served, self.server.as_ref(), &range, chunk, drop_pages)
    }
}
