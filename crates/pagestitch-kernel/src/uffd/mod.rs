//! The userfaultfd: it is opened, memory is registered with it, and the kernel fills pages through
//! it.
//!
//! Each fill operation takes a page-aligned [`AddressRange`] and returns the kernel's answer as a
//! value, an [`Outcome`]. A fill is a safe function for any range, because the kernel writes
//! missing pages of memory that is registered with *this* userfaultfd only
//! ([`Outcome::NotRegistered`] otherwise), and a missing page has no value yet (the crate's [safety
//! argument](crate)). The danger is in registering, because that lets pages of existing memory *be*
//! missing. [`Uffd::register`] takes a reservation; [`Uffd::register_range`] and [`OwnMemory`] take
//! an `unsafe` promise; and memory that other processes have registered is not memory of this one.
//!
//! See `userfaultfd(2)` and `ioctl_userfaultfd(2)`.

mod abi;
mod adopt;
#[cfg(feature = "inject")]
pub mod inject;
mod kept_fd;
pub(crate) mod message;
mod moved;
mod open;
mod opened;
mod outcome;
mod own_process;
mod read;
mod register;
mod stand_in;
#[cfg(feature = "userfaultfd")]
mod userfaultfd_crate;

pub use adopt::{AdoptError, OwnMemory};
pub use open::{OpenError, handshake_probe, kernel_features};
pub use opened::{FaultMode, OpenedBy};
pub use outcome::Outcome;
pub use register::RegisterMode;

use abi::Waiters;
use kept_fd::KeptFd;
use outcome::Operation;
use read::ReadMethod;

use crate::errno::Errno;
use crate::features::Features;
use crate::page::{AddressRange, Span};
use crate::pages::Donated;
use crate::process::is_same_file;
use nix::libc::c_int;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Whether a page that is copied in stops its first writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The page can be written at once.
    Writable,
    /// The page is write-protected: its first write is a fault.
    Protected,
}

/// A userfaultfd that this process has opened, or that another process has sent.
#[derive(Debug)]
pub struct Uffd {
    fd: KeptFd,
    opened_by: OpenedBy,
    mode: FaultMode,
    features: Features,
    read_method: ReadMethod,
}

impl Uffd {
    /// True if another descriptor of this process, by its number, is of the same userfaultfd. As
    /// [`is_same_file`].
    #[must_use]
    pub fn is_also(&self, other: RawFd) -> bool {
        is_same_file(self.raw(), other)
    }

    /// The wanted features that are on.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The faults that it serves.
    #[must_use]
    pub const fn mode(&self) -> FaultMode {
        self.mode
    }

    /// The way in which it was opened.
    #[must_use]
    pub const fn opened_by(&self) -> OpenedBy {
        self.opened_by
    }

    /// Fills the missing pages of `range` with `bytes` and wakes the threads that wait for them.
    /// `bytes` needs no alignment.
    ///
    /// # Panics
    ///
    /// If `bytes` is not as long as `range`.
    #[doc(alias = "UFFDIO_COPY")]
    pub fn copy(&self, range: AddressRange, bytes: &[u8]) -> Outcome {
        assert_eq!(bytes.len(), range.bytes(), "a copy fills its range exactly");
        self.copy_from(range, bytes.as_ptr().addr(), Arrival::Writable)
    }

    /// As [`copy`](Self::copy), for pages that arrive write-protected: the first write to each is a
    /// write-protect fault. The range is registered for those. Linux 5.7.
    ///
    /// # Panics
    ///
    /// As [`copy`](Self::copy).
    #[doc(alias = "UFFDIO_COPY_MODE_WP")]
    pub fn copy_protected(&self, range: AddressRange, bytes: &[u8]) -> Outcome {
        assert_eq!(bytes.len(), range.bytes(), "a copy fills its range exactly");
        self.copy_from(range, bytes.as_ptr().addr(), Arrival::Protected)
    }

    /// Lets the kernel copy from an address of this process. The answer to an unreadable address is
    /// [`Outcome::SourceUnreadable`].
    pub(crate) fn copy_from(&self, range: AddressRange, source: usize, arrival: Arrival) -> Outcome {
        self.fill(Operation::Copy, range, |part, waiters| {
            let mut request = abi::UffdioCopy::new(part, source + (part.start() - range.start()), waiters)
                .protected(arrival == Arrival::Protected);
            // SAFETY: the kernel writes missing pages of registered memory only, which have no
            // value yet, and the `copied` field of `request`. It reads the source, which may be any
            // address.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::copy(self.raw(), &raw mut request) };
            Outcome::interpret(answer, part.bytes(), request.copied)
        })
    }

    /// Fills the missing pages of `range` with the zero page and wakes the threads that wait for
    /// them. Not for hugetlbfs.
    #[doc(alias = "UFFDIO_ZEROPAGE")]
    pub fn zero(&self, range: AddressRange) -> Outcome {
        self.fill(Operation::Zero, range, |range, waiters| {
            let mut request = abi::UffdioProgress::new(range, waiters);
            // SAFETY: the kernel maps zero pages in missing pages of registered memory only, which
            // have no value yet, and writes the `done` field of `request`.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::zeropage(self.raw(), &raw mut request) };
            Outcome::interpret(answer, range.bytes(), request.done)
        })
    }

    /// Maps the pages that the file behind `range` has in its page cache (minor faults), and wakes
    /// the waiting threads. Linux 5.13.
    #[doc(alias = "UFFDIO_CONTINUE")]
    pub fn continue_pages(&self, range: AddressRange) -> Outcome {
        self.fill(Operation::Continue, range, |range, waiters| {
            let mut request = abi::UffdioProgress::new(range, waiters);
            // SAFETY: the kernel maps a file's own pages in registered memory where no page is
            // mapped yet, and writes the `done` field of `request`.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::r#continue(self.raw(), &raw mut request) };
            Outcome::interpret(answer, range.bytes(), request.done)
        })
    }

    /// True if the process whose memory a userfaultfd fills has ended, or runs another program by
    /// now. `range` was registered with it.
    pub fn has_no_process(fd: BorrowedFd<'_>, range: AddressRange) -> bool {
        let mut request = abi::UffdioProgress::new(range, Waiters::Woken);
        // SAFETY: the kernel maps a file's own pages in registered memory where no page is mapped
        // yet, and writes the `done` field of `request`.
        #[expect(unsafe_code, reason = "an ioctl")]
        let answer = unsafe { abi::r#continue(fd.as_raw_fd(), &raw mut request) };
        answer.map_err(Errno::of) == Err(Errno::ESRCH)
    }

    /// Puts poison markers in the missing pages of `range`: an access, also one that waits, gets
    /// SIGBUS. Linux 6.6.
    #[doc(alias = "UFFDIO_POISON")]
    pub fn poison(&self, range: AddressRange) -> Outcome {
        self.fill(Operation::Poison, range, |range, waiters| {
            let mut request = abi::UffdioProgress::new(range, waiters);
            // SAFETY: the kernel writes markers to missing pages of registered memory only, which
            // have no value yet, and the `done` field of `request`.
            #[expect(unsafe_code, reason = "an ioctl")]
            let answer = unsafe { abi::poison(self.raw(), &raw mut request) };
            Outcome::interpret(answer, range.bytes(), request.done)
        })
    }

    /// As [`poison`](Self::poison), also for missing pages that are write-protected, as those of shared memory
    /// can be. The kernel takes such a page for a present one, so their protection is removed before.
    ///
    /// Unregistering would remove the protection, too, and the pages would read as zeros.
    pub fn poison_protected(&self, range: AddressRange) -> Outcome {
        let poisoned = self.poison(range);
        if poisoned != Outcome::AlreadyThere {
            return poisoned;
        }
        match self.unprotect(range.part(0, 1)) {
            // Not registered for write-protect faults: the page is present.
            Outcome::NotRegistered => return poisoned,
            Outcome::Done => {}
            // A part of a huge page.
            _ => {
                self.unprotect(range);
            }
        }
        self.poison(range)
    }

    /// Moves the private anonymous pages at `source` to the missing pages of `range`, and wakes the
    /// waiting threads. Linux 6.8.
    ///
    /// The moved pages are missing at `source` afterwards. Since Linux 6.18 the outcome may be
    /// [`Outcome::AlreadyThere`] for a page that has moved, or [`Outcome::Partial`] for too few: the page is missing at
    /// `source` then, too.
    ///
    /// # Safety
    ///
    /// - `source` is memory of this process that the caller owns, and no Rust reference to it
    ///   exists during the call. It reads as zeros later, or as the bytes that fill it then.
    ///
    /// # Panics
    ///
    /// If the ranges differ in length.
    #[doc(alias = "UFFDIO_MOVE")]
    #[expect(unsafe_code, reason = "takes pages away")]
    pub unsafe fn move_pages(&self, range: AddressRange, source: AddressRange) -> Outcome {
        assert!(source.bytes() == range.bytes(), "the ranges differ in length");
        self.fill(Operation::Move, range, |part, waiters| {
            let mut request =
                abi::UffdioCopy::new(part, source.start() + (part.start() - range.start()), waiters);
            // SAFETY: the kernel writes missing pages of registered memory, which have no value
            // yet, and the `copied` field of `request`. It takes away pages at `source`, which the
            // caller owns and has no reference to.
            let answer = unsafe { abi::r#move(self.raw(), &raw mut request) };
            Outcome::interpret(answer, part.bytes(), request.copied)
        })
    }

    /// Moves donated pages from `offset` on, a multiple of the page size, as
    /// [`move_pages`](Self::move_pages) does. Both sides must be writable mappings. Linux 6.8.
    ///
    /// The answer is [`Outcome::NotRegistered`] if the first page was never touched (and so is
    /// zeros), has moved before, or is taken by another thread at this moment.
    ///
    /// # Panics
    ///
    /// If the donation does not have as many pages there.
    pub fn move_donated(&self, range: AddressRange, donated: &Donated, offset: u64) -> Outcome {
        let Some(taken) = donated.take(donated.span(offset, range.bytes())) else {
            return Outcome::NotRegistered;
        };
        let part = range.part(0, taken.span().pages);
        // SAFETY: the donation owns the pages, and no slice of them exists.
        #[expect(unsafe_code, reason = "the donation is the vouching owner that move_pages asks for")]
        let mut outcome = unsafe { self.move_pages(part, donated.range(taken.span())) };
        if outcome != Outcome::Done {
            outcome = self.moved(outcome, &part, donated, taken.span());
        }
        taken.note(outcome);
        outcome.of_part(part.bytes(), range.bytes())
    }

    /// The outcome of a move of donated pages, whose answer may tell too little. See `uffd/moved.rs`.
    #[inline(never)] // a signal handler has a small stack
    fn moved(&self, told: Outcome, range: &AddressRange, donated: &Donated, span: Span) -> Outcome {
        let before = match told {
            Outcome::AlreadyThere => 0,
            Outcome::Partial { bytes } => bytes,
            _ => return told,
        };
        let moved = moved::moved(before, range, &donated.range(span));
        if moved == before {
            return told;
        }
        let _ = self.wake(*range);
        if moved < range.bytes() { Outcome::Partial { bytes: moved } } else { Outcome::Done }
    }

    /// Copies donated pages that cannot be moved. As [`move_donated`](Self::move_donated)
    /// otherwise.
    ///
    /// # Panics
    ///
    /// As [`move_donated`](Self::move_donated).
    pub fn copy_donated(
        &self,
        range: AddressRange,
        donated: &Donated,
        offset: u64,
        arrival: Arrival,
    ) -> Outcome {
        let Some(taken) = donated.take(donated.span(offset, range.bytes())) else {
            return Outcome::NotRegistered;
        };
        let part = range.part(0, taken.span().pages);
        let outcome = self.copy_from(part, donated.range(taken.span()).start(), arrival);
        outcome.of_part(part.bytes(), range.bytes())
    }

    /// Write-protects the present pages of `range`. A write then waits for
    /// [`unprotect`](Self::unprotect). Linux 5.7.
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    pub fn write_protect(&self, range: AddressRange) -> Outcome {
        self.set_protection(range, abi::WRITEPROTECT_MODE_WP)
    }

    /// Removes the write protection of `range` and wakes the waiting writers. Linux 5.7.
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    pub fn unprotect(&self, range: AddressRange) -> Outcome {
        self.set_protection(range, 0)
    }

    fn set_protection(&self, range: AddressRange, mode: u64) -> Outcome {
        let mut request = abi::UffdioWriteProtect { range: range.into(), mode };
        // SAFETY: the kernel changes the protection of registered pages, and no byte of them.
        #[expect(unsafe_code, reason = "an ioctl")]
        let answer = unsafe { abi::write_protect(self.raw(), &raw mut request) };
        Outcome::interpret(answer, range.bytes(), 0)
    }

    /// Fills a range, which may lie in several mappings. In a test, `inject` may answer instead.
    fn fill(
        &self,
        operation: Operation,
        range: AddressRange,
        ask: impl Fn(AddressRange, Waiters) -> Outcome,
    ) -> Outcome {
        let ask = |range, waiters| across_mappings(operation, range, &|part| ask(part, waiters));
        #[cfg(feature = "inject")]
        let outcome = inject::around(operation, range, self.opened_by != OpenedBy::Other, ask);
        #[cfg(not(feature = "inject"))]
        let (outcome, _) = (ask(range, Waiters::Woken), operation);
        outcome
    }

    /// Reads messages of [`MESSAGE`](message::MESSAGE) bytes each without waiting, whatever
    /// another process does with the descriptor. Returns the number of bytes; 0 if no message is
    /// there.
    pub(crate) fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        self.read_method.read(&self.fd, into)
    }

    /// The child's uffd of a fork event.
    pub(crate) fn of_child(fd: OwnedFd, parent: &Self) -> Self {
        let read_method = ReadMethod::of_child(&fd);
        let (fd, opened_by) = (KeptFd::own(fd), OpenedBy::Other);
        Self { fd, opened_by, mode: parent.mode, features: parent.features, read_method }
    }

    /// True if a thread may wait for a page: its event is unread, or its page is missing.
    #[must_use]
    pub fn has_waiters(&self) -> bool {
        if self.is_stand_in() {
            return false;
        }
        // One read, because the kernel writes the whole file at once; it has about 100 bytes.
        let mut about = [0; 1024];
        let opened = File::open(format!("/proc/self/fdinfo/{}", self.raw()));
        let bytes = opened.and_then(|mut file| file.read(&mut about)).unwrap_or(0);
        let lines = std::str::from_utf8(&about[..bytes]).unwrap_or_default().lines();
        let mut totals = lines.filter_map(|line| line.strip_prefix("total:")?.trim().parse::<u64>().ok());
        totals.next().is_none_or(|total| total > 0)
    }

    /// True if a message is unread, or if the kernel does not tell.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        let mut readable = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut readable, PollTimeout::ZERO) != Ok(0)
    }

    /// Leaves the descriptor open after the drop, because waiting threads would read zeros after a
    /// close.
    pub fn keep_open(&self) {
        self.fd.keep();
    }

    fn raw(&self) -> c_int {
        self.fd.as_fd().as_raw_fd()
    }
}

/// The descriptor, with its registrations. Its new owner closes it, also if it was to be
/// [kept open](Uffd::keep_open). That of a [stand-in](Uffd::stand_in) is a duplicate.
impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.fd.into_fd()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Fills a range that may lie in several mappings. A call of the application (`madvise`, `mbind`,
/// `mprotect`, `mlock`) splits a mapping, and the kernel refuses a range that crosses the border.
/// After a refusal, tries one page, then two, four, and so on up to the border. Only a refusal of
/// the first page alone is the answer.
fn across_mappings(
    operation: Operation,
    range: AddressRange,
    ask: &impl Fn(AddressRange) -> Outcome,
) -> Outcome {
    let outcome = ask(range);
    if !operation.may_cross(outcome) || range.is_one_page() {
        return outcome;
    }
    page_by_page(range, ask)
}

/// Not part of its caller, because a signal handler, which asks for one page, has a small stack.
#[inline(never)]
fn page_by_page(range: AddressRange, ask: &impl Fn(AddressRange) -> Outcome) -> Outcome {
    let (mut done, mut pages) = (0, 1);
    while done < range.bytes() {
        let part = range.part(done, pages);
        match ask(part) {
            Outcome::Done => done += part.bytes(),
            Outcome::Partial { bytes } => return Outcome::Partial { bytes: done + bytes },
            outcome if done == 0 => return outcome,
            // The caller continues from there, and gets the reason.
            _ => return Outcome::Partial { bytes: done },
        }
        pages *= 2;
    }
    Outcome::Done
}
