//! The userfaultfd: opened, registered, and asked to fill pages.
//!
//! Each fill operation takes a page-aligned [`AddressRange`] and answers with an [`Outcome`]: what the kernel said,
//! as a value. Filling is a safe function of any range because the kernel fills only missing pages of memory that is
//! registered with *this* userfaultfd ([`Outcome::NotRegistered`] else), and a missing page has no value yet (the
//! crate's [safety argument](crate)). Making pages *be* missing in somebody's memory is where care is due, and that is
//! registering: [`Uffd::register`] takes a reservation, [`Uffd::register_range`] and [`OwnMemory`] an `unsafe` promise, and
//! what other processes have registered is no memory of this one.
//!
//! Own ioctls on the `userfaultfd` crate's fd: that crate has no move, poison or feature query, and loses the
//! sign of what COPY says. See `userfaultfd(2)` and `ioctl_userfaultfd(2)`.

mod abi;
mod adopt;
#[cfg(feature = "inject")]
pub mod inject;
mod kept_fd;
mod open;
mod outcome;
mod own_process;
mod read;

pub use adopt::{AdoptError, OwnMemory};
pub use open::{FaultMode, OpenError, OpenedBy, handshake_probe, kernel_features};
pub use outcome::Outcome;
pub use userfaultfd::RegisterMode;

use kept_fd::KeptFd;
use outcome::{Operation, Waiters};
use read::ReadMethod;

use crate::features::Features;
use crate::page::AddressRange;
use crate::pages::Donated;
use crate::process::is_same_file;
use crate::reservation::Reservation;
use nix::errno::Errno;
use nix::libc::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// A userfaultfd of this process, or of another that sent it.
#[derive(Debug)]
pub struct Uffd {
    fd: KeptFd,
    opened_by: OpenedBy,
    mode: FaultMode,
    features: Features,
    read_method: ReadMethod,
}

impl Uffd {
    /// Opens a non-blocking, close-on-exec userfaultfd with those of the features `wanted` that this kernel has.
    ///
    /// `/dev/userfaultfd` is tried first, then the system call, which an ordinary user may make since Linux 5.11
    /// if faults of the kernel itself (a `write(2)` from an absent page) need not be served: see [`Uffd::mode`].
    ///
    /// # Errors
    ///
    /// [`OpenError`] says which way was refused, why, and what to do.
    #[doc(alias = "UFFDIO_API")]
    pub fn open(wanted: Features) -> Result<Self, OpenError> {
        open::open(wanted)
    }

    /// Takes over a userfaultfd of another process that sent it ([`fd_passing`](crate::fd_passing)). It is made non-blocking, for all who
    /// hold it.
    ///
    /// Which events were asked for is not known; [`features`](Self::features) are the kernel's operations.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]: the descriptor is something else, cannot be asked what it is, or fills memory of *this* process, whichever
    /// process has sent it: see [`adopt_own`](Self::adopt_own).
    pub fn adopt(fd: OwnedFd) -> Result<Self, AdoptError> {
        adopt::adopt(fd, None)
    }

    /// The same, for memory of this process too: another part of the program has registered it.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt), but for the last.
    pub fn adopt_own(fd: OwnedFd, promise: OwnMemory) -> Result<Self, AdoptError> {
        adopt::adopt(fd, Some(promise))
    }

    /// Whether another descriptor of this process, by its number, is of the same userfaultfd. As [`is_same_file`].
    #[must_use]
    pub fn is_also(&self, other: RawFd) -> bool {
        is_same_file(self.raw(), other)
    }

    /// Which of the wanted features are on.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// Whose faults are served.
    #[must_use]
    pub const fn mode(&self) -> FaultMode {
        self.mode
    }

    /// Which way it was opened.
    #[must_use]
    pub const fn opened_by(&self) -> OpenedBy {
        self.opened_by
    }

    /// Registers a whole reservation, and [opens](Reservation::open) it: from now on its missing pages are filled by whoever reads this
    /// uffd. Nothing has been shown in the reservation before.
    ///
    /// # Errors
    ///
    /// The kernel's errno: `EBUSY` if another uffd has the range, `ENOMEM`, `EINVAL` where the mapping cannot have `modes`; those of
    /// [`Reservation::open`].
    #[doc(alias = "UFFDIO_REGISTER")]
    pub fn register(&self, reservation: &Reservation, modes: RegisterMode) -> Result<(), Errno> {
        // SAFETY: the reservation is a range of its own, made by mmap: no allocator ever gave out its pages as zeros.
        #[expect(unsafe_code, reason = "the reservation is the vouching owner that register_range asks for")]
        unsafe { self.register_range(reservation.range(), modes) }?;
        // In this order: a page that is there before the range is registered never faults.
        reservation.open()
    }

    /// Registers a range of addresses that the caller vouches for.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    ///
    /// # Safety
    ///
    /// - The range's missing pages must be nobody's: no Rust value lives there that counts on them to read as zeros
    ///   (memory from `alloc_zeroed`, a fresh `mmap` already used as `&[u8]`).
    #[expect(unsafe_code, reason = "declares an obligation; what it calls is safe")]
    pub unsafe fn register_range(&self, range: AddressRange, modes: RegisterMode) -> Result<(), Errno> {
        let answer = self.fd.register_with_mode(range.start() as *mut c_void, range.bytes(), modes);
        answer.map(drop).map_err(|error| errno_of(&error))
    }

    /// Ends the registration of a range. Threads blocked in a missing page there read **zeros**: poison first.
    ///
    /// # Errors
    ///
    /// The kernel's errno.
    #[doc(alias = "UFFDIO_UNREGISTER")]
    pub fn unregister(&self, range: AddressRange) -> Result<(), Errno> {
        let answer = self.fd.unregister(range.start() as *mut c_void, range.bytes());
        answer.map_err(|error| errno_of(&error))
    }

    /// Fills the missing pages of `range` with `bytes` and wakes who waits for them. `bytes` needs no alignment.
    ///
    /// # Panics
    ///
    /// If `bytes` is not as long as `range`.
    #[doc(alias = "UFFDIO_COPY")]
    pub fn copy(&self, range: AddressRange, bytes: &[u8]) -> Outcome {
        assert_eq!(bytes.len(), range.bytes(), "a copy fills its range exactly");
        self.copy_from(range, bytes.as_ptr().addr())
    }

    /// Has the kernel copy from an address: it can be anything, and says so if it cannot be read.
    fn copy_from(&self, range: AddressRange, source: usize) -> Outcome {
        self.fill(Operation::Copy, range, |part, waiters| {
            let mut request = abi::Copy::new(part, source + (part.start() - range.start()), waiters);
            // SAFETY: `request` is a uffdio_copy that lives through the call; the kernel only reads its source.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::copy(self.raw(), &raw mut request) };
            Outcome::interpret(answer, part.bytes(), request.copied)
        })
    }

    /// Fills the missing pages of `range` with the zero page and wakes who waits for them. Not for hugetlbfs.
    #[doc(alias = "UFFDIO_ZEROPAGE")]
    pub fn zero(&self, range: AddressRange) -> Outcome {
        self.fill(Operation::Zero, range, |range, waiters| {
            let mut request = abi::Progress::new(range, waiters);
            // SAFETY: `request` is a uffdio_zeropage that lives through the call.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::zeropage(self.raw(), &raw mut request) };
            Outcome::interpret(answer, range.bytes(), request.done)
        })
    }

    /// Maps the pages that the file behind `range` has in its page cache (minor faults), and wakes. Linux 5.13.
    #[doc(alias = "UFFDIO_CONTINUE")]
    pub fn continue_pages(&self, range: AddressRange) -> Outcome {
        self.fill(Operation::Continue, range, |range, waiters| {
            let mut request = abi::Progress::new(range, waiters);
            // SAFETY: `request` is a uffdio_continue that lives through the call.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::r#continue(self.raw(), &raw mut request) };
            Outcome::interpret(answer, range.bytes(), request.done)
        })
    }

    /// Whether the process whose memory a userfaultfd fills has ended, or has another program by now; `range` was registered with it.
    pub fn has_no_process(fd: BorrowedFd<'_>, range: AddressRange) -> bool {
        let mut request = abi::Progress::new(range, Waiters::Woken);
        // SAFETY: `request` is a uffdio_continue that lives through the call. It maps what a page cache has, where there is one.
        #[expect(unsafe_code, reason = "an ioctl")]
        let answer = unsafe { abi::r#continue(fd.as_raw_fd(), &raw mut request) };
        answer == Err(Errno::ESRCH)
    }

    /// Makes the missing pages of `range` bad: whoever touches them, or waits for them, gets SIGBUS. Linux 6.6.
    #[doc(alias = "UFFDIO_POISON")]
    pub fn poison(&self, range: AddressRange) -> Outcome {
        self.fill(Operation::Poison, range, |range, waiters| {
            let mut request = abi::Progress::new(range, waiters);
            // SAFETY: `request` is a uffdio_poison that lives through the call.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::poison(self.raw(), &raw mut request) };
            Outcome::interpret(answer, range.bytes(), request.done)
        })
    }

    /// Moves the private anonymous pages at `source` to the missing pages of `range`, and wakes. Linux 6.8.
    ///
    /// The pages at `source` are gone afterwards, those that were moved.
    ///
    /// # Safety
    ///
    /// - `source` is memory of this process that the caller owns, and no Rust reference to it exists during the
    ///   call; what is read there later is zeros, or whatever then fills it.
    ///
    /// # Panics
    ///
    /// If the ranges differ in length.
    #[doc(alias = "UFFDIO_MOVE")]
    #[expect(unsafe_code, reason = "takes pages away")]
    pub unsafe fn move_pages(&self, range: AddressRange, source: AddressRange) -> Outcome {
        assert_eq!(source.bytes(), range.bytes(), "as many pages move as are missing");
        self.fill(Operation::Move, range, |part, waiters| {
            let mut request = abi::Copy::new(part, source.start() + (part.start() - range.start()), waiters);
            // SAFETY: `request` is a uffdio_move, laid out as a uffdio_copy; the caller gives `source` away.
            let answer = unsafe { abi::r#move(self.raw(), &raw mut request) };
            Outcome::interpret(answer, part.bytes(), request.copied)
        })
    }

    /// Moves donated pages in, as [`move_pages`](Self::move_pages) does: those from `offset` on, a multiple of the page
    /// size. [`Outcome::NotRegistered`] if the first was never touched, and is zeros, has moved before, or is taken by another
    /// thread at this moment. Both sides have to be writable mappings. Linux 6.8.
    ///
    /// # Panics
    ///
    /// If the donation does not have as many pages there.
    pub fn move_donated(&self, range: AddressRange, donated: &Donated, offset: u64) -> Outcome {
        let span = donated.span(offset, range.bytes());
        let Some(taken) = donated.take(span) else { return Outcome::NotRegistered };
        let part = range.part(0, taken.span().pages);
        // SAFETY: pages that were given up: nobody has a slice of them.
        #[expect(unsafe_code, reason = "the donation is the vouching owner that move_pages asks for")]
        let outcome = unsafe { self.move_pages(part, donated.range(taken.span())) };
        match outcome {
            Outcome::Done => taken.moved(taken.span().pages),
            Outcome::Partial { bytes } => taken.moved(donated.span(offset, bytes).pages),
            _ => {}
        }
        outcome.of_part(part.bytes(), range.bytes())
    }

    /// Copies donated pages in, for where they cannot be moved. As [`move_donated`](Self::move_donated) otherwise.
    ///
    /// # Panics
    ///
    /// As [`move_donated`](Self::move_donated).
    pub fn copy_donated(&self, range: AddressRange, donated: &Donated, offset: u64) -> Outcome {
        let span = donated.span(offset, range.bytes());
        let Some(taken) = donated.take(span) else { return Outcome::NotRegistered };
        let part = range.part(0, taken.span().pages);
        let outcome = self.copy_from(part, donated.range(taken.span()).start());
        outcome.of_part(part.bytes(), range.bytes())
    }

    /// Write-protects the present pages of `range`: a write then waits for [`unprotect`](Self::unprotect). Linux 5.7.
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    pub fn write_protect(&self, range: AddressRange) -> Outcome {
        self.set_protection(range, abi::WRITEPROTECT_MODE_WP)
    }

    /// Takes the write-protection of `range` away and wakes the writers that wait. Linux 5.7.
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    pub fn unprotect(&self, range: AddressRange) -> Outcome {
        self.set_protection(range, 0)
    }

    fn set_protection(&self, range: AddressRange, mode: u64) -> Outcome {
        let mut request = abi::WriteProtect { range: range.into(), mode };
        // SAFETY: `request` is a uffdio_writeprotect that lives through the call.
        #[expect(unsafe_code, reason = "an ioctl")]
        let answer = unsafe { abi::write_protect(self.raw(), &raw mut request) };
        Outcome::interpret(answer, range.bytes(), 0)
    }

    /// Lets every thread that waits in `range` try its access again.
    ///
    /// # Errors
    ///
    /// The kernel's errno; none is expected for a range of whole pages.
    #[doc(alias = "UFFDIO_WAKE")]
    pub fn wake(&self, range: AddressRange) -> Result<(), Errno> {
        let answer = self.fd.wake(range.start() as *mut c_void, range.bytes());
        answer.map_err(|error| errno_of(&error))
    }

    /// Has the kernel fill a range; or, in a test, something else happen there. The range may lie in several mappings.
    fn fill(
        &self,
        operation: Operation,
        range: AddressRange,
        ask: impl Fn(AddressRange, Waiters) -> Outcome,
    ) -> Outcome {
        let ask = |range, waiters| across_mappings(operation, range, |part| ask(part, waiters));
        #[cfg(feature = "inject")]
        let outcome = inject::around(operation, range, self.opened_by != OpenedBy::Other, ask);
        #[cfg(not(feature = "inject"))]
        let (outcome, _) = (ask(range, Waiters::Woken), operation);
        outcome
    }

    /// Reads messages of [`MESSAGE`](crate::event::MESSAGE) bytes each without waiting, whatever others do with the descriptor. Says how
    /// many bytes came; none if there is nothing to read.
    pub(crate) fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        self.read_method.read(&*self.fd, into)
    }

    /// The child's uffd, from a fork event.
    pub(crate) fn of_child(fd: OwnedFd, parent: &Self) -> Self {
        let read_method = ReadMethod::of_child(&fd);
        let (fd, opened_by) = (open::wrap(fd), OpenedBy::Other);
        Self { fd, opened_by, mode: parent.mode, features: parent.features, read_method }
    }

    /// Whether a thread waits for a page, as far as can be told: an event of its own that was not read, or a page that was not filled.
    #[must_use]
    pub fn has_waiters(&self) -> bool {
        let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.raw())).unwrap_or_default();
        let total = about.lines().find_map(|line| line.strip_prefix("total:")?.trim().parse::<u64>().ok());
        total.is_none_or(|total| total > 0)
    }

    /// Leaves the descriptor open when this is dropped: closed, it would show zeros to the threads that wait for it.
    pub fn keep_open(&self) {
        self.fd.keep();
    }

    fn raw(&self) -> c_int {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Asks the kernel for a range that may lie in several mappings: a call of the application (`madvise`, `mbind`, `mprotect`,
/// `mlock`) splits one, and the kernel refuses what crosses the border. Where it refuses a range, a page is tried, then two,
/// four, and so on up to the border. Only a refusal of the first page alone is the answer.
fn across_mappings(
    operation: Operation,
    range: AddressRange,
    ask: impl Fn(AddressRange) -> Outcome,
) -> Outcome {
    let outcome = ask(range);
    if !operation.may_cross(outcome) || range.is_one_page() {
        return outcome;
    }
    let (mut done, mut pages) = (0, 1);
    while done < range.bytes() {
        let part = range.part(done, pages);
        match ask(part) {
            Outcome::Done => done += part.bytes(),
            Outcome::Partial { bytes } => return Outcome::Partial { bytes: done + bytes },
            outcome if done == 0 => return outcome,
            // The caller goes on from there, and learns why.
            _ => return Outcome::Partial { bytes: done },
        }
        pages *= 2;
    }
    Outcome::Done
}

/// The errno inside an error of the `userfaultfd` crate, whose own Errno type is of another `nix`.
pub(crate) fn errno_of(error: &userfaultfd::Error) -> Errno {
    match error {
        userfaultfd::Error::SystemError(errno) => Errno::from_raw(*errno as i32),
        _ => Errno::EIO,
    }
}
