//! Units of reads (`granularity()`): each unit of a source is read once.

use crate::waits::SetOnDrop;
use crate::wrappers::{
    KIB_64, Later, Noted, PAGE, Prompt, is_right, is_right_but, region_of, region_of_fetch,
};
use crate::{reason, until};
use pagestitch::source::{Cached, FailureReason};
use pagestitch::{Chunk, Eager, ErrorKind, OnFailure, Pool, Readahead, Region, Retry, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::byte_at;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Each unit of a source is read once, whatever the order of the touches.
#[test]
fn a_source_is_read_in_units_of_its_granularity() {
    const UNITS: u64 = 64;
    let pool = Pool::builder().workers(3).start().unwrap();
    let units: Vec<_> = (0..UNITS).map(|unit| (unit * KIB_64, KIB_64 as usize)).collect();
    let touch_all = |region: &Region| {
        let pages = UNITS * KIB_64 / PAGE;
        for page in 0..pages {
            let at = (page * 617 % pages * PAGE) as usize;
            assert_eq!(region.as_slice()[at + 7], byte_at(at as u64 + 7));
        }
    };
    let noted = Arc::new(Noted::new(UNITS * KIB_64, 50_000));
    let region = region_of(&noted, &pool);
    touch_all(&region);
    assert_eq!(noted.reads(), units);
    let seen = region.close();
    assert_eq!((seen.pages_installed(), seen.faults), (1024, UNITS));
    // Readahead and whole blocks read several units at once, but no unit twice.
    let noted = Arc::new(Noted::new(UNITS * KIB_64, KIB_64));
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&noted))).build(&pool).unwrap();
    touch_all(&region);
    assert_covered_once(&noted, KIB_64, UNITS * KIB_64);
    // The reader of whole units is followed, unless it is faster.
    until(|| {
        let noted = Arc::new(Noted::new(UNITS * KIB_64, KIB_64));
        let region = Region::builder().chunk(Chunk::source(Arc::clone(&noted))).build(&pool).unwrap();
        assert!(is_right(&region), "a sequential reader");
        assert_covered_once(&noted, KIB_64, UNITS * KIB_64);
        region.close().pages_ahead > 0
    });
    let later = Arc::new(Later::new(UNITS * KIB_64, KIB_64));
    let region = region_of_fetch(&later, &pool);
    let done = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| later.answer_until(&done));
        let _ended = SetOnDrop(&done);
        touch_all(&region);
    });
    assert_eq!(later.noted.reads(), units);
}

/// A source of blocks whose every seventh read fails for a moment.
struct Busy(AtomicU64);

impl Source for Busy {
    fn size(&self) -> u64 {
        32 * KIB_64
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(7);
        let read = self.0.fetch_add(1, Ordering::Relaxed);
        if read % 7 == 3 { Err(io::Error::other("busy")) } else { Ok(()) }
    }

    fn granularity(&self) -> u64 {
        KIB_64
    }
}

#[test]
fn a_unit_that_fails_for_a_moment_is_read_again_as_a_whole() {
    let pool = Pool::builder().workers(1).start().unwrap();
    for server in 0..3 {
        let busy = Arc::new(Busy(AtomicU64::new(0)));
        let retry =
            OnFailure::Retry(Retry::times(5).pause(Duration::from_millis(1), Duration::from_millis(1)));
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&busy)).on_failure(retry));
        let region = if server == 2 { builder.build(Eager) } else { builder.build(&pool) }.unwrap();
        match server {
            0 => region.populate(..).unwrap(),
            1 => region.read_at(0, &mut vec![0; region.len()]).unwrap(),
            _ => {}
        }
        assert!(region.as_slice().iter().all(|&byte| byte == 7));
        // One by one, each page of a failed unit is a read: 16 and more for each failure.
        let reads = busy.0.load(Ordering::Relaxed);
        assert!(reads <= 32 + 32 / 6 + 1, "{reads} reads of 32 units, server {server}");
        let seen = region.close();
        assert!(seen.source_errors >= 1 || reads < 4, "{seen:?}");
        assert_eq!(seen.source_errors, seen.source_retries, "{seen:?}");
    }
}

/// A call reads the units that its range begins and ends in as a whole, as a fault does.
#[test]
fn populate_and_read_at_read_each_unit_of_a_source_once() {
    const UNITS: u64 = 64;
    let pool = Pool::builder().workers(1).start().unwrap();
    let noted = Arc::new(Noted::new(UNITS * KIB_64, KIB_64));
    let region = region_of(&noted, &pool);
    let mut byte = [0];
    region.read_at(5 * KIB_64 + 7 * PAGE, &mut byte).unwrap();
    assert_eq!(
        (byte[0], noted.reads()),
        (byte_at(5 * KIB_64 + 7 * PAGE), vec![(5 * KIB_64, KIB_64 as usize)])
    );
    for page in 0..16 {
        region.read_at(5 * KIB_64 + page * PAGE, &mut byte).unwrap();
        region.populate(9 * KIB_64 + page * PAGE..9 * KIB_64 + (page + 1) * PAGE).unwrap();
    }
    region.populate(11 * KIB_64 - 1..13 * KIB_64 + 1).unwrap();
    region.populate(..).unwrap();
    assert_covered_once(&noted, KIB_64, UNITS * KIB_64);
    assert_eq!(region.close().pages_installed(), UNITS * 16);
}

/// The helper threads split the range between units, also where a unit lies in two blocks.
#[test]
fn threads_that_populate_read_each_unit_of_a_source_once() {
    const UNIT: u64 = 1 << 20;
    let pool = Pool::builder().workers(1).start().unwrap();
    let noted = Arc::new(Noted::new(80 * UNIT, UNIT));
    let chunk = Chunk::source(Arc::clone(&noted)).range(3 * PAGE..80 * UNIT);
    let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
    region.populate(..).unwrap();
    let mut next = 3 * PAGE;
    for (offset, len) in noted.reads() {
        assert_eq!(offset, next, "{:?}", noted.reads());
        next = offset + len as u64;
        assert!(next.is_multiple_of(UNIT), "{:?}", noted.reads());
    }
    assert_eq!(next, 80 * UNIT);
}

/// The lost page is read with the unit, and fails nothing, because the caller does not ask for it.
#[test]
fn populate_fails_only_for_pages_of_its_range() {
    let pool = Pool::builder().workers(1).start().unwrap();
    for lost in [0, 15] {
        let noted = Arc::new(Noted::new(KIB_64, KIB_64).losing(lost * PAGE));
        let region = region_of(&noted, &pool);
        region.populate(5 * PAGE..8 * PAGE).unwrap();
        assert_eq!(noted.reads().last(), Some(&(5 * PAGE, 3 * PAGE as usize)));
        assert!(region.failures().is_empty());
        assert_eq!(region.populate(..).unwrap_err().kind(), ErrorKind::SourceFailed);
        assert_eq!(region.failures().len(), 1);
        let seen = region.close();
        assert_eq!(seen.pages_installed(), if lost == 0 { 3 } else { 15 });
    }
}

/// Each read consists of whole units, and no unit is read twice.
fn assert_covered_once(noted: &Noted, unit: u64, size: u64) {
    let mut next = 0;
    for (offset, len) in noted.reads() {
        assert_eq!(offset, next, "{:?}", noted.reads());
        next = offset + len as u64;
        assert!(next.is_multiple_of(unit) || next == size, "{:?}", noted.reads());
    }
    assert_eq!(next, size);
}

/// A unit with a lost page is read once. Then a fault reads its own page alone, wherever that page
/// is, and `populate` reads page by page.
#[test]
fn a_lost_page_of_a_unit_costs_a_fault_one_more_read() {
    const UNIT: usize = 1 << 20;
    let pool = Pool::builder().workers(1).start().unwrap();
    let lossy = || Arc::new(Noted::new(UNIT as u64, UNIT as u64).losing(UNIT as u64 - 2 * PAGE));
    for at in [0, UNIT as u64 / 2, UNIT as u64 - PAGE] {
        let noted = lossy();
        let region = region_of(&noted, &pool);
        assert_eq!(region.as_slice()[at as usize], byte_at(at));
        let mut expected = [(0, UNIT), (at, PAGE as usize)];
        expected.sort_unstable();
        assert_eq!(noted.reads(), expected);
        let seen = region.close();
        assert_eq!((seen.pages_installed(), seen.pages_poisoned), (1, 0));
    }
    let noted = lossy();
    let region = region_of(&noted, &pool);
    region.populate(..).unwrap_err();
    assert_eq!(region.close().pages_poisoned, 1);
    let several = noted.reads().iter().filter(|(_, bytes)| *bytes > PAGE as usize).count();
    assert_eq!(several, 1, "each page after the failed read is read alone");
}

/// Chunks that begin and end inside units and inside pages.
#[test]
fn a_unit_ends_with_its_chunk() {
    let pool = Pool::builder().workers(2).start().unwrap();
    for granularity in [8192, 1 << 20, u64::MAX] {
        let noted = Arc::new(Noted::new(6 << 20, granularity));
        let (first, second) = (40_960..3_000_000, 5_000..2_500_000);
        let region = Region::builder()
            .chunk(Chunk::source(Arc::clone(&noted)).range(first.clone()))
            .chunk(Chunk::source(Arc::clone(&noted)).range(second.clone()))
            .build(&pool)
            .unwrap();
        let bytes: Vec<_> = first.chain(second).map(byte_at).collect();
        for at in (0..bytes.len()).map(|at| at * 7_654_321 % bytes.len()).step_by(101) {
            assert_eq!(region.as_slice()[at], bytes[at], "byte {at} of units of {granularity} bytes");
        }
        assert!(region.as_slice()[..bytes.len()] == bytes);
        let reads = noted.reads();
        let most = if granularity == 8192 { 700 } else { 60 };
        assert!(reads.len() < most, "{} reads in units of {granularity} bytes", reads.len());
    }
}

/// The pages of a unit fail alone, before and after the touched page; so do the pages of a block of
/// a cached source.
#[test]
fn a_page_that_fails_takes_no_other_page_of_its_unit() {
    let pool = Pool::builder().workers(2).start().unwrap();
    for (fetched, cached) in [(false, false), (true, false), (false, true), (true, true)] {
        let noted = Arc::new(Noted::new(4 * KIB_64, KIB_64).losing(20 * PAGE + 5));
        let chunk = match (fetched, cached) {
            (true, false) => Chunk::fetch(Arc::new(Prompt(Arc::clone(&noted)))),
            (false, false) => Chunk::source(Arc::clone(&noted)),
            (true, true) => Chunk::fetch(Arc::new(Cached::new(Prompt(Arc::clone(&noted)), 1 << 20))),
            (false, true) => Chunk::source(Arc::new(Cached::new(Arc::clone(&noted), 1 << 20))),
        };
        let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
        for page in [31, 16, 24, 17, 21, 19, 22] {
            let mut byte = [0];
            region.read_at(page * PAGE, &mut byte).unwrap();
            assert_eq!(byte[0], byte_at(page * PAGE), "fetched {fetched}, cached {cached}");
        }
        let error = region.read_at(20 * PAGE, &mut [0]).unwrap_err();
        assert_eq!((error.chunk(), reason(&error)), (Some(0), FailureReason::Source), "{error}");
        assert!(is_right_but(&region, 20));
        assert_eq!(region.failures().len(), 1);
    }
}

/// A region that records needs a fault for each page.
#[test]
fn a_region_that_records_reads_page_by_page() {
    let pool = Pool::new().unwrap();
    let noted = Arc::new(Noted::new(2 * KIB_64, KIB_64));
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&noted))).record().build(&pool).unwrap();
    assert!(is_right(&region));
    assert_eq!(noted.reads().len(), 32);
}
