//! System calls that change a part of a region and so split its mapping in the kernel. An ioctl
//! across the border is ENOENT, although all addresses are mapped: each page must be filled anyway.

use crate::donated::pages_of;
use crate::lazy::chunk_of;
use crate::{PAGE, cannot_inherit, pattern};
use nix::errno::Errno;
use nix::libc;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pagestitch::source::Donated;
use pagestitch::{Chunk, Inline, Manual, Pool, Readahead, Region, Server};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::this_test;
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCK: usize = 2 << 20;
const PAGES: usize = 1024 + 5;

/// A system call that splits a mapping.
#[derive(Debug, Clone, Copy)]
enum Split {
    Advise,
    Protect,
    Bind,
    Lock,
}

const SPLITS: [Split; 4] = [Split::Advise, Split::Protect, Split::Bind, Split::Lock];

impl Split {
    /// Splits a mapping at both ends of a range. False if the kernel refuses.
    #[expect(unsafe_code, reason = "system calls of the application are part of the test")]
    fn at(self, start: usize, bytes: usize) -> bool {
        let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(start);
        // Each call is `name(address, bytes, argument, ...)`. MPOL_BIND takes a mask of nodes: node
        // 0.
        let (number, argument, nodes) = match self {
            Self::Advise => (libc::SYS_madvise, libc::MADV_RANDOM as i64, None),
            Self::Protect => (libc::SYS_mprotect, i64::from(libc::PROT_READ), None),
            Self::Bind => (libc::SYS_mbind, 2, Some(&1_u64)),
            Self::Lock => (libc::SYS_mlock2, libc::MLOCK_ONFAULT as i64, None),
        };
        let nodes = nodes.map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: pages of a region. None of these calls changes a byte.
        let answer = unsafe { libc::syscall(number, address, bytes, argument, nodes, 64_i64, 0_i64) };
        if answer != 0 {
            println!("SKIPPED in part: {self:?}: {}", std::io::Error::last_os_error());
        }
        answer == 0
    }

    /// Splits a region inside each of its first two blocks.
    fn within(self, region: &Region) -> bool {
        let start = region.as_ptr().addr().get();
        self.at(start + 100 * PAGE, 3 * PAGE) && self.at(start + BLOCK + 211 * PAGE, 33 * PAGE)
    }
}

/// Chunks of each kind of page that the kernel installs: copied, moved and zero pages.
fn pieces() -> (Vec<Chunk>, Vec<u8>) {
    let memory = pattern(1, PAGES * PAGE);
    let donated = pattern(2, PAGES * PAGE);
    let given = Donated::from(pages_of(&donated));
    let expected = [&memory[..], &donated, &vec![0; PAGES * PAGE]].concat();
    (vec![memory.into(), Arc::new(given).into(), Chunk::hole((PAGES * PAGE) as u64)], expected)
}

fn check(server: impl Into<Server>, split: Split, read: impl Fn(&Region, &[u8])) {
    let (chunks, expected) = pieces();
    let region = Region::builder().chunks(chunks).build(server).unwrap();
    if split.within(&region) && split.at(region.as_ptr().addr().get() + 3 * BLOCK + PAGE, BLOCK) {
        read(&region, &expected);
        assert!(region.failures().is_empty(), "{split:?}: {:?}", region.failures());
        assert_eq!(region.metrics().pages_poisoned, 0, "{split:?}");
    }
}

#[test]
fn a_split_region_is_populated() {
    let pool = Pool::new().unwrap();
    for split in SPLITS {
        check(&pool, split, |region, expected| {
            region.populate(..).unwrap_or_else(|error| panic!("{split:?}: {error}"));
            assert!(region.as_slice() == expected, "{split:?}");
        });
    }
}

#[test]
fn a_split_region_is_read_in_order() {
    let pool = Pool::new().unwrap();
    for split in SPLITS {
        check(&pool, split, |region, expected| assert!(region.as_slice() == expected, "{split:?}"));
    }
}

#[test]
fn a_split_region_is_served_inline() {
    for split in SPLITS {
        check(Inline, split, |region, expected| {
            assert!(region.as_slice()[..BLOCK] == expected[..BLOCK], "{split:?}");
            region.populate(..).unwrap_or_else(|error| panic!("{split:?}: {error}"));
            assert!(region.as_slice() == expected, "{split:?}");
        });
    }
}

#[test]
fn a_split_region_is_served_by_a_manual() {
    for split in SPLITS {
        let mut manual = Manual::new().unwrap();
        let (chunks, expected) = pieces();
        let region = Region::builder().chunks(chunks).build(&manual).unwrap();
        if !split.within(&region) {
            continue;
        }
        let read = AtomicBool::new(false);
        scope(|scope| {
            scope.spawn(|| {
                assert!(region.as_slice() == expected, "{split:?}");
                read.store(true, Ordering::SeqCst);
            });
            crate::serve_until(&mut manual, 10, || read.load(Ordering::SeqCst));
        });
        assert_eq!(region.metrics().pages_poisoned, 0, "{split:?}");
    }
}

#[test]
fn a_split_region_shows_a_lazy_memfd() {
    let bytes = pattern(3, PAGES * PAGE);
    for split in SPLITS {
        let chunk = chunk_of(&bytes, true);
        let region = Region::builder().chunk(chunk).build_shared(&Pool::new().unwrap()).unwrap();
        if split.at(region.as_ptr().addr().get() + 100 * PAGE, 3 * PAGE) {
            let mut seen = vec![0; bytes.len()];
            region.read_at(0, &mut seen).unwrap_or_else(|error| panic!("{split:?}: {error}"));
            assert!(seen == bytes, "{split:?}");
        }
    }
}

#[test]
fn a_split_region_moves_the_pages_on_both_sides_of_the_border() {
    let bytes = pattern(4, 2 * BLOCK);
    let builder = Region::builder().chunk(pages_of(&bytes)).readahead(Readahead::None);
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    let start = region.as_ptr().addr().get();
    if !Split::Advise.at(start + 100 * PAGE, 3 * PAGE) {
        return;
    }
    region.populate(..).unwrap();
    assert!(region.as_slice() == bytes);
    assert_eq!(region.close().pages_copied, 0, "the kernel moves pages on either side of a border");
}

#[test]
fn a_split_donation_moves_on_a_touch_and_when_a_region_is_built() {
    for split in SPLITS {
        for children in [false, true] {
            let bytes = pattern(7, BLOCK + 40 * PAGE);
            let pages = pages_of(&bytes);
            if !split.at(pages.as_ptr().addr() + 100 * PAGE, 3 * PAGE) {
                continue;
            }
            let builder = Region::builder().chunk(pages).writable();
            let builder = if children { builder.inherit_on_fork() } else { builder };
            match builder.build(&Pool::new().unwrap()) {
                Ok(region) => assert!(region.as_slice() == bytes, "{split:?}"),
                Err(error) if cannot_inherit(&error) => println!("SKIPPED in part: {error}"),
                Err(error) => panic!("{split:?}: {error}"),
            }
        }
    }
}

/// A guest whose memory is split inside, and its adopted region.
fn adopted(expected: &[u8]) -> (Guest, pagestitch::AdoptedRegion) {
    let guest = Guest::new(&[expected.len()], false).unwrap();
    let [(start, _)] = guest.ranges()[..] else { panic!("one range") };
    assert!(Split::Advise.at(start + 100 * PAGE, 3 * PAGE));
    let builder = Region::builder().chunk(expected.to_vec());
    let region = builder.build_adopted(crate::guests::adopt(&guest), &Pool::new().unwrap());
    (guest, region.unwrap())
}

#[test]
fn split_adopted_memory_is_populated() {
    if crate::lacks_poison(this_test!()) {
        return;
    }
    let expected = pattern(5, BLOCK);
    let (guest, region) = adopted(&expected);
    region.populate(..).unwrap();
    assert!((0..BLOCK).step_by(PAGE).all(|at| guest.read(at) == expected[at]));
    assert_eq!(region.close().pages_poisoned, 0);
}

#[test]
fn split_adopted_memory_has_no_zeros_after_a_drop() {
    if crate::lacks_poison(this_test!()) {
        return;
    }
    let (guest, region) = adopted(&pattern(6, BLOCK));
    drop(region);
    let [(start, _)] = guest.ranges()[..] else { panic!("one range") };
    for page in 0..BLOCK / PAGE {
        let mut byte = [0xff];
        let from = RemoteIoVec { base: start + page * PAGE, len: 1 };
        let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut byte)], &[from]);
        assert_eq!(read, Err(Errno::EFAULT), "page {page} reads as {byte:?}");
    }
}
