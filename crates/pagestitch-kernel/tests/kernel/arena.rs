//! Pages that leave a region, and come back.

use crate::{has, page};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use pagestitch_kernel::arena::{ArenaError, Discards, Runs};
use pagestitch_kernel::uffd::{Arrival, RegisterMode};
use pagestitch_kernel::{
    Access, Arena, Batch, Errno, Evictable, Features, Outcome, Page, PageSize, Span, StableView, Uffd, View,
};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

struct Bounded {
    from: Evictable,
    view: StableView,
    uffd: Uffd,
}

impl Bounded {
    /// A region in which page `i` is full of the byte `i + 1`.
    fn new(pages: usize) -> Self {
        let access = Access::LogicallyReadOnly;
        let (reservation, view) =
            View::reserve(NonZeroUsize::new(pages).unwrap(), PageSize::system(), access).unwrap();
        let uffd = Uffd::open(Features::THREAD_ID).unwrap();
        uffd.register(&reservation, RegisterMode::MISSING).unwrap();
        reservation.use_small_pages();
        // SAFETY: `fill` gives each page the same bytes each time, and no code writes to it.
        #[expect(unsafe_code, reason = "a promise of the caller")]
        let from = unsafe { Evictable::new(reservation) };
        let bounded = Self { from, view: view.into_stable().unwrap(), uffd };
        (0..pages).for_each(|page| assert_eq!(bounded.fill(page), Outcome::Done));
        bounded
    }

    fn fill(&self, index: usize) -> Outcome {
        let bytes = vec![index as u8 + 1; PageSize::system().bytes()];
        self.uffd.copy(self.from.reservation().addresses(page(index)), &bytes)
    }

    fn byte(&self, index: usize) -> u8 {
        self.view.as_slice()[index * PageSize::system().bytes()]
    }

    /// Writes the byte that a page has already.
    fn write_again(&self, index: usize) {
        let start = self.from.reservation().addresses(page(index)).start();
        // SAFETY: no byte of the page changes, and no other thread accesses it.
        #[expect(unsafe_code, reason = "a write of the application")]
        unsafe {
            std::ptr::with_exposed_provenance_mut::<u8>(start).write_volatile(index as u8 + 1);
        }
    }

    fn present(&self) -> Vec<bool> {
        let (reservation, mut present) = (self.from.reservation(), Vec::new());
        let all = Span { first: Page(0), pages: reservation.pages() };
        reservation.residency(all, |_, here| present.push(here)).unwrap();
        present
    }
}

fn arena(test: &str, slots: usize) -> Option<Arena> {
    if !has(test, Features::MOVE) {
        return None;
    }
    match Arena::new(NonZeroUsize::new(slots).unwrap()) {
        Err(ArenaError::NoMoves(reason)) => {
            eprintln!("SKIPPED {test}: {reason}");
            None
        }
        arena => Some(arena.unwrap()),
    }
}

#[test]
fn a_page_leaves_for_a_slot_and_comes_back_with_its_bytes() {
    let Some(arena) = arena("a_page_leaves_for_a_slot_and_comes_back_with_its_bytes", 4) else { return };
    let bounded = Bounded::new(4);
    assert_eq!(arena.take_in(&bounded.from, Span { first: Page(1), pages: 2 }, 1), Outcome::Done);
    assert_eq!(bounded.present(), [true, false, false, true]);
    assert_eq!(arena.take_in(&bounded.from, page(1), 0), Outcome::NotRegistered, "the page is missing");
    assert_eq!(arena.take_in(&bounded.from, page(0), 1), Outcome::AlreadyThere, "the slot is in use");
    let mut bytes = [0; 1];
    assert_eq!(arena.read(2, &mut bytes), Ok(()));
    assert_eq!((bytes, arena.read(0, &mut bytes)), ([3], Err(Errno::EFAULT)));
    let range = |index| bounded.from.reservation().addresses(page(index));
    assert_eq!(arena.give_back(&bounded.uffd, range(2), 2), Outcome::Done);
    assert_eq!(bounded.byte(2), 3);
    assert_eq!(arena.copy_back(&bounded.uffd, range(1), 1..2, Arrival::Writable), Outcome::Done);
    assert_eq!(bounded.byte(1), 2);
    arena.empty(0..4).unwrap();
    assert_eq!(arena.take_in(&bounded.from, page(0), 1), Outcome::Done, "an emptied slot is free");
    assert_eq!(bounded.present(), [false, true, true, true]);
}

#[test]
fn an_empty_slot_gives_nothing_back() {
    let Some(arena) = arena("an_empty_slot_gives_nothing_back", 2) else { return };
    let bounded = Bounded::new(1);
    assert_eq!(arena.take_in(&bounded.from, page(0), 0), Outcome::Done);
    arena.empty(0..2).unwrap();
    let range = bounded.from.reservation().addresses(page(0));
    assert_eq!(arena.give_back(&bounded.uffd, range, 0), Outcome::NotRegistered);
    assert_eq!(
        arena.copy_back(&bounded.uffd, range, 0..1, Arrival::Writable),
        Outcome::SourceUnreadable,
        "the read does not wait"
    );
    assert_eq!(bounded.fill(0), Outcome::Done);
    assert_eq!(bounded.byte(0), 1);
}

#[test]
fn a_locked_page_stays() {
    let Some(arena) = arena("a_locked_page_stays", 2) else { return };
    let bounded = Bounded::new(2);
    let range = bounded.from.reservation().addresses(page(0));
    // SAFETY: mlock(2) changes no byte of the region.
    #[expect(unsafe_code, reason = "mlock")]
    let locked = unsafe { libc::mlock(range.start() as *const _, range.bytes()) };
    assert_eq!(locked, 0);
    let outcome = arena.take_in(&bounded.from, page(0), 0);
    assert!(matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
    assert!(bounded.from.discard(page(0)).is_err());
    assert_eq!(bounded.byte(0), 1);
}

/// A child of fork that shares the frames of the region, until its end.
struct Sharing {
    child: Pid,
    /// The child ends when this is closed.
    connected: UnixStream,
}

impl Sharing {
    fn start(bounded: &Bounded) -> Self {
        let range = bounded.from.reservation().range();
        // SAFETY: the advice changes no byte of the region.
        #[expect(unsafe_code, reason = "madvise")]
        let advised = unsafe { libc::madvise(range.start() as *mut _, range.bytes(), libc::MADV_DOFORK) };
        assert_eq!(advised, 0);
        let (mut ours, mut of_child) = UnixStream::pair().unwrap();
        // SAFETY: the child reads memory of this test, and its socket, and takes no lock.
        #[expect(unsafe_code, reason = "fork(2) limits its child")]
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                drop(of_child);
                let mut byte = [0];
                ours.read_exact(&mut byte).unwrap();
                assert_eq!(byte, [1], "the child reads a byte of page 0");
                Self { child, connected: ours }
            }
            ForkResult::Child => {
                drop(ours);
                let _ = of_child.write_all(&[bounded.byte(0)]);
                let _ = of_child.read(&mut [0]);
                // SAFETY: ends the child, and touches no memory.
                #[expect(unsafe_code, reason = "exit(3) takes locks")]
                unsafe {
                    libc::_exit(0)
                }
            }
        }
    }

    fn end(self) {
        // Not by a drop, because a child of another test may have the socket, too.
        self.connected.shutdown(Shutdown::Both).unwrap();
        assert_eq!(waitpid(self.child, None), Ok(WaitStatus::Exited(self.child, 0)));
    }
}

/// A fork ends the kernel's note that a frame has one owner, and the end of the child does not bring it back.
#[test]
fn a_page_whose_frame_a_forked_child_shares_stays_until_the_child_has_ended_and_the_page_is_written() {
    let test =
        "a_page_whose_frame_a_forked_child_shares_stays_until_the_child_has_ended_and_the_page_is_written";
    let Some(arena) = arena(test, 2) else { return };
    let bounded = Bounded::new(2);
    let child = Sharing::start(&bounded);
    assert_eq!(arena.take_in(&bounded.from, page(0), 0), Outcome::Busy);
    assert_eq!((bounded.present(), bounded.byte(0)), (vec![true, true], 1));
    assert_eq!(bounded.from.discard(page(1)), Ok(()), "a shared page can be dropped");
    assert_eq!(bounded.present(), [true, false]);
    child.end();
    assert_eq!(arena.take_in(&bounded.from, page(0), 0), Outcome::Busy);
    bounded.write_again(0);
    assert_eq!(arena.take_in(&bounded.from, page(0), 0), Outcome::Done);
    assert_eq!(bounded.present(), [false, false]);
    let range = bounded.from.reservation().addresses(page(0));
    assert_eq!(arena.give_back(&bounded.uffd, range, 0), Outcome::Done);
    assert_eq!(bounded.byte(0), 1);
}

#[test]
fn a_thread_that_touches_a_page_in_a_slot_waits_for_it() {
    let Some(arena) = arena("a_thread_that_touches_a_page_in_a_slot_waits_for_it", 1) else { return };
    let bounded = Bounded::new(2);
    assert_eq!(arena.take_in(&bounded.from, page(1), 0), Outcome::Done);
    thread::scope(|scope| {
        let toucher = scope.spawn(|| bounded.byte(1));
        let mut batch = Batch::with_capacity(4);
        while batch.faults().is_empty() {
            poll(&mut [PollFd::new(bounded.uffd.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            batch.read(&bounded.uffd, PageSize::system()).unwrap();
        }
        let range = bounded.from.reservation().addresses(page(1));
        assert_eq!(arena.give_back(&bounded.uffd, range, 0), Outcome::Done);
        assert_eq!(toucher.join().unwrap(), 2);
    });
}

#[test]
fn several_runs_are_dropped_at_once() {
    let bounded = Bounded::new(8);
    let discards = Discards::new();
    let span = |first, pages| Span { first: Page(first), pages };
    let mut runs = Runs::<3>::of(&bounded.from);
    assert!(runs.is_empty());
    [span(1, 2), span(4, 1), span(6, 2)].into_iter().for_each(|run| runs.push(run));
    assert!(runs.is_full());
    assert_eq!([runs.get(0), runs.get(1), runs.get(2)], [span(1, 2), span(4, 1), span(6, 2)]);
    assert_eq!(discards.discard(&runs, 0), 3);
    assert_eq!(bounded.present(), [true, false, false, true, false, true, false, false]);
    let mut runs = Runs::<8>::of(&bounded.from);
    [span(0, 1), span(3, 1)].into_iter().for_each(|run| runs.push(run));
    assert_eq!((runs.len(), discards.discard(&runs, 1)), (2, 1));
    assert_eq!(bounded.present(), [true, false, false, false, false, true, false, false]);
    assert_eq!(bounded.fill(2), Outcome::Done);
    assert_eq!(bounded.byte(2), 3);
}
