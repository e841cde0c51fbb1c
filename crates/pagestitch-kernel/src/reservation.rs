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
//! A [`Reservation`] is shared with handler threads and knows addresses only. The
//! [`View`](crate::View) stays with the region and is the only way to the bytes. Every operation on
//! part of the range passes one bounds check, [`Reservation::addresses`].
//!
//! A forked child does not inherit the range (`MADV_DONTFORK`), because it would read zeros where
//! no handler fills pages. The child's fork handler closes the addresses, and after a drop no other
//! mapping uses them for a while ([`ranges`]).

use crate::access::Access;
use crate::copy;
use crate::errno::Errno;
use crate::fork_window::ForkWindow;
use crate::limits::ReserveError;
use crate::mapping::{OwnedMapping, unlock};
use crate::page::{AddressRange, Page, PageSize, Span};
use crate::populate;
use crate::ranges::{self, ServedRange};
use crate::swap;
use crate::vma_name;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::{self, c_void};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, mmap, mprotect};
use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// An owned range of whole pages, each of which is missing until it is filled.
#[derive(Debug)]
pub struct Reservation {
    pub(crate) mapping: OwnedMapping,
    page: PageSize,
    access: Access,
    on_memfd: bool,
}

impl Reservation {
    /// Reserves `pages` pages of addresses. [`View::reserve`](crate::View::reserve) adds the view.
    /// `on_memfd`: the view maps a memfd over all of them.
    pub(crate) fn new(
        pages: NonZeroUsize,
        page: PageSize,
        access: Access,
        on_memfd: bool,
    ) -> Result<Arc<Self>, ReserveError> {
        let bytes = pages.checked_mul(NonZeroUsize::new(page.bytes()).expect("a page has bytes"));
        let bytes = bytes.ok_or_else(|| ReserveError::met(usize::MAX, Errno::ENOMEM))?;
        let refused = |errno| ReserveError::met(bytes.get(), errno);
        ranges::release_old();
        let mut mapping = OwnedMapping::closed_aligned(bytes).map_err(refused)?;
        mapping.do_not_fork().map_err(refused)?;
        let reservation = Arc::new(Self { mapping, page, access, on_memfd });
        vma_name::set(reservation.range(), None);
        Ok(reservation)
    }

    /// Opens the range to the accesses that it was reserved for.
    /// [`Uffd::register`](crate::Uffd::register) calls this. In a range that is not registered,
    /// missing pages read as zeros from now on.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if the kernel counts writable memory and the range exceeds the limit:
    /// [`ReserveError::met`] names it.
    pub fn open(&self) -> Result<(), Errno> {
        self.mapping.open(self.access.protection())
    }

    /// As [`open`](Self::open), for a span. The rest stays closed: an access there is SIGSEGV.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_span(&self, span: Span) -> Result<(), Errno> {
        let range = self.addresses(span);
        if range.bytes() == 0 {
            return Ok(());
        }
        let offset = range.start() - self.range().start();
        self.mapping.open_part(offset, range.bytes(), self.access.protection())
    }

    /// Keeps other mappings away from the addresses for a while after the drop, because a thread
    /// that waits in the range may run only then.
    pub fn linger(&self) {
        self.mapping.linger();
    }

    /// Names the range `[anon:pagestitch:REGION]` in `/proc/PID/maps`, instead of
    /// `[anon:pagestitch]`. Characters that the kernel forbids there become `_`, and long names are
    /// cut. Has no effect before Linux 5.17, or without `CONFIG_ANON_VMA_NAME`.
    #[doc(alias = "PR_SET_VMA_ANON_NAME")]
    pub fn set_name(&self, region: &str) {
        vma_name::set(self.range(), Some(region));
    }

    /// Notes that children of fork inherit a span, because something is shown there in place.
    pub(crate) fn show(&self, span: Span) {
        let range = self.addresses(span);
        ranges::show(self.range().start(), range.start()..range.end());
    }

    /// Notes the server of the range. A region that copies from here finds it with
    /// [`ranges::served_in`].
    pub fn serve(&self, served: ServedRange) {
        ranges::serve(self.range().start(), served);
    }

    /// True if its pages are those of a memfd, which other processes may write and discard.
    #[must_use]
    pub const fn is_on_memfd(&self) -> bool {
        self.on_memfd
    }

    /// The size of its pages.
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.page
    }

    /// The number of its pages.
    #[must_use]
    pub const fn pages(&self) -> usize {
        self.mapping.bytes() / self.page.bytes()
    }

    /// All of its addresses.
    #[must_use]
    pub fn range(&self) -> AddressRange {
        self.addresses(Span { first: Page(0), pages: self.pages() })
    }

    /// The addresses of a span of its pages. This is the one bounds check.
    ///
    /// # Panics
    ///
    /// If the span is not inside. Spans come from the region's layout, so a span outside is a
    /// defect and not an input.
    #[must_use]
    pub fn addresses(&self, span: Span) -> AddressRange {
        let inside = span.first.0.checked_add(span.pages).is_some_and(|end| end <= self.pages());
        assert!(inside, "{span:?} is not inside a reservation of {} pages", self.pages());
        let start = self.mapping.start().as_ptr().addr() + span.first.0 * self.page.bytes();
        AddressRange::new(start, self.page.bytes_of(span), self.page)
            .expect("whole pages of an aligned mapping")
    }

    /// The page that holds `address`; `None` if the address is not inside.
    #[must_use]
    pub fn page_at(&self, address: usize) -> Option<Page> {
        let offset = address.checked_sub(self.mapping.start().as_ptr().addr())?;
        (offset < self.mapping.bytes()).then(|| self.page.page_at(offset as u64))
    }

    /// Calls `each` with every page of a span, and whether it is present: in memory or swapped out.
    ///
    /// `mincore(2)` reports a swapped page as absent, so the function reads `/proc/self/pagemap`
    /// for the absent ones. If it cannot read that file, they count as absent. A poisoned page may
    /// count as either.
    ///
    /// # Errors
    ///
    /// The errno of `mincore(2)`.
    pub fn residency(&self, span: Span, each: impl FnMut(Page, bool)) -> Result<(), Errno> {
        self.ask(span, swap::find, each)
    }

    /// As [`residency`](Self::residency), except that a swapped page counts as absent: one system call
    /// for up to 1,024 pages.
    ///
    /// # Errors
    ///
    /// The errno of `mincore(2)`.
    pub fn in_memory(&self, span: Span, each: impl FnMut(Page, bool)) -> Result<(), Errno> {
        self.ask(span, |_, _| {}, each)
    }

    /// Asks `mincore(2)` about a span, and `find` about the pages that it calls absent.
    fn ask(
        &self,
        span: Span,
        find: impl Fn(AddressRange, &mut [u8]),
        mut each: impl FnMut(Page, bool),
    ) -> Result<(), Errno> {
        let mut vector = [0u8; RESIDENCY_BATCH];
        let mut rest = span;
        while !rest.is_empty() {
            let part = rest.prefix(RESIDENCY_BATCH);
            let range = self.addresses(part);
            // SAFETY: the kernel writes one byte for each page of the range to `vector`, which is
            // as long or longer. It writes no page of the range.
            #[expect(unsafe_code, reason = "mincore")]
            let answer =
                unsafe { libc::mincore(range.start() as *mut c_void, range.bytes(), vector.as_mut_ptr()) };
            Errno::result(answer)?;
            let there = &mut vector[..part.pages];
            there.iter_mut().for_each(|here| *here &= 1);
            if there.contains(&0) {
                find(range, there);
            }
            part.iter().zip(&*there).for_each(|(page, &here)| each(page, here != 0));
            rest = rest.without_prefix(part.pages);
        }
        Ok(())
    }

    /// True if a page is in memory: [`residency`](Self::residency) for one page, with little stack,
    /// for signal handlers.
    ///
    /// # Errors
    ///
    /// The errno of `mincore(2)`.
    pub fn is_resident(&self, page: Page) -> Result<bool, Errno> {
        let range = self.addresses(page.span());
        let mut here = 0u8;
        // SAFETY: the kernel writes one byte for the one page of the range to `here`. It does not
        // write the page.
        #[expect(unsafe_code, reason = "mincore")]
        let answer = unsafe { libc::mincore(range.start() as *mut c_void, range.bytes(), &raw mut here) };
        Errno::result(answer).map(|_| here & 1 == 1)
    }

    /// Advises huge pages, so that a huge page moves in as a whole. Without the advice, the kernel
    /// prepares for small pages at the first fault in a block and splits each huge page that moves
    /// there. Has no effect on a kernel without huge pages.
    pub fn advise_hugepage(&self) {
        let _ = self.mapping.advise(MmapAdvise::MADV_HUGEPAGE);
    }

    /// Advises small pages, because pages leave the range one by one. Has no effect on a kernel without
    /// huge pages.
    pub fn use_small_pages(&self) {
        let _ = self.mapping.advise(MmapAdvise::MADV_NOHUGEPAGE);
    }

    /// Unlocks the range, which `mlockall(2)` has locked.
    pub(crate) fn unlock(&self) -> Result<(), Errno> {
        unlock(self.mapping.start(), self.mapping.bytes())
    }

    /// Lets children of `fork(2)` inherit the range. A child reads zeros unless a server fills
    /// *its* pages, so the caller serves the uffds that come with
    /// [`Event::Fork`](crate::Event::Fork). A thread that reads these events enters the window until
    /// it has kept the uffds open: a child waits for it, and an access to the range is SIGSEGV if the
    /// server has ended before. A child of a raw `clone(2)` does not wait.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`; none is known to occur.
    pub fn inherit_on_fork(&self, window: Arc<ForkWindow>) -> Result<(), Errno> {
        ranges::inherit(self.range().start(), window);
        self.advise_parts(MmapAdvise::MADV_DOFORK)
    }

    /// Hides the range from children of `fork(2)` from now on.
    ///
    /// # Errors
    ///
    /// As [`inherit_on_fork`](Self::inherit_on_fork).
    pub fn do_not_fork(&self) -> Result<(), Errno> {
        self.advise_parts(MmapAdvise::MADV_DONTFORK)
    }

    /// Leaves the range, with everything shown in it so far, out of core dumps. A dump would walk
    /// all of its addresses.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`; none is known to occur.
    pub fn hide_from_dumps(&self) -> Result<(), Errno> {
        self.advise_parts(MmapAdvise::MADV_DONTDUMP)
    }

    fn advise_parts(&self, advice: MmapAdvise) -> Result<(), Errno> {
        match self.mapping.advise(advice) {
            // The advice is refused for a device's memory, and for a range of which the application
            // has unmapped a part: advises the other mappings one by one.
            Err(Errno::EINVAL | Errno::ENOMEM) => {
                for part in self.mapped_parts() {
                    let start = part.start() as *mut c_void;
                    // SAFETY: the part is inside an owned mapping, and the advice changes none of
                    // its bytes.
                    #[expect(unsafe_code, reason = "madvise")]
                    let _ = unsafe { libc::madvise(start, part.bytes(), advice as i32) };
                }
                Ok(())
            }
            advised => advised,
        }
    }

    /// Copies bytes out of the range. The kernel copies them, so that a concurrent write is no data race.
    ///
    /// # Errors
    ///
    /// The errno of `process_vm_readv(2)`: `EFAULT` for a page that is absent or poisoned.
    ///
    /// # Panics
    ///
    /// If the bytes are not inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        copy::read(&self.mapping, offset, into)
    }

    /// Reads the pages of a span in the calling process. A poisoned page is an error here and not a
    /// signal. Linux 5.14.
    ///
    /// Before Linux 6.9, `madvise(2)` tries a page of a file that cannot be read from the disk again
    /// and again, without end. There, a copy of a byte of each page reads them first.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)` with `MADV_POPULATE_READ`: `EHWPOISON` or `EFAULT` for a poisoned
    /// page, `ENOMEM` if the range is not mapped, as in a forked child.
    pub fn populate_read(&self, span: Span) -> Result<(), Errno> {
        if populate::may_not_end() {
            let mut offsets = span.iter().map(|page| self.page.offset_of(page));
            offsets.try_for_each(|offset| copy::read(&self.mapping, offset, &mut [0]))?;
        }
        let range = self.addresses(span);
        // SAFETY: the kernel reads pages of an owned mapping. It writes only missing ones, which
        // have no value yet.
        #[expect(unsafe_code, reason = "madvise")]
        let answer =
            unsafe { libc::madvise(range.start() as *mut c_void, range.bytes(), libc::MADV_POPULATE_READ) };
        Errno::result(answer).map(drop)
    }

    /// Has the kernel begin to read pages of a file that are not in memory, and no others: a touch has it
    /// read pages before and behind, too. A hint, whose failure changes nothing.
    pub fn will_need(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let part = rest.prefix((WILL_NEED / self.page.bytes()).max(1));
            let range = self.addresses(part);
            // SAFETY: the range is inside an owned mapping, and the kernel changes no page of it.
            #[expect(unsafe_code, reason = "madvise")]
            let _ =
                unsafe { libc::madvise(range.start() as *mut c_void, range.bytes(), libc::MADV_WILLNEED) };
            rest = rest.without_prefix(part.pages);
        }
    }

    /// Looks for locked pages in a span, and changes none. A discard (`MADV_DONTNEED`) drops the pages
    /// before the first locked one.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`: `EINVAL` for locked pages. `EOPNOTSUPP` before Linux 5.4.
    pub fn check_unlocked(&self, span: Span) -> Result<(), Errno> {
        let range = self.addresses(span);
        // Refused in the same mappings as MADV_DONTNEED.
        let advise = |bytes| {
            // SAFETY: the pages are those of an owned mapping. The kernel only makes them the first that
            // it reclaims.
            #[expect(unsafe_code, reason = "madvise")]
            let answer = unsafe { libc::madvise(range.start() as *mut c_void, bytes, libc::MADV_COLD) };
            Errno::result(answer).map(drop)
        };
        // Of no bytes, only an advice is refused that the kernel does not know.
        advise(0).map_err(|_| Errno::EOPNOTSUPP)?;
        advise(range.bytes())
    }

    /// Drops the pages of a span: they are missing afterwards.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`: `EINVAL` for locked pages.
    ///
    /// # Safety
    ///
    /// - The pages are filled with the same bytes again, or no reference to their bytes exists.
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub(crate) unsafe fn discard(&self, span: Span) -> Result<(), Errno> {
        let range = self.addresses(span);
        // SAFETY: the pages are those of an owned mapping, and the caller vouches for their bytes.
        let answer =
            unsafe { libc::madvise(range.start() as *mut c_void, range.bytes(), libc::MADV_DONTNEED) };
        Errno::result(answer).map(drop)
    }

    /// Takes a span away for good: an access there is SIGBUS. For kernels without `UFFDIO_POISON`
    /// (before 6.6).
    ///
    /// Maps an empty memfd over the span, sealed against growing, because an access past a file's
    /// end is SIGBUS. If the kernel refuses another mapping or descriptor (`vm.max_map_count`),
    /// closes the span instead, and an access is SIGSEGV. The caller wakes threads that wait there.
    ///
    /// # Errors
    ///
    /// The errno of `mprotect(2)`: `ENOMEM` past `vm.max_map_count`.
    pub fn revoke(&self, span: Span) -> Result<(), Errno> {
        let range = self.addresses(span);
        let Some(bytes) = NonZeroUsize::new(range.bytes()) else { return Ok(()) };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let covered = always_empty().and_then(|empty| {
            // SAFETY: the range is inside an owned mapping. A read through a reference to its bytes
            // ends the program from now on; it never sees other bytes.
            #[expect(unsafe_code, reason = "mmap over part of an owned mapping")]
            unsafe {
                mmap(NonZeroUsize::new(range.start()), bytes, ProtFlags::PROT_READ, flags, &empty, 0)
                    .map_err(Errno::of)
            }
        });
        covered.map(drop).or_else(|_| close(range))
    }

    /// Closes the whole range for good: an access is SIGSEGV.
    ///
    /// The last act before the uffd closes, because waiting threads would read zeros after the
    /// close alone. The caller wakes them, and they meet the closed range. The time depends on the
    /// present pages and not on the length of the range.
    ///
    /// # Errors
    ///
    /// The errno of `mprotect(2)`; none is known to occur.
    pub fn fence(&self) -> Result<(), Errno> {
        match close(self.range()) {
            // The application has unmapped or moved part of the range: closes the rest.
            Err(Errno::ENOMEM) => self.mapped_parts().into_iter().try_for_each(close),
            closed => closed,
        }
    }

    /// As [`fence`](Self::fence), for the spans in which pages can be missing. The caller keeps the
    /// pages of the others until the end, and no thread waits there.
    ///
    /// # Errors
    ///
    /// As [`fence`](Self::fence).
    pub fn fence_spans(&self, mut spans: impl Iterator<Item = Span>) -> Result<(), Errno> {
        match spans.try_for_each(|span| close(self.addresses(span))) {
            Err(Errno::ENOMEM) => self.fence(),
            closed => closed,
        }
    }

    /// The parts of the range in which something is mapped.
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

/// An empty memfd that cannot grow.
fn always_empty() -> Result<OwnedFd, Errno> {
    let empty = memfd_create(c"pagestitch-revoked", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(Errno::of)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&empty, FcntlArg::F_ADD_SEALS(seals)).map_err(Errno::of)?;
    Ok(empty)
}

fn close(range: AddressRange) -> Result<(), Errno> {
    let Some(start) = NonNull::new(range.start() as *mut c_void) else { return Ok(()) };
    // Not a new mapping over the range, because a process at its limit of mappings
    // (vm.max_map_count) has none left. The protection of whole mappings needs no new one.
    // SAFETY: the range is inside an owned mapping. An access through a pointer into it is a signal
    // from now on, and reads nothing.
    #[expect(unsafe_code, reason = "mprotect of an owned mapping")]
    unsafe {
        mprotect(start, range.bytes(), ProtFlags::PROT_NONE).map_err(Errno::of)
    }
}

const RESIDENCY_BATCH: usize = 1024;
/// The bytes of one request to read ahead: the kernel's default. It cuts a longer one to the disk's largest
/// request, or to its own readahead.
const WILL_NEED: usize = 128 << 10;
