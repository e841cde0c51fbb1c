//! Files that are read around the page cache: the bytes are those of any other read.

use crate::bounded_corners::is_in_memory;
use crate::{PAGE, pattern, reason};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use pagestitch::source::{FailureReason, FileSource, SharedFile};
use pagestitch::{Access, Chunk, ErrorKind, Inline, Pool, Region, Source};
use pagestitch_testkit::this_test;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A file with these bytes, and its path; `None`, with a line that says so, where the file system cannot.
pub(crate) fn direct(test: &str, bytes: &[u8]) -> Option<(Arc<FileSource>, PathBuf)> {
    static FILES: AtomicU32 = AtomicU32::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("pagestitch-direct-{}-{number}", process::id()));
    fs::write(&path, bytes).unwrap();
    match FileSource::open(&path).unwrap().direct() {
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
    let opened = File::open(&path).unwrap();
    let in_place = Region::builder().chunk(SharedFile::open(&path, Access::ReadOnly).unwrap());
    let in_place = in_place.build_shared(&Pool::builder().workers(1).start().unwrap()).unwrap();
    let cached = || (0..41).filter(|page| is_in_memory(&in_place, *page)).count();
    opened.sync_all().unwrap();
    posix_fadvise(&opened, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    if cached() > 0 {
        // A file system in memory, for example.
        return println!("SKIPPED {}: the file stays in the page cache", this_test!());
    }
    for page in [30, 1, 17] {
        assert_eq!(aligned.as_slice()[page * PAGE], bytes[(page - 1) * PAGE], "page {page}");
    }
    assert_eq!(cached(), 0);
    assert!(aligned.as_slice()[PAGE..] == bytes);
    assert!(shifted.as_slice()[PAGE + 1..] == bytes);
    assert!(cached() > 0, "pages that do not begin with a block of the disk");
    fs::remove_file(path).unwrap();
}
