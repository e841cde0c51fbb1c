//! The one view of a reservation's bytes, and the memory that it shows in place.
//!
//! ```text
//!   View ──── map: a sealed memfd   map_stable: a file that does not change
//!     │       move_in: donated pages ────────────────────────▶ into_stable() ──▶ StableView: &[u8]
//!     └────── map_file   map_lazy   alias   map_physical ─────▶ the bytes may change: read_at, write_at, a pointer
//! ```
//!
//! A read of a byte whose page is missing waits until the page is filled, so the reservation must
//! be registered and served. Until it is registered, the view is closed and an access is SIGSEGV.

mod stable;

pub use stable::StableView;

use crate::access::Access;
use crate::copy;
use crate::errno::Errno;
use crate::immutable::StableFile;
use crate::limits::ReserveError;
use crate::mapping::{OwnedMapping, unlock};
use crate::memfd::{SealedFile, SealedMemfd, UnsealedMemfd};
use crate::page::{AddressRange, Page, PageSize, Span};
use crate::pages::Donated;
use crate::physical::Physical;
use crate::reservation::Reservation;
use crate::shared::{Alias, SharedFile, Sharing, duplicate};
use crate::uffd::{Outcome, RegisterMode, Uffd};
use nix::libc::{self, c_void};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The one view of a reservation. Other processes may change some of its bytes.
#[derive(Debug)]
pub struct View {
    reservation: Arc<Reservation>,
    access: Access,
    /// True if no other process can change the bytes that it shows.
    stable: bool,
    /// The spans behind which a device may be. The kernel does not copy from there. Ascending.
    physical: Vec<Span>,
    /// The memfd that has the pages of the reservation, at the same offsets.
    memfd: Option<UnsealedMemfd>,
    /// The number of bytes that slices show. It never falls while the view is shared.
    ///
    /// Invariant: no reference to a byte behind them exists.
    visible: AtomicUsize,
    /// Held while bytes become visible.
    revealing: Mutex<()>,
}

impl View {
    /// Reserves `pages` pages of addresses, closed to every access until they are
    /// [registered](Uffd::register), and makes the one view of them. A page takes no memory until
    /// it is filled.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] names the size and the limit that it meets.
    pub fn reserve(
        pages: NonZeroUsize,
        page: PageSize,
        access: Access,
    ) -> Result<(Arc<Reservation>, Self), ReserveError> {
        let reservation = Reservation::new(pages, page, access, false)?;
        let view = Self::of(Arc::clone(&reservation), access);
        Ok((reservation, view))
    }

    /// As [`reserve`](Self::reserve), for pages that other processes can map: each page that is filled
    /// becomes a page of the memfd. The memfd is new, without a page, and as long as the range. It is
    /// in no other mapping, because that would read zeros where a page is missing.
    ///
    /// A page is missing while the memfd lacks it. If the memfd has it, because another process has
    /// written or touched it, an access maps it without a fault.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve); the errno of `mmap(2)`.
    ///
    /// # Panics
    ///
    /// If the memfd is shorter than the range.
    pub fn reserve_on(
        memfd: UnsealedMemfd,
        (pages, page): (NonZeroUsize, PageSize),
        access: Access,
    ) -> Result<(Arc<Reservation>, Self), ReserveError> {
        let reservation = Reservation::new(pages, page, access, true)?;
        let mut view = Self::of(Arc::clone(&reservation), access);
        let refused = |errno| ReserveError::met(reservation.range().bytes(), errno);
        view.lay_on(&memfd).map_err(refused)?;
        view.memfd = Some(memfd);
        Ok((reservation, view))
    }

    fn of(reservation: Arc<Reservation>, access: Access) -> Self {
        Self {
            access,
            stable: true,
            physical: Vec::new(),
            memfd: None,
            visible: AtomicUsize::new(reservation.mapping.bytes()),
            revealing: Mutex::new(()),
            reservation,
        }
    }

    /// Maps a memfd over all pages, closed to every access.
    fn lay_on(&mut self, memfd: &UnsealedMemfd) -> Result<(), Errno> {
        self.stable = false;
        let all = Span { first: Page(0), pages: self.reservation.pages() };
        let end = memfd.file().metadata().map_err(Errno::of)?.len();
        let granule = self.reservation.page_size();
        let part = Part { fd: memfd.file(), offset: 0, end, granule, surely_maps: true };
        self.map_closed(all, part, MapFlags::MAP_SHARED)?;
        let range = self.reservation.range();
        // As a private reservation: `mlockall(2)` would fill holes with zeros, and a forked child would
        // read zeros.
        unlock(at(range), range.bytes())?;
        self.reservation.do_not_fork()
    }

    /// True if memory that is shown in place is mapped for writes, too.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.access == Access::Writable
    }

    /// The memfd that has the pages, at the same offsets, if the view was
    /// [reserved on](Self::reserve_on) one.
    #[must_use]
    pub fn memfd(&self) -> Option<&File> {
        self.memfd.as_ref().map(UnsealedMemfd::file)
    }

    /// Hides the bytes from `len` on, until they are [revealed](Self::reveal): no slice shows them.
    pub fn hide_from(&mut self, len: usize) {
        let visible = self.visible.get_mut();
        *visible = len.min(*visible);
    }

    /// The number of bytes that slices show.
    #[must_use]
    #[inline]
    pub fn visible(&self) -> usize {
        self.visible.load(Ordering::Acquire)
    }

    /// Writes the first of the hidden bytes in place, and shows all bytes up to `len`. A reader that
    /// sees the new length sees the bytes.
    ///
    /// A hidden byte has no reader, so this changes no byte behind a slice. If its page is missing,
    /// the write waits until the page is filled.
    ///
    /// # Errors
    ///
    /// `EACCES` if bytes must be written and the memory is protected against writes.
    ///
    /// # Panics
    ///
    /// If the bytes end after `len`, or `len` is less than the visible bytes or more than the
    /// reservation has.
    pub fn reveal(&self, first: &[u8], len: usize) -> Result<(), Errno> {
        let _alone = self.revealing.lock().unwrap_or_else(PoisonError::into_inner);
        let visible = self.visible();
        let mapping = &self.reservation.mapping;
        assert!(first.len() <= len - visible && len <= mapping.bytes(), "{visible} to {len} bytes");
        if !first.is_empty() {
            if !self.access.protection().contains(ProtFlags::PROT_WRITE) {
                return Err(Errno::EACCES);
            }
            let at = mapping.at(visible).cast::<u8>();
            // SAFETY: the bytes are inside the owned mapping, which is mapped for writing. They are
            // hidden, so no reference to them exists, and the lock keeps other writers out.
            #[expect(unsafe_code, reason = "writes through a raw pointer")]
            unsafe {
                at.copy_from_nonoverlapping(NonNull::from(first).cast(), first.len());
            }
        }
        self.visible.store(len, Ordering::Release);
        Ok(())
    }

    /// Drops the pages of a span: they are missing afterwards, and may be filled with other bytes. Pages
    /// that are shown in place are shown again.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`: `EINVAL` for locked pages.
    ///
    /// # Panics
    ///
    /// If the span is not inside the reservation.
    pub fn discard(&self, span: Span) -> Result<(), Errno> {
        // SAFETY: a slice of a view comes from `as_slice`, whose caller vouches that its bytes do not
        // change; a `StableView` is borrowed mutably here.
        #[expect(unsafe_code, reason = "the callers of as_slice vouch")]
        unsafe {
            self.reservation.discard(span)
        }
    }

    /// Shows part of a sealed memfd in place: the pages of the span are the memfd's own, present at
    /// once and not copied.
    ///
    /// In a writable reservation, the first write to a page copies it. The memfd never changes.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`. After `ENOMEM` (past `vm.max_map_count`) the span is unchanged.
    /// After another errno it may be closed to every access: [`restore`](Self::restore) makes it
    /// absent again. The same holds for each function of this kind.
    ///
    /// # Panics
    ///
    /// If the memfd does not have all pages of the span at `offset` (the last one may be partial),
    /// or the addresses of the span or `offset` are no multiples of the memfd's
    /// [granule](SealedMemfd::granule). The same holds for each function of this kind.
    pub fn map(&mut self, span: Span, memfd: &SealedMemfd, offset: u64) -> Result<(), Errno> {
        // Private, because a shared mapping of a memfd sealed against writing is EPERM before Linux
        // 6.7.
        let (end, granule) = (memfd.len() as u64, memfd.granule());
        let part = Part { fd: memfd, offset, end, granule, surely_maps: true };
        self.map_over(span, part, MapFlags::MAP_PRIVATE)
    }

    /// As [`map`](Self::map), for a file whose bytes do not change.
    ///
    /// A page that the kernel cannot read from the disk, or that does not match its hash of
    /// fs-verity, is SIGBUS.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `ENODEV` if its file system does not map files.
    pub fn map_stable(&mut self, span: Span, file: &StableFile, offset: u64) -> Result<(), Errno> {
        let (end, granule, surely_maps) = (file.len(), file.granule(), file.surely_maps());
        let part = Part { fd: file, offset, end, granule, surely_maps };
        self.map_over(span, part, MapFlags::MAP_PRIVATE)
    }

    /// As [`map`](Self::map), of a memfd that has no other mapping.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map).
    ///
    /// # Panics
    ///
    /// As [`map`](Self::map).
    pub fn map_sealed(&mut self, span: Span, memfd: &SealedFile, offset: u64) -> Result<(), Errno> {
        let (end, granule) = (memfd.len(), memfd.granule());
        let part = Part { fd: memfd, offset, end, granule, surely_maps: true };
        self.map_over(span, part, MapFlags::MAP_PRIVATE)
    }

    /// Shows zeros in a span, without a server: each page is the kernel's zero page until it is
    /// written to. The span must be closed: neither registered nor shown in place.
    ///
    /// # Errors
    ///
    /// `ENOMEM` past `vm.max_map_count`, or if the kernel counts writable memory and the span exceeds
    /// the limit.
    pub fn show_zeros(&mut self, span: Span) -> Result<(), Errno> {
        let range = self.reservation.addresses(span);
        if range.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: the range is inside an owned mapping, and the advice changes none of its bytes.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe { madvise(at(range), range.bytes(), MmapAdvise::MADV_DOFORK) }.map_err(Errno::of)?;
        self.protect(range)?;
        self.reservation.show(span);
        Ok(())
    }

    /// Shows part of a file in place. The owner of the file must not shorten it, because an access
    /// past its end is SIGBUS.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EACCES` if a file that is open for reading only would be writable
    /// and shared.
    pub fn map_file(
        &mut self,
        span: Span,
        file: &SharedFile,
        offset: u64,
        sharing: Sharing,
    ) -> Result<(), Errno> {
        self.stable = false;
        let flags = match sharing {
            Sharing::Shared => MapFlags::MAP_SHARED,
            Sharing::CopyOnWrite => MapFlags::MAP_PRIVATE,
        };
        self.map_over(span, Part::of(file, offset), flags)
    }

    /// Shows part of a memfd whose pages come later. An access to a page that the memfd lacks, or
    /// that is not mapped in this view yet, is a fault of `uffd`; the answer is
    /// [`Uffd::continue_pages`]. Linux 5.14.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); the errno of the registration: `EINVAL` before Linux 5.14, and for a
    /// file that is not a memfd.
    pub fn map_lazy(&mut self, span: Span, file: &SharedFile, offset: u64, uffd: &Uffd) -> Result<(), Errno> {
        self.stable = false;
        // Closed until it is registered, because `mlockall(2)` would fill the holes of an open
        // mapping with zeros.
        self.map_closed(span, Part::of(file, offset), MapFlags::MAP_SHARED)?;
        let range = self.reservation.addresses(span);
        if range.bytes() == 0 {
            return Ok(());
        }
        unlock(at(range), range.bytes())?;
        // A forked child would read zeros where a page has not come.
        // SAFETY: the range is inside an owned mapping, and the advice changes none of its bytes.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe { madvise(at(range), range.bytes(), MmapAdvise::MADV_DONTFORK) }.map_err(Errno::of)?;
        // SAFETY: no allocator has given out pages of a reservation as zeros.
        #[expect(unsafe_code, reason = "the view is the vouching owner that register_range asks for")]
        unsafe { uffd.register_range(range, RegisterMode::MISSING | RegisterMode::MINOR) }?;
        self.protect(range)
    }

    /// Shows a mapping of unknown descriptor a second time.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EACCES` if a read-only mapping would be writable.
    pub fn alias(&mut self, span: Span, alias: &Alias, offset: u64) -> Result<(), Errno> {
        let Some((range, source)) = self.whole_pages(span, &alias.mapping, offset) else { return Ok(()) };
        self.stable = false;
        let (page, mut done) = (self.reservation.page_size().bytes(), 0);
        while done < range.bytes() {
            let at_source = offset as usize + done;
            let pages = (alias.end_of(at_source) - at_source) / page;
            let part = source.part(done, pages);
            duplicate(part, at(range.part(done, pages)))?;
            done += part.bytes();
        }
        self.protect(range)
    }

    /// Shows part of physical memory in place.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EACCES` if memory that was opened for reading would be writable.
    pub fn map_physical(&mut self, span: Span, physical: &Physical, offset: u64) -> Result<(), Errno> {
        self.stable = false;
        let part = Part {
            fd: physical,
            offset: physical.file_offset(offset),
            end: physical.file_end(),
            granule: self.reservation.page_size(),
            // Its open has mapped it.
            surely_maps: true,
        };
        self.map_over(span, part, MapFlags::MAP_SHARED)?;
        let place = self.physical.partition_point(|known| known.first < span.first);
        self.physical.insert(place, span);
        Ok(())
    }

    /// Moves donated pages in, at once, and registers them: a page that is discarded later is missing.
    /// Zeros are left in their old place. Linux 5.7.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EINVAL` before Linux 5.7. The pages have not moved then. `EAGAIN` if the
    /// kernel has no memory for page tables.
    ///
    /// # Panics
    ///
    /// As [`map`](Self::map); if one of the pages has moved before.
    pub fn move_in(&mut self, span: Span, donated: &Donated, offset: u64, uffd: &Uffd) -> Result<(), Errno> {
        let Some((range, source)) = self.whole_pages(span, &donated.mapping, offset) else { return Ok(()) };
        let moving = donated.span(offset, range.bytes());
        let taken = donated.take(moving).filter(|taken| taken.span() == moving);
        let taken = taken.unwrap_or_else(|| panic!("{moving:?} of {donated:?} have moved before"));
        let page = self.reservation.page_size().bytes();
        let (mut done, mut pages) = (0, moving.pages);
        while done < range.bytes() {
            match remap(source.part(done, pages), range.part(done, pages)) {
                Ok(()) => done += source.part(done, pages).bytes(),
                // Before Linux 6.17, pages of several mappings do not move in one call, and an
                // application may have split the donation's mapping.
                Err(Errno::EFAULT) if pages > 1 => pages /= 2,
                Err(errno) => {
                    taken.moved(done / page);
                    return Err(errno);
                }
            }
        }
        taken.moved(moving.pages);
        // SAFETY: no allocator has given out pages of a reservation as zeros. The donated pages are no
        // allocator's either, and their zeros are shown below.
        #[expect(unsafe_code, reason = "the view is the vouching owner that register_range asks for")]
        unsafe { uffd.register_range(range, RegisterMode::MISSING) }?;
        self.show_untouched(span, uffd)?;
        self.protect(range)
    }

    /// Shows the zeros of donated pages that were never touched, which the kernel does not have.
    fn show_untouched(&self, span: Span, uffd: &Uffd) -> Result<(), Errno> {
        let (mut run, mut shown) = (span.prefix(0), Ok(()));
        let mut show = |run: Span| shown = shown.and_then(|()| self.zero_missing(run, uffd));
        self.reservation.residency(span, |page, is_here| {
            if !is_here && page == run.end() {
                run.pages += 1;
            } else if !is_here {
                show(std::mem::replace(&mut run, page.span()));
            }
        })?;
        show(run);
        shown
    }

    /// Shows zeros where a page is missing.
    fn zero_missing(&self, run: Span, uffd: &Uffd) -> Result<(), Errno> {
        let (page, mut rest) = (self.reservation.page_size().bytes(), run);
        while !rest.is_empty() {
            rest = match uffd.zero(self.reservation.addresses(rest)) {
                Outcome::Done => return Ok(()),
                Outcome::Partial { bytes } => rest.without_prefix(bytes / page),
                // It was swapped out, and the kernel does not tell.
                Outcome::AlreadyThere => rest.without_prefix(1),
                Outcome::Changing => rest,
                _ => return Err(Errno::EAGAIN),
            };
        }
        Ok(())
    }

    /// Copies bytes out, without a reference to them, because they may be changing.
    ///
    /// # Errors
    ///
    /// `EFAULT` if a byte is unreadable: past the end of a truncated file, in a poisoned page, or
    /// in an absent page while only faults of user code are served
    /// ([`FaultMode::UserOnly`](crate::uffd::FaultMode::UserOnly)).
    ///
    /// # Panics
    ///
    /// If the range is not inside the reservation.
    pub fn read_at(&self, offset: u64, mut into: &mut [u8]) -> Result<(), Errno> {
        let mut offset = offset;
        while !into.is_empty() {
            let (bytes, physical) = self.stretch(offset, into.len());
            let (now, later) = into.split_at_mut(bytes);
            if physical {
                let from = self.reservation.mapping.at(offset as usize).cast::<u8>();
                // SAFETY: the stretch is inside the owned mapping, and `map_physical` has mapped
                // each page of it for reading.
                #[expect(unsafe_code, reason = "reads through a raw pointer")]
                unsafe {
                    copy::read_words(from.as_ptr(), now)
                };
            } else {
                copy::read(&self.reservation.mapping, offset, now)?;
            }
            (offset, into) = (offset + bytes as u64, later);
        }
        Ok(())
    }

    /// Writes bytes, without a reference to the old ones. Two concurrent writers are no data race;
    /// either may win.
    ///
    /// It takes `&self`, so that several threads can write. A slice of the view does not exclude it:
    /// the caller of [`as_slice`](Self::as_slice) promises that no write happens meanwhile. A view
    /// with safe slices has [`StableView::write_at`], which takes `&mut self`.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at); `EACCES` if the reservation is read-only.
    ///
    /// # Panics
    ///
    /// If the range is not inside the reservation.
    pub fn write_at(&self, offset: u64, mut from: &[u8]) -> Result<(), Errno> {
        if self.access != Access::Writable {
            return Err(Errno::EACCES);
        }
        let mut offset = offset;
        while !from.is_empty() {
            let (bytes, physical) = self.stretch(offset, from.len());
            let (now, later) = from.split_at(bytes);
            if physical {
                let to = self.reservation.mapping.at(offset as usize).cast::<u8>();
                // SAFETY: the stretch is inside the owned mapping and writable, and no reference to
                // its bytes exists. The maker of the `Physical` has vouched for writes to it.
                #[expect(unsafe_code, reason = "writes through a raw pointer")]
                unsafe {
                    copy::write_words(to.as_ptr(), now)
                };
            } else {
                copy::write(&self.reservation.mapping, offset, now)?;
            }
            (offset, from) = (offset + bytes as u64, later);
        }
        Ok(())
    }

    /// Loads a byte, as an ordinary access of the program does. If its page cannot be filled, the
    /// access is a signal.
    ///
    /// # Panics
    ///
    /// If the byte is not inside the reservation, or is [hidden](Self::hide_from).
    #[must_use]
    pub fn touch(&self, offset: usize) -> u8 {
        assert!(offset < self.visible(), "byte {offset} is not inside the reservation");
        let byte = self.reservation.mapping.at(offset).cast::<u8>();
        // SAFETY: the byte is mapped for reading. Another process may write it meanwhile; as for
        // device memory, a volatile read of one byte is one load.
        #[expect(unsafe_code, reason = "reads through a raw pointer")]
        unsafe {
            byte.read_volatile()
        }
    }

    /// The bytes of all pages, without [hidden](Self::hide_from) ones.
    ///
    /// # Safety
    ///
    /// - As long as the slice lives, its bytes are not written: not through this view, not through
    ///   another mapping of the same file or physical memory, in this process or another one. No
    ///   file behind it is shortened.
    #[must_use]
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn as_slice(&self) -> &[u8] {
        let mapping = &self.reservation.mapping;
        // SAFETY: the mapping is readable as long as `self` keeps the reservation. The caller
        // vouches that its bytes do not change.
        unsafe { slice::from_raw_parts(mapping.start().as_ptr().cast(), self.visible()) }
    }

    /// The address of the first byte, for code that works with raw pointers.
    #[must_use]
    #[inline]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.reservation.mapping.start().cast()
    }

    /// Maps part of a descriptor's file over the pages of the span.
    fn map_over(&mut self, span: Span, part: Part<'_, impl AsFd>, flags: MapFlags) -> Result<(), Errno> {
        self.map_with(self.protection(), span, part, flags)?;
        self.reservation.show(span);
        Ok(())
    }

    /// As [`map_over`](Self::map_over), closed to every access.
    fn map_closed(&mut self, span: Span, part: Part<'_, impl AsFd>, flags: MapFlags) -> Result<(), Errno> {
        self.map_with(ProtFlags::PROT_NONE, span, part, flags)
    }

    #[expect(clippy::needless_pass_by_ref_mut, reason = "no reference to the replaced bytes may exist")]
    fn map_with(
        &mut self,
        protection: ProtFlags,
        span: Span,
        Part { fd, offset, end, granule, surely_maps }: Part<'_, impl AsFd>,
        flags: MapFlags,
    ) -> Result<(), Errno> {
        let range = self.reservation.addresses(span);
        let Some(bytes) = NonZeroUsize::new(range.bytes()) else { return Ok(()) };
        let there = granule.round_up(end).unwrap_or(u64::MAX);
        let inside = offset.checked_add(range.bytes() as u64).is_some_and(|last| last <= there);
        // The kernel would round the length up, and replace pages past the span.
        let whole = AddressRange::new(range.start(), range.bytes(), granule).is_some()
            && granule.offset_of(granule.page_at(offset)) == offset;
        assert!(inside && whole, "{span:?} from {offset}, in multiples of {granule}");
        let flags = flags | self.reserving(granule, flags);
        if !surely_maps {
            // The kernel unmaps the old pages before it asks the file system, so a refusal would
            // leave a gap in the reservation.
            let unit = NonZeroUsize::new(granule.bytes()).expect("a page has bytes");
            drop(OwnedMapping::of_file_at(fd.as_fd(), offset, unit, protection, flags)?);
        }
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let start = NonZeroUsize::new(range.start());
        // SAFETY: the range is inside an owned mapping. `self` is its one view and borrowed
        // mutably, so no reference to the replaced bytes exists.
        #[expect(unsafe_code, reason = "mmap over part of an owned mapping")]
        let answer = unsafe { mmap(start, bytes, protection, flags | MapFlags::MAP_FIXED, fd, offset) };
        answer.map(drop).map_err(Errno::of).inspect_err(|_| close_gap(range))
    }

    /// Makes a span absent again that one of the functions above could not map. With a
    /// [stand-in](Uffd::stand_in), the span stays closed.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`, `munlock(2)` or the registration.
    pub fn restore(&mut self, span: Span, uffd: &Uffd) -> Result<(), Errno> {
        if uffd.is_stand_in() {
            return Ok(());
        }
        let range = self.reservation.addresses(span);
        unlock(at(range), range.bytes())?;
        // SAFETY: the range is inside an owned mapping, and the advice changes none of its bytes.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe { madvise(at(range), range.bytes(), MmapAdvise::MADV_DONTFORK) }.map_err(Errno::of)?;
        // SAFETY: no allocator has given out pages of a reservation as zeros.
        #[expect(unsafe_code, reason = "the view is the vouching owner that register_range asks for")]
        unsafe { uffd.register_range(range, RegisterMode::MISSING) }?;
        // SAFETY: the range is inside an owned mapping. `self` is its one view and borrowed mutably,
        // so no reference to its bytes exists.
        #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
        unsafe { mprotect(at(range), range.bytes(), self.access.protection()) }.map_err(Errno::of)
    }

    /// Reserves no memory for pages that are shown in place, except for huge pages that a write
    /// copies: without a reserve, a write with no huge page left is a signal.
    fn reserving(&self, granule: PageSize, flags: MapFlags) -> MapFlags {
        let copied = flags.contains(MapFlags::MAP_PRIVATE) && self.access == Access::Writable;
        if copied && granule != PageSize::system() { MapFlags::empty() } else { MapFlags::MAP_NORESERVE }
    }

    /// The protection of memory that is shown in place. The kernel moves no page there, so memory
    /// that is only read is protected in hardware.
    fn protection(&self) -> ProtFlags {
        match self.access {
            Access::ReadOnly | Access::LogicallyReadOnly => Access::ReadOnly.protection(),
            Access::Writable => Access::Writable.protection(),
        }
    }

    /// Gives pages that came with another protection the view's.
    fn protect(&mut self, range: AddressRange) -> Result<(), Errno> {
        // SAFETY: the range is inside an owned mapping. `self` is its one view and borrowed
        // mutably, so no reference to its bytes exists.
        #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
        unsafe {
            mprotect(at(range), range.bytes(), self.protection()).map_err(Errno::of)
        }
    }

    /// The addresses of a span, and of as many bytes of a mapping; `None` for an empty span.
    fn whole_pages(
        &self,
        span: Span,
        of: &OwnedMapping,
        offset: u64,
    ) -> Option<(AddressRange, AddressRange)> {
        let range = self.reservation.addresses(span);
        let offset = usize::try_from(offset).expect("inside a mapping");
        let end = of.at(offset.checked_add(range.bytes()).expect("inside a mapping"));
        let source =
            AddressRange::new(end.addr().get() - range.bytes(), range.bytes(), self.reservation.page_size());
        (!span.is_empty()).then(|| (range, source.expect("a multiple of the page size")))
    }

    /// The number of the `most` bytes at `offset` that are of one kind, and whether that is
    /// physical memory.
    fn stretch(&self, offset: u64, most: usize) -> (usize, bool) {
        let page = self.reservation.page_size();
        let end = offset.checked_add(most as u64).filter(|&end| end <= self.visible() as u64);
        let end = end.expect("inside the reservation");
        let at = page.page_at(offset);
        let next = self.physical.get(self.physical.partition_point(|span| span.end() <= at));
        let (until, physical) = match next {
            Some(span) if span.first <= at => (page.offset_of(span.end()), true),
            Some(span) => (page.offset_of(span.first), false),
            None => (end, false),
        };
        ((end.min(until) - offset) as usize, physical)
    }
}

/// Moves donated pages over part of a reservation. The old addresses stay mapped until the donation
/// unmaps them, so that no other mapping uses them.
fn remap(source: AddressRange, target: AddressRange) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let bytes = source.bytes();
    // SAFETY: the donation owns the source, and no slice of it exists. The target is inside the
    // caller's reservation, whose one view is borrowed mutably, so no reference to the replaced
    // bytes exists.
    #[expect(unsafe_code, reason = "mremap")]
    let answer = unsafe { libc::mremap(at(source).as_ptr(), bytes, bytes, flags, at(target).as_ptr()) };
    if answer == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// Closes the gap that a refused mapping may have left in a reservation, before another mapping of
/// the process takes the addresses.
fn close_gap(range: AddressRange) {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED_NOREPLACE;
    let (start, bytes) = (NonZeroUsize::new(range.start()), NonZeroUsize::new(range.bytes()));
    let Some(bytes) = bytes else { return };
    // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping. Before Linux 4.17 the kernel takes the
    // address as a hint and may map another place, which is harmless.
    #[expect(unsafe_code, reason = "mmap")]
    let closed = unsafe { mmap_anonymous(start, bytes, ProtFlags::PROT_NONE, flags) };
    // EEXIST: there is no gap.
    let _ = closed;
}

/// Part of a descriptor's file.
struct Part<'f, F> {
    fd: &'f F,
    offset: u64,
    /// The end of the file's bytes.
    end: u64,
    /// The unit in which the kernel maps the file.
    granule: PageSize,
    /// False if the kernel may refuse a mapping of the file.
    surely_maps: bool,
}

impl<'f> Part<'f, SharedFile> {
    const fn of(file: &'f SharedFile, offset: u64) -> Self {
        let (end, granule, surely_maps) = (file.len(), file.granule(), file.surely_maps());
        Self { fd: file, offset, end, granule, surely_maps }
    }
}

fn at(range: AddressRange) -> NonNull<c_void> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(range.start())).expect("mappings are not at 0")
}
