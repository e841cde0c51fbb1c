//! The userfaultfd: each operation and its answers.

use crate::{has, page, reserve, wait};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pause};
use pagestitch_kernel::Features;
use pagestitch_kernel::fork_window::ForkWindow;
use pagestitch_kernel::uffd::{AdoptError, OwnMemory, RegisterMode};
use pagestitch_kernel::{
    Access, AddressRange, Batch, Event, FaultKind, Outcome, Page, PageSize, Span, Support, Uffd, View,
};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{slice, thread};

#[test]
fn copy_fills_a_missing_page_once_and_needs_no_alignment() {
    let (reservation, view, uffd) = reserve(2, Access::ReadOnly);
    let size = PageSize::system().bytes();
    let bytes: Vec<u8> = (0..=size).map(|i| (i % 251) as u8).collect();
    let range = reservation.addresses(page(1));
    assert_eq!(uffd.copy(range, &bytes[1..]), Outcome::Done);
    assert_eq!(&view.as_slice()[size..], &bytes[1..]);
    assert_eq!(uffd.copy(range, &bytes[..size]), Outcome::AlreadyThere);
    assert_eq!(&view.as_slice()[size..], &bytes[1..], "a filled page keeps its bytes");
}

#[test]
fn a_copy_that_meets_a_present_page_returns_its_progress() {
    let (reservation, _view, uffd) = reserve(4, Access::ReadOnly);
    let size = PageSize::system().bytes();
    let bytes = vec![1u8; 4 * size];
    assert_eq!(uffd.copy(reservation.addresses(page(2)), &bytes[..size]), Outcome::Done);
    assert_eq!(uffd.copy(reservation.range(), &bytes), Outcome::Partial { bytes: 2 * size });
    assert_eq!(uffd.zero(reservation.addresses(page(3))), Outcome::Done);
}

#[test]
fn a_copy_to_an_unregistered_range_is_an_outcome_of_its_own() {
    let (reservation, _view, uffd) = reserve(1, Access::ReadOnly);
    let bytes = vec![1u8; PageSize::system().bytes()];
    uffd.unregister(reservation.range()).unwrap();
    assert_eq!(uffd.copy(reservation.range(), &bytes), Outcome::NotRegistered);
}

#[test]
fn a_blocked_thread_is_reported_and_resumes_with_the_bytes() {
    let (reservation, view, uffd) = reserve(4, Access::ReadOnly);
    let size = PageSize::system().bytes();
    thread::scope(|scope| {
        let toucher = scope.spawn(|| view.as_slice()[2 * size + 5]);
        let batch = wait(&uffd);
        let fault = batch.faults()[0];
        assert_eq!(reservation.page_at(fault.address), Some(Page(2)));
        assert_eq!((fault.kind, fault.write), (FaultKind::Missing, false));
        assert_ne!(fault.thread, 0, "asked for with THREAD_ID");
        assert_eq!(uffd.copy(reservation.addresses(page(2)), &vec![9u8; size]), Outcome::Done);
        assert_eq!(toucher.join().unwrap(), 9);
    });
}

#[test]
fn a_write_to_a_missing_page_is_a_write_fault_and_is_kept() {
    let (reservation, mut view, uffd) = reserve(1, Access::Writable);
    let size = PageSize::system().bytes();
    thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            let bytes = view.as_mut_slice().expect("writable");
            bytes[3] = 77;
            (bytes[3], bytes[4])
        });
        assert!(wait(&uffd).faults()[0].write);
        assert_eq!(uffd.copy(reservation.range(), &vec![9u8; size]), Outcome::Done);
        assert_eq!(toucher.join().unwrap(), (77, 9));
    });
}

#[test]
fn a_read_only_view_gives_no_mutable_slice() {
    let (_reservation, mut view, _uffd) = reserve(1, Access::ReadOnly);
    assert!(view.as_mut_slice().is_none());
}

#[test]
fn residency_reports_filled_and_missing_pages() {
    let (reservation, _view, uffd) = reserve(2000, Access::ReadOnly);
    let bytes = vec![1u8; PageSize::system().bytes()];
    for index in [0, 1023, 1024, 1999] {
        assert_eq!(uffd.copy(reservation.addresses(page(index)), &bytes), Outcome::Done);
    }
    let mut here = Vec::new();
    let all = Span { first: Page(0), pages: 2000 };
    reservation.residency(all, |page, resident| here.extend(resident.then_some(page.0))).unwrap();
    assert_eq!(here, [0, 1023, 1024, 1999]);
}

#[test]
fn a_tebibyte_is_reserved_and_registered_at_once() {
    let (reservation, view, uffd) = reserve(1 << 28, Access::ReadOnly);
    let last = page((1 << 28) - 1);
    assert_eq!(uffd.zero(reservation.addresses(last)), Outcome::Done);
    assert_eq!(view.as_slice().last(), Some(&0));
}

#[test]
#[should_panic(expected = "is not inside a reservation of 2 pages")]
fn a_span_outside_the_reservation_panics() {
    let (reservation, _view, _uffd) = reserve(2, Access::ReadOnly);
    let _ = reservation.addresses(Span { first: Page(1), pages: 2 });
}

#[test]
fn a_remove_comes_before_the_faults_of_its_batch() {
    let (reservation, view, uffd) = reserve(8, Access::Writable);
    let size = PageSize::system().bytes();
    for index in 0..4 {
        assert_eq!(uffd.copy(reservation.addresses(page(index)), &vec![1u8; size]), Outcome::Done);
    }
    let start = view.as_ptr().addr().get();
    thread::scope(|scope| {
        let toucher = scope.spawn(|| view.as_slice()[6 * size]);
        scope.spawn(move || discard(start, 4 * size));
        let mut batch = Batch::with_capacity(16);
        let (mut removes, mut faults) = (Vec::new(), Vec::new());
        while removes.is_empty() || faults.is_empty() {
            batch.read(&uffd, PageSize::system()).unwrap();
            for event in batch.take_events() {
                let Event::Remove { start, end } = event else { panic!("{event:?}") };
                removes.push((start, end));
            }
            faults.extend_from_slice(batch.faults());
        }
        assert_eq!(removes, [(start, start + 4 * size)]);
        assert_eq!(reservation.page_at(faults[0].address), Some(Page(6)));
        while uffd.copy(reservation.addresses(page(6)), &vec![8u8; size]) == Outcome::Changing {
            thread::yield_now();
        }
        assert_eq!(toucher.join().unwrap(), 8);
    });
}

#[expect(unsafe_code, reason = "madvise on memory of the test's own reservation")]
fn discard(start: usize, bytes: usize) {
    let start = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(start)).unwrap();
    // SAFETY: pages of the test's own reservation; no reference to their bytes exists.
    unsafe { nix::sys::mman::madvise(start, bytes, nix::sys::mman::MmapAdvise::MADV_DONTNEED) }.unwrap();
}

#[test]
fn a_page_is_poisoned_once_and_a_copy_replaces_the_marker() {
    if !has("a_page_is_poisoned_once_and_a_copy_replaces_the_marker", Features::POISON) {
        return;
    }
    let (reservation, view, uffd) = reserve(1, Access::ReadOnly);
    assert_eq!(uffd.poison(reservation.range()), Outcome::Done);
    assert_eq!(uffd.poison(reservation.range()), Outcome::AlreadyThere);
    assert_eq!(uffd.copy(reservation.range(), &vec![4u8; PageSize::system().bytes()]), Outcome::Done);
    assert_eq!(view.as_slice()[0], 4);
}

/// The kernel takes a protected missing page for a present one.
#[test]
fn a_missing_page_that_is_write_protected_is_poisoned_and_a_present_one_is_not() {
    let features = Features::POISON | Features::WRITE_PROTECT_UNPOPULATED;
    if !has("a_missing_page_that_is_write_protected_is_poisoned_and_a_present_one_is_not", features) {
        return;
    }
    let page = PageSize::system();
    let (reservation, view) = View::reserve(NonZeroUsize::new(3).unwrap(), page, Access::Writable).unwrap();
    let view = view.into_stable().unwrap();
    let uffd = Uffd::open(features | Features::WRITE_PROTECT).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT).unwrap();
    let at = |first| reservation.addresses(Span { first: Page(first), pages: 3 - first });
    assert_eq!(uffd.copy(at(2), &vec![7u8; page.bytes()]), Outcome::Done);
    assert_eq!(uffd.write_protect(reservation.range()), Outcome::Done);
    assert_eq!(uffd.poison(reservation.range()), Outcome::AlreadyThere);
    assert_eq!(uffd.poison_protected(at(0)), Outcome::Partial { bytes: page.bytes() });
    assert_eq!(uffd.poison_protected(at(1)), Outcome::Partial { bytes: page.bytes() });
    assert_eq!(uffd.poison_protected(at(2)), Outcome::AlreadyThere);
    uffd.unregister(reservation.range()).unwrap();
    assert_eq!(view.as_slice()[2 * page.bytes()], 7);
    for poisoned in [0, 1] {
        reservation.populate_read(Page(poisoned).span()).unwrap_err();
    }
}

#[test]
#[expect(unsafe_code, reason = "move_pages takes pages away")]
fn move_takes_the_pages_of_the_source() {
    if !has("move_takes_the_pages_of_the_source", Features::MOVE) {
        return;
    }
    let (reservation, view, uffd) = reserve(2, Access::Writable);
    let (from, source) =
        View::reserve(NonZeroUsize::new(2).unwrap(), PageSize::system(), Access::Writable).unwrap();
    from.open().unwrap();
    let mut source = source.into_stable().unwrap();
    source.as_mut_slice().unwrap().fill(5);
    // SAFETY: the source is the test's own reservation; no reference to its bytes exists during the call.
    let moved = unsafe { uffd.move_pages(reservation.range(), from.range()) };
    assert_eq!(moved, Outcome::Done);
    assert!(view.as_slice().iter().all(|&byte| byte == 5));
    assert!(source.as_slice().iter().all(|&byte| byte == 0), "the source's pages are gone");
}

#[test]
fn write_protection_blocks_a_writer_until_unprotect() {
    if !has("write_protection_blocks_a_writer_until_unprotect", Features::WRITE_PROTECT) {
        return;
    }
    let (reservation, view) = View::reserve(NonZeroUsize::MIN, PageSize::system(), Access::Writable).unwrap();
    let mut view = view.into_stable().unwrap();
    let uffd = Uffd::open(Features::WRITE_PROTECT).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT).unwrap();
    assert_eq!(uffd.copy(reservation.range(), &vec![1u8; PageSize::system().bytes()]), Outcome::Done);
    assert_eq!(uffd.write_protect(reservation.range()), Outcome::Done);
    thread::scope(|scope| {
        let writer = scope.spawn(|| view.as_mut_slice().unwrap()[0] = 2);
        assert_eq!(wait(&uffd).faults()[0].kind, FaultKind::WriteProtect);
        assert_eq!(uffd.unprotect(reservation.range()), Outcome::Done);
        writer.join().unwrap();
    });
    assert_eq!(view.as_slice()[0], 2);
}

#[test]
#[expect(unsafe_code, reason = "maps and registers a memfd, which a reservation does not do")]
fn a_minor_fault_is_resolved_by_mapping_the_cached_page() {
    if !has("a_minor_fault_is_resolved_by_mapping_the_cached_page", Features::MINOR_SHMEM) {
        return;
    }
    let size = PageSize::system().bytes();
    let file = File::from(memfd_create(c"minor", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(2 * size as u64).unwrap();
    file.write_all_at(&vec![6u8; size], 0).unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let bytes = NonZeroUsize::new(2 * size).unwrap();
    // SAFETY: the kernel chooses the address of a new mapping, which replaces no other.
    let start = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
    let range = AddressRange::new(start.as_ptr().addr(), 2 * size, PageSize::system()).unwrap();
    let uffd = Uffd::open(Features::MINOR_SHMEM).unwrap();
    // SAFETY: the mapping is new, so no reference to its bytes exists.
    unsafe { uffd.register_range(range, RegisterMode::MISSING | RegisterMode::MINOR) }.unwrap();
    let first = AddressRange::new(range.start(), size, PageSize::system()).unwrap();
    let second = AddressRange::new(range.start() + size, size, PageSize::system()).unwrap();
    assert_eq!(uffd.continue_pages(second), Outcome::SourceUnreadable, "the cache has no such page");
    assert_eq!(uffd.continue_pages(first), Outcome::Done);
    assert_eq!(uffd.continue_pages(first), Outcome::AlreadyThere);
    // SAFETY: the first page of the mapping is present, and no thread writes to it.
    let seen = unsafe { slice::from_raw_parts(start.as_ptr().cast::<u8>(), size) };
    assert_eq!(seen[0], 6);
}

#[test]
fn a_reservation_that_is_too_large_is_refused_with_size_and_remedy() {
    let pages = NonZeroUsize::new(1 << 40).unwrap();
    let error = View::reserve(pages, PageSize::system(), Access::ReadOnly).unwrap_err();
    assert_eq!((error.bytes, error.errno), (1 << 52, pagestitch_kernel::Errno::ENOMEM), "{error}");
}

/// The promise that memory of this process may be filled.
#[expect(unsafe_code, reason = "makes the promise")]
const fn own_memory() -> OwnMemory {
    // SAFETY: these tests register reservations, and have no reference to their bytes.
    unsafe { OwnMemory::promise() }
}

/// Reads, in a thread, from a uffd that a peer holds too. `None` if the read has not returned after
/// a time that is long for any read.
fn read_of_peer(uffd: OwnedFd) -> Option<usize> {
    let (done, read) = mpsc::channel();
    thread::spawn(move || {
        let uffd = Uffd::adopt_own(uffd, own_memory()).unwrap();
        let mut batch = Batch::with_capacity(4);
        let blocking = OFlag::from_bits_retain(fcntl(&uffd, FcntlArg::F_GETFL).unwrap()) - OFlag::O_NONBLOCK;
        fcntl(&uffd, FcntlArg::F_SETFL(blocking)).unwrap();
        batch.read(&uffd, PageSize::system()).unwrap();
        done.send(batch.take_events().count() + batch.faults().len())
    });
    read.recv_timeout(Duration::from_secs(20)).ok()
}

/// The flag belongs to the open file description, which the peer shares.
#[test]
fn a_read_of_a_uffd_that_its_peer_has_made_blocking_does_not_wait() {
    let uffd = Uffd::open(Features::NONE).unwrap();
    assert_eq!(read_of_peer(uffd.as_fd().try_clone_to_owned().unwrap()), Some(0));
}

/// The kernel does not know RWF_NOWAIT for a uffd that a fork event has made, and opens it with the
/// flags of its parent's. A peer may pass it on, and a child of this process may have a blocking
/// one.
#[test]
#[expect(unsafe_code, reason = "forks, as a peer does")]
fn a_read_of_a_forked_childs_uffd_does_not_wait() {
    let Ok(uffd) = opened_blocking(Features::EVENT_FORK) else {
        println!("SKIPPED a_read_of_a_forked_childs_uffd_does_not_wait: EVENT_FORK takes CAP_SYS_PTRACE");
        return;
    };
    let (reservation, _view) =
        View::reserve(NonZeroUsize::MIN, PageSize::system(), Access::Writable).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING).unwrap();
    reservation.inherit_on_fork(Arc::new(ForkWindow::new(None).unwrap())).unwrap();
    let mut batch = Batch::with_capacity(4);
    let (child, process) = thread::scope(|scope| {
        // SAFETY: the child makes two system calls and nothing else.
        let forker = scope.spawn(|| match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                pause();
            },
            ForkResult::Parent { child } => child,
        });
        let child = loop {
            batch.read(&uffd, PageSize::system()).unwrap();
            match batch.take_events().next() {
                Some(Event::Fork { child, .. }) => break child,
                _ => thread::yield_now(),
            }
        };
        (child, forker.join().unwrap())
    });
    let flags = fcntl(&child, FcntlArg::F_GETFL).unwrap();
    let read = read_of_peer(child.as_fd().try_clone_to_owned().unwrap());
    kill(process, Signal::SIGKILL).unwrap();
    waitpid(process, None).unwrap();
    assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK), "{flags:#x}");
    assert_eq!(read, Some(0));
}

/// A blocking userfaultfd, as a peer may open it.
#[expect(unsafe_code, reason = "system calls without a wrapper")]
fn opened_blocking(features: Features) -> Result<Uffd, Errno> {
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    // SAFETY: userfaultfd(2) takes flags by value and touches no memory.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })?;
    // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut request = [0xaa, features.bits(), 0u64];
    // SAFETY: the kernel reads and writes `request`, which has the layout of a uffdio_api.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, request.as_mut_ptr()) })?;
    Ok(Uffd::adopt_own(fd, own_memory()).unwrap())
}

/// A userfaultfd fills, protects and poisons only memory that is registered with it, so its fills
/// are safe functions for any range.
#[test]
fn fills_leave_unregistered_memory_unchanged() {
    let page = PageSize::system();
    let bytes = vec![1u8; 4 * page.bytes()];
    let start = bytes.as_ptr().addr().next_multiple_of(page.bytes());
    let range = AddressRange::new(start, page.bytes(), page).unwrap();
    let (other, _view) = View::reserve(NonZeroUsize::MIN, page, Access::Writable).unwrap();
    // All features of the kernel, except the one that an ordinary user may not request.
    let wanted =
        Features::from_bits(Support::current().features().unwrap().bits() & !Features::EVENT_FORK.bits());
    let uffd = Uffd::open(wanted).unwrap();
    uffd.register(&other, RegisterMode::MISSING).unwrap();
    let ff = vec![0xff; page.bytes()];
    for outcome in [uffd.copy(range, &ff), uffd.zero(range), uffd.continue_pages(range), uffd.poison(range)] {
        assert!(matches!(outcome, Outcome::NotRegistered | Outcome::Refused(_)), "{outcome:?}");
    }
    for outcome in [uffd.write_protect(range), uffd.unprotect(range)] {
        assert!(matches!(outcome, Outcome::NotRegistered | Outcome::Refused(_)), "{outcome:?}");
    }
    assert!(bytes.iter().all(|&byte| byte == 1));
}

#[test]
fn a_userfaultfd_of_this_process_is_adopted_only_with_a_promise() {
    let page = PageSize::system();
    let (reservation, _view) = View::reserve(NonZeroUsize::MIN, page, Access::Writable).unwrap();
    let uffd = Uffd::open(Features::NONE).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING).unwrap();
    let again = || uffd.as_fd().try_clone_to_owned().unwrap();
    assert_eq!(Uffd::adopt(again()).err(), Some(AdoptError::OwnMemory));
    let own = Uffd::adopt_own(again(), own_memory()).unwrap();
    assert_eq!(own.copy(reservation.range(), &vec![3; page.bytes()]), Outcome::Done);
}

/// Adopted as another process's, it could be registered with memory of this process afterwards.
#[test]
fn a_userfaultfd_without_its_handshake_is_not_adopted() {
    // SAFETY: the call takes flags and touches no memory.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
    if fd < 0 {
        return println!("SKIPPED a_userfaultfd_without_its_handshake_is_not_adopted: {}", Errno::last());
    }
    // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    assert_eq!(Uffd::adopt(fd).err(), Some(AdoptError::NotReady));
}
