//! Memory that others may change: shared with all of them, and never shown as a `&[u8]`.

use crate::donated::pages_of;
use crate::{PAGE, pattern, reason, touch};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{ProtFlags, mprotect};
use pagestitch::source::{Alias, FailureReason, SharedFile, UnsealedMemfd};
use pagestitch::{Access, Chunk, ErrorKind, Method, PlanReason, Pool, Region, SharedRegion};
use pagestitch_testkit::{child, this_test};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A file of these bytes, as a source and as a second handle.
fn file_of(bytes: &[u8]) -> (Arc<SharedFile>, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    (Arc::new(SharedFile::open(file.path(), Access::Writable).unwrap()), file)
}

pub(crate) fn memfd_of(bytes: &[u8]) -> (Arc<SharedFile>, File) {
    let memfd = UnsealedMemfd::create("shared", bytes.len() as u64).unwrap();
    memfd.file().write_all_at(bytes, 0).unwrap();
    let file = memfd.file().try_clone().unwrap();
    (Arc::new(SharedFile::try_from(&memfd).unwrap()), file)
}

fn bytes_of(region: &SharedRegion) -> Vec<u8> {
    let mut bytes = vec![0; region.len()];
    region.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn pages_of_files_and_memfds_in_any_order_are_in_place_without_a_fault() {
    let bytes = pattern(1, 4 * PAGE);
    let ((file, _kept), (memfd, _)) = (file_of(&bytes), memfd_of(&bytes));
    let page = |of: &Arc<SharedFile>, page: usize| {
        Chunk::from(Arc::clone(of)).range((page * PAGE) as u64..((page + 1) * PAGE) as u64)
    };
    let order = [(&file, 3), (&memfd, 1), (&file, 0), (&memfd, 2)];
    let region = Region::builder()
        .chunks(order.map(|(of, number)| page(of, number)))
        .require_zero_copy()
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    let expected = order.map(|(_, number)| &bytes[number * PAGE..(number + 1) * PAGE]).concat();
    assert!(bytes_of(&region) == expected);
    let seen = region.close();
    assert_eq!((seen.pages_in_place, seen.faults, seen.bytes_copied), (4, 0, 0));
}

#[test]
fn a_write_is_seen_by_the_region_and_by_the_file() {
    let bytes = pattern(2, 3 * PAGE);
    for (shared, other) in [memfd_of(&bytes), {
        let (shared, kept) = file_of(&bytes);
        (shared, kept.into_file())
    }] {
        let region = Region::builder()
            .chunk(Chunk::from(shared).range(PAGE as u64..3 * PAGE as u64))
            .writable()
            .build_shared(&Pool::new().unwrap())
            .unwrap();
        region.write_at(5000, b"ours").unwrap();
        let mut seen = [0; 4];
        other.read_exact_at(&mut seen, PAGE as u64 + 5000).unwrap();
        assert_eq!(&seen, b"ours");
        other.write_all_at(b"theirs", PAGE as u64).unwrap();
        assert_eq!(touch(region.as_ptr().addr().get() + 5), b's');
    }
}

#[test]
fn two_regions_of_one_memfd_share_its_pages() {
    let (memfd, _) = memfd_of(&pattern(3, 2 * PAGE));
    let pool = Pool::new().unwrap();
    let build = || Region::builder().chunk(Arc::clone(&memfd)).writable().build_shared(&pool).unwrap();
    let (one, two) = (build(), build());
    one.write_at(4094, b"seam").unwrap();
    assert_eq!(&bytes_of(&two)[4094..4098], b"seam");
    assert!(one.close().bytes_copied + two.close().bytes_copied == 0);
}

#[test]
fn copy_on_write_keeps_writes_in_the_region() {
    let bytes = pattern(4, 2 * PAGE);
    let (memfd, other) = memfd_of(&bytes);
    let region = Region::builder()
        .chunk(Chunk::copy_on_write(memfd))
        .writable()
        .require_zero_copy()
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    assert_eq!(region.plan().runs()[0].reason, PlanReason::MappedUntilWritten);
    region.write_at(10, b"mine").unwrap();
    let mut theirs = [0; 4];
    other.read_exact_at(&mut theirs, 10).unwrap();
    assert_eq!(theirs, bytes[10..14]);
    assert_eq!(&bytes_of(&region)[10..14], b"mine");
}

#[test]
#[expect(unsafe_code, reason = "an alias is a second way to memory")]
fn an_alias_is_the_same_memory() {
    let bytes = pattern(5, 3 * PAGE);
    let (memfd, other) = memfd_of(&bytes);
    let pool = Pool::new().unwrap();
    let first = Region::builder().chunk(memfd).build_shared(&pool).unwrap();
    // SAFETY: the test has no reference to the bytes.
    let alias = unsafe { Alias::of(first.as_ptr(), 3 * PAGE) }.unwrap();
    let second = Region::builder()
        .chunk(Chunk::from(alias).range(PAGE as u64..3 * PAGE as u64))
        .require_zero_copy()
        .build_shared(&pool)
        .unwrap();
    drop(first);
    other.write_all_at(b"news", 2 * PAGE as u64).unwrap();
    let seen = bytes_of(&second);
    assert!(&seen[PAGE..PAGE + 4] == b"news" && seen[..PAGE] == bytes[PAGE..2 * PAGE]);
    assert_eq!(second.close().faults, 0);
}

#[test]
#[expect(unsafe_code, reason = "an alias is a second way to memory")]
fn an_alias_of_mappings_next_to_each_other_shows_each_of_them() {
    let (first, second) = (pattern(12, 3 * PAGE), pattern(13, 2 * PAGE));
    let [(one, _), (two, _)] = [memfd_of(&first), memfd_of(&second)];
    let pool = Pool::new().unwrap();
    // Pages of two memfds, one of them out of the order of its file.
    let page = |of: &Arc<SharedFile>, page: usize| {
        Chunk::from(Arc::clone(of)).range((page * PAGE) as u64..((page + 1) * PAGE) as u64)
    };
    let chunks = [page(&one, 0), page(&one, 2), page(&two, 0), page(&two, 1), page(&one, 1)];
    let shown = Region::builder().chunks(chunks).require_zero_copy().build_shared(&pool).unwrap();
    let expected = bytes_of(&shown);
    // SAFETY: the test has no reference to the bytes.
    let alias = Arc::new(unsafe { Alias::of(shown.as_ptr(), 5 * PAGE) }.unwrap());
    for range in [0..5 * PAGE, PAGE..4 * PAGE] {
        let part = Chunk::from(Arc::clone(&alias)).range(range.start as u64..range.end as u64);
        let region = Region::builder().chunk(part).require_zero_copy().build_shared(&pool).unwrap();
        let mut seen = vec![0; range.len()];
        region.read_at(0, &mut seen).unwrap();
        assert!(seen == expected[range.clone()], "{range:?}");
    }
}

#[test]
fn build_refuses_a_shared_chunk() {
    let (memfd, _) = memfd_of(&pattern(6, PAGE));
    let builder = Region::builder().name("r").chunk(vec![1u8; 100]).chunk(memfd);
    let error = builder.build(&Pool::new().unwrap()).unwrap_err();
    // The chunk is refused also off a page boundary, where it would only be copied.
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::SharedSource, Some(1)), "{error}");
}

#[test]
fn an_unaligned_shared_chunk_is_copied_at_the_first_touch() {
    let bytes = pattern(7, 2 * PAGE);
    let (memfd, other) = memfd_of(&bytes);
    let region =
        Region::builder().chunk(vec![1u8; 100]).chunk(memfd).build_shared(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.plan().runs()[1].method, Method::Buffered);
    other.write_all_at(b"before", 0).unwrap();
    assert_eq!(&bytes_of(&region)[100..106], b"before");
    other.write_all_at(b"after!", 0).unwrap();
    assert_eq!(&bytes_of(&region)[100..106], b"before", "it was copied when it was touched");
}

#[test]
fn page_aligned_chunks_are_shown_in_place() {
    let bytes = pattern(8, 5 * PAGE);
    let (memfd, _) = memfd_of(&bytes);
    let ranges = [100..5000, 4096..4097, 0..9000_u64];
    let part = |range: &std::ops::Range<u64>| Chunk::from(Arc::clone(&memfd)).range(range.clone());
    let region = Region::builder()
        .page_aligned()
        .chunks(ranges.iter().map(part))
        .require_zero_copy()
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    let seen = bytes_of(&region);
    for (number, range) in ranges.iter().enumerate() {
        let start = region.offset_of(number).unwrap() as usize;
        let expected = &bytes[range.start as usize..range.end as usize];
        assert!(seen[start..start + expected.len()] == *expected, "chunk {number}");
    }
    assert_eq!(region.offset_of(3), None);
    let plan = region.plan();
    let mapped: Vec<_> =
        plan.runs().iter().filter(|run| !run.chunks.is_empty()).map(|run| run.chunks.clone()).collect();
    assert!(plan.runs().iter().all(|run| run.method == Method::Map), "{plan}");
    assert_eq!(mapped, [0..1, 1..2, 2..3], "padding is not counted:\n{plan}");
    assert_eq!(region.close().bytes_copied, 0);
}

#[test]
fn a_file_that_shrinks_is_an_error_of_read_at_and_sigbus_for_a_touch() {
    let (memfd, other) = memfd_of(&pattern(9, 3 * PAGE));
    let region =
        Region::builder().name("r").chunk(memfd).writable().build_shared(&Pool::new().unwrap()).unwrap();
    other.set_len(PAGE as u64).unwrap();
    region.read_at(0, &mut [0; PAGE]).unwrap();
    for error in [
        region.read_at(4000, &mut [0; 200]).unwrap_err(),
        region.write_at(2 * PAGE as u64, &[0; 2]).unwrap_err(),
    ] {
        assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Truncated));
    }
    let end = child::run(this_test!(), || {
        touch(region.as_ptr().addr().get() + 2 * PAGE);
    });
    assert_eq!(end.signal(), Some(nix::libc::SIGBUS), "{}", end.output());
}

#[test]
fn a_read_only_file_is_shown_in_place_and_refuses_writes() {
    let exe = || SharedFile::open("/proc/self/exe", Access::ReadOnly).unwrap();
    let pool = Pool::new().unwrap();
    let region = Region::builder().name("r").chunk(exe()).require_zero_copy().build_shared(&pool).unwrap();
    assert_eq!(&bytes_of(&region)[1..4], b"ELF");
    let error = region.write_at(0, b"no").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    let error = Region::builder().name("r").chunk(exe()).writable().build_shared(&pool).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::UnusableFile, Some(0)), "{error}");
    let copied = Region::builder().chunk(Chunk::copy_on_write(exe())).writable().build_shared(&pool).unwrap();
    copied.write_at(0, b"mine").unwrap();
}

#[test]
fn a_read_only_file_beside_donated_pages_is_shown_read_only() {
    // Donated pages move only between writable mappings, but the file must stay mapped read-only.
    let file = SharedFile::open("/proc/self/exe", Access::ReadOnly).unwrap();
    let builder = Region::builder().chunk(pages_of(&pattern(11, PAGE))).chunk(file).require_zero_copy();
    let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
    assert_eq!(&bytes_of(&region)[PAGE + 1..PAGE + 4], b"ELF");
    assert!(region.write_at(0, b"no").is_err());
}

#[test]
fn the_limit_of_mappings_can_be_set() {
    let (memfd, _) = memfd_of(&pattern(10, 8 * PAGE));
    let pages = [7, 6, 5, 4, 3, 2, 1, 0_u64]
        .map(|page| Chunk::from(Arc::clone(&memfd)).range(page * PAGE as u64..(page + 1) * PAGE as u64));
    let region = Region::builder().chunks(pages).max_mappings(3).build_shared(&Pool::new().unwrap()).unwrap();
    let hows: Vec<_> = region.plan().runs().iter().map(|run| (run.method, run.chunks.clone())).collect();
    assert_eq!(hows, [(Method::Map, 0..3), (Method::Buffered, 3..8)]);
    bytes_of(&region);
    assert_eq!(region.close().pages_in_place, 3);
}

/// Collapses a file into huge pages, through a mapping of its own.
#[expect(unsafe_code, reason = "maps a file as another process would")]
pub(crate) fn collapse(file: &File, bytes: usize) -> nix::Result<()> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
    const MADV_COLLAPSE: i32 = 25;
    let (length, huge) = (std::num::NonZeroUsize::new(bytes + (2 << 20)).expect("bytes"), 2 << 20);
    let (protection, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    // SAFETY: a new mapping where the kernel chooses. Nothing is touched past the end of its file.
    let start = unsafe { mmap(None, length, protection, flags, file, 0) }?;
    // Addresses and file offsets must both be multiples of 2 MiB.
    let aligned = start.as_ptr().addr().next_multiple_of(huge);
    // SAFETY: addresses inside that mapping, from which nothing is borrowed.
    let start_of_file = unsafe {
        let length = std::num::NonZeroUsize::new(bytes).expect("bytes");
        mmap(std::num::NonZeroUsize::new(aligned), length, protection, flags | MapFlags::MAP_FIXED, file, 0)
    };
    // SAFETY: the kernel moves pages and changes no byte.
    let answer =
        start_of_file.map(|start| unsafe { nix::libc::madvise(start.as_ptr(), bytes, MADV_COLLAPSE) });
    let answer = answer.and_then(|answer| nix::errno::Errno::result(answer).map(drop));
    // SAFETY: that mapping, from which nothing is borrowed.
    let _ = unsafe { munmap(start, length.get()) };
    answer
}

#[test]
fn a_file_that_cannot_be_mapped_is_copied_and_the_plan_says_so() {
    // A file of sysfs without mmap, whose length is known.
    let path = "/sys/kernel/notes";
    let Ok(bytes) = std::fs::read(path) else { return println!("SKIPPED: there is no {path}") };
    let file = Arc::new(SharedFile::open(path, Access::ReadOnly).unwrap());
    if file.len() != bytes.len() as u64 {
        return println!("SKIPPED: {path} does not say how long it is");
    }
    for chunk in [Chunk::from(Arc::clone(&file)), Chunk::copy_on_write(Arc::clone(&file))] {
        let builder = Region::builder().chunk(chunk).chunk(vec![7; 10]);
        let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
        assert!(bytes_of(&region) == [&bytes[..], &[7; 10]].concat());
    }
    let region = Region::builder().chunk(Arc::clone(&file)).build_shared(&Pool::new().unwrap()).unwrap();
    let plan = region.plan();
    assert_eq!(plan.runs()[0].reason, PlanReason::UnmappableFile, "{plan}");
    assert!(bytes_of(&region) == bytes, "the refused page is still the region's");
    let strict = Region::builder().chunk(file).require_zero_copy();
    let error = strict.build_shared(&Pool::new().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotZeroCopy);
    assert_eq!((error.chunk(), error.plan_reason()), (Some(0), Some(PlanReason::UnmappableFile)));
}

/// Before Linux 6.7, a memfd that is sealed against writes has no shared mappings.
#[test]
fn a_file_without_shared_mappings_is_copied_into_a_region_that_is_read() {
    let memfd = memfd_create("sealed", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let memfd = File::from(memfd);
    memfd.write_all_at(&pattern(3, 3 * PAGE), 0).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let mut files =
        vec![(Arc::new(SharedFile::try_from(OwnedFd::from(memfd)).unwrap()), pattern(3, 3 * PAGE))];
    let types = "/sys/kernel/btf/vmlinux";
    match std::fs::read(types) {
        Ok(bytes) => files.push((Arc::new(SharedFile::open(types, Access::ReadOnly).unwrap()), bytes)),
        Err(error) => println!("SKIPPED in part: {types}: {error}"),
    }
    for (file, bytes) in files {
        let region = Region::builder().chunk(file).build_shared(&Pool::new().unwrap()).unwrap();
        println!("{}", region.plan());
        assert!(bytes_of(&region) == bytes);
    }
}

#[test]
fn a_write_to_a_full_file_system_is_enospc() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let folder = tempfile::tempdir().unwrap();
    let options = Some("size=64k");
    if let Err(errno) = mount(Some("none"), folder.path(), Some("tmpfs"), MsFlags::empty(), options) {
        return println!("SKIPPED: no file system can be mounted here ({errno})");
    }
    let errors = std::panic::catch_unwind(|| {
        let path = folder.path().join("sparse");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let file = SharedFile::open(&path, Access::Writable).unwrap();
        let builder = Region::builder().name("sparse").chunk(file).writable();
        let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
        region.write_at(0, &[1; PAGE]).unwrap();
        let error = region.write_at(0, &[1; 1 << 19]).unwrap_err();
        // The file gets shorter, which is another error.
        File::options().write(true).open(&path).unwrap().set_len(PAGE as u64).unwrap();
        let shorter = region.read_at(1 << 19, &mut [0]).unwrap_err();
        [error, shorter].map(|error| (error.kind(), reason(&error)))
    });
    umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    let expected =
        [FailureReason::NoSpace, FailureReason::Truncated].map(|reason| (ErrorKind::SourceFailed, reason));
    assert_eq!(errors.unwrap(), expected);
}

#[test]
fn read_at_and_write_at_work_without_process_vm_readv() {
    let end = child::run(this_test!(), || {
        pagestitch_testkit::deny::deny_copies(pagestitch_kernel::Errno::EPERM);
        let (bytes, donated) = (pattern(9, 3 * PAGE), pattern(10, 2 * PAGE));
        let (file, other) = memfd_of(&bytes);
        // The donated chunk is not page-aligned, so it is copied.
        let builder = Region::builder().chunk(file).chunk(vec![1; 10]).chunk(pages_of(&donated)).writable();
        let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
        assert!(bytes_of(&region) == [&bytes[..], &[1; 10], &donated].concat());
        region.write_at(PAGE as u64 - 2, b"across").unwrap();
        let mut seen = [0; 6];
        other.read_exact_at(&mut seen, PAGE as u64 - 2).unwrap();
        assert_eq!(&seen, b"across");
        other.set_len(PAGE as u64).unwrap();
        let error = region.read_at(2 * PAGE as u64, &mut [0]).unwrap_err();
        assert_eq!(reason(&error), FailureReason::Truncated, "{error}");
    });
    end.expect_pass();
}

/// A call that writes to frames would force its way, and write to a frame that has left the region.
#[test]
fn a_write_keeps_to_the_protection_of_its_pages() {
    write_keeps_to_protection();
}

#[test]
fn a_write_without_process_vm_readv_keeps_to_the_protection_of_its_pages() {
    let end = child::run(this_test!(), || {
        pagestitch_testkit::deny::deny_copies(pagestitch_kernel::Errno::EPERM);
        write_keeps_to_protection();
    });
    end.expect_pass();
}

fn write_keeps_to_protection() {
    let builder = Region::builder().chunk(vec![1; 3 * PAGE]).writable();
    let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
    region.populate(..).unwrap();
    protect(&region, PAGE, ProtFlags::PROT_READ);
    let error = region.write_at(0, &[2; 3 * PAGE]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceFailed, "{error}");
    assert!(bytes_of(&region)[PAGE..] == [1; 2 * PAGE]);
    protect(&region, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    region.write_at(0, &[2; 3 * PAGE]).unwrap();
    assert!(bytes_of(&region) == [2; 3 * PAGE]);
}

#[expect(unsafe_code, reason = "an application protects a page of its region")]
fn protect(region: &SharedRegion, offset: usize, protection: ProtFlags) {
    let page = region.as_ptr().cast().map_addr(|start| start.saturating_add(offset));
    // SAFETY: the page is inside the region, and the test holds no reference to its bytes.
    unsafe { mprotect(page, PAGE, protection) }.unwrap();
}

/// A file system on a disk that fails, with a file of which nothing is in the page cache.
struct FailingDisk {
    folder: tempfile::TempDir,
}

impl FailingDisk {
    fn of(bytes: &[u8]) -> Option<Self> {
        use std::process::Command;
        let folder = tempfile::tempdir().unwrap();
        let (disk, mounted) = (folder.path().join("disk"), folder.path().join("mounted"));
        std::fs::create_dir(&mounted).unwrap();
        File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        let done = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let mount = |options| done(Command::new("mount").args(["-o", options]).arg(&disk).arg(&mounted));
        let unmount = || done(Command::new("umount").arg(&mounted));
        let made = done(Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal"]).arg(&disk));
        if !made || !mount("loop") {
            return None;
        }
        std::fs::write(mounted.join("file"), bytes).unwrap();
        (unmount() && mount("loop,ro")).then_some(Self { folder })
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("mounted/file")
    }

    /// From now on each read from the disk fails.
    fn fail(&self) {
        File::options().write(true).open(self.folder.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.folder.path().join("mounted"), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_disk_error_is_an_error_of_read_at() {
    let Some(disk) = FailingDisk::of(&pattern(11, 4 << 20)) else {
        return println!("SKIPPED: no file system can be made and mounted here");
    };
    let file = SharedFile::open(disk.file(), Access::ReadOnly).unwrap();
    let region = Region::builder().chunk(file).build_shared(&Pool::new().unwrap()).unwrap();
    disk.fail();
    let error = region.read_at(2 << 20, &mut [0; PAGE]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceFailed);
    assert_eq!(reason(&error), FailureReason::Source, "{error}");
    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
}

#[test]
fn a_shared_file_that_ends_early_where_it_is_copied_is_truncated() {
    let (file, kept) = file_of(&pattern(8, 2 * PAGE));
    let region = Region::builder().chunk(Chunk::from(file).range(1..)).build_shared(&Pool::new().unwrap());
    let region = region.unwrap();
    kept.as_file().set_len(PAGE as u64).unwrap();
    let error = region.read_at(0, &mut [0; PAGE]).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Truncated, "{error}");
}
