//! Pages that leave, or stay, because the application asks for it.

use crate::api::AnyRegion;
use crate::error::{BuildOption, Error, ErrorKind};
use pagestitch_kernel::Span;
use std::ops::RangeBounds;

impl AnyRegion {
    /// Has the pages of a range of byte offsets leave now, although the [budget](crate::Builder::budget) has
    /// room for them. Returns the number of bytes that have left. No byte changes: a page comes back when it
    /// is touched.
    ///
    /// Pages that only reach into the range leave, too. Their memory is free at once, except for those that have left
    /// before and are in standby still. In a region that is built [`write_back`](crate::Builder::write_back), all
    /// wait for a while, and a touch soon after needs no read. Pages that are [pinned](Self::pin), locked
    /// (`mlock(2)`), or being filled stay. Pages of a file or memfd that are shown in place take no memory of the
    /// region, and none of them leaves.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OptionConflict`] for a region without a budget: its filled pages stay until the drop.
    /// [`ErrorKind::OutOfRange`] if the range leaves the region. [`ErrorKind::ForkedChild`] in a forked child.
    ///
    /// ```
    /// use pagestitch::{Budget, Pool, Region};
    ///
    /// let budget = Budget::bytes(16 << 20)?;
    /// let region = Region::builder().chunk(vec![7u8; 1 << 20]).budget(&budget).build(&Pool::builder().workers(1).start()?)?;
    /// region.populate(..)?;
    /// assert_eq!(region.evict(..8192)?, 8192);
    /// assert_eq!(region.as_slice()[0], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn evict(&self, range: impl RangeBounds<u64>) -> Result<u64, Error> {
        let span = self.own_span("evict", range)?;
        let Some(residence) = &self.served.residence else {
            if self.served.in_place.pages() == self.served.target.all().pages as u64 {
                return Ok(0);
            }
            let what = format!(
                "region {}: it has no budget(), so its filled pages stay until the drop: add budget(), or leave out evict()",
                self.name()
            );
            return Err(Error::new(ErrorKind::OptionConflict, what).of_option(BuildOption::Budget));
        };
        Ok((residence.evict(span) * self.served.page_size().bytes()) as u64)
    }

    /// Fills the absent pages of a range of byte offsets, as [`populate`](Self::populate) does, and keeps them:
    /// they do not leave because of the [budget](crate::Builder::budget), until [`unpin`](Self::unpin) or the
    /// drop. Pages that only reach into the range are pinned, too.
    ///
    /// Half of a budget can be pinned, by all of its regions together. In a region without a budget, filled
    /// pages stay anyway. A pin is no lock: the kernel may swap the page out, unless `mlock(2)` keeps it.
    ///
    /// # Errors
    ///
    /// As [`populate`](Self::populate); [`ErrorKind::LimitReached`] if the budget has no room for as many
    /// pinned pages. Then no page of the range is pinned.
    ///
    /// ```
    /// use pagestitch::{Budget, ErrorKind, Pool, Region};
    ///
    /// let budget = Budget::bytes(16 << 20)?;
    /// let region = Region::builder().chunk(vec![7u8; 32 << 20]).budget(&budget).build(&Pool::builder().workers(1).start()?)?;
    /// region.pin(..1 << 20)?;                                     // an index, which is always at hand
    /// assert!(region.as_slice().iter().all(|&byte| byte == 7));
    /// assert_eq!(region.pin(..).unwrap_err().kind(), ErrorKind::LimitReached);
    /// region.unpin(..)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn pin(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        let span = self.own_span("pin", range)?;
        let Some(residence) = &self.served.residence else { return self.populate_pages(span) };
        residence.pin(span).map_err(|most| self.too_many_pins(span, most))?;
        self.populate_pages(span).inspect_err(|_| residence.unpin(span))
    }

    /// Ends the [pins](Self::pin) of a range of byte offsets: its pages can leave again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] if the range leaves the region. [`ErrorKind::ForkedChild`] in a forked child.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 10_000]).build(&Pool::new()?)?;
    /// region.pin(..)?;
    /// region.unpin(..)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn unpin(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        let span = self.own_span("unpin", range)?;
        if let Some(residence) = &self.served.residence {
            residence.unpin(span);
        }
        Ok(())
    }

    /// The pages of a range. An error in a forked child, which does not have the threads that serve them.
    fn own_span(&self, call: &str, range: impl RangeBounds<u64>) -> Result<Span, Error> {
        if self.server.is_of_this_process() {
            return self.span(range);
        }
        let what = format!(
            "region {}: it belongs to the parent process: call {call}() there, not in a forked child",
            self.name()
        );
        Err(Error::new(ErrorKind::ForkedChild, what))
    }

    fn too_many_pins(&self, span: Span, most: usize) -> Error {
        let size = self.served.page_size();
        let (name, bytes, most) = (self.name(), size.bytes_of(span), most * size.bytes());
        let what = format!(
            "region {name}: no room to pin {bytes} bytes, because the regions of its budget pin {most} bytes at most: unpin() others, or make the budget larger"
        );
        Error::new(ErrorKind::LimitReached, what).of_option(BuildOption::Budget)
    }
}
