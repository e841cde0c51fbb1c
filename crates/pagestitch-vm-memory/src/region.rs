//! A region at a guest address.

use crate::{DirtyPages, GuestRegionError};
use pagestitch::SharedRegion;
use std::sync::Arc;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestMemoryResult, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// A [`SharedRegion`] at a guest address, as `GuestRegionMmap` is a mapping at one.
///
/// It has the bytes that the region has when it is made: later [appends](SharedRegion::append) are not
/// part of it. Several guest regions without a bitmap may be of one region, in an [`Arc`].
///
/// A [`Region`](pagestitch::Region) is refused by its type, because it shows its bytes as `&[u8]`, which
/// must not change:
///
/// ```compile_fail
/// # use pagestitch::{Pool, Region};
/// # use pagestitch_vm_memory::{GuestRegion, vm_memory::GuestAddress};
/// let region = Region::builder().chunk(vec![7u8; 8_192]).writable().build(&Pool::new().unwrap()).unwrap();
/// GuestRegion::new(region, GuestAddress(0)).unwrap();         // instead: build_shared()
/// ```
#[derive(Debug)]
pub struct GuestRegion<B = ()> {
    region: Arc<SharedRegion>,
    start: GuestAddress,
    /// The length of the region when this was made.
    bytes: usize,
    /// Present if the region is on a memfd.
    file: Option<FileOffset>,
    bitmap: B,
}

impl GuestRegion {
    /// Puts a region at a guest address, without a bitmap of dirty pages.
    ///
    /// # Errors
    ///
    /// [`GuestRegionError`]: the region is not [`writable`](pagestitch::Builder::writable), because
    /// `vm_memory` has no memory that is only read; it has no bytes; its end would be 2^64 or more.
    ///
    /// ```
    /// use pagestitch::{Chunk, Pool, Region};
    /// use pagestitch_vm_memory::GuestRegion;
    /// use vm_memory::{GuestAddress, GuestMemoryRegion};
    ///
    /// let builder = Region::builder().name("low").chunk(Chunk::hole(1 << 20));
    /// let region = builder.writable().build_shared(&Pool::new()?)?;
    /// let guest = GuestRegion::new(region, GuestAddress(0x1000))?;
    /// assert_eq!(guest.last_addr(), GuestAddress(0x10_0fff));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(region: impl Into<Arc<SharedRegion>>, start: GuestAddress) -> Result<Self, GuestRegionError> {
        Self::with_bitmap(region.into(), start, |_| ())
    }
}

impl GuestRegion<DirtyPages> {
    /// As [`new`](GuestRegion::new), with a bitmap of dirty pages. Pages that were written before are
    /// dirty.
    ///
    /// It takes the region itself, and no [`Arc`] of it, because a region has one record of its changes: a
    /// second bitmap would miss what the scans of the first one find. For the same reason, leave
    /// [`changes`](pagestitch::AnyRegion::changes) and [`save_changes`](pagestitch::AnyRegion::save_changes) of
    /// [`region`](GuestRegion::region) alone:
    ///
    /// ```compile_fail
    /// # use pagestitch::{Pool, Region};
    /// # use pagestitch_vm_memory::{GuestRegion, vm_memory::GuestAddress};
    /// # let builder = Region::builder().chunk(vec![7u8; 8_192]).writable().track_changes();
    /// let region = std::sync::Arc::new(builder.build_shared(&Pool::new().unwrap()).unwrap());
    /// GuestRegion::tracked(region, GuestAddress(0)).unwrap();     // instead: the region itself
    /// ```
    ///
    /// # Errors
    ///
    /// As [`new`](GuestRegion::new); also if the region is not built
    /// [`track_changes`](pagestitch::Builder::track_changes).
    ///
    /// [`DirtyPages`] has an example.
    pub fn tracked(region: SharedRegion, start: GuestAddress) -> Result<Self, GuestRegionError> {
        let guest = Self::with_bitmap(region.into(), start, |region| DirtyPages::new(region.len()))?;
        guest.scan()?;
        Ok(guest)
    }

    /// Marks the pages that were written since the last scan, by any thread, virtual CPU or device model
    /// in the kernel. One scan suffices for a round of migration or of snapshots; see
    /// [`changes`](pagestitch::AnyRegion::changes) for its time, and for writes that it does not find.
    ///
    /// # Errors
    ///
    /// As [`changes`](pagestitch::AnyRegion::changes). No change is lost: the next scan finds it.
    pub fn scan(&self) -> Result<(), pagestitch::Error> {
        for run in self.region.changes()? {
            self.bitmap.mark_dirty(run.start as usize, (run.end - run.start) as usize);
        }
        Ok(())
    }

    /// The dirty pages.
    #[must_use]
    pub const fn dirty_pages(&self) -> &DirtyPages {
        &self.bitmap
    }
}

impl<B> GuestRegion<B> {
    fn with_bitmap(
        region: Arc<SharedRegion>,
        start: GuestAddress,
        bitmap: impl FnOnce(&SharedRegion) -> B,
    ) -> Result<Self, GuestRegionError> {
        let (bytes, name) = (region.len(), || region.name().to_owned());
        if bytes == 0 {
            return Err(GuestRegionError::Empty { region: name() });
        }
        let end = start.checked_add(bytes as u64);
        end.ok_or_else(|| GuestRegionError::TooHigh { region: name(), bytes: bytes as u64, start: start.0 })?;
        // Refused unless the region is writable.
        region.write_at(0, &[])?;
        let file = region.file().map(|file| file.try_clone().map(|file| FileOffset::new(file, 0)));
        let file =
            file.transpose().map_err(|error| GuestRegionError::Descriptor { region: name(), error })?;
        let bitmap = bitmap(&region);
        Ok(Self { region, start, bytes, file, bitmap })
    }

    /// The region.
    #[must_use]
    pub const fn region(&self) -> &Arc<SharedRegion> {
        &self.region
    }

    /// The memfd that has the pages, and the offset of the first one: what a vhost-user back end maps.
    ///
    /// As [`file_offset`](GuestMemoryRegion::file_offset), with an error that names the remedy.
    ///
    /// # Errors
    ///
    /// [`GuestRegionError::NoFile`] unless the region is built
    /// [`on_memfd`](pagestitch::Builder::on_memfd).
    ///
    /// ```
    /// use pagestitch::{Pool, Region};
    /// use pagestitch_vm_memory::GuestRegion;
    /// use std::os::unix::fs::FileExt;
    /// use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
    ///
    /// let builder = Region::builder().chunk(vec![7u8; 1 << 20]).writable().on_memfd();
    /// let guest = GuestRegion::new(builder.build_shared(&Pool::new()?)?, GuestAddress(0))?;
    /// guest.region().populate(..)?;                               // a back end would read zeros before
    /// let sent = guest.shared_file()?;
    /// sent.file().write_all_at(b"by a back end", sent.start() + 5_000)?;
    /// assert_eq!(guest.read_obj::<u8>(MemoryRegionAddress(5_000))?, b'b');
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn shared_file(&self) -> Result<&FileOffset, GuestRegionError> {
        let missing = || GuestRegionError::NoFile { region: self.region.name().to_owned() };
        self.file.as_ref().ok_or_else(missing)
    }
}

impl<B: Bitmap> GuestMemoryRegion for GuestRegion<B> {
    type B = B;

    #[inline]
    fn len(&self) -> GuestUsize {
        self.bytes as GuestUsize
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    #[inline]
    fn bitmap(&self) -> BS<'_, B> {
        self.bitmap.slice_at(0)
    }

    #[inline]
    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        let inside = self.check_address(addr).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.region.as_ptr().as_ptr().wrapping_add(inside.0 as usize))
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, B>>> {
        let offset = offset.0 as usize;
        let inside = offset.checked_add(count).is_some_and(|end| end <= self.bytes);
        if !inside {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let (at, bitmap) = (self.region.as_ptr().as_ptr().wrapping_add(offset), self.bitmap.slice_at(offset));
        // SAFETY: the bytes are inside the region, which is mapped for reading and writing as long as
        // `self` keeps it. A `SharedRegion` has no safe slices of them: its other users are the kernel,
        // and pointers. An access to an absent page waits until the page is filled.
        #[expect(unsafe_code, reason = "vm-memory accesses memory by its address")]
        let slice = unsafe { VolatileSlice::with_bitmap(at, count, bitmap, None) };
        Ok(slice)
    }
}

impl<B: Bitmap> GuestMemoryRegionBytes for GuestRegion<B> {}
