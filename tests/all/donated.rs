//! Pages that are given up move in: they are not copied, and never read as the zeros that they leave behind.

use crate::{let_go, pattern, until};
use pagestitch::source::{Donated, Pages};
use pagestitch::{Chunk, ErrorKind, How, Pool, Readahead, Region};
use pagestitch_kernel::Support;
use pagestitch_kernel::support::Features;
use std::sync::Arc;

const PAGE: usize = 4096;

pub(crate) fn pages_of(bytes: &[u8]) -> Pages {
    let mut pages = Pages::new(bytes.len()).unwrap();
    pages.copy_from_slice(bytes);
    pages
}

fn moves() -> bool {
    Support::current().has(Features::MOVE)
}

#[test]
fn donated_pages_are_not_copied() {
    let bytes = pattern(1, 5 * PAGE + 100);
    let region = Region::builder()
        .chunk(pages_of(&bytes))
        .readahead(Readahead::None)
        .require_zero_copy()
        .build(&Pool::new().unwrap())
        .unwrap();
    assert_eq!(region.plan().runs()[0].how, How::Move);
    assert!(region.as_slice() == bytes);
    let seen = region.close();
    assert_eq!(seen.bytes_copied, 0);
    // At once where the kernel cannot move them on a fault.
    assert_eq!((seen.pages_moved, seen.pages_in_place), if moves() { (6, 0) } else { (0, 6) });
}

#[test]
fn a_huge_page_moves_as_one() {
    let bytes = pattern(2, 4 << 20);
    let pages = pages_of(&bytes);
    let huge_before = huge_kib(&pages);
    let region = Region::builder().chunk(pages).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice()[3 << 20], bytes[3 << 20]);
    assert_eq!(region.as_slice()[(3 << 20) - 4096], bytes[(3 << 20) - 4096], "it came with the other");
    if moves() {
        until(|| region.metrics().pages_moved == 512);
        assert_eq!(region.metrics().faults, 1);
    }
    assert!(region.as_slice() == bytes);
    // Where there were huge pages (an ordinary user has them too; a small guest may have none left).
    // The kernel may have merged the mapping with a neighbour's, and counts both.
    assert_eq!(huge_kib(region.as_slice()).min(4096), huge_before.min(4096));
    assert_eq!(region.close().bytes_copied, 0);
}

/// How much of the mapping that holds these bytes is in huge pages.
pub(crate) fn huge_kib(bytes: &[u8]) -> u64 {
    let address = bytes.as_ptr().addr();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let range = range.and_then(|(start, end)| {
            Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
        });
        inside = range.map_or(inside, |range| range.contains(&address));
        if let Some(kib) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            return kib.trim().trim_end_matches(" kB").parse().unwrap();
        }
    }
    panic!("no mapping holds {address:#x}");
}

#[test]
fn a_shuffled_donation_takes_no_mappings() {
    const PAGES: usize = 1000;
    let bytes = pattern(3, PAGES * PAGE);
    let donated = Arc::new(Donated::from(pages_of(&bytes)));
    let order: Vec<usize> = (0..PAGES).map(|place| place * 389 % PAGES).collect();
    let page = |&page: &usize| {
        Chunk::from(Arc::clone(&donated)).range((page * PAGE) as u64..((page + 1) * PAGE) as u64)
    };
    let region =
        Region::builder().chunks(order.iter().map(page)).writable().build(&Pool::new().unwrap()).unwrap();
    let expected: Vec<u8> =
        order.iter().flat_map(|page| &bytes[page * PAGE..(page + 1) * PAGE]).copied().collect();
    assert!(region.as_slice() == expected);
    assert_eq!(region.close().bytes_copied, 0);
}

#[test]
fn what_was_never_touched_is_zeros_and_what_is_off_its_pages_is_copied() {
    let mut pages = Pages::new(6 * PAGE).unwrap();
    pages[4 * PAGE..].fill(9);
    let donated = Arc::new(Donated::from(pages));
    let part = |start: usize, end: usize| Chunk::from(Arc::clone(&donated)).range(start as u64..end as u64);
    let region = Region::builder()
        .chunk(part(0, 2 * PAGE)) // moves, and is zeros
        .chunk(part(4 * PAGE + 10, 6 * PAGE)) // elsewhere in its pages
        .build(&Pool::new().unwrap())
        .unwrap();
    assert!(region.as_slice() == [vec![0; 2 * PAGE], vec![9; 2 * PAGE - 10]].concat());
    assert_eq!(region.plan().runs()[1].how, How::Read);
}

#[test]
fn a_byte_is_given_up_once() {
    let donated = Arc::new(Donated::from(Pages::new(4 * PAGE).unwrap()));
    let part = |start: u64, end: u64| Chunk::from(Arc::clone(&donated)).range(start..end);
    let builder = Region::builder().chunk(part(0, 5000)).chunk(part(4999, 6000));
    let error = builder.build(&Pool::new().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadChunk);
    let said = "chunk 1 (donated pages) gives up bytes 0..5000, which a chunk gave up before";
    assert!(error.to_string().contains(said), "{error}");
}

#[test]
fn a_moved_page_that_is_let_go_is_an_error_and_not_zeros() {
    if !moves() {
        return;
    }
    let bytes = pattern(4, 3 * PAGE);
    let region = Region::builder()
        .chunk(pages_of(&bytes))
        .readahead(Readahead::None)
        .build(&Pool::new().unwrap())
        .unwrap();
    assert!(region.as_slice() == bytes);
    let_go(region.as_ptr().addr().get() + PAGE, PAGE);
    let error = region.read_at(0, &mut vec![0; 3 * PAGE]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(error.to_string().contains("the bytes are gone"), "{error}");
    // The mark of the bad page is not a page that has moved.
    let error = region.heal(..).unwrap_err();
    assert!(error.to_string().contains("the bytes are gone"), "{error}");
    until(|| {
        // That it was let go may be noted only now, and makes it absent until somebody asks for it.
        region.heal(..).is_err() && region.failures().len() == 1
    });
}

#[test]
fn pinned_pages_are_copied_instead() {
    if !moves() {
        return;
    }
    let bytes = pattern(5, 3 * PAGE);
    let pages = pages_of(&bytes);
    let Some(_pin) = pin(&pages) else { return };
    let region =
        Region::builder().chunk(pages).readahead(Readahead::None).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == bytes);
    let seen = region.close();
    assert_eq!((seen.pages_moved, seen.pages_copied), (0, 3));
}

/// Registers memory with an io_uring, which pins its pages; `None` where that is not to be had.
#[expect(unsafe_code, reason = "io_uring has no wrapper here")]
fn pin(bytes: &[u8]) -> Option<std::os::fd::OwnedFd> {
    use nix::libc::{SYS_io_uring_register, SYS_io_uring_setup, iovec, syscall};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    let mut parameters = [0u32; 30];
    // SAFETY: 120 bytes of parameters.
    let ring = unsafe { syscall(SYS_io_uring_setup, 1_i64, parameters.as_mut_ptr()) };
    if ring < 0 {
        return None;
    }
    // SAFETY: a descriptor that the kernel has just made.
    let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
    let buffer = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: one buffer, which the kernel takes hold of.
    let answer = unsafe { syscall(SYS_io_uring_register, ring.as_raw_fd(), 0_i64, &raw const buffer, 1_i64) };
    (answer == 0).then_some(ring)
}
