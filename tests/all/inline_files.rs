//! Files in inline regions: the touching thread reads its page in the signal handler.

use crate::immutable::open;
use crate::{PAGE, SIGBUS, discard, handle_bus_errors, pattern, reason, touch};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use pagestitch::source::{FailureReason, FileSource, Limited, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, Inline, OnFailure, Region};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

/// A file on the disk, and one in memory (tmpfs).
fn files(bytes: &[u8]) -> [File; 2] {
    let mut disk = tempfile::tempfile().unwrap();
    disk.write_all(bytes).unwrap();
    let memory = UnsealedMemfd::create("file", bytes.len() as u64).unwrap();
    memory.file().write_all_at(bytes, 0).unwrap();
    [disk, memory.file().try_clone().unwrap()]
}

pub(crate) fn file_of(bytes: &[u8]) -> Arc<FileSource> {
    let [disk, _] = files(bytes);
    Arc::new(FileSource::try_from(disk).unwrap())
}

/// The parts of a file of such a length, from the last one to the first.
fn backwards(file: &Arc<FileSource>, bytes: &[u8], part: usize) -> (Vec<Chunk>, Vec<u8>) {
    let starts = (0..bytes.len()).step_by(part).rev();
    let ranges = starts.map(|start| start..(start + part).min(bytes.len()));
    ranges
        .map(|part| {
            let chunk = Chunk::from(Arc::clone(file)).range(part.start as u64..part.end as u64);
            (chunk, &bytes[part])
        })
        .fold((Vec::new(), Vec::new()), |(mut chunks, mut expected), (chunk, bytes)| {
            chunks.push(chunk);
            expected.extend(bytes);
            (chunks, expected)
        })
}

#[test]
fn many_threads_read_a_shuffled_file_inline() {
    let bytes = pattern(1, 500 * PAGE + 77);
    for file in files(&bytes) {
        let file = Arc::new(FileSource::try_from(file).unwrap());
        let (chunks, expected) = backwards(&file, &bytes, 7 * PAGE + 11);
        let region = Region::builder().chunks(chunks).build(Inline).unwrap();
        let (pages, all) = (expected.len().div_ceil(PAGE), region.as_slice());
        scope(|scope| {
            for reader in 0..8usize {
                let expected = &expected;
                scope.spawn(move || {
                    for i in 0..pages {
                        // Each thread has another order, in which all pages come.
                        let start = (i * 7 + reader * 60) % pages * PAGE;
                        let end = (start + PAGE).min(expected.len());
                        assert!(all[start..end] == expected[start..end], "page at {start}");
                    }
                });
            }
        });
        let seen = region.close();
        assert_eq!(seen.pages_installed(), pages as u64);
        assert!(seen.pages_buffered > 400 && seen.pages_gathered > 60, "{seen:?}");
        assert_eq!((seen.source_errors, seen.bytes_copied), (0, (pages * PAGE) as u64));
    }
}

#[test]
fn a_page_of_a_file_in_memory_and_a_hole_is_gathered_inline() {
    let bytes = pattern(2, 1000);
    let builder = Region::builder().chunk(vec![9u8; 100]).chunk(file_of(&bytes)).chunk(Chunk::hole(50));
    let region = builder.chunk(Chunk::from(file_of(&bytes)).range(10..20)).build(Inline).unwrap();
    let expected = [&[9; 100], &bytes[..], &[0; 50], &bytes[10..20]].concat();
    assert!(region.as_slice() == expected);
    assert_eq!(region.close().pages_gathered, 1);
}

#[test]
fn an_immutable_file_at_another_offset_in_its_page_is_read_inline() {
    let bytes = pattern(3, 10 * PAGE);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let file = open(file.path()).unwrap();
    let region = Region::builder().chunk(vec![9u8; 100]).chunk(file).build(Inline).unwrap();
    assert!(region.as_slice()[..100] == [9; 100] && region.as_slice()[100..] == bytes);
}

#[test]
fn a_discarded_page_of_a_file_is_read_again() {
    let bytes = pattern(4, 20 * PAGE);
    let region = Region::builder().chunk(file_of(&bytes)).build(Inline).unwrap();
    for _ in 0..3 {
        assert!(region.as_slice() == bytes);
        discard(region.as_ptr().addr().get() + 5 * PAGE, 10 * PAGE);
    }
    assert!(region.as_slice() == bytes);
}

/// The file of [`a_read_of_a_file_keeps_errno`], and the errno that the application's handler has met.
static ODD: OnceLock<File> = OnceLock::new();
static MET: AtomicI32 = AtomicI32::new(0);

/// The handler of the application, which makes the file readable.
extern "C" fn make_readable(_signal: i32) {
    MET.store(Errno::last_raw(), Ordering::SeqCst);
    let _ = fcntl(ODD.get().unwrap(), FcntlArg::F_SETFL(OFlag::empty()));
}

/// The read of a file fails until the application's handler of the signal has changed the file. Neither this handler
/// nor the thread meets the errno of the failed read.
#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "the sanitizer sets errno before a handler of the application runs"
)]
fn a_read_of_a_file_keeps_errno() {
    let test = this_test!();
    let end = child::run(test, || {
        let [file, _] = files(&pattern(5, 10 * PAGE));
        let odd = ODD.get_or_init(|| file.try_clone().unwrap());
        handle_bus_errors(make_readable);
        let chunk = Chunk::from(FileSource::try_from(file).unwrap()).range(1..);
        let region = Region::builder().chunk(chunk).build(Inline).unwrap();
        let set = fcntl(odd, FcntlArg::F_SETFL(OFlag::O_DIRECT));
        // Most disks refuse a read around the page cache at an odd offset.
        if set.is_err() || odd.read_at(&mut [0; 100], 1).is_ok() {
            return println!("SKIPPED {test}: the file system lets all reads pass");
        }
        Errno::set_raw(77);
        let byte = std::hint::black_box(region.as_slice()[5 * PAGE]);
        assert_eq!((Errno::last_raw(), MET.load(Ordering::SeqCst)), (77, 77));
        assert_eq!(byte, pattern(5, 10 * PAGE)[5 * PAGE + 1]);
    });
    end.expect_pass();
    print!("{}", end.output().lines().filter(|line| line.contains("SKIPPED")).collect::<String>());
}

/// An inline region of a file that ends ten bytes after its second page by now.
fn truncated(on_failure: OnFailure) -> Region {
    let [file, _] = files(&pattern(6, 4 * PAGE));
    let chunk = Chunk::try_from(file.try_clone().unwrap()).unwrap().on_failure(on_failure);
    let region = Region::builder().chunk(chunk).build(Inline).unwrap();
    file.set_len(2 * PAGE as u64 + 10).unwrap();
    region
}

#[test]
fn a_page_past_the_end_of_a_truncated_file_is_a_signal_and_never_zeros() {
    let test = this_test!();
    for page in [2, 3] {
        let end = child::run(test, || {
            let region = truncated(OnFailure::Zeros);
            assert_ne!(region.as_slice()[PAGE], 0);
            println!("read {}", touch(region.as_ptr().addr().get() + page * PAGE));
        });
        assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    }
}

#[test]
fn populate_tells_that_the_file_of_an_inline_region_was_truncated() {
    let region = truncated(OnFailure::Poison);
    let error = region.populate(..).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Truncated, "{error}");
    assert!(region.as_slice()[..2 * PAGE] == pattern(6, 4 * PAGE)[..2 * PAGE]);
}

#[test]
fn populate_applies_the_policy_of_a_chunk_to_the_file_of_an_inline_region() {
    let region = truncated(OnFailure::Zeros);
    region.populate(..).unwrap();
    assert_eq!(region.as_slice()[3 * PAGE], 0);
    assert!(region.close().pages_zeroed_on_failure >= 1);
}

#[test]
fn a_wrapper_around_a_file_is_refused_inline() {
    let file = file_of(&pattern(7, PAGE));
    let limited = Chunk::source(Arc::new(Limited::new(Arc::clone(&file), 1)));
    let error = Region::builder().chunk(file).chunk(limited).build(Inline).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::UnsuitableServer, Some(1)), "{error}");
}
