//! Memfds of huge pages (`MFD_HUGETLB`): the kernel maps them in units of two megabytes. Smaller
//! parts are copied, and their neighbours keep their bytes.

use crate::{HugePages, pattern, touch, until};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use pagestitch::source::{Alias, AliasError, Memfd, SharedFile};
use pagestitch::{Chunk, ErrorKind, Method, PlanReason, Pool, Region};
use pagestitch_testkit::this_test;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const MIB: usize = 1 << 20;
const HUGE: usize = 2 * MIB;

/// A memfd of whole huge pages that holds these bytes. A mapping writes them, because `write(2)` is
/// EINVAL on hugetlbfs.
#[expect(unsafe_code, reason = "hugetlbfs can only be written through a mapping")]
fn huge_memfd(bytes: &[u8]) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB;
    let file = File::from(memfd_create("huge", flags).unwrap());
    let whole = NonZeroUsize::new(bytes.len().next_multiple_of(HUGE)).unwrap();
    file.set_len(whole.get() as u64).unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping where the kernel chooses.
    let start = unsafe { mmap(None, whole, protection, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
    // SAFETY: the mapping from above holds `bytes.len()` bytes or more.
    unsafe {
        start.cast::<u8>().copy_from_nonoverlapping(std::ptr::NonNull::from(bytes).cast(), bytes.len())
    };
    // SAFETY: the mapping from above.
    unsafe { nix::sys::mman::munmap(start, whole.get()) }.unwrap();
    file
}

fn sealed(bytes: &[u8]) -> Memfd {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let file = huge_memfd(bytes);
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    // A forked child of another test may have the writable mapping until the end of the child (EBUSY).
    until(|| fcntl(&file, FcntlArg::F_ADD_SEALS(seals)) != Err(Errno::EBUSY));
    Memfd::from_fd(file.into()).unwrap()
}

fn shared(bytes: &[u8]) -> Arc<SharedFile> {
    Arc::new(SharedFile::try_from(OwnedFd::from(huge_memfd(bytes))).unwrap())
}

#[test]
fn a_chunk_behind_a_part_of_a_huge_page_keeps_its_bytes() {
    let Some(_reserved) = HugePages::or_skip(this_test!(), 16) else { return };
    let (huge, other) = (pattern(1, 4 * MIB), pattern(2, MIB + 77));
    let memfd = sealed(&huge);
    let chunk = Chunk::from(memfd).range(0..3 * MIB as u64);
    let region = Region::builder().chunk(chunk).chunk(other.clone()).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice()[..3 * MIB] == huge[..3 * MIB]);
    assert!(region.as_slice()[3 * MIB..] == other);
    assert_eq!(region.plan().runs()[0].reason, PlanReason::EdgeOfHugePage);
    assert_eq!(region.close().pages_in_place, 512, "its first huge page is shown");
}

#[test]
fn a_chunk_behind_a_shared_part_of_a_huge_page_keeps_its_bytes() {
    let Some(_reserved) = HugePages::or_skip(this_test!(), 16) else { return };
    let (huge, other) = (pattern(3, 4 * MIB), pattern(4, MIB));
    let file = shared(&huge);
    for first in [Chunk::from(Arc::clone(&file)), Chunk::copy_on_write(file)] {
        let builder = Region::builder().chunk(first.range(0..3 * MIB as u64)).chunk(other.clone());
        let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
        let mut seen = vec![0; 4 * MIB];
        region.read_at(0, &mut seen).unwrap();
        assert!(seen[..3 * MIB] == huge[..3 * MIB]);
        assert!(seen[3 * MIB..] == other);
    }
}

#[test]
#[expect(unsafe_code, reason = "a mapping behind the region is part of the test")]
fn a_mapping_behind_a_part_of_a_huge_page_keeps_its_bytes() {
    let Some(_reserved) = HugePages::or_skip(this_test!(), 16) else { return };
    let huge = pattern(5, 4 * MIB);
    let chunk = || Chunk::from(sealed(&huge)).range(0..3 * MIB as u64);
    let region = Region::builder().chunk(chunk()).build(&Pool::new().unwrap()).unwrap();
    let end = region.as_ptr().addr().get() + 3 * MIB;
    drop(region);
    // The kernel puts the next region of that size there again, now with a mapping behind it.
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
    let (mib, protection) = (NonZeroUsize::new(MIB).unwrap(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    // SAFETY: a new mapping that replaces nothing.
    let behind = unsafe { nix::sys::mman::mmap_anonymous(NonZeroUsize::new(end), mib, protection, flags) };
    let Ok(behind) = behind else { return println!("SKIPPED: something is behind the region already") };
    // SAFETY: the mapping from above.
    unsafe { behind.cast::<u8>().write_bytes(7, MIB) };
    let region = Region::builder().chunk(chunk()).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == &huge[..3 * MIB]);
    drop(region);
    assert!((0..MIB).step_by(4096).all(|at| touch(end + at) == 7));
    // SAFETY: the mapping from above.
    unsafe { nix::sys::mman::munmap(behind, MIB) }.unwrap();
}

#[test]
fn whole_huge_pages_are_in_place_and_parts_are_copied() {
    let Some(_reserved) = HugePages::or_skip(this_test!(), 16) else { return };
    let bytes = pattern(6, 6 * MIB);
    let memfd = sealed(&bytes);
    let part = |start: usize, end: usize| Chunk::from(memfd.clone()).range(start as u64..end as u64);
    let pool = Pool::new().unwrap();
    let whole = Region::builder().chunk(part(HUGE, 3 * HUGE)).chunk(part(0, HUGE)).require_zero_copy();
    let region = whole.build(&pool).unwrap();
    assert_eq!(region.plan().runs()[0].method, Method::Map);
    assert!(region.as_slice() == [&bytes[HUGE..], &bytes[..HUGE]].concat());
    // A multiple of the system's page size, but not of the memfd's.
    let off = Region::builder().chunk(part(MIB, 6 * MIB)).build(&pool).unwrap();
    assert!(off.as_slice() == &bytes[MIB..]);
    let reason = PlanReason::OtherOffsetInHugePage;
    assert_eq!(off.plan().runs()[0].reason, reason);
    let error = Region::builder().chunk(part(MIB, 3 * MIB)).require_zero_copy().build(&pool).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotZeroCopy);
    assert_eq!((error.chunk(), error.plan_reason()), (Some(0), Some(reason)), "{error}");
}

#[test]
#[expect(unsafe_code, reason = "an alias is unsafe to make")]
fn an_alias_of_hugetlb_memory_is_refused_with_the_remedy() {
    let Some(_reserved) = HugePages::or_skip(this_test!(), 16) else { return };
    let file = huge_memfd(&pattern(7, 2 * HUGE));
    let bytes = NonZeroUsize::new(2 * HUGE).unwrap();
    // SAFETY: a new mapping where the kernel chooses.
    let start = unsafe { mmap(None, bytes, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
    for (at, len) in [(0, HUGE), (0, 3 * MIB), (HUGE, MIB), (4096, 4096)] {
        // SAFETY: part of the mapping from above.
        let part = unsafe { start.byte_add(at) };
        // SAFETY: nothing has a reference to the memory.
        let error = unsafe { Alias::of(part.cast(), len) }.unwrap_err();
        assert!(
            matches!(error, AliasError::Huge { address } if address == part.as_ptr().addr()),
            "{error:?}"
        );
    }
    // SAFETY: the mapping from above.
    unsafe { nix::sys::mman::munmap(start, bytes.get()) }.unwrap();
}
