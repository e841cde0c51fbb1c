//! Zero copy: memfds are shown in place with the same pages, no copy and no fault. The plan gives a
//! reason for each copied chunk.

use crate::scale::resident_kib;
use crate::{PAGE, pattern};
use pagestitch::source::{Memfd, SharedFile};
use pagestitch::{Chunk, ErrorKind, Method, PlanReason, Pool, Region};
use pagestitch_kernel::memfd::{SealedMemfd, UnsealedMemfd};
use pagestitch_testkit::{child, this_test};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// A sealed memfd of these bytes.
pub(crate) fn memfd(bytes: &[u8]) -> Memfd {
    sealed(bytes).into()
}

fn sealed(bytes: &[u8]) -> SealedMemfd {
    let unsealed = UnsealedMemfd::create("test", bytes.len() as u64).unwrap();
    unsealed.file().write_all_at(bytes, 0).unwrap();
    unsealed.seal().unwrap()
}

#[test]
fn shuffled_pages_of_a_memfd_are_in_place_without_a_fault() {
    let bytes = pattern(1, 10 * PAGE);
    let memfd = memfd(&bytes);
    let order = [3, 9, 0, 4, 5, 1, 8, 2, 7, 6];
    let part =
        |page: usize| Chunk::from(memfd.clone()).range((page * PAGE) as u64..((page + 1) * PAGE) as u64);
    let builder = Region::builder().chunks(order.map(part)).require_zero_copy();
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    let expected: Vec<u8> =
        order.iter().flat_map(|page| &bytes[page * PAGE..(page + 1) * PAGE]).copied().collect();
    assert!(region.as_slice() == expected);
    region.populate(..).unwrap();
    let mut copied = vec![0; 5000];
    region.read_at(1234, &mut copied).unwrap();
    assert!(copied == expected[1234..6234]);
    let seen = region.close();
    assert_eq!((seen.pages_in_place, seen.pages_installed(), seen.faults, seen.bytes_copied), (10, 0, 0, 0));
}

#[test]
fn pages_in_place_are_the_memfds_own_frames() {
    let sealed = sealed(&pattern(2, 4 * PAGE));
    let again = Memfd::from_fd(sealed.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let region = Region::builder().chunk(again).build(&Pool::new().unwrap()).unwrap();
    let (theirs, ours) = (sealed.as_ref(), region.as_slice());
    assert!(theirs == ours);
    for page in 0..4 {
        let (their_frame, our_frame) = (frame(&theirs[page * PAGE]), frame(&ours[page * PAGE]));
        // An ordinary user reads zeros for both frame numbers.
        assert_eq!(their_frame, our_frame, "page {page}");
    }
}

/// The page frame of a byte of this process, from /proc/self/pagemap. 0 without CAP_SYS_ADMIN.
fn frame(byte: &u8) -> u64 {
    let mut pagemap = File::open("/proc/self/pagemap").unwrap();
    pagemap.seek(SeekFrom::Start(((&raw const *byte).addr() / PAGE * 8) as u64)).unwrap();
    let mut entry = [0; 8];
    pagemap.read_exact(&mut entry).unwrap();
    u64::from_le_bytes(entry) & ((1 << 55) - 1)
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "memory of the sanitizer is counted")]
fn a_region_in_place_takes_no_memory_of_its_own() {
    let end = child::run(this_test!(), || {
        // The kernel may replace a few pages by a huge one at any time.
        nix::sys::prctl::set_thp_disable(true).unwrap();
        let bytes = pattern(3, 64 << 20);
        let region = Region::builder().chunk(memfd(&bytes)).build(&Pool::new().unwrap()).unwrap();
        let before = resident_kib();
        assert!(region.as_slice() == bytes);
        let grown = resident_kib() - before;
        assert!(grown < 1024, "reading 64 MiB in place took {grown} KiB\n{}", region.plan());
    });
    end.expect_pass();
}

#[test]
fn edges_inside_a_page_are_copied_and_the_plan_says_so() {
    let bytes = pattern(4, 10 * PAGE);
    let memfd = memfd(&bytes);
    let region = Region::builder()
        .chunk(vec![1u8; 100])
        .chunk(Chunk::from(memfd.clone()).range(100..5 * PAGE as u64 + 7)) // in place except for its edges
        .chunk(Chunk::from(memfd).range(0..9 * PAGE as u64)) // not page-aligned
        .build(&Pool::new().unwrap())
        .unwrap();
    let reasons: Vec<_> = region.plan().runs().iter().map(|run| (run.method, run.reason)).collect();
    let expected = [
        (Method::Copy, PlanReason::Memory),
        (Method::Copy, PlanReason::Edge),
        (Method::Copy, PlanReason::OtherOffset),
    ];
    assert_eq!(reasons, expected);
    assert!(region.as_slice() == [&[1u8; 100], &bytes[100..5 * PAGE + 7], &bytes[..9 * PAGE]].concat());
    let seen = region.close();
    assert_eq!(seen.pages_in_place, 4);
}

#[test]
fn require_zero_copy_names_the_chunk_and_the_reason() {
    let (pool, memfd) = (Pool::new().unwrap(), memfd(&pattern(5, 10 * PAGE)));
    for (chunk, reason) in [
        (Chunk::from(vec![1u8; PAGE]), PlanReason::Memory),
        (Chunk::from(memfd.clone()).range(1..8193), PlanReason::OtherOffset),
        (Chunk::from(memfd.clone()).range(0..100), PlanReason::NoWholePage),
        (Chunk::from(memfd.clone()).range(0..5000), PlanReason::Edge),
    ] {
        let first = Chunk::from(memfd.clone()).range(4096..8192);
        let error = {
            // With a chunk behind it, because the last page of a region may extend past its end.
            let builder = Region::builder().chunk(first).chunk(chunk).chunk(Chunk::hole(9));
            builder.require_zero_copy().build(&pool).unwrap_err()
        };
        assert_eq!(error.kind(), ErrorKind::NotZeroCopy);
        assert_eq!((error.chunk(), error.plan_reason()), (Some(1), Some(reason)), "{error}");
    }
    Region::builder().chunk(memfd.clone()).chunk(Chunk::hole(5000)).require_zero_copy().build(&pool).unwrap();
    let ragged = Chunk::from(memfd).range(0..5000);
    Region::builder().chunk(ragged).require_zero_copy().build(&pool).unwrap();
}

#[test]
fn a_hundred_thousand_shuffled_pages_are_mapped_up_to_the_budget_and_copied_beyond() {
    const PAGES: u64 = 100_000;
    let unsealed = UnsealedMemfd::create("many", PAGES * PAGE as u64).unwrap();
    for page in (0..PAGES).step_by(97) {
        unsealed.file().write_all_at(&page.to_le_bytes(), page * PAGE as u64).unwrap();
    }
    let memfd = Memfd::from(unsealed.seal().unwrap());
    // 7919 shares no factor with 100,000, so that each page comes once, and no two in order.
    let page_at = |place: u64| place * 7919 % PAGES;
    let chunks = (0..PAGES).map(|place| {
        let start = page_at(place) * PAGE as u64;
        Chunk::from(memfd.clone()).range(start..start + PAGE as u64)
    });
    let region = Region::builder().chunks(chunks).build(&Pool::new().unwrap()).unwrap();
    let runs: Vec<_> = region.plan().runs().iter().map(|run| run.method).collect();
    assert_eq!(runs, [Method::Map, Method::Copy]);
    for place in (0..PAGES).filter(|&place| page_at(place) % 97 == 0) {
        let start = place as usize * PAGE;
        let seen = u64::from_le_bytes(region.as_slice()[start..start + 8].try_into().unwrap());
        assert_eq!(seen, page_at(place));
    }
    let seen = region.close();
    assert!(seen.pages_in_place > 1000 && seen.pages_copied > 100, "{seen:?}");
}

#[test]
fn a_writable_region_leaves_the_memfd_as_it_is() {
    let bytes = pattern(6, 3 * PAGE);
    let sealed = memfd(&bytes);
    let mut region = Region::builder().writable().chunk(sealed.clone()).build(&Pool::new().unwrap()).unwrap();
    region.as_mut_slice().unwrap()[5000] = 0;
    assert_eq!(region.as_slice()[5000], 0);
    let other = Region::builder().chunk(sealed).build(&Pool::new().unwrap()).unwrap();
    assert!(other.as_slice() == bytes);
}

#[test]
fn a_memfd_received_through_a_socket_is_shown_in_place() {
    use nix::sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    };
    use std::os::fd::{AsRawFd, FromRawFd};
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let bytes = pattern(7, 2 * PAGE);
    let sealed = sealed(&bytes);
    let fds = [sealed.as_fd().as_raw_fd()];
    let message = [std::io::IoSlice::new(b"x")];
    sendmsg::<()>(theirs.as_raw_fd(), &message, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty(), None)
        .unwrap();
    drop(sealed);
    let mut space = nix::cmsg_space!([i32; 1]);
    let (mut byte, flags) = ([0], MsgFlags::MSG_CMSG_CLOEXEC);
    let mut into = [std::io::IoSliceMut::new(&mut byte)];
    let received = recvmsg::<()>(ours.as_raw_fd(), &mut into, Some(&mut space), flags).unwrap();
    let Some(ControlMessageOwned::ScmRights(fds)) = received.cmsgs().unwrap().next() else {
        panic!("no descriptor")
    };
    // SAFETY: recvmsg(2) has just made this descriptor for us.
    #[expect(unsafe_code, reason = "recvmsg gives raw descriptors")]
    let fd = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    let memfd = Memfd::from_fd(fd).unwrap();
    let region = Region::builder().chunk(memfd).require_zero_copy().build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_descriptor_without_seals_is_refused() {
    let error = Memfd::from_fd(File::open("/proc/self/exe").unwrap().into()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnusableFile);
}

#[test]
fn a_write_to_padding_that_shows_a_file_is_refused() {
    let memfd = UnsealedMemfd::create("part", 3 * PAGE as u64).unwrap();
    memfd.file().write_all_at(&[7; 3 * PAGE], 0).unwrap();
    let part = || Chunk::from(SharedFile::try_from(&memfd).unwrap()).range(2000..PAGE as u64 + 100);
    let builder = || Region::builder().writable().page_aligned();
    let region = builder().chunk(part()).chunk(vec![1; 10]).build_shared(&Pool::new().unwrap()).unwrap();
    assert_eq!((region.offset_of(0), region.offset_of(1)), (Some(2000), Some(2 * PAGE as u64)));
    assert_eq!(region.plan().runs()[0].reason, PlanReason::PaddingInPlace, "{}", region.plan());
    for (at, bytes) in [(0, 1), (1999, 2), (PAGE + 100, 1), (2100, PAGE)] {
        let error = region.write_at(at as u64, &vec![9; bytes]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
    region.write_at(2000, &[9; PAGE - 1900]).unwrap();
    region.write_at(2 * PAGE as u64, &[9; 10]).unwrap();
    let mut seen = vec![0; 3 * PAGE];
    memfd.file().read_exact_at(&mut seen, 0).unwrap();
    assert!((0..3 * PAGE).all(|at| seen[at] == if (2000..PAGE + 100).contains(&at) { 9 } else { 7 }));
    // Padding that is no byte of a source may be written: in a page of its own, and beside a private copy.
    let copied = Chunk::copy_on_write(SharedFile::try_from(&memfd).unwrap()).range(2000..PAGE as u64);
    let private = builder().chunk(copied).chunk(vec![1; 10]).build_shared(&Pool::new().unwrap()).unwrap();
    private.write_at(0, &vec![5; private.len()]).unwrap();
    memfd.file().read_exact_at(&mut seen, 0).unwrap();
    assert_eq!((seen[0], seen[2000]), (7, 9));
}
