//! The one view of a reservation's bytes, and what can be shown in it in place.
//!
//! ```text
//!   View ──── map: a sealed memfd   move_in: donated pages ───▶ into_stable() ──▶ StableView: &[u8]
//!     └────── map_file   map_lazy   alias   map_physical ─────▶ others may change it: read_at, write_at, a pointer
//! ```
//!
//! Reading a byte whose page is missing waits until the page is filled: it has to be registered and served first.
//! The view is closed, and a touch is SIGSEGV, until its reservation is registered.

use crate::access::Access;
use crate::copy;
use crate::limits::ReserveError;
use crate::mapping::{OwnedMapping, unlock};
use crate::memfd::SealedMemfd;
use crate::page::{AddressRange, PageSize, Span};
use crate::pages::Donated;
use crate::physical::Physical;
use crate::reservation::Reservation;
use crate::shared::{Alias, SharedFile, Sharing, duplicate};
use crate::uffd::Uffd;
use nix::errno::Errno;
use nix::libc::{self, c_void};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mprotect};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;
use userfaultfd::RegisterMode;

/// The one view of a reservation, of whose bytes others may change some.
#[derive(Debug)]
pub struct View {
    reservation: Arc<Reservation>,
    access: Access,
    /// Whether nobody else can change what it shows.
    stable: bool,
    /// Where a device may be behind the bytes: the kernel does not copy from there. Ascending.
    physical: Vec<Span>,
}

impl View {
    /// Reserves `pages` pages of addresses, closed to every access until they are [registered](Uffd::register), and makes the one view of
    /// them. No memory is used until a page is filled.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] names the size and the limit that was in the way.
    pub fn reserve(
        pages: NonZeroUsize,
        page: PageSize,
        access: Access,
    ) -> Result<(Arc<Reservation>, Self), ReserveError> {
        let reservation = Reservation::new(pages, page, access)?;
        let view = Self { reservation: Arc::clone(&reservation), access, stable: true, physical: Vec::new() };
        Ok((reservation, view))
    }

    /// Shows part of a sealed memfd in place: the span's pages are the memfd's own, there at once and not copied.
    ///
    /// In a writable reservation a page is copied when it is first written to; the memfd never changes.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`. After `ENOMEM` (past `vm.max_map_count`) the span is as it was; after another, none of
    /// which is known to occur, it may be closed to every access. So for all of these functions.
    ///
    /// # Panics
    ///
    /// If the memfd does not have all of the span's pages at `offset`, the last one in part; if the span's addresses or `offset` are no
    /// multiples of the memfd's [granule](SealedMemfd::granule). So for all of these functions.
    pub fn map(&mut self, span: Span, memfd: &SealedMemfd, offset: u64) -> Result<(), Errno> {
        // Private, as a shared mapping of a memfd that is sealed against writing is EPERM before Linux 6.7.
        let part = Part { fd: memfd, offset, end: memfd.len() as u64, granule: memfd.granule() };
        self.map_over(span, part, MapFlags::MAP_PRIVATE)
    }

    /// Shows part of a file in place. It is the file's user who sees to it that the file keeps its length: a page past
    /// its end is SIGBUS to who touches it.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EACCES` to show a file that is open for reading only, writable and shared.
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

    /// Shows part of a memfd whose pages come later: to touch one that the memfd does not have, or that is not in this
    /// view yet, is a fault of `uffd`, and [`Uffd::continue_pages`] the answer. Linux 5.14.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); the errno of registering: `EINVAL` before Linux 5.14, and for a file that is not a memfd.
    pub fn map_lazy(&mut self, span: Span, file: &SharedFile, offset: u64, uffd: &Uffd) -> Result<(), Errno> {
        self.stable = false;
        // Closed until it is registered: a process that locks its memory (`mlockall(2)`) would have its holes filled with zeros.
        self.map_closed(span, Part::of(file, offset), MapFlags::MAP_SHARED)?;
        let range = self.reservation.addresses(span);
        if range.bytes() == 0 {
            return Ok(());
        }
        unlock(at(range), range.bytes())?;
        // A forked child would read zeros where a page has not come.
        // SAFETY: pages of our own mapping, and what a child of fork sees of them.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe { madvise(at(range), range.bytes(), MmapAdvise::MADV_DONTFORK) }?;
        // SAFETY: pages of a reservation, which no allocator gave out as zeros.
        #[expect(unsafe_code, reason = "the view is the vouching owner that register_range asks for")]
        unsafe { uffd.register_range(range, RegisterMode::MISSING | RegisterMode::MINOR) }?;
        self.protect(range)
    }

    /// Shows a mapping whose descriptor is not known a second time.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EACCES` to show writable what cannot be written to.
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
    /// As [`map`](Self::map); `EACCES` to show writable what was opened for reading.
    pub fn map_physical(&mut self, span: Span, physical: &Physical, offset: u64) -> Result<(), Errno> {
        self.stable = false;
        let part = Part {
            fd: physical,
            offset: physical.file_offset(offset),
            end: physical.file_end(),
            granule: self.reservation.page_size(),
        };
        self.map_over(span, part, MapFlags::MAP_SHARED)?;
        let place = self.physical.partition_point(|known| known.first < span.first);
        self.physical.insert(place, span);
        Ok(())
    }

    /// Moves donated pages in, at once: what is left in their old place are zeros. Linux 5.7.
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map); `EINVAL` before Linux 5.7. The pages have not moved then.
    ///
    /// # Panics
    ///
    /// As [`map`](Self::map); if one of the pages has moved before.
    pub fn move_in(&mut self, span: Span, donated: &Donated, offset: u64) -> Result<(), Errno> {
        let Some((range, source)) = self.whole_pages(span, &donated.mapping, offset) else { return Ok(()) };
        let moving = donated.span(offset, range.bytes());
        let taken = donated.take(moving).filter(|taken| taken.span() == moving);
        let taken = taken.unwrap_or_else(|| panic!("{moving:?} of {donated:?} have moved before"));
        let page = self.reservation.page_size().bytes();
        let (mut done, mut pages) = (0, moving.pages);
        while done < range.bytes() {
            match remap(source.part(done, pages), range.part(done, pages)) {
                Ok(()) => done += source.part(done, pages).bytes(),
                // Before Linux 6.17, what lies in several mappings does not move at once: an application may have split the donation's.
                Err(Errno::EFAULT) if pages > 1 => pages /= 2,
                Err(errno) => {
                    taken.moved(done / page);
                    return Err(errno);
                }
            }
        }
        taken.moved(moving.pages);
        self.protect(range)
    }

    /// Copies bytes out, without a reference to them: they may be changing.
    ///
    /// # Errors
    ///
    /// `EFAULT` where they cannot be read: past the end of a file that was truncated, in a poisoned page, or in an absent
    /// one of an ordinary user's.
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
                // SAFETY: `stretch` lies inside the mapping, of which every page there was mapped by `map_physical`.
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

    /// Writes bytes, without a reference to what is there. Two writers at once are no race, and either may win.
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
                // SAFETY: as in `read_at`, and writable; who made the `Physical` vouches for what writing to it does.
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

    /// Touches the page of a byte, as a load of a program's does, and says what the byte is at that moment. A page that cannot
    /// be had is a signal, here.
    ///
    /// # Panics
    ///
    /// If the byte is not inside the reservation.
    #[must_use]
    pub fn touch(&self, offset: usize) -> u8 {
        assert!(offset < self.reservation.mapping.bytes(), "byte {offset} is not inside the reservation");
        let byte = self.reservation.mapping.at(offset).cast::<u8>();
        // SAFETY: mapped for reading; a byte cannot be torn, and may be changing.
        #[expect(unsafe_code, reason = "reads through a raw pointer")]
        unsafe {
            byte.read_volatile()
        }
    }

    /// The bytes, all pages of them.
    ///
    /// # Safety
    ///
    /// - As long as the slice lives, nobody writes to what is shown in it: not through this view, not through another
    ///   mapping of the same file or physical memory, in this process or another; and no file is cut short.
    #[must_use]
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn as_slice(&self) -> &[u8] {
        let mapping = &self.reservation.mapping;
        // SAFETY: mapped and readable as long as `self` keeps the reservation; that it keeps its bytes is vouched for.
        unsafe { slice::from_raw_parts(mapping.start().as_ptr().cast(), mapping.bytes()) }
    }

    /// The address of the first byte, for code that works with raw pointers.
    #[must_use]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.reservation.mapping.start().cast()
    }

    /// As a view with slices, if nobody can change what it shows.
    ///
    /// # Errors
    ///
    /// The view itself, if somebody can.
    pub fn into_stable(self) -> Result<StableView, Self> {
        if self.stable { Ok(StableView { view: self }) } else { Err(self) }
    }

    /// Maps part of what a descriptor stands for over the span's pages.
    fn map_over(&self, span: Span, part: Part<'_, impl AsFd>, flags: MapFlags) -> Result<(), Errno> {
        self.map_with(self.protection(), span, part, flags)?;
        self.reservation.show(span);
        Ok(())
    }

    /// The same, closed to every access.
    fn map_closed(&self, span: Span, part: Part<'_, impl AsFd>, flags: MapFlags) -> Result<(), Errno> {
        self.map_with(ProtFlags::PROT_NONE, span, part, flags)
    }

    fn map_with(
        &self,
        protection: ProtFlags,
        span: Span,
        Part { fd, offset, end, granule }: Part<'_, impl AsFd>,
        flags: MapFlags,
    ) -> Result<(), Errno> {
        let range = self.reservation.addresses(span);
        let Some(bytes) = NonZeroUsize::new(range.bytes()) else { return Ok(()) };
        let there = granule.round_up(end).unwrap_or(u64::MAX);
        let inside = offset.checked_add(range.bytes() as u64).is_some_and(|last| last <= there);
        // The kernel would round the length up, and replace what is behind the span.
        let whole = AddressRange::new(range.start(), range.bytes(), granule).is_some()
            && granule.offset_of(granule.page_at(offset)) == offset;
        assert!(inside && whole, "{span:?} from {offset}, in multiples of {granule}");
        let flags = flags | MapFlags::MAP_FIXED | self.reserving(granule, flags);
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let start = NonZeroUsize::new(range.start());
        // SAFETY: the range is inside our own mapping, and this is the one view of it, which the callers have
        // borrowed mutably: nobody has a reference to its bytes.
        #[expect(unsafe_code, reason = "mmap over part of an owned mapping")]
        unsafe { mmap(start, bytes, protection, flags, fd, offset) }.map(drop)
    }

    /// Memory is reserved for no page that is shown in place, but for huge pages that are copied when they are written to: there may
    /// be none left then, which is a signal to the writer.
    fn reserving(&self, granule: PageSize, flags: MapFlags) -> MapFlags {
        let copied = flags.contains(MapFlags::MAP_PRIVATE) && self.access == Access::Writable;
        if copied && granule != PageSize::system() { MapFlags::empty() } else { MapFlags::MAP_NORESERVE }
    }

    /// Of what is shown in place: the kernel moves nothing there, so what is only read is guarded.
    fn protection(&self) -> ProtFlags {
        match self.access {
            Access::ReadOnly | Access::LogicallyReadOnly => Access::ReadOnly.protection(),
            Access::Writable => Access::Writable.protection(),
        }
    }

    /// Gives pages that brought their own protection the view's.
    fn protect(&self, range: AddressRange) -> Result<(), Errno> {
        // SAFETY: pages of our own mapping, whose one view the callers have borrowed mutably.
        #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
        unsafe {
            mprotect(at(range), range.bytes(), self.protection())
        }
    }

    /// The addresses of a span, and of as many bytes of a mapping; `None` for no pages.
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

    /// How many of the `most` bytes at `offset` are of one kind, and whether that is physical memory.
    fn stretch(&self, offset: u64, most: usize) -> (usize, bool) {
        let page = self.reservation.page_size();
        let end =
            offset.checked_add(most as u64).filter(|&end| end <= self.reservation.mapping.bytes() as u64);
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

/// A view of bytes that nobody else can change.
#[derive(Debug)]
pub struct StableView {
    /// Invariant: it is stable, and nothing is put into it any more.
    view: View,
}

impl StableView {
    /// The bytes, all pages of them.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: a missing page gets its value when it is first read, and no safe operation gives a filled page other
        // bytes (see the crate's safety argument); writes go through `as_mut_slice`, which excludes this borrow.
        #[expect(unsafe_code, reason = "the invariant is the vouching")]
        unsafe {
            self.view.as_slice()
        }
    }

    /// The bytes for writing, if the reservation was made writable.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        if self.view.access != Access::Writable {
            return None;
        }
        let mapping = &self.view.reservation.mapping;
        // SAFETY: as in `as_slice`, mapped for writing; this is the only view, and it is borrowed mutably.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        Some(unsafe { slice::from_raw_parts_mut(mapping.start().as_ptr().cast(), mapping.bytes()) })
    }

    /// The address of the first byte, for code that works with raw pointers.
    #[must_use]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.view.as_ptr()
    }
}

/// Moves donated pages over part of a reservation. The old addresses stay mapped: they are the donation's to unmap, and no other mapping's.
fn remap(source: AddressRange, target: AddressRange) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let bytes = source.bytes();
    // SAFETY: the source is memory that was given up, without a slice of it; the target is inside the reservation of the caller, which has
    // borrowed its one view mutably: nothing has a reference to its bytes.
    #[expect(unsafe_code, reason = "mremap")]
    let answer = unsafe { libc::mremap(at(source).as_ptr(), bytes, bytes, flags, at(target).as_ptr()) };
    if answer == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// Part of what a descriptor stands for.
struct Part<'f, F> {
    fd: &'f F,
    offset: u64,
    /// How much there is.
    end: u64,
    /// What it is mapped in multiples of.
    granule: PageSize,
}

impl<'f> Part<'f, SharedFile> {
    const fn of(file: &'f SharedFile, offset: u64) -> Self {
        Self { fd: file, offset, end: file.len(), granule: file.granule() }
    }
}

fn at(range: AddressRange) -> NonNull<c_void> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(range.start())).expect("mappings are not at 0")
}
