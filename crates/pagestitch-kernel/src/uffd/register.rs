//! Registering memory with a userfaultfd, ending that, and waking the threads that wait.

use super::Uffd;
use super::abi::{self, UffdioRange, UffdioRegister};
use crate::errno::Errno;
use crate::page::{AddressRange, Page, Span};
use crate::reservation::Reservation;
use std::ops::BitOr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The faults for which memory is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisterMode(u64);

impl RegisterMode {
    /// Accesses of missing pages.
    #[doc(alias = "UFFDIO_REGISTER_MODE_MISSING")]
    pub const MISSING: Self = Self(abi::REGISTER_MODE_MISSING);
    /// Writes to write-protected pages. Linux 5.7.
    #[doc(alias = "UFFDIO_REGISTER_MODE_WP")]
    pub const WRITE_PROTECT: Self = Self(abi::REGISTER_MODE_WP);
    /// Accesses of pages that the file has in its page cache, and that are not mapped. Linux 5.13.
    #[doc(alias = "UFFDIO_REGISTER_MODE_MINOR")]
    pub const MINOR: Self = Self(abi::REGISTER_MODE_MINOR);

    /// Its bits, as `UFFDIO_REGISTER` numbers them.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl BitOr for RegisterMode {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Uffd {
    /// Registers a whole reservation and [opens](Reservation::open) it. From now on, the reader of
    /// this uffd fills its missing pages. Nothing has been shown in the reservation before.
    ///
    /// # Errors
    ///
    /// The kernel's errno: `EBUSY` if another uffd has the range, `ENOMEM`, `EINVAL` if the mapping
    /// does not support `modes`; the errors of [`Reservation::open`].
    #[doc(alias = "UFFDIO_REGISTER")]
    pub fn register(&self, reservation: &Reservation, modes: RegisterMode) -> Result<(), Errno> {
        self.register_part(reservation, Span { first: Page(0), pages: reservation.pages() }, modes)?;
        // Opened afterwards, because a page that is filled before the range is registered never
        // faults.
        reservation.open()
    }

    /// Registers a span of a reservation, and leaves it closed. Each page has one uffd. When the
    /// whole reservation is registered, the caller [opens](Reservation::open) it.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    ///
    /// # Panics
    ///
    /// If the span is not inside the reservation.
    pub fn register_part(
        &self,
        reservation: &Reservation,
        span: Span,
        modes: RegisterMode,
    ) -> Result<(), Errno> {
        // SAFETY: the reservation is a mapping of its own. No allocator ever gave out its pages as
        // zeros.
        #[expect(unsafe_code, reason = "the reservation is the vouching owner that register_range asks for")]
        unsafe {
            self.register_range(reservation.addresses(span), modes)
        }
    }

    /// Registers a range of addresses that the caller vouches for.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    ///
    /// # Safety
    ///
    /// - No Rust value in the range counts on its missing pages to read as zeros. Memory from
    ///   `alloc_zeroed` does, and so does a fresh `mmap` of which a `&[u8]` exists.
    #[expect(unsafe_code, reason = "passes its obligation on")]
    pub unsafe fn register_range(&self, range: AddressRange, modes: RegisterMode) -> Result<(), Errno> {
        // SAFETY: the caller makes the same promise about the memory of the range.
        unsafe { register(self.as_fd(), range, modes) }
    }

    /// Ends the registration of a range, and wakes the threads that wait there. Those that wait for a
    /// missing page read **zeros**: poison the pages first.
    ///
    /// # Errors
    ///
    /// The kernel's errno.
    #[doc(alias = "UFFDIO_UNREGISTER")]
    pub fn unregister(&self, range: AddressRange) -> Result<(), Errno> {
        let ended = unregister(self.as_fd(), range);
        // The kernel wakes the threads before it has the lock of the mapping. A fault that holds this lock
        // shared can begin to wait after that wake, even if its page has a poison marker, because the kernel's
        // second check of the page (`userfaultfd_must_wait`) takes a marker for a missing page.
        let _ = wake(self.as_fd(), range);
        ended
    }

    /// Wakes the threads that wait in `range`; each tries its access again.
    ///
    /// # Errors
    ///
    /// The kernel's errno; none is expected for a range of whole pages.
    #[doc(alias = "UFFDIO_WAKE")]
    pub fn wake(&self, range: AddressRange) -> Result<(), Errno> {
        wake(self.as_fd(), range)
    }
}

/// Registers a range of the process whose memory the userfaultfd fills.
///
/// # Safety
///
/// - If that is this process: as [`Uffd::register_range`], or the kernel refuses the range.
#[expect(unsafe_code, reason = "an ioctl that lets pages of existing memory be missing")]
pub(super) unsafe fn register(
    fd: BorrowedFd<'_>,
    range: AddressRange,
    modes: RegisterMode,
) -> Result<(), Errno> {
    let mut request = UffdioRegister { range: range.into(), mode: modes.bits(), ioctls: 0 };
    // SAFETY: the kernel reads `request` and writes its `ioctls` field. The caller vouches for the
    // memory of the range.
    unsafe { abi::register(fd.as_raw_fd(), &raw mut request) }.map(drop).map_err(Errno::of)
}

pub(super) fn unregister(fd: BorrowedFd<'_>, range: AddressRange) -> Result<(), Errno> {
    let mut request = UffdioRange::from(range);
    // SAFETY: the kernel reads `request`. It changes no page, and missing pages of the range, which
    // have no value yet, read as zeros from now on.
    #[expect(unsafe_code, reason = "an ioctl")]
    unsafe { abi::unregister(fd.as_raw_fd(), &raw mut request) }.map(drop).map_err(Errno::of)
}

pub(super) fn wake(fd: BorrowedFd<'_>, range: AddressRange) -> Result<(), Errno> {
    let mut request = UffdioRange::from(range);
    // SAFETY: the kernel reads `request`, and wakes threads. It writes no memory.
    #[expect(unsafe_code, reason = "an ioctl")]
    unsafe { abi::wake(fd.as_raw_fd(), &raw mut request) }.map(drop).map_err(Errno::of)
}
