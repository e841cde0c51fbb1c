//! Lazy memfds: one copy in memory for all mappings, and each page is filled once, at the first
//! touch of any of them.

use crate::application::duplicate_of;
use crate::machine::rounds;
use crate::{PAGE, SIGBUS, lacks_poison, pattern, reason, touch};
use nix::mount::MsFlags;
use pagestitch::source::{FailureReason, FillMemfd, LazyMemfd, SharedFile, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, Method, Pool, Readahead, Region};
use pagestitch_kernel::Features;
use pagestitch_kernel::Support;
use pagestitch_testkit::{child, this_test};
use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGES: usize = 64;

/// Writes its bytes and counts the pages. Fails at one byte.
struct Filler {
    bytes: Vec<u8>,
    pages: AtomicU64,
    failing: Option<u64>,
}

impl Filler {
    fn new() -> Arc<Self> {
        Arc::new(Self { bytes: pattern(1, PAGES * PAGE), pages: AtomicU64::new(0), failing: None })
    }

    fn pages(&self) -> u64 {
        self.pages.load(Ordering::SeqCst)
    }
}

impl FillMemfd for Filler {
    fn fill(&self, memfd: &SharedFile, range: Range<u64>) -> io::Result<()> {
        if self.failing.is_some_and(|byte| range.contains(&byte)) {
            return Err(io::Error::other("the store is down"));
        }
        self.pages.fetch_add((range.end - range.start).div_ceil(PAGE as u64), Ordering::SeqCst);
        memfd.file().write_all_at(&self.bytes[range.start as usize..range.end as usize], range.start)
    }
}

/// A lazy memfd of these bytes, which it holds already if `filled`.
pub(crate) fn chunk_of(bytes: &[u8], filled: bool) -> Chunk {
    let memfd = UnsealedMemfd::create("lazy", bytes.len() as u64).unwrap();
    if filled {
        memfd.file().write_all_at(bytes, 0).unwrap();
    }
    let filler = Filler { bytes: bytes.to_vec(), pages: AtomicU64::new(0), failing: None };
    lazy(&memfd, &Arc::new(filler)).into()
}

fn continues() -> bool {
    Support::current().has(Features::MISSING_SHMEM | Features::MINOR_SHMEM)
}

fn memfd() -> UnsealedMemfd {
    UnsealedMemfd::create("lazy", (PAGES * PAGE) as u64).unwrap()
}

fn lazy(memfd: &UnsealedMemfd, filler: &Arc<Filler>) -> LazyMemfd {
    LazyMemfd::new(memfd.file().try_clone().unwrap().into(), Arc::clone(filler) as _).unwrap()
}

#[test]
fn two_regions_of_a_lazy_memfd_fill_each_page_once() {
    let (memfd, filler, pool) = (memfd(), Filler::new(), Pool::new().unwrap());
    let build = || {
        let builder = Region::builder().chunk(lazy(&memfd, &filler)).readahead(Readahead::None);
        builder.build_shared(&pool).unwrap()
    };
    let (one, two) = (build(), build());
    for page in [3, 60, 17] {
        let expected = filler.bytes[page * PAGE + 9];
        assert_eq!(touch(one.as_ptr().addr().get() + page * PAGE + 9), expected);
        assert_eq!(touch(two.as_ptr().addr().get() + page * PAGE + 9), expected);
    }
    assert_eq!(filler.pages(), 3);
    let mut all = vec![0; PAGES * PAGE];
    two.read_at(0, &mut all).unwrap();
    assert!(all == filler.bytes);
    assert_eq!(filler.pages(), PAGES as u64);
    let (one, two) = (one.close(), two.close());
    if continues() {
        assert_eq!((one.pages_continued, one.bytes_copied), (3, 0));
        assert_eq!((two.pages_continued, two.bytes_copied), (PAGES as u64, 0));
    }
}

#[test]
fn two_processes_share_the_pages_of_a_lazy_memfd() {
    let (memfd, filler, pool) = (memfd(), Filler::new(), Pool::new().unwrap());
    let region = Region::builder()
        .chunk(lazy(&memfd, &filler))
        .readahead(Readahead::None)
        .build_shared(&pool)
        .unwrap();
    let base = region.as_ptr().addr().get();
    assert_eq!(touch(base + 3 * PAGE), filler.bytes[3 * PAGE]);
    // The child reads the path of its parent's memfd from a file.
    let note = |process: u32| -> PathBuf { std::env::temp_dir().join(format!("pagestitch-lazy-{process}")) };
    let path = format!("/proc/{}/fd/{}", std::process::id(), memfd.file().as_raw_fd());
    fs::write(note(std::process::id()), path).unwrap();
    let end = child::run(this_test!(), || {
        // The child has run the test up to here, and has written a file of its own.
        fs::remove_file(note(std::process::id())).unwrap();
        let path = fs::read_to_string(note(std::os::unix::process::parent_id())).unwrap();
        let theirs = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let filler = Filler::new();
        let lazy = LazyMemfd::new(theirs.into(), Arc::clone(&filler) as _).unwrap();
        let builder = Region::builder().chunk(lazy).readahead(Readahead::None);
        let region = builder.build_shared(&pool).unwrap();
        let base = region.as_ptr().addr().get();
        assert_eq!(touch(base + 3 * PAGE), filler.bytes[3 * PAGE], "filled by the parent");
        assert_eq!(filler.pages(), 0);
        assert_eq!(touch(base + 5 * PAGE), filler.bytes[5 * PAGE]);
        assert_eq!(filler.pages(), 1);
    });
    let _ = fs::remove_file(note(std::process::id()));
    end.expect_pass();
    assert_eq!(touch(base + 5 * PAGE), filler.bytes[5 * PAGE], "filled by the child");
    assert_eq!(filler.pages(), 1, "only page 3 was filled here");
}

#[test]
fn a_lazy_page_whose_fill_fails_is_an_error_and_sigbus() {
    let mut filler = Arc::into_inner(Filler::new()).unwrap();
    filler.failing = Some((7 * PAGE) as u64);
    let (memfd, filler, pool) = (memfd(), Arc::new(filler), Pool::new().unwrap());
    let region = Region::builder()
        .chunk(vec![5u8; PAGE])
        .chunk(lazy(&memfd, &filler))
        .readahead(Readahead::None)
        .build_shared(&pool)
        .unwrap();
    let base = region.as_ptr().addr().get() + PAGE;
    assert_eq!(touch(base + 6 * PAGE), filler.bytes[6 * PAGE]);
    let end = child::run(this_test!(), || {
        touch(base + 7 * PAGE);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    let error = region.read_at(8 * PAGE as u64, &mut [0]).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::SourceFailed, Some(1)), "{error}");
    assert_eq!(reason(&error), FailureReason::Source, "the store is down: {error}");
    assert_eq!(touch(base + 8 * PAGE), filler.bytes[8 * PAGE]);
}

#[test]
fn an_unaligned_lazy_chunk_is_filled_and_copied() {
    let (memfd, filler) = (memfd(), Filler::new());
    let region = Region::builder()
        .chunk(vec![5u8; 100])
        .chunk(Chunk::from(lazy(&memfd, &filler)).range(50..20_000))
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    let mut all = vec![0; region.len()];
    region.read_at(0, &mut all).unwrap();
    assert!(all[100..] == filler.bytes[50..20_000]);
    assert_eq!(region.plan().runs()[1].method, Method::Buffered);
}

#[test]
fn a_read_only_lazy_memfd_is_refused() {
    let memfd = memfd();
    let path = format!("/proc/self/fd/{}", memfd.file().as_raw_fd());
    let error = LazyMemfd::new(fs::File::open(path).unwrap().into(), Filler::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnusableFile);
}

/// A tmpfs that is mounted for its lifetime. Needs root.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(huge: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        Self::remount(folder.path(), huge, MsFlags::empty()).ok().map(|()| Self(folder))
    }

    fn remount(path: &Path, huge: &str, flags: MsFlags) -> nix::Result<()> {
        let options = format!("huge={huge}");
        nix::mount::mount(Some("pagestitch"), path, Some("tmpfs"), flags, Some(options.as_str()))
    }

    fn file(&self) -> fs::File {
        let path = self.0.path().join("lazy");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(HUGE_BYTES as u64).unwrap();
        file
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Eight megabytes.
const HUGE_BYTES: usize = 8 << 20;

fn filler_of(bytes: usize) -> Arc<Filler> {
    Arc::new(Filler { bytes: pattern(2, bytes), pages: AtomicU64::new(0), failing: None })
}

/// One write makes a whole huge page present, and the rest of that page is zeros.
#[test]
fn a_lazy_file_whose_pages_may_be_huge_is_refused_with_the_remedy() {
    for huge in ["always", "within_size"] {
        let Some(tmpfs) = Tmpfs::mount(huge) else { return println!("SKIPPED huge tmpfs: no mount") };
        let filler = filler_of(HUGE_BYTES);
        match LazyMemfd::new(tmpfs.file().into(), Arc::clone(&filler) as _) {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::UnusableFile, "{error}");
            }
            Ok(lazy) => {
                let region = Region::builder().chunk(lazy).build_shared(&Pool::new().unwrap()).unwrap();
                let mut all = vec![0; HUGE_BYTES];
                region.read_at(4 << 20, &mut all[..1]).unwrap();
                region.read_at(0, &mut all).unwrap();
                let wrong = all.chunks(PAGE).zip(filler.bytes.chunks(PAGE)).filter(|(a, b)| a != b).count();
                panic!("huge={huge}: not refused, and {wrong} pages are wrong");
            }
        }
    }
}

#[test]
fn a_lazy_file_that_gets_huge_pages_is_an_error_and_not_zeros() {
    let Some(tmpfs) = Tmpfs::mount("never") else { return println!("SKIPPED huge tmpfs: no mount") };
    let (filler, pool) = (filler_of(HUGE_BYTES), Pool::new().unwrap());
    let lazy = LazyMemfd::new(tmpfs.file().into(), Arc::clone(&filler) as _).unwrap();
    let region = Region::builder().chunk(lazy).readahead(Readahead::None).build_shared(&pool).unwrap();
    let mut byte = [0];
    region.read_at(5, &mut byte).unwrap();
    assert_eq!(byte[0], filler.bytes[5]);
    Tmpfs::remount(tmpfs.0.path(), "always", MsFlags::MS_REMOUNT).unwrap();
    for offset in [4 << 20, (4 << 20) + PAGE] {
        match region.read_at(offset as u64, &mut byte) {
            Ok(()) => assert_eq!(byte[0], filler.bytes[offset], "page {}", offset / PAGE),
            Err(error) => assert_eq!(reason(&error), FailureReason::HugePages, "{error}"),
        }
    }
}

#[test]
fn lazy_files_of_hugetlbfs_and_on_disk_are_refused() {
    let filler = filler_of(PAGE);
    let hugetlb = nix::sys::memfd::memfd_create("huge", nix::sys::memfd::MFdFlags::MFD_HUGETLB);
    if let Ok(hugetlb) = hugetlb {
        let hugetlb = fs::File::from(hugetlb);
        if hugetlb.set_len(2 << 20).is_ok() {
            let error = LazyMemfd::new(hugetlb.into(), Arc::clone(&filler) as _).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnusableFile, "{error}");
        }
    }
    // Other file systems report holes in units of their own, or not at all.
    let other = fs::File::options().read(true).write(true).open("/proc/self/comm").unwrap();
    let error = LazyMemfd::new(other.into(), Arc::clone(&filler) as _).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnusableFile);
}

/// Allocated space of a file is not yet a filled page.
#[test]
fn fallocated_pages_of_a_lazy_memfd_are_filled() {
    let (memfd, filler) = (memfd(), Filler::new());
    nix::fcntl::fallocate(memfd.file(), nix::fcntl::FallocateFlags::empty(), 0, (PAGES * PAGE) as i64)
        .unwrap();
    let pool = Pool::new().unwrap();
    let builder = Region::builder().chunk(lazy(&memfd, &filler)).readahead(Readahead::None);
    let region = builder.build_shared(&pool).unwrap();
    assert_eq!(touch(region.as_ptr().addr().get() + 3 * PAGE + 9), filler.bytes[3 * PAGE + 9]);
    let mut all = vec![0; PAGES * PAGE];
    region.read_at(0, &mut all).unwrap();
    assert!(all == filler.bytes);
}

/// The kernel collapses another mapping of the memfd into huge pages while some of its pages are
/// absent.
#[test]
fn a_collapse_of_a_lazy_memfd_shows_no_zeros() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) < (Some(6), Some(4)) {
        return println!("SKIPPED collapse: Linux {release} fills holes with zeros then, as is documented");
    }
    let memfd = UnsealedMemfd::create("lazy", HUGE_BYTES as u64).unwrap();
    let (filler, pool) = (filler_of(HUGE_BYTES), Pool::new().unwrap());
    let lazy = LazyMemfd::new(memfd.file().try_clone().unwrap().into(), Arc::clone(&filler) as _).unwrap();
    let region = Region::builder().chunk(lazy).readahead(Readahead::None).build_shared(&pool).unwrap();
    if region.plan().runs()[0].method != Method::Continue {
        return println!("SKIPPED collapse: the memfd is copied here");
    }
    let mut byte = [0];
    for block in 0..4 {
        region.read_at(block << 21, &mut byte).unwrap();
    }
    if let Err(errno) = crate::shared::collapse(memfd.file(), HUGE_BYTES) {
        println!("the kernel refuses to collapse: {errno}");
    }
    let mut all = vec![0; HUGE_BYTES];
    region.read_at(0, &mut all).unwrap();
    let wrong = all.chunks(PAGE).zip(filler.bytes.chunks(PAGE)).filter(|(a, b)| a != b).count();
    assert_eq!(wrong, 0, "pages that differ");
}

/// The time for a page does not depend on the filled size of the memfd. A time is the subject, so a
/// clock measures it.
#[test]
fn the_time_to_find_a_hole_does_not_grow_with_the_filled_pages() {
    let bytes = (rounds(512) << 20) as usize;
    let memfd = UnsealedMemfd::create("lazy", bytes as u64).unwrap();
    let chunk = vec![7; 1 << 20];
    (0..bytes >> 20).for_each(|mib| memfd.file().write_all_at(&chunk, (mib << 20) as u64).unwrap());
    let file = SharedFile::try_from(&memfd).unwrap();
    let quickest = |offset: u64| {
        let ask = || {
            let began = std::time::Instant::now();
            assert_eq!(file.next_hole(&(offset..offset + PAGE as u64)).unwrap(), None);
            began.elapsed()
        };
        (0..50).map(|_| ask()).min().unwrap()
    };
    let (before_all, before_little) = (quickest(0), quickest((bytes - 2 * PAGE) as u64));
    println!("before all pages: {before_all:?}, before two pages: {before_little:?}");
    assert!(
        before_all < before_little * 20,
        "{before_all:?} before all pages, {before_little:?} before two pages"
    );
}

/// `mremap(2)` of shared memory duplicates it, with its registration, beside the region.
#[test]
fn a_duplicate_of_the_mapping_has_the_bytes_or_a_signal_and_never_hangs() {
    if !continues() || lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        let bytes = pattern(3, PAGES * PAGE);
        let pool = Pool::builder().workers(2).start().unwrap();
        let builder = Region::builder().chunk(chunk_of(&bytes, false)).readahead(Readahead::None);
        let region = builder.build_shared(&pool).unwrap();
        let start = region.as_ptr().expose_provenance().get();
        assert_eq!(touch(start + PAGE), bytes[PAGE]);
        let duplicate = duplicate_of(start, PAGES * PAGE);
        assert_eq!(touch(duplicate + PAGE), bytes[PAGE]);
        println!("filled: the same");
        println!("absent: {}", touch(duplicate + 5 * PAGE));
    });
    let output = end.output();
    assert_eq!(end.signal(), Some(SIGBUS), "{output}");
    assert!(output.contains("filled: the same") && !output.contains("absent:"), "{output}");
}
