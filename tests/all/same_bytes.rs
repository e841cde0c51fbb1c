//! Pages that leave a region and come back: from a source that may change they have the bytes of their first
//! reading, or they are an error.

use crate::waits::until;
use crate::{PAGE, SIGBUS, reason};
use pagestitch::source::{FailureReason, FileSource};
use pagestitch::{Budget, BuildOption, Chunk, ErrorKind, Pool, Region, SameBytes, SharedRegion, Source};
use pagestitch_testkit::{child, this_test};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

/// Bytes that may change, behind a lock.
fn changing() -> Arc<Mutex<Vec<u8>>> {
    Arc::new(Mutex::new((0..SIZE as usize).map(|at| (at / PAGE) as u8 | 1).collect()))
}

fn pool() -> Pool {
    Pool::builder().workers(1).start().unwrap()
}

/// A region longer than its budget, whose first page was read.
fn read_once(chunk: Chunk) -> (Budget, Region) {
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = Region::builder().chunk(chunk).budget(&budget).build(&pool()).unwrap();
    assert_eq!(region.as_slice()[0], 1);
    (budget, region)
}

/// Reads the pages of a region until they are in the memory of its first page, if that one leaves soon
/// enough: a page may also come back from the standby list.
fn others_come(region: &Region) {
    region.evict(..PAGE as u64).unwrap();
    for page in 1..region.len() / PAGE {
        assert_eq!(region.as_slice()[page * PAGE], page as u8 | 1);
    }
}

#[test]
fn a_page_of_a_changed_source_is_an_error_and_never_other_bytes() {
    let source = changing();
    let (_, region) = read_once(Chunk::source(Arc::clone(&source)));
    source.lock().unwrap()[100] ^= 1;
    let read = || region.read_at(0, &mut [0; 10]);
    until(|| {
        others_come(&region);
        read().is_err()
    });
    let error = read().unwrap_err();
    assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Changed), "{error}");
    let failures = region.failures();
    assert_eq!(failures.len(), 1, "{failures:?}");
    // With its first bytes, the page can be had again.
    source.lock().unwrap()[100] ^= 1;
    if region.retry_failed(..).is_ok() {
        assert_eq!(region.as_slice()[..PAGE], [1; PAGE]);
    }
}

#[test]
fn a_touch_of_a_page_of_a_changed_source_is_sigbus() {
    let end = child::run(this_test!(), || {
        let source = changing();
        let (_, region) = read_once(Chunk::source(Arc::clone(&source)));
        source.lock().unwrap()[0] = 9;
        until(|| {
            others_come(&region);
            region.as_slice()[0] != 1
        });
        println!("read a byte: {}", region.as_slice()[0]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

#[test]
fn a_page_of_an_unchanged_file_comes_back() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&changing().lock().unwrap()).unwrap();
    let (budget, region) = read_once(FileSource::open(file.path()).unwrap().into());
    until(|| {
        others_come(&region);
        let before = budget.metrics().refaults;
        assert_eq!(region.as_slice()[..PAGE], [1; PAGE]);
        budget.metrics().refaults > before
    });
    assert_eq!(region.plan().runs()[0].same_bytes, Some(SameBytes::Hashed));
    assert!(region.plan().to_string().contains("hashes"), "{}", region.plan());
}

#[test]
fn a_changed_page_of_a_shared_region_shows_its_new_bytes() {
    let (source, budget) = (changing(), Budget::bytes(BUDGET).unwrap());
    let builder = SharedRegion::builder().chunk(Chunk::source(Arc::clone(&source))).budget(&budget);
    let region = builder.build_shared(&pool()).unwrap();
    for page in 0..region.len() / PAGE {
        assert_eq!(region.view().touch(page * PAGE), page as u8 | 1);
    }
    source.lock().unwrap()[0] = 9;
    until(|| {
        region.evict(..PAGE as u64).unwrap();
        (1..region.len() / PAGE)
            .for_each(|page| assert_eq!(region.view().touch(page * PAGE), page as u8 | 1));
        region.view().touch(0) == 9
    });
    assert_eq!(region.plan().runs()[0].same_bytes, Some(SameBytes::Unchecked));
}

#[test]
fn pages_of_stable_sources_are_not_hashed() {
    let budget = Budget::bytes(BUDGET).unwrap();
    let build = |chunk: Chunk| Region::builder().chunk(chunk).budget(&budget).build(&pool()).unwrap();
    let memory = build(vec![7; PAGE].into());
    assert_eq!((budget.resident_bytes(), memory.plan().runs()[0].same_bytes), (0, Some(SameBytes::Stable)));
    let hashed = build(Chunk::source(changing()));
    // 16 bytes for each of its pages.
    assert_eq!(budget.resident_bytes(), SIZE / PAGE as u64 * 16);
    drop(hashed);
    assert_eq!(budget.resident_bytes(), 0);
}

/// A long source.
struct Long;

impl Source for Long {
    fn size(&self) -> u64 {
        1 << 40
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(7);
        Ok(())
    }
}

#[test]
fn hashes_that_take_more_than_a_part_of_the_budget_are_refused() {
    let budget = Budget::bytes(BUDGET).unwrap();
    let build = |chunk: Chunk| Region::builder().chunk(chunk).budget(&budget).build(&pool());
    let error = build(Chunk::source(Arc::new(Long))).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::LimitReached, Some(BuildOption::Budget)));
    // The bound is one of all regions of the budget together.
    let most = BUDGET / 8 / 16 * PAGE as u64;
    let whole = build(Chunk::source(Arc::new(Long)).range(..most)).unwrap();
    build(Chunk::source(Arc::new(Long)).range(..1)).unwrap_err();
    drop(whole);
    build(Chunk::source(Arc::new(Long)).range(..1)).unwrap();
}

const BUDGET: u64 = 5 << 20;
const SIZE: u64 = BUDGET + (2 << 20);
