//! A reserved, contiguous range of addresses.
//!
//! ```text
//!            ┌────────────┬─────────────┬───────────────┬─────────────┐
//!   addresses│ filled     │ missing     │ revoked       │ missing     │   one mmap, PROT_READ or READ|WRITE
//!            └────────────┴─────────────┴───────────────┴─────────────┘
//!   a reader   sees bytes   waits for     gets SIGBUS
//!                           the uffd
//! ```
//!
//! A [`Reservation`] is shared with handler threads and knows addresses only; the [`View`](crate::View) stays with the region
//! and is the only way to the bytes. Every operation on part of the range passes one bounds check,
//! [`Reservation::addresses`]. It is not inherited by a forked child (`MADV_DONTFORK`): without the handler, the
//! child would read zeros. Its addresses are closed there, and after its drop they are kept from other mappings for a while
//! ([`ranges`]).

use crate::access::Access;
use crate::limits::ReserveError;
use crate::mapping::OwnedMapping;
use crate::page::{AddressRange, Page, PageSize, Span};
use crate::ranges::{self, ServedRange};
use crate::swap;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::{self, c_void};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, mmap, mprotect};
use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// An owned range of addresses, a whole number of pages, missing until filled.
#[derive(Debug)]
pub struct Reservation {
    pub(crate) mapping: OwnedMapping,
    page: PageSize,
    access: Access,
}

impl Reservation {
    /// Reserves `pages` pages of addresses, without a view: for [`View::reserve`](crate::View::reserve).
    pub(crate) fn new(
        pages: NonZeroUsize,
        page: PageSize,
        access: Access,
    ) -> Result<Arc<Self>, ReserveError> {
        let bytes = pages.checked_mul(NonZeroUsize::new(page.bytes()).expect("a page has bytes"));
        let bytes = bytes.ok_or_else(|| ReserveError::met(usize::MAX, Errno::ENOMEM))?;
        let refused = |errno| ReserveError::met(bytes.get(), errno);
        ranges::release_old();
        let mut mapping = OwnedMapping::closed_aligned(bytes).map_err(refused)?;
        mapping.do_not_fork().map_err(refused)?;
        Ok(Arc::new(Self { mapping, page, access }))
    }

    /// Lets the range be accessed as it was reserved for. [`Uffd::register`](crate::Uffd::register) does so. Where it was not registered,
    /// missing pages read as zeros from now on.
    ///
    /// # Errors
    ///
    /// `ENOMEM` where writable memory is counted and there may be no more: [`ReserveError::met`] names the limit.
    pub fn open(&self) -> Result<(), Errno> {
        self.mapping.open(self.access.protection())
    }

    /// Keeps the addresses from other mappings for a while after the drop, because a thread that waits in the range now may run only then.
    pub fn linger(&self) {
        self.mapping.linger();
    }

    /// Notes that children of fork inherit a span, as something is shown in it in place.
    pub(crate) fn show(&self, span: Span) {
        let range = self.addresses(span);
        ranges::show(self.range().start(), range.start()..range.end());
    }

    /// Notes what serves the range: who is about to copy from it asks ([`ranges::served_in`]).
    pub fn serve(&self, served: ServedRange) {
        ranges::serve(self.range().start(), served);
    }

    /// The size of its pages.
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.page
    }

    /// How many pages it has.
    #[must_use]
    pub const fn pages(&self) -> usize {
        self.mapping.bytes() / self.page.bytes()
    }

    /// All of its addresses.
    #[must_use]
    pub fn range(&self) -> AddressRange {
        self.addresses(Span { first: Page(0), pages: self.pages() })
    }

    /// The addresses of a span of its pages: the one bounds check.
    ///
    /// # Panics
    ///
    /// If the span is not inside. Spans come from the region's layout, so that is a defect, not an input.
    #[must_use]
    pub fn addresses(&self, span: Span) -> AddressRange {
        let inside = span.first.0.checked_add(span.pages).is_some_and(|end| end <= self.pages());
        assert!(inside, "{span:?} is not inside a reservation of {} pages", self.pages());
        let start = self.mapping.start().as_ptr().addr() + span.first.0 * self.page.bytes();
        AddressRange::new(start, self.page.bytes_of(span), self.page)
            .expect("whole pages of an aligned mapping")
    }

    /// The page that holds `address`, if it is inside.
    #[must_use]
    pub fn page_at(&self, address: usize) -> Option<Page> {
        let offset = address.checked_sub(self.mapping.start().as_ptr().addr())?;
        (offset < self.mapping.bytes()).then(|| self.page.page_at(offset as u64))
    }

    /// Which pages of a span are there: calls `each` with every page and whether it is in memory or swapped out.
    ///
    /// `mincore(2)` calls a page that was swapped out absent; for those, `/proc/self/pagemap` is asked too. Where that cannot be read,
    /// they count as absent. A page that is bad is one or the other.
    ///
    /// # Errors
    ///
    /// The errno of `mincore(2)`.
    pub fn residency(&self, span: Span, mut each: impl FnMut(Page, bool)) -> Result<(), Errno> {
        let mut vector = [0u8; RESIDENCY_BATCH];
        let mut rest = span;
        while !rest.is_empty() {
            let part = rest.prefix(RESIDENCY_BATCH);
            let range = self.addresses(part);
            // SAFETY: the range is ours, and `vector` has a byte for each of its pages.
            #[expect(unsafe_code, reason = "mincore")]
            let answer =
                unsafe { libc::mincore(range.start() as *mut c_void, range.bytes(), vector.as_mut_ptr()) };
            Errno::result(answer)?;
            let there = &mut vector[..part.pages];
            there.iter_mut().for_each(|here| *here &= 1);
            if there.contains(&0) {
                swap::find(range, there);
            }
            part.iter().zip(&*there).for_each(|(page, &here)| each(page, here != 0));
            rest = rest.without_prefix(part.pages);
        }
        Ok(())
    }

    /// Whether a page is in memory, as [`residency`](Self::residency) says it; with next to no stack, for a signal handler.
    ///
    /// # Errors
    ///
    /// The errno of `mincore(2)`.
    pub fn is_resident(&self, page: Page) -> Result<bool, Errno> {
        let range = self.addresses(page.span());
        let mut here = 0u8;
        // SAFETY: the range is a page of ours, and `here` has the byte for it.
        #[expect(unsafe_code, reason = "mincore")]
        let answer = unsafe { libc::mincore(range.start() as *mut c_void, range.bytes(), &raw mut here) };
        Errno::result(answer).map(|_| here & 1 == 1)
    }

    /// Lets huge pages move in as they are. Without, the kernel prepares for small pages on the first fault in a block, and
    /// splits what moves there. Where there are no huge pages, this changes nothing.
    pub fn advise_hugepage(&self) {
        let _ = self.mapping.advise(MmapAdvise::MADV_HUGEPAGE);
    }

    /// Lets children of `fork(2)` have the range, too: where nothing is filled for *their* pages, they read zeros. Whoever asks for
    /// this serves them, by the uffds that come with [`Event::Fork`](crate::Event::Fork).
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`; none is known to occur.
    pub fn inherit_on_fork(&self) -> Result<(), Errno> {
        self.advise_parts(MmapAdvise::MADV_DOFORK)
    }

    /// From now on, children of `fork(2)` do not have the range.
    ///
    /// # Errors
    ///
    /// As [`inherit_on_fork`](Self::inherit_on_fork).
    pub fn do_not_fork(&self) -> Result<(), Errno> {
        self.advise_parts(MmapAdvise::MADV_DONTFORK)
    }

    /// Leaves the range out of core dumps, with what is shown in it by now: the kernel would walk all of its addresses.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`; none is known to occur.
    pub fn hide_from_dumps(&self) -> Result<(), Errno> {
        self.advise_parts(MmapAdvise::MADV_DONTDUMP)
    }

    fn advise_parts(&self, advice: MmapAdvise) -> Result<(), Errno> {
        match self.mapping.advise(advice) {
            // Of a device's memory it is not to be said, and somebody may have unmapped a part: the rest, one by one.
            Err(Errno::EINVAL | Errno::ENOMEM) => {
                for part in self.mapped_parts() {
                    let start = part.start() as *mut c_void;
                    // SAFETY: part of our own mapping, and what children of fork see of it.
                    #[expect(unsafe_code, reason = "madvise")]
                    let _ = unsafe { libc::madvise(start, part.bytes(), advice as i32) };
                }
                Ok(())
            }
            advised => advised,
        }
    }

    /// Touches the pages of a span, in the process that this is called in, without a signal for those that are bad. Linux 5.14.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)` with `MADV_POPULATE_READ`: `EHWPOISON` or `EFAULT` for a bad page, `ENOMEM` where the range is
    /// not there, as in a forked child.
    pub fn populate_read(&self, span: Span) -> Result<(), Errno> {
        let range = self.addresses(span);
        // SAFETY: our own addresses, which are read from, and that only by the kernel.
        #[expect(unsafe_code, reason = "madvise")]
        let answer =
            unsafe { libc::madvise(range.start() as *mut c_void, range.bytes(), libc::MADV_POPULATE_READ) };
        Errno::result(answer).map(drop)
    }

    /// Takes a span away for good: a touch is SIGBUS. For kernels without `UFFDIO_POISON` (before 6.6).
    ///
    /// Maps an empty memfd over it, sealed against growing, as an access past a file's end is SIGBUS. Where the kernel maps no more
    /// (`vm.max_map_count`, descriptors), the span is closed instead, and a touch is SIGSEGV. Threads that already wait there have
    /// to be woken.
    ///
    /// # Errors
    ///
    /// The errno of `mprotect(2)`: `ENOMEM` past `vm.max_map_count`.
    pub fn revoke(&self, span: Span) -> Result<(), Errno> {
        let range = self.addresses(span);
        let Some(bytes) = NonZeroUsize::new(range.bytes()) else { return Ok(()) };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let covered = always_empty().and_then(|empty| {
            // SAFETY: the range is inside our own mapping. A reference to its bytes becomes one whose use ends the
            // program; it never shows other bytes.
            #[expect(unsafe_code, reason = "mmap over part of an owned mapping")]
            unsafe {
                mmap(NonZeroUsize::new(range.start()), bytes, ProtFlags::PROT_READ, flags, &empty, 0)
            }
        });
        covered.map(drop).or_else(|_| close(range))
    }

    /// Closes the whole range for good: whoever touches it gets SIGSEGV.
    ///
    /// The last act before a uffd is closed: closing alone would show zeros to who waits. Threads that already
    /// wait have to be woken; they meet the closed range. Takes time for the pages present, not for the range.
    ///
    /// # Errors
    ///
    /// The errno of `mprotect(2)`; none is known to occur.
    pub fn fence(&self) -> Result<(), Errno> {
        match close(self.range()) {
            // Somebody has unmapped or moved part of it: what is left is closed.
            Err(Errno::ENOMEM) => self.mapped_parts().into_iter().try_for_each(close),
            closed => closed,
        }
    }

    /// The parts of it that something is mapped at.
    fn mapped_parts(&self) -> Vec<AddressRange> {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let own = self.range();
        let parts = maps.lines().filter_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let start = usize::from_str_radix(start, 16).ok()?.max(own.start());
            let end = usize::from_str_radix(end, 16).ok()?.min(own.end());
            AddressRange::new(start, end.checked_sub(start).filter(|&bytes| bytes > 0)?, self.page)
        });
        parts.collect()
    }
}

/// A memfd without a byte, that never has one.
fn always_empty() -> Result<OwnedFd, Errno> {
    let empty = memfd_create(c"pagestitch-revoked", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&empty, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(empty)
}

fn close(range: AddressRange) -> Result<(), Errno> {
    let Some(start) = NonNull::new(range.start() as *mut c_void) else { return Ok(()) };
    // Not by mapping something over it: a process that has all of its mappings (vm.max_map_count) could not.
    // Protecting whole mappings needs no new one.
    // SAFETY: our own mapping; whoever still has a pointer into it is stopped, and reads nothing.
    #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
    unsafe {
        mprotect(start, range.bytes(), ProtFlags::PROT_NONE)
    }
}

const RESIDENCY_BATCH: usize = 1024;
