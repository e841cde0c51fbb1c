//! A memfd that is filled later: one copy in memory for all who map it, filled once, whoever needs it first.

use crate::{pattern, touch};
use pagestitch::source::{FillMemfd, LazyMemfd, SharedFile, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, How, Pool, Readahead, Region};
use pagestitch_kernel::Support;
use pagestitch_kernel::support::Features;
use pagestitch_testkit::child;
use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;
const PAGES: usize = 64;

/// Writes what it was given, and counts the pages; fails for one of them.
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

/// A memfd of these bytes, which it has already or not.
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
fn two_regions_of_it_have_each_page_filled_once() {
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
        assert_eq!((one.pages_cached, one.bytes_copied), (3, 0));
        assert_eq!((two.pages_cached, two.bytes_copied), (PAGES as u64, 0));
    }
}

#[test]
fn two_processes_share_one_copy() {
    let (memfd, filler, pool) = (memfd(), Filler::new(), Pool::new().unwrap());
    let region = Region::builder()
        .chunk(lazy(&memfd, &filler))
        .readahead(Readahead::None)
        .build_shared(&pool)
        .unwrap();
    let base = region.as_ptr().addr().get();
    assert_eq!(touch(base + 3 * PAGE), filler.bytes[3 * PAGE]);
    // The child is told which memfd: the one of its parent.
    let note = |process: u32| -> PathBuf { std::env::temp_dir().join(format!("pagestitch-lazy-{process}")) };
    let path = format!("/proc/{}/fd/{}", std::process::id(), memfd.file().as_raw_fd());
    fs::write(note(std::process::id()), path).unwrap();
    let end = child::run("lazy::two_processes_share_one_copy", || {
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
fn what_cannot_be_filled_is_an_error_and_sigbus() {
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
    let end = child::run("lazy::what_cannot_be_filled_is_an_error_and_sigbus", || {
        touch(base + 7 * PAGE);
    });
    assert_eq!(end.signal(), Some(nix::libc::SIGBUS), "{}", end.said());
    let error = region.read_at(8 * PAGE as u64, &mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(error.to_string().contains("chunk 1 (lazy memfd)"), "{error}");
    assert!(error.to_string().contains("the store is down"), "{error}");
    assert_eq!(touch(base + 8 * PAGE), filler.bytes[8 * PAGE]);
}

#[test]
fn off_its_pages_it_is_filled_and_copied() {
    let (memfd, filler) = (memfd(), Filler::new());
    let region = Region::builder()
        .chunk(vec![5u8; 100])
        .chunk(Chunk::from(lazy(&memfd, &filler)).range(50..20_000))
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    let mut all = vec![0; region.len()];
    region.read_at(0, &mut all).unwrap();
    assert!(all[100..] == filler.bytes[50..20_000]);
    assert_eq!(region.plan().runs()[1].how, How::Read);
}

#[test]
fn a_memfd_that_cannot_be_written_to_is_refused() {
    let memfd = memfd();
    let path = format!("/proc/self/fd/{}", memfd.file().as_raw_fd());
    let error = LazyMemfd::new(fs::File::open(path).unwrap().into(), Filler::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::File);
    assert!(error.to_string().contains("open for writing too"), "{error}");
}
