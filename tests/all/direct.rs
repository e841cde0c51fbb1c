//! Files that are read around the page cache: the bytes are those of any other read.

use crate::bounded_corners::is_in_memory;
use crate::bounded_writes::{BUDGET, PAGES, builder, moves_no_pages, pool, word, write_beside_flushes};
use crate::changes::records_no_writes;
use crate::inline_writes::word_of;
use crate::{PAGE, pattern, reason};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use pagestitch::source::{FailureReason, FileSource, SharedFile, WritableFile};
use pagestitch::{
    Access, Budget, Chunk, Error, ErrorKind, Inline, Pool, Readahead, Region, Server, SharedRegion, Source,
    WriteBack,
};
use pagestitch_testkit::this_test;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// A file with these bytes, and its path; `None`, with a line that says so, where the file system cannot.
pub(crate) fn direct(test: &str, bytes: &[u8]) -> Option<(Arc<FileSource>, PathBuf)> {
    opened(test, bytes, |path| FileSource::open(path)?.direct())
}

/// As [`direct`], for a file that takes written pages.
fn writable(test: &str, bytes: &[u8]) -> Option<(Arc<WritableFile>, PathBuf)> {
    opened(test, bytes, |path| WritableFile::open(path)?.direct())
}

fn opened<F>(
    test: &str,
    bytes: &[u8],
    open: impl FnOnce(&Path) -> Result<F, Error>,
) -> Option<(Arc<F>, PathBuf)> {
    static FILES: AtomicU32 = AtomicU32::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("pagestitch-direct-{}-{number}", process::id()));
    fs::write(&path, bytes).unwrap();
    match open(&path) {
        Ok(file) => Some((Arc::new(file), path)),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::UnusableFile, "{error}");
            println!("SKIPPED {test}: {error}");
            fs::remove_file(path).unwrap();
            None
        }
    }
}

#[test]
fn direct_reads_at_any_offset_have_the_bytes_of_the_file() {
    let bytes = pattern(1, 300 * PAGE + 77);
    let Some((file, path)) = direct(this_test!(), &bytes) else { return };
    let mut into = vec![0; bytes.len()];
    for (start, len) in [
        (0, PAGE),
        (1, PAGE),
        (4095, 2),
        (511, 513),
        (300 * PAGE, 77),
        (299 * PAGE + 5, 4168),
        (3, 40_000),
        (0, 300 * PAGE + 77),
    ] {
        file.read_at(start as u64, &mut into[..len]).unwrap();
        assert!(into[..len] == bytes[start..start + len], "{len} bytes from {start}");
    }
    let parts = [Chunk::from(Arc::clone(&file)).range(5..100_000), Chunk::from(Arc::clone(&file))];
    let region = Region::builder().chunks(parts).build(&Pool::builder().workers(2).start().unwrap()).unwrap();
    for page in [200, 10, 324, 0, 25, 24] {
        let offset = page * PAGE;
        let expected = if offset < 99_995 { bytes[offset + 5] } else { bytes[offset - 99_995] };
        assert_eq!(region.as_slice()[offset], expected, "page {page}");
    }
    assert!(region.as_slice()[..99_995] == bytes[5..100_000] && region.as_slice()[99_995..] == bytes);
    fs::remove_file(path).unwrap();
}

#[test]
fn a_direct_read_of_a_truncated_file_is_an_error() {
    let Some((file, path)) = direct(this_test!(), &pattern(2, 10 * PAGE)) else { return };
    let region = Region::builder()
        .chunk(Chunk::from(file))
        .build(&Pool::builder().workers(1).start().unwrap())
        .unwrap();
    File::options().write(true).open(&path).unwrap().set_len(5 * PAGE as u64 + 1).unwrap();
    region.populate(..4 * PAGE as u64).unwrap();
    for page in [5, 9] {
        let error = region.populate((page * PAGE) as u64..((page + 1) * PAGE) as u64).unwrap_err();
        assert_eq!(reason(&error), FailureReason::Truncated);
    }
    fs::remove_file(path).unwrap();
}

/// The pages of a file in the page cache, which shows them in place.
struct Cache {
    file: File,
    in_place: SharedRegion,
}

impl Cache {
    fn of(path: &Path) -> Self {
        let chunk = SharedFile::open(path, Access::ReadOnly).unwrap();
        Self {
            file: File::open(path).unwrap(),
            in_place: Region::builder().chunk(chunk).build_shared(&pool(1)).unwrap(),
        }
    }

    fn pages(&self) -> usize {
        (0..self.in_place.len().div_ceil(PAGE)).filter(|page| is_in_memory(&self.in_place, *page)).count()
    }

    /// A file system in memory keeps them.
    fn empty(&self) {
        self.file.sync_all().unwrap();
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
}

#[test]
fn no_write_is_lost_in_a_file_that_is_read_around_the_page_cache() {
    if moves_no_pages() {
        return;
    }
    for server in [Server::from(&pool(2)), Server::from(Inline)] {
        let Some((file, path)) = writable(this_test!(), &vec![0; PAGES * PAGE]) else { return };
        let (budget, cache) = (Budget::bytes(BUDGET).unwrap(), Cache::of(&path));
        cache.empty();
        let is_on_disk = cache.pages() == 0;
        let region = builder(&budget, Chunk::writable(file)).build_shared(server).unwrap();
        (0..PAGES).step_by(100).for_each(|page| assert_eq!(word(&region, page).load(Ordering::Relaxed), 0));
        assert!(!is_on_disk || cache.pages() == 0, "a page in the page cache was read");
        let shadow = write_beside_flushes(&region, &budget, 3);
        assert!(budget.metrics().write_backs > 500, "{:?}", budget.metrics());
        region.finish().unwrap();
        let cached = cache.pages();
        assert!(!is_on_disk || cached < PAGES / 50, "{cached} pages in the page cache");
        let file = File::open(&path).unwrap();
        shadow.iter().enumerate().for_each(|(page, expected)| assert_eq!(word_of(&file, page), *expected));
        fs::remove_file(path).unwrap();
    }
}

/// Several pages are read at once, because no read of a disk hangs. They arrive armed.
#[test]
fn written_pages_of_a_direct_file_without_a_budget_are_known() {
    if records_no_writes(this_test!()) {
        return;
    }
    let before = pattern(5, 64 * PAGE);
    let Some((file, path)) = writable(this_test!(), &before) else { return };
    let region =
        Region::builder().chunk(Chunk::writable(file)).write_back(WriteBack::ToSource).track_changes();
    let region = region.readahead(Readahead::None).build_shared(&pool(1)).unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let region = &region;
            scope.spawn(move || {
                for page in (thread..64).step_by(8) {
                    let value = word(region, page).load(Ordering::Relaxed);
                    if page % 3 == 0 {
                        word(region, page).store(!value, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let changes = region.changes().unwrap();
    let changed = changes.into_iter().flat_map(|run| (run.start..run.end).step_by(PAGE));
    assert!(
        changed.eq((0..64).step_by(3).map(|page: u64| page * PAGE as u64)),
        "the written pages, and no others"
    );
    region.finish().unwrap();
    let after = fs::read(&path).unwrap();
    for page in 0..64 {
        let (was, is) = (&before[page * PAGE..][..PAGE], &after[page * PAGE..][..PAGE]);
        let changed = was[..8].iter().map(|byte| if page % 3 == 0 { !byte } else { *byte });
        assert!(changed.eq(is[..8].iter().copied()) && was[8..] == is[8..], "page {page}");
    }
    fs::remove_file(path).unwrap();
}

/// The pages at the start and the end have another chunk, too, so that they come through the page cache.
#[test]
fn a_whole_page_that_is_read_inline_passes_around_the_page_cache() {
    let bytes = pattern(3, 40 * PAGE + 77);
    let Some((file, path)) = direct(this_test!(), &bytes) else { return };
    let build = |first: &[u8]| {
        let chunks = Region::builder().chunk(first.to_vec()).chunk(Chunk::from(Arc::clone(&file)));
        chunks.build(Inline).unwrap()
    };
    let (aligned, shifted) = (build(&[7; PAGE]), build(&[7; PAGE + 1]));
    let cache = Cache::of(&path);
    cache.empty();
    if cache.pages() > 0 {
        // A file system in memory, for example.
        return println!("SKIPPED {}: the file stays in the page cache", this_test!());
    }
    for page in [30, 1, 17] {
        assert_eq!(aligned.as_slice()[page * PAGE], bytes[(page - 1) * PAGE], "page {page}");
    }
    assert_eq!(cache.pages(), 0);
    assert!(aligned.as_slice()[PAGE..] == bytes);
    assert!(shifted.as_slice()[PAGE + 1..] == bytes);
    assert!(cache.pages() > 0, "pages that do not begin with a block of the disk");
    fs::remove_file(path).unwrap();
}
