//! Files that do not change: their own pages as a slice, without a copy.

use crate::bounded_corners::is_in_memory;
use crate::{PAGE, pattern, reason, serve_until, until};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use pagestitch::source::{Cached, FailureReason, ImmutableFile, Limited, Retrying, SharedFile};
use pagestitch::{Access, Chunk, Eager, ErrorKind, Inline, Manual, Method, PlanReason, Pool, Region, Retry};
use pagestitch_kernel::{Features, Support};
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::NamedTempFile;

/// A file of these bytes in a folder.
pub(crate) fn file_in(folder: &Path, bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new_in(folder).unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Files of these bytes: on the file system of temporary files, and on a tmpfs.
fn files_of(bytes: &[u8]) -> [NamedTempFile; 2] {
    folders().map(|folder| file_in(&folder, bytes))
}

fn folders() -> [PathBuf; 2] {
    [std::env::temp_dir(), memory_folder()]
}

/// A folder on a tmpfs. A guest has only that of temporary files.
fn memory_folder() -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    if shared.is_dir() { shared } else { std::env::temp_dir() }
}

#[expect(unsafe_code, reason = "the promise that a file does not change")]
pub(crate) fn open(path: impl AsRef<Path>) -> Result<ImmutableFile, pagestitch::Error> {
    // SAFETY: only the test has the file. It changes no byte of which it has a slice.
    unsafe { ImmutableFile::open(path) }
}

#[test]
fn a_whole_immutable_file_is_a_slice_of_its_own_pages() {
    let bytes = pattern(1, 5 * PAGE + 77);
    for file in files_of(&bytes) {
        for pool in [true, false] {
            let builder = Region::builder().chunk(open(file.path()).unwrap()).require_zero_copy();
            let region = if pool { builder.build(&Pool::new().unwrap()) } else { builder.build(Inline) };
            let region = region.unwrap();
            assert!(region.as_slice() == bytes);
            let plan = region.plan();
            assert_eq!(plan.runs()[0].reason, PlanReason::MappedByPromise, "{plan}");
            assert_eq!(plan.runs()[0].source, file.path().display().to_string());
            let mut part = vec![0; 5000];
            region.read_at(3333, &mut part).unwrap();
            assert!(part == bytes[3333..8333]);
            let seen = region.close();
            assert_eq!((seen.pages_in_place, seen.faults, seen.bytes_copied), (6, 0, 0));
        }
    }
}

#[test]
fn ranges_of_immutable_files_in_any_order_are_in_place() {
    let bytes = pattern(2, 9 * PAGE);
    let [disk, memory] = files_of(&bytes);
    let (disk, memory) = (open(disk.path()).unwrap(), open(memory.path()).unwrap());
    let ranges = [(&disk, 20_000..30_000_u64), (&memory, 1..2), (&disk, 4096..8192), (&memory, 100..30_001)];
    let chunks = ranges.clone().map(|(file, range)| Chunk::from(file.clone()).range(range));
    let builder = Region::builder().page_aligned().chunks(chunks).require_zero_copy();
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    for (number, (_, range)) in ranges.into_iter().enumerate() {
        let start = region.offset_of(number).unwrap() as usize;
        let expected = &bytes[range.start as usize..range.end as usize];
        assert!(region.as_slice()[start..start + expected.len()] == *expected, "chunk {number}");
    }
    assert_eq!(region.close().bytes_copied, 0);
}

#[test]
fn a_pointer_to_an_immutable_file_is_mapped_and_a_wrapper_reads_it() {
    let bytes = pattern(9, 4 * PAGE);
    let file = file_in(&std::env::temp_dir(), &bytes);
    let shared = Arc::new(open(file.path()).unwrap());
    let pool = Pool::new().unwrap();
    let half = |start: usize| {
        let range = (start * PAGE) as u64..((start + 2) * PAGE) as u64;
        Chunk::source(Arc::clone(&shared)).range(range)
    };
    let mapped = Region::builder().chunks([half(0), half(2)]).require_zero_copy().build(&pool).unwrap();
    assert!(mapped.as_slice() == bytes);
    assert_eq!(mapped.plan().runs()[0].reason, PlanReason::MappedByPromise);
    let retrying = Retrying::new(Arc::clone(&shared), Retry::times(1));
    let limited = Limited::new(Arc::clone(&shared), 1);
    let cached = Cached::new(shared, 1 << 20);
    for chunk in
        [Chunk::source(Arc::new(retrying)), Chunk::source(Arc::new(limited)), Chunk::source(Arc::new(cached))]
    {
        let read = Region::builder().chunk(chunk).build(&pool).unwrap();
        assert!(read.as_slice() == bytes);
        assert_eq!(read.plan().runs()[0].method, Method::Buffered);
    }
}

#[test]
fn edges_and_unaligned_parts_of_an_immutable_file_are_copied() {
    let bytes = pattern(3, 3 << 20);
    for file in files_of(&bytes) {
        let file = open(file.path()).unwrap();
        let region = Region::builder()
            .chunk(Chunk::from(file.clone()).range(0..2 * PAGE as u64 + 5)) // the edge shares its page
            .chunk(Chunk::from(file).range(1..3 << 20)) // off every page boundary
            .build(&Pool::new().unwrap())
            .unwrap();
        let plan = region.plan();
        let (edge, off) = (&plan.runs()[0], &plan.runs()[1]);
        assert_eq!((edge.method, edge.reason), (Method::Buffered, PlanReason::Edge), "{plan}");
        assert_eq!((off.method, off.reason), (Method::Buffered, PlanReason::OtherOffset), "{plan}");
        let can_move = Support::current().has(Features::MOVE);
        assert_eq!(plan.staged().is_ok(), can_move, "whole blocks are read into huge pages: {plan}");
        assert!(*region.as_slice() == [&bytes[..2 * PAGE + 5], &bytes[1..]].concat());
        assert_eq!(region.close().pages_in_place, 2);
    }
}

#[test]
fn a_write_to_the_region_leaves_the_immutable_file_as_it_is() {
    let bytes = pattern(4, 3 * PAGE);
    for file in files_of(&bytes) {
        let builder = Region::builder().chunk(open(file.path()).unwrap()).writable();
        let mut region = builder.require_zero_copy().build(&Pool::new().unwrap()).unwrap();
        region.as_mut_slice().unwrap()[5000..5004].copy_from_slice(b"mine");
        assert_eq!(&region.as_slice()[5000..5004], b"mine");
        assert!(region.as_slice()[..5000] == bytes[..5000]);
        assert!(fs::read(file.path()).unwrap() == bytes);
    }
}

#[test]
fn an_immutable_file_that_is_replaced_or_removed_keeps_its_bytes() {
    let bytes = pattern(5, 2 * PAGE);
    for file in files_of(&bytes) {
        let region =
            Region::builder().chunk(open(file.path()).unwrap()).build(&Pool::new().unwrap()).unwrap();
        let other = file_in(file.path().parent().unwrap(), b"other bytes");
        fs::rename(other.path(), file.path()).unwrap();
        assert!(region.as_slice() == bytes);
        fs::remove_file(file.path()).unwrap();
        assert!(region.as_slice() == bytes);
    }
}

#[test]
fn a_truncated_immutable_file_is_an_error_of_read_at_and_sigbus_for_a_touch() {
    let truncated = |file: &NamedTempFile| {
        let builder = Region::builder().name("r").chunk(open(file.path()).unwrap());
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        file.as_file().set_len(PAGE as u64).unwrap();
        region
    };
    let body = child::body(this_test!(), |folder| {
        let region = truncated(&file_in(Path::new(folder), &pattern(6, 3 * PAGE)));
        std::hint::black_box(region.as_slice()[2 * PAGE]);
    });
    for folder in folders() {
        let file = file_in(&folder, &pattern(6, 3 * PAGE));
        let region = truncated(&file);
        region.read_at(0, &mut [0; PAGE]).unwrap();
        let error = region.read_at(4000, &mut [0; 200]).unwrap_err();
        assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Truncated));
        assert_eq!(error.chunk(), Some(0), "{error}");
        if has_populate_read() {
            let error = region.populate(..).unwrap_err();
            assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Truncated));
            region.populate(..PAGE as u64).unwrap();
        }
        let end = body.spawn(folder).wait();
        assert_eq!(end.signal(), Some(nix::libc::SIGBUS), "{}", end.output());
    }
}

#[test]
fn populate_of_a_truncated_shared_file_is_an_error() {
    if !has_populate_read() {
        return println!("SKIPPED: the kernel does not populate mappings of files");
    }
    let file = file_in(&std::env::temp_dir(), &pattern(6, 3 * PAGE));
    let region = Region::builder().chunk(SharedFile::open(file.path(), Access::ReadOnly).unwrap());
    let region = region.build_shared(&Pool::new().unwrap()).unwrap();
    region.populate(..).unwrap();
    file.as_file().set_len(PAGE as u64).unwrap();
    region.populate(..PAGE as u64).unwrap();
    let error = region.populate(..).unwrap_err();
    assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Truncated));
}

/// True since Linux 5.14, which can read pages of a mapping on request.
fn has_populate_read() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-']).map_while(|number| number.parse().ok()).collect();
    numbers >= vec![5, 14]
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "each read has faults of the sanitizer")]
fn populate_maps_the_pages_of_an_immutable_file() {
    if !has_populate_read() {
        return println!("SKIPPED: the kernel does not populate mappings of files");
    }
    let body = child::body(this_test!(), |folder| {
        let file = file_in(Path::new(folder), &pattern(11, 5 << 20));
        let builder = Region::builder().page_aligned().chunk(vec![1u8; 5]).chunk(open(file.path()).unwrap());
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        region.populate(..).unwrap();
        let before = faults();
        let pages = region.chunk_slice(1).unwrap().iter().step_by(PAGE);
        assert!(pages.map(|&byte| u64::from(byte)).sum::<u64>() > 0);
        // A sanitizer has faults of its own.
        let (seen, pages) = (faults() - before, (5 << 20) / PAGE as i64);
        assert!(seen < pages / 4, "{seen} faults of {pages} pages");
    });
    for folder in folders() {
        body.spawn(folder).wait().expect_pass();
    }
}

/// Beside each range there is more than the kernel's readahead would read. The kernel reclaims pages at any time,
/// without need too (DAMON), and the touch of such a page reads others. So most tries have to be exact, and not all.
#[test]
fn no_page_of_a_file_in_place_is_read_outside_of_a_populated_or_prefetched_range() {
    if !has_populate_read() || keeps_files_in_memory(&std::env::temp_dir()) {
        return println!("SKIPPED {}: files stay in the page cache", this_test!());
    }
    let mut file = NamedTempFile::new_in(std::env::temp_dir()).unwrap();
    (0..80).for_each(|part| file.write_all(&pattern(part, 1 << 20)).unwrap());
    file.as_file().sync_all().unwrap();
    for (range, prefetches) in
        [(5000..5001, false), (7000..7700, true), (6000..15_000, false), (5000..14_000, true)]
    {
        let exact = (range.len(), Some(range.start), Some(range.end - 1));
        let (mut tries, mut others) = (0, Vec::new());
        while tries - others.len() < 3 {
            let read = read_pages(&file, &range, prefetches);
            tries += 1;
            others.extend(Some(read).filter(|read| *read != exact));
            assert!(others.len() < 4, "{range:?}, {tries} tries: {others:?}");
        }
    }
}

/// The number of pages that are read, the first and the last of them.
type Read = (usize, Option<usize>, Option<usize>);

/// The pages of a file that a populate or a prefetch reads.
fn read_pages(file: &NamedTempFile, range: &Range<usize>, prefetches: bool) -> Read {
    const PAGES: usize = (80 << 20) / PAGE;
    let shared = || Arc::new(SharedFile::open(file.path(), Access::ReadOnly).unwrap());
    let chunk = match range.len() {
        1 => Chunk::from(shared()),
        700 => Chunk::copy_on_write(shared()),
        _ => Chunk::from(open(file.path()).unwrap()),
    };
    let region = Region::builder().chunk(chunk).build_shared(&Pool::new().unwrap()).unwrap();
    until(|| {
        posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        (0..PAGES).all(|page| !is_in_memory(&region, page))
    });
    let bytes = (range.start * PAGE) as u64..(range.end * PAGE) as u64;
    if prefetches {
        assert_eq!(region.prefetch(bytes).unwrap().wait().pages_left, 0);
        // The kernel reads a short range while the prefetch counts as over.
        if range.len() < 1000 {
            range.clone().for_each(|page| region.read_at((page * PAGE) as u64, &mut [0]).unwrap());
        }
    } else {
        region.populate(bytes).unwrap();
    }
    let read: Vec<_> = (0..PAGES).filter(|&page| is_in_memory(&region, page)).collect();
    (read.len(), read.first().copied(), read.last().copied())
}

/// Of 20 MiB the kernel begins the ends, and the server reads the middle.
#[test]
fn a_prefetch_of_a_long_file_in_place_is_over_after_its_server_has_read_it() {
    let file = file_in(&std::env::temp_dir(), &pattern(6, 20 << 20));
    file.as_file().sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let builder = || Region::builder().chunk(SharedFile::open(file.path(), Access::ReadOnly).unwrap());
    let mut manual = Manual::new().unwrap();
    let region = builder().build_shared(&manual).unwrap();
    let ahead = region.prefetch(..).unwrap();
    assert!(!ahead.is_done());
    serve_until(&mut manual, 1, || ahead.is_done());
    assert!(ahead.progress().is_complete(), "{:?}", ahead.progress());
    let pages = (20 << 20) / PAGE;
    let read = (0..pages).filter(|&page| is_in_memory(&region, page)).count();
    assert!(read > pages * 9 / 10, "{read} of {pages} pages are read, and few can have left by now");

    file.as_file().set_len(8 << 20).unwrap();
    let region = builder().build_shared(&Pool::new().unwrap()).unwrap();
    file.as_file().set_len(6 << 20).unwrap();
    assert!(region.prefetch(..).unwrap().wait().is_complete());
    let error = region.read_at(7 << 20, &mut [0]).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Truncated);

    let dropped = builder().build_shared(&manual).unwrap();
    let ahead = dropped.prefetch(..).unwrap();
    drop(dropped);
    serve_until(&mut manual, 1, || ahead.is_done());
}

#[test]
fn a_prefetch_of_holes_in_a_tmpfs_allocates_no_page() {
    let [_, memory] = folders();
    let file = NamedTempFile::new_in(memory).unwrap();
    file.as_file().set_len(32 << 20).unwrap();
    let region = Region::builder().chunk(SharedFile::open(file.path(), Access::ReadOnly).unwrap());
    let region = region.build_shared(&Pool::new().unwrap()).unwrap();
    assert!(region.prefetch(..).unwrap().wait().is_complete());
    assert_eq!(file.as_file().metadata().unwrap().blocks(), 0);
}

/// True for a tmpfs, for example.
fn keeps_files_in_memory(folder: &Path) -> bool {
    let file = file_in(folder, &[7; PAGE]);
    file.as_file().sync_all().unwrap();
    let region = Region::builder().chunk(SharedFile::open(file.path(), Access::ReadOnly).unwrap());
    let region = region.build_shared(&Pool::new().unwrap()).unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    is_in_memory(&region, 0)
}

/// The faults of this thread without a disk read.
fn faults() -> i64 {
    nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD).unwrap().minor_page_faults()
}

#[test]
fn an_unaligned_page_of_a_truncated_immutable_file_is_an_error() {
    for file in files_of(&pattern(7, 3 * PAGE)) {
        let builder = Region::builder().chunk(vec![1u8; 10]).chunk(open(file.path()).unwrap());
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        file.as_file().set_len(PAGE as u64).unwrap();
        let error = region.populate(..).unwrap_err();
        assert_eq!((error.chunk(), reason(&error)), (Some(1), FailureReason::Truncated), "{error}");
    }
}

#[test]
fn a_region_of_immutable_files_in_place_holds_no_descriptor_of_them() {
    let bytes = pattern(8, PAGE);
    let [file, _] = files_of(&bytes);
    let open_of = |path: &Path| {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == path)).count()
    };
    let before = open_of(file.path());
    let region = Region::builder().chunk(open(file.path()).unwrap()).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(open_of(file.path()), before);
    assert!(region.as_slice() == bytes);
}

#[test]
#[expect(unsafe_code, reason = "the promise that a file does not change")]
fn an_open_file_can_be_taken_with_the_promise() {
    let bytes = pattern(9, 2 * PAGE);
    for file in files_of(&bytes) {
        let shared = SharedFile::try_from(OwnedFd::from(File::open(file.path()).unwrap())).unwrap();
        // SAFETY: only the test has the file, and it changes no byte.
        let taken = unsafe { ImmutableFile::assume(shared) };
        let builder = Region::builder().chunk(taken).require_zero_copy();
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        assert!(region.as_slice() == bytes);
        assert_eq!(region.plan().runs()[0].source, file.path().display().to_string());
    }
}

#[test]
fn things_that_are_no_immutable_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (empty, pipe) = (folder.path().join("empty"), folder.path().join("pipe"));
    File::create(&empty).unwrap();
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, kind) in [
        (folder.path(), ErrorKind::UnusableFile),
        (&empty, ErrorKind::UnusableFile),
        (&pipe, ErrorKind::UnusableFile),
        (Path::new("/dev/null"), ErrorKind::UnusableFile),
        (Path::new("/proc/self/maps"), ErrorKind::UnusableFile),
        (&folder.path().join("absent"), ErrorKind::Io),
    ] {
        let error = open(path).unwrap_err();
        assert_eq!((error.kind(), error.path()), (kind, Some(path)), "{error}");
    }
}

#[test]
fn the_errors_of_immutable_files_are_shown() {
    let folder = tempfile::tempdir_in(memory_folder()).unwrap();
    let path = folder.path().join("file");
    let (within, shown) = (folder.path().display(), path.display());
    crate::error_messages::check([
        (open(&path).unwrap_err(), format!("cannot open {shown}: No such file or directory (os error 2)")),
        (open(folder.path()).unwrap_err(), format!("cannot open {within}: a directory: name a file in it")),
        (
            open("/proc/self/maps").unwrap_err(),
            String::from(
                "cannot open /proc/self/maps: a file of /proc has no length and cannot be mapped: copy its bytes into memory",
            ),
        ),
    ]);
    fs::write(&path, "bytes").unwrap();
    let expected = format!(
        "cannot use {shown}: its file system is not known to check fs-verity: use ext4, f2fs or btrfs, or promise that the file does not change"
    );
    crate::error_messages::check([(ImmutableFile::open_verity(&path).unwrap_err(), expected)]);
}

#[test]
fn an_immutable_file_whose_file_system_cannot_map_it_is_copied() {
    let path = "/sys/kernel/notes";
    let Ok(bytes) = fs::read(path) else { return println!("SKIPPED: there is no {path}") };
    if fs::metadata(path).unwrap().len() != bytes.len() as u64 {
        return println!("SKIPPED: {path} does not say how long it is");
    }
    let eager = Region::builder().chunk(open(path).unwrap()).build(Eager).unwrap();
    assert!(eager.as_slice() == bytes);
    let region = Region::builder().chunk(open(path).unwrap()).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.plan().runs()[0].reason, PlanReason::UnmappableFile, "{}", region.plan());
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_file_without_fs_verity_is_no_proof() {
    for file in files_of(b"bytes") {
        let error = ImmutableFile::open_verity(file.path()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (ErrorKind::UnusableFile, Some(file.path())), "{error}");
    }
}
