//! The sources that a view shows in place.

use crate::{has, page, raw, reserve};
use pagestitch_kernel::Features;
use pagestitch_kernel::memfd::UnsealedMemfd;
use pagestitch_kernel::pages::{Donated, Pages};
use pagestitch_kernel::physical::{Caching, Physical, Refusal};
use pagestitch_kernel::shared::{Alias, AliasError, SharedFile, Sharing};
use pagestitch_kernel::uffd::Arrival;
use pagestitch_kernel::{Access, Errno, Outcome, Page, PageSize, Span};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

const SIZE: usize = 4096;

fn span(first: usize, pages: usize) -> Span {
    Span { first: Page(first), pages }
}

/// A memfd whose pages have their number in every byte, and a second descriptor of it.
fn numbered(pages: u8) -> (SharedFile, File) {
    let memfd = UnsealedMemfd::create("numbered", u64::from(pages) * SIZE as u64).unwrap();
    (0..pages).for_each(|i| memfd.file().write_all_at(&[i + 1; SIZE], u64::from(i) * SIZE as u64).unwrap());
    let fd = memfd.file().as_fd().try_clone_to_owned().unwrap();
    (SharedFile::try_from(fd).unwrap(), memfd.file().try_clone().unwrap())
}

#[test]
fn a_sealed_memfd_is_shown_in_place_and_never_changed() {
    let memfd = UnsealedMemfd::create("shown", 3 * SIZE as u64).unwrap();
    memfd.file().write_all_at(&vec![8u8; 3 * SIZE], 0).unwrap();
    let sealed = memfd.seal().unwrap();
    let (_reservation, mut view, _uffd) = raw(4, Access::Writable);
    view.map(span(1, 2), &sealed, SIZE as u64).unwrap();
    let mut view = view.into_stable().unwrap();
    assert!(
        view.as_slice()[SIZE..3 * SIZE].iter().all(|&byte| byte == 8),
        "no fault, because no server runs"
    );
    view.as_mut_slice().unwrap()[SIZE] = 9;
    assert_eq!((view.as_slice()[SIZE], sealed.as_ref()[SIZE]), (9, 8));
}

#[test]
#[should_panic(expected = "from 8192")]
fn a_map_past_the_end_of_a_memfd_panics() {
    let sealed = UnsealedMemfd::create("short", 3 * 4096).unwrap().seal().unwrap();
    let (_reservation, mut view, _uffd) = raw(4, Access::ReadOnly);
    let _ = view.map(span(0, 2), &sealed, 8192);
}

#[test]
fn a_file_is_shared_both_ways_and_its_view_has_no_slices() {
    let (file, other) = numbered(3);
    let (_reservation, mut view, _uffd) = raw(4, Access::Writable);
    view.map_file(span(1, 2), &file, SIZE as u64, Sharing::Shared).unwrap();
    other.write_all_at(b"theirs", SIZE as u64 + 10).unwrap();
    let mut seen = [0; 7];
    view.read_at(SIZE as u64 + 10, &mut seen).unwrap();
    assert_eq!(&seen, b"theirs\x02");
    view.write_at(2 * SIZE as u64 - 3, b"across").unwrap();
    other.read_exact_at(&mut seen, 2 * SIZE as u64 - 3).unwrap();
    assert_eq!(&seen, b"across\x03");
    assert!(view.into_stable().is_err());
}

#[test]
fn a_write_to_a_copy_on_write_file_stays_in_its_view() {
    let (file, other) = numbered(2);
    let (_reservation, mut view, _uffd) = raw(2, Access::Writable);
    view.map_file(span(0, 2), &file, 0, Sharing::CopyOnWrite).unwrap();
    view.write_at(5, b"mine").unwrap();
    other.write_all_at(b"theirs", SIZE as u64).unwrap();
    let (mut ours, mut theirs) = ([0; 4], [0; 4]);
    view.read_at(5, &mut ours).unwrap();
    other.read_exact_at(&mut theirs, 5).unwrap();
    assert_eq!((&ours, &theirs), (b"mine", &[1; 4]));
    view.read_at(SIZE as u64, &mut ours).unwrap();
    assert_eq!(&ours, b"thei", "a page that was not written to is still the file's");
}

#[test]
fn a_writable_view_of_a_read_only_file_is_refused() {
    let (file, _other) = numbered(1);
    let (_reservation, mut view, _uffd) = raw(1, Access::ReadOnly);
    view.map_file(span(0, 1), &file, 0, Sharing::Shared).unwrap();
    assert_eq!(view.write_at(0, b"no"), Err(Errno::EACCES));
    let read_only = SharedFile::try_from(OwnedFd::from(File::open("/proc/self/exe").unwrap())).unwrap();
    assert!(!read_only.is_writable());
    let (_reservation, mut view, _uffd) = raw(1, Access::Writable);
    assert_eq!(view.map_file(span(0, 1), &read_only, 0, Sharing::Shared), Err(Errno::EACCES));
}

#[test]
fn a_truncated_file_is_an_error_to_read_at_and_not_a_signal() {
    let (file, other) = numbered(2);
    let (_reservation, mut view, _uffd) = raw(2, Access::Writable);
    view.map_file(span(0, 2), &file, 0, Sharing::Shared).unwrap();
    other.set_len(SIZE as u64).unwrap();
    assert_eq!(view.read_at(SIZE as u64 - 1, &mut [0; 2]), Err(Errno::EFAULT));
    assert_eq!(view.write_at(SIZE as u64, &[0; 2]), Err(Errno::EFAULT));
    assert_eq!(view.read_at(0, &mut [0; SIZE]), Ok(()));
}

#[test]
fn the_holes_of_a_memfd_are_found() {
    let memfd = UnsealedMemfd::create("holes", 5 * SIZE as u64).unwrap();
    for page in [1, 2, 4] {
        memfd.file().write_all_at(&[1; SIZE], page * SIZE as u64).unwrap();
    }
    let file = SharedFile::try_from(memfd.file().as_fd().try_clone_to_owned().unwrap()).unwrap();
    let hole = |first: u64, end: u64| {
        let found = file.next_hole(&(first * SIZE as u64..end * SIZE as u64)).unwrap();
        found.map(|hole| (hole.start / SIZE as u64, hole.end / SIZE as u64))
    };
    assert_eq!([hole(0, 5), hole(1, 5), hole(1, 3), hole(4, 5)], [Some((0, 1)), Some((3, 4)), None, None]);
}

#[test]
fn only_a_regular_file_with_bytes_is_a_shared_file() {
    for path in ["/dev/zero", "/proc", "/proc/self/maps"] {
        let error = SharedFile::try_from(OwnedFd::from(File::open(path).unwrap())).unwrap_err();
        assert_eq!(
            (error.kind(), error.raw_os_error()),
            (std::io::ErrorKind::InvalidInput, None),
            "{path}: {error}"
        );
    }
}

#[test]
#[expect(unsafe_code, reason = "an alias is a second way to memory")]
fn an_alias_shows_the_same_pages_without_their_descriptor() {
    let (file, other) = numbered(3);
    let (_first, mut first, _uffd) = raw(3, Access::Writable);
    first.map_file(span(0, 3), &file, 0, Sharing::Shared).unwrap();
    // SAFETY: the test has no reference to the bytes.
    let alias = unsafe { Alias::of(first.as_ptr(), 3 * SIZE) }.unwrap();
    drop((first, file));
    let mut bytes = [0; 2];
    alias.read_at(2 * SIZE as u64 - 1, &mut bytes).unwrap();
    assert_eq!(bytes, [2, 3]);
    let (_second, mut second, _uffd) = raw(2, Access::ReadOnly);
    second.alias(span(1, 1), &alias, 2 * SIZE as u64).unwrap();
    other.write_all_at(b"seen through both", 2 * SIZE as u64).unwrap();
    let mut seen = [0; 17];
    second.read_at(SIZE as u64, &mut seen).unwrap();
    assert_eq!(&seen, b"seen through both");
}

#[test]
#[expect(unsafe_code, reason = "an alias is a second way to memory")]
fn private_memory_has_no_alias_and_the_error_says_what_would_work() {
    let pages = Pages::new(2 * SIZE).unwrap();
    let start = NonNull::from(&pages[0]);
    // SAFETY: the call is refused, so no alias is made.
    let error = unsafe { Alias::of(start, 2 * SIZE) }.unwrap_err();
    assert_eq!(error, AliasError::Private { address: start.addr().get() });
    // SAFETY: the call is refused, so no alias is made.
    let error = unsafe { Alias::of(start, 100) }.unwrap_err();
    assert!(matches!(error, AliasError::Unaligned { bytes: 100, .. }), "{error}");
}

fn donation(pages: u8) -> Donated {
    let mut given = Pages::new(usize::from(pages) * SIZE).unwrap();
    given.chunks_mut(SIZE).zip(1..).for_each(|(page, number)| page.fill(number));
    Donated::from(given)
}

#[test]
fn donated_pages_move_once_and_are_never_read_as_the_zeros_they_leave() {
    if !has("donated_pages_move_once_and_are_never_read_as_the_zeros_they_leave", Features::MOVE) {
        return;
    }
    let donated = donation(3);
    let (reservation, mut view, uffd) = reserve(3, Access::LogicallyReadOnly);
    assert!(view.as_mut_slice().is_none(), "only the kernel writes to it");
    assert_eq!(uffd.move_donated(reservation.addresses(span(1, 2)), &donated, 0), Outcome::Done);
    assert_eq!((view.as_slice()[SIZE], view.as_slice()[2 * SIZE]), (1, 2));
    assert_eq!(donated.read_at(2 * SIZE as u64 - 1, &mut [0; 2]), Err(Errno::ENODATA));
    assert_eq!(
        uffd.move_donated(reservation.addresses(page(0)), &donated, 0),
        Outcome::NotRegistered,
        "a hole by now"
    );
    assert!(donated.has_moved(Page(1)) && !donated.has_moved(Page(2)));
}

#[test]
fn a_move_needs_a_writable_mapping_and_a_copy_does_not() {
    if !has("a_move_needs_a_writable_mapping_and_a_copy_does_not", Features::MOVE) {
        return;
    }
    let donated = donation(1);
    let (reservation, view, uffd) = reserve(1, Access::ReadOnly);
    assert_eq!(uffd.move_donated(reservation.range(), &donated, 0), Outcome::Refused(Errno::EINVAL));
    assert_eq!(uffd.copy_donated(reservation.range(), &donated, 0, Arrival::Writable), Outcome::Done);
    assert_eq!(view.as_slice()[SIZE - 1], 1);
}

#[test]
fn donated_pages_move_into_a_view_on_any_kernel() {
    let donated = donation(3);
    let (_reservation, mut view, uffd) = raw(4, Access::ReadOnly);
    view.move_in(span(2, 2), &donated, SIZE as u64, &uffd).unwrap();
    let view = view.into_stable().unwrap();
    assert_eq!((view.as_slice()[2 * SIZE], view.as_slice()[4 * SIZE - 1]), (2, 3));
    assert_eq!(donated.read_at(SIZE as u64, &mut [0]), Err(Errno::ENODATA));
    assert_eq!(donated.read_at(0, &mut [0]), Ok(()));
}

#[test]
fn a_page_of_a_lazy_memfd_is_mapped_once_it_is_written() {
    if !has("a_page_of_a_lazy_memfd_is_mapped_once_it_is_written", Features::MINOR_SHMEM) {
        return;
    }
    let memfd = UnsealedMemfd::create("lazy", 2 * SIZE as u64).unwrap();
    let file = SharedFile::try_from(memfd.file().as_fd().try_clone_to_owned().unwrap()).unwrap();
    let (reservation, mut view, uffd) = raw(3, Access::ReadOnly);
    // A uffd gets its features when it is opened.
    drop(uffd);
    let uffd = pagestitch_kernel::Uffd::open(Features::MISSING_SHMEM | Features::MINOR_SHMEM).unwrap();
    view.map_lazy(span(1, 2), &file, 0, &uffd).unwrap();
    let second = reservation.addresses(page(2));
    assert_eq!(uffd.continue_pages(second), Outcome::SourceUnreadable, "the memfd has no such page");
    memfd.file().write_all_at(&[7; SIZE], SIZE as u64).unwrap();
    assert_eq!(uffd.continue_pages(second), Outcome::Done);
    let mut seen = [0; 2];
    view.read_at(2 * SIZE as u64, &mut seen).unwrap();
    assert_eq!(seen, [7, 7]);
}

#[test]
#[expect(unsafe_code, reason = "physical memory")]
fn unavailable_physical_memory_is_refused_with_the_reason() {
    let page = PageSize::system().bytes() as u64;
    // SAFETY: the test reads and writes no byte of it.
    let error =
        unsafe { Physical::dev_mem(page..2 * page + 1, Access::ReadOnly, Caching::Cached) }.unwrap_err();
    assert!(
        matches!(error.refusal, Refusal::NoNode(_) | Refusal::NotWholePages | Refusal::NoCapability(_)),
        "{error}"
    );
    let path = "/sys/bus/pci/devices/none/resource0";
    // SAFETY: no such device exists.
    let error = unsafe { Physical::pci_resource(path, Access::ReadOnly, Caching::Uncached) }.unwrap_err();
    assert_eq!(error.refusal, Refusal::NoNode(path.to_owned()));
}

/// The memfd that covers a page in place of a poison marker (before Linux 6.6) can be opened
/// through `/proc`, but it cannot grow.
#[test]
fn a_revoked_page_never_has_bytes_again() {
    let (reservation, view, _uffd) = raw(2, Access::Writable);
    reservation.revoke(page(1)).unwrap();
    let range = reservation.addresses(page(1));
    let link = format!("/proc/self/map_files/{:x}-{:x}", range.start(), range.end());
    match File::options().read(true).write(true).open(link) {
        Ok(file) => {
            assert_eq!(file.set_len(SIZE as u64).unwrap_err().raw_os_error(), Some(Errno::EPERM.raw()))
        }
        Err(error) => {
            println!("SKIPPED a_revoked_page_never_has_bytes_again: map_files cannot be opened ({error})")
        }
    }
    assert_eq!(view.read_at(SIZE as u64, &mut [0]), Err(Errno::EFAULT));
}
