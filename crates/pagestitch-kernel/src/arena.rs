//! Pages that leave a region: they move to the slots of an arena, or are dropped.
//!
//! ```text
//!   region   |■|■| |■|■|■|■|      missing afterwards: a touch is a fault
//!                 │ ▲
//!    take_in      │ │   give_back            UFFDIO_MOVE, both ways: no byte is copied
//!                 ▼ │
//!   arena    |■|■|■|■| | | | |    slots; `empty` frees a run of them with one call
//! ```
//!
//! Only the destination of a move has to be registered. So the arena has a userfaultfd of its own, and
//! pages of any region move there, while other threads read the region. The kernel clears the entry
//! of the page in one step: a page that is pinned, or shared with a forked process, stays. The latter stays until
//! it is written, also after the process has ended.
//!
//! A page that leaves may come back with other bytes, if its source has changed. [`Evictable`] is the
//! promise that no reader sees that.

use crate::access::Access;
use crate::errno::Errno;
use crate::features::Features;
use crate::file_write::write_from;
use crate::page::{AddressRange, Page, PageSize, Span};
use crate::reservation::Reservation;
use crate::swap::{self, There};
use crate::uffd::{Arrival, OpenError, Outcome, RegisterMode, Uffd};
use nix::libc::{self, c_void};
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// A reservation whose filled pages may be taken away.
#[derive(Debug, Clone)]
pub struct Evictable(Arc<Reservation>);

impl Evictable {
    /// Lets pages of a reservation be taken away.
    ///
    /// # Safety
    ///
    /// - A page that was taken away is filled with the same bytes again; or no slice of the view's
    ///   bytes exists, because the view is not stable and the kernel alone reads it.
    /// - No code writes to the pages; or a page with written bytes is never dropped.
    #[must_use]
    #[expect(unsafe_code, reason = "a promise of the caller")]
    pub const unsafe fn new(reservation: Arc<Reservation>) -> Self {
        Self(reservation)
    }

    /// The reservation.
    #[must_use]
    pub const fn reservation(&self) -> &Arc<Reservation> {
        &self.0
    }

    /// Drops pages: they are missing afterwards, and their memory is free. Pages that are missing
    /// already, stay so.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`: `EINVAL` for locked pages.
    pub fn discard(&self, span: Span) -> Result<(), Errno> {
        discard(self.0.addresses(span))
    }
}

/// The reason why there is no arena.
#[derive(Debug)]
pub enum ArenaError {
    /// This kernel does not move pages, or not safely: the reason and the remedy.
    NoMoves(&'static str),
    /// No userfaultfd can be opened.
    Open(OpenError),
    /// The kernel refuses its memory, or its registration.
    Refused(Errno),
}

impl fmt::Display for ArenaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMoves(reason) => f.write_str(reason),
            Self::Open(error) => error.fmt(f),
            Self::Refused(errno) => write!(f, "the kernel refuses memory for standby pages: {errno}"),
        }
    }
}

impl std::error::Error for ArenaError {}

/// Slots for pages that have left their regions. The caller decides which slots are in use.
#[derive(Debug)]
pub struct Arena {
    reservation: Arc<Reservation>,
    uffd: Uffd,
}

impl Arena {
    /// An arena with empty slots. It takes no memory before pages move in.
    ///
    /// # Errors
    ///
    /// [`ArenaError::NoMoves`] before Linux 6.8, and where a page that is swapped out could be lost in
    /// a move.
    pub fn new(slots: NonZeroUsize) -> Result<Self, ArenaError> {
        // Without SIGBUS, a read of an empty slot by the kernel would wait for ever.
        let wanted = Features::MOVE | Features::SIGBUS;
        let uffd = Uffd::open(wanted).map_err(ArenaError::Open)?;
        if !uffd.features().contains(wanted) {
            return Err(ArenaError::NoMoves("this kernel cannot move pages: use Linux 6.8 or newer"));
        }
        swap::moves_safely().and_then(|()| swap::tells_swapped_pages()).map_err(ArenaError::NoMoves)?;
        let reservation = Reservation::new(slots, PageSize::system(), Access::LogicallyReadOnly, false)
            .map_err(|error| ArenaError::Refused(error.errno))?;
        reservation.set_name("standby");
        uffd.register(&reservation, RegisterMode::MISSING).map_err(ArenaError::Refused)?;
        reservation.use_small_pages();
        // A dump has the pages of regions, if it has any.
        reservation.hide_from_dumps().map_err(ArenaError::Refused)?;
        Ok(Self { reservation, uffd })
    }

    /// The number of its slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.reservation.pages()
    }

    /// Moves pages of a reservation to empty slots, the first to `slot`.
    ///
    /// [`Outcome::NotRegistered`]: the first page is missing. [`Outcome::Busy`]: it is pinned, or shared
    /// with a forked process. [`Outcome::Refused`]: the memory is locked, or not writable.
    ///
    /// # Panics
    ///
    /// If there are not as many slots.
    pub fn take_in(&self, from: &Evictable, span: Span, slot: usize) -> Outcome {
        let into = self.reservation.addresses(Span { first: Page(slot), pages: span.pages });
        // SAFETY: the reservation owns the pages at the source. By the promise of `Evictable`, a
        // reference to their bytes sees the same bytes when they are back, and waits meanwhile.
        #[expect(unsafe_code, reason = "the promise of Evictable is the one that move_pages asks for")]
        let mut outcome = unsafe { self.uffd.move_pages(into, from.0.addresses(span)) };
        if outcome != Outcome::Done {
            outcome = self.taken_in(outcome, from, &span, slot);
        }
        outcome
    }

    /// The outcome of a move to empty slots, whose answer may tell too little. See `uffd/moved.rs`.
    #[inline(never)] // a signal handler has a small stack
    fn taken_in(&self, told: Outcome, from: &Evictable, span: &Span, slot: usize) -> Outcome {
        let before = match told {
            Outcome::AlreadyThere => 0,
            Outcome::Partial { bytes } => bytes / PageSize::system().bytes(),
            _ => return told,
        };
        let is_there = |address| matches!(There::of(address), There::Present | There::Swapped);
        let left = |pages: usize| from.0.addresses(span.without_prefix(pages)).start();
        let into = |pages: usize| self.slots_at(slot + pages..slot + pages + 1).start();
        // The kernel has told of a page in the first slot.
        let is_told = |pages| pages == 0 && told == Outcome::AlreadyThere;
        let mut pages = before;
        while pages < span.pages && !is_there(left(pages)) && (is_told(pages) || is_there(into(pages))) {
            pages += 1;
        }
        match pages {
            _ if pages == before => told,
            _ if pages < span.pages => Outcome::Partial { bytes: pages * PageSize::system().bytes() },
            _ => Outcome::Done,
        }
    }

    /// Moves the page of a slot to a missing page of a region, and wakes the threads that wait there.
    /// The slot is empty then.
    ///
    /// # Panics
    ///
    /// If there is no such slot, or the range is not one page.
    pub fn give_back(&self, uffd: &Uffd, range: AddressRange, slot: usize) -> Outcome {
        // SAFETY: the arena owns its pages, and gives out no reference to them.
        #[expect(unsafe_code, reason = "the arena is the vouching owner that move_pages asks for")]
        let mut outcome = unsafe { uffd.move_pages(range, self.slots_at(slot..slot + 1)) };
        if outcome != Outcome::Done {
            outcome = self.given_back(outcome, uffd, &range, slot);
        }
        outcome
    }

    /// The outcome of a move of a full slot. If its page is there and the slot is empty, the page is the one. See
    /// `uffd/moved.rs`.
    #[inline(never)] // a signal handler has a small stack
    fn given_back(&self, told: Outcome, uffd: &Uffd, range: &AddressRange, slot: usize) -> Outcome {
        if told != Outcome::AlreadyThere || There::of(self.slots_at(slot..slot + 1).start()) != There::Missing
        {
            return told;
        }
        let _ = uffd.wake(*range);
        Outcome::Done
    }

    /// Copies the pages of slots to missing pages of a region, and wakes the threads that wait there:
    /// where they cannot move, and where they arrive write-protected, because a move has no such mode.
    /// The slots keep their pages.
    ///
    /// # Panics
    ///
    /// If there are no such slots, or the range differs in length.
    pub fn copy_back(
        &self,
        uffd: &Uffd,
        range: AddressRange,
        slots: Range<usize>,
        arrival: Arrival,
    ) -> Outcome {
        let from = self.slots_at(slots);
        assert_eq!(from.bytes(), range.bytes(), "each slot has a page of the range");
        uffd.copy_from(range, from.start(), arrival)
    }

    /// Copies the bytes of the pages of a run of slots.
    ///
    /// # Errors
    ///
    /// `EFAULT` if a slot is empty; otherwise as [`Reservation::read_at`].
    ///
    /// # Panics
    ///
    /// If there are no such slots.
    pub fn read(&self, first: usize, into: &mut [u8]) -> Result<(), Errno> {
        self.reservation.read_at(self.reservation.page_size().offset_of(Page(first)), into)
    }

    /// Writes bytes of slots to a file, from `offset` on. False if the file does not take all of them, or if a slot is
    /// empty. A signal handler may do so.
    ///
    /// # Panics
    ///
    /// If there are no such slots.
    #[must_use]
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64, bytes: Range<usize>) -> bool {
        let all = self.reservation.range();
        assert!(bytes.end <= all.bytes(), "the bytes are those of slots");
        write_from(file, offset, all.start() + bytes.start..all.start() + bytes.end)
    }

    /// Empties a run of slots, and frees their memory.
    ///
    /// `mlockall(2)` may have locked the arena, from which the kernel frees nothing then. So the arena is
    /// unlocked, and pages of locked regions do not move there from now on.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)` or `munlock(2)`; none is known to occur.
    ///
    /// # Panics
    ///
    /// If there are no such slots.
    pub fn empty(&self, slots: Range<usize>) -> Result<(), Errno> {
        let range = self.slots_at(slots);
        discard(range).or_else(|_| {
            self.reservation.unlock()?;
            discard(range)
        })
    }

    fn slots_at(&self, slots: Range<usize>) -> AddressRange {
        self.reservation.addresses(Span { first: Page(slots.start), pages: slots.len() })
    }
}

fn discard(range: AddressRange) -> Result<(), Errno> {
    // SAFETY: the range is inside a reservation whose pages may be taken away. They are missing
    // afterwards, because it is registered.
    #[expect(unsafe_code, reason = "madvise")]
    let answer = unsafe { libc::madvise(range.start() as *mut c_void, range.bytes(), libc::MADV_DONTNEED) };
    Errno::result(answer).map(drop)
}

/// Drops many runs of pages with few system calls.
#[derive(Debug)]
pub struct Discards {
    /// This process, for `process_madvise(2)`.
    own: Option<OwnedFd>,
}

impl Discards {
    /// Finds out whether this kernel drops several runs at once (Linux 6.13).
    #[must_use]
    pub fn new() -> Self {
        let own = own_process().ok();
        let works = |own: &OwnedFd| advise_all(own, &[]).is_ok();
        Self { own: own.filter(works) }
    }

    /// Drops the runs from the `first`-th on, as [`Evictable::discard`] does. Returns the number of those that
    /// are dropped: the run after them is refused.
    ///
    /// # Panics
    ///
    /// If there are fewer than `first` runs.
    pub fn discard<const N: usize>(&self, runs: &Runs<'_, N>, first: usize) -> usize {
        let ranges = &runs.ranges[first..runs.len];
        let bytes = ranges.iter().map(|range| range.iov_len).sum();
        let at_once = |own: &OwnedFd| ranges.len() > 1 && advise_all(own, ranges) == Ok(bytes);
        if self.own.as_ref().is_some_and(at_once) {
            return ranges.len();
        }
        // Dropping a page twice is harmless.
        (first..runs.len).take_while(|&run| runs.from.discard(runs.get(run)).is_ok()).count()
    }
}

/// Up to `N` runs of pages of a reservation, in the form in which the kernel drops them: 16 bytes each,
/// because they are on the stack of a signal handler perhaps.
#[derive(Debug)]
pub struct Runs<'e, const N: usize> {
    from: &'e Evictable,
    /// Of runs of `from`, and `len` of them.
    ranges: [libc::iovec; N],
    len: usize,
}

impl<'e, const N: usize> Runs<'e, N> {
    /// No runs yet.
    #[must_use]
    pub const fn of(from: &'e Evictable) -> Self {
        Self { from, ranges: [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; N], len: 0 }
    }

    /// Adds a run.
    ///
    /// # Panics
    ///
    /// If there are `N` runs already, or if the run is not inside the reservation.
    pub fn push(&mut self, run: Span) {
        let range = self.from.0.addresses(run);
        self.ranges[self.len] =
            libc::iovec { iov_base: range.start() as *mut c_void, iov_len: range.bytes() };
        self.len += 1;
    }

    /// A run, by its number.
    ///
    /// # Panics
    ///
    /// If there is none of that number.
    #[must_use]
    pub fn get(&self, number: usize) -> Span {
        let (range, reservation) = (&self.ranges[..self.len][number], &self.from.0);
        let first =
            reservation.page_at(range.iov_base.addr()).expect("`push` takes pages of the reservation only");
        Span { first, pages: range.iov_len / reservation.page_size().bytes() }
    }

    /// The number of runs.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True without a run.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if there is no room for another run.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.len == N
    }
}

impl Default for Discards {
    fn default() -> Self {
        Self::new()
    }
}

fn own_process() -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open(2) takes integers and touches no memory.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns it.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    let own = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor is an int")) };
    Ok(own)
}

/// Drops the pages of ranges of this process. All of them are inside of evictable reservations.
fn advise_all(own: &OwnedFd, ranges: &[libc::iovec]) -> Result<usize, Errno> {
    // SAFETY: the ranges are inside reservations whose pages may be taken away, and the kernel reads
    // the vectors.
    #[expect(unsafe_code, reason = "process_madvise")]
    let answer = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            own.as_raw_fd(),
            ranges.as_ptr(),
            ranges.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    Errno::result(answer).map(|bytes| usize::try_from(bytes).unwrap_or(0))
}
