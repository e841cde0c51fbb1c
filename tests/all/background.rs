//! Background fills: all pages arrive, at a rate, after the recording, and the end is known.

use crate::guests::{adopt, lacks_poison};
use crate::{PAGE, comes_true, until};
use pagestitch::{
    AnyRegion, Chunk, ErrorKind, FillRate, Inline, Manual, Pool, Readahead, Recording, Region, Source,
};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at, is_filled};
use pagestitch_testkit::this_test;
use std::io;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGES: usize = 2000;
const BYTES: u64 = (PAGES * PAGE) as u64;

fn builder(source: &Arc<Scripted>) -> pagestitch::Builder {
    Region::builder().name("r").chunk(Chunk::source(Arc::clone(source))).readahead(Readahead::None)
}

fn is_right(region: &Region) -> bool {
    is_filled(0, region.as_slice())
}

fn rate(bytes_per_second: u64) -> FillRate {
    FillRate::BytesPerSecond(NonZeroU64::new(bytes_per_second).unwrap())
}

#[test]
fn a_background_fill_fills_all_pages_without_a_fault() {
    for workers in 1..=3 {
        for rate in [FillRate::Unlimited, rate(u64::MAX), rate(400 << 20)] {
            let pool = Pool::builder().workers(workers).start().unwrap();
            let source = Arc::new(Scripted::new(BYTES));
            let region = builder(&source).build(&pool).unwrap();
            let progress = region.fill_in_background(rate).unwrap().wait();
            assert!(progress.is_complete() && progress.pages_filled == PAGES as u64, "{progress:?}");
            let again = region.fill_in_background(rate).unwrap().wait();
            assert!(again.is_complete() && again.pages_filled == 0, "{again:?}");
            assert!(is_right(&region));
            assert_eq!(region.close().faults, 0);
        }
    }
}

#[test]
fn a_manual_server_fills_in_the_background_and_an_inline_one_cannot() {
    let source = Arc::new(Scripted::new(BYTES));
    let mut manual = Manual::new().unwrap();
    let region = builder(&source).build(&manual).unwrap();
    let fill = region.fill_in_background(rate(1 << 40)).unwrap();
    until(|| {
        manual.serve_ready(usize::MAX);
        fill.is_done()
    });
    assert!(fill.progress().is_complete());
    let region = Region::builder().chunk(vec![1; 5 * PAGE]).build(Inline).unwrap();
    let error = region.fill_in_background(FillRate::Unlimited).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsuitableServer);
}

/// A lower bound on the time: a slow machine takes longer.
#[test]
fn a_background_fill_keeps_its_rate() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES));
    let region = builder(&source).build(&pool).unwrap();
    let began = Instant::now();
    let fill = region.fill_in_background(rate(4 * BYTES)).unwrap();
    assert!(fill.wait().is_complete());
    // A quarter of a second, without the tenth by which it may be ahead, and without the last step.
    assert!(began.elapsed() > Duration::from_millis(130), "{:?}", began.elapsed());
}

#[test]
fn a_page_that_fails_does_not_stop_a_background_fill() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).failing(700 * PAGE as u64..701 * PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    let progress = region.fill_in_background(FillRate::Unlimited).unwrap().wait();
    assert!(!progress.is_complete() && (1..=64).contains(&progress.pages_failed), "{progress:?}");
    assert_eq!(progress.pages_filled + progress.pages_failed, PAGES as u64);
    assert!(region.failures().is_empty());
    source.repair();
    assert!(region.fill_in_background(FillRate::Unlimited).unwrap().wait().is_complete());
    assert!(is_right(&region));
}

/// The fault holds the page for as long as its source hangs. The other pages are filled meanwhile.
#[test]
fn a_background_fill_waits_for_a_page_that_a_fault_is_filling() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let at = 1000 * PAGE as u64;
    let source = Arc::new(Scripted::new(BYTES).holding(at..at + PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice()[at as usize]);
        source.wait_until_held(1);
        let fill = region.fill_in_background(FillRate::Unlimited).unwrap();
        let others_are_filled = comes_true(|| fill.progress().pages_filled == PAGES as u64 - 1);
        let is_done = fill.is_done();
        source.release();
        assert_eq!(reader.join().unwrap(), byte_at(at));
        assert!(others_are_filled && !is_done);
        assert!(fill.wait().is_complete());
    });
}

#[test]
fn a_dropped_background_fill_fills_no_further_page() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES));
    let region = builder(&source).build(&pool).unwrap();
    // A page in four seconds.
    let fill = region.fill_in_background(rate(1000)).unwrap();
    until(|| fill.progress().pages_filled > 0);
    drop(fill);
    let filled = region.metrics().pages_ahead;
    assert!(filled < 100, "{filled}");
    // The service of a region ends its fill, though the next page is due in years.
    let fill = region.fill_in_background(rate(1)).unwrap();
    until(|| fill.progress().pages_filled > 0);
    drop(region);
    assert!(!fill.wait().is_complete());
}

/// A source that notes the offsets of its reads, in the order of time.
struct Ordered(Scripted, Mutex<Vec<u64>>);

impl Source for Ordered {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.1.lock().unwrap().push(offset / PAGE as u64);
        self.0.read_at(offset, into)
    }
}

fn recording(pages: &[u64]) -> Recording {
    let region = Region::builder().chunk(vec![7; BYTES as usize]).record().build(&Pool::new().unwrap());
    let region = region.unwrap();
    pages.iter().for_each(|&page| assert_eq!(region.as_slice()[page as usize * PAGE], 7));
    region.recording().unwrap()
}

#[test]
fn a_background_fill_comes_after_the_recording() {
    let recorded: Vec<u64> = (0..40).map(|page| 1990 - 7 * page).collect();
    let first = recorded[..16].iter().min().unwrap() * PAGE as u64;
    let scripted = Scripted::new(BYTES).holding(first..first + 1);
    let source = Arc::new(Ordered(scripted, Mutex::default()));
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
    let region = builder.replay(&recording(&recorded)).build(&pool).unwrap();
    source.0.wait_until_held(1);
    let fill = region.fill_in_background(FillRate::Unlimited).unwrap();
    source.0.release();
    assert!(fill.wait().is_complete());
    let reads = source.1.lock().unwrap().clone();
    assert!(reads[..40].iter().all(|page| recorded.contains(page)), "{:?}", &reads[..50]);
    assert!(reads[40..].is_sorted(), "{:?}", &reads[40..]);
    assert!(is_right(&region));
}

#[test]
fn pages_that_their_owner_discards_during_a_background_fill_are_zeros() {
    if lacks_poison(this_test!()) {
        return;
    }
    let pool = Pool::builder().workers(2).start().unwrap();
    let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
    let source = Arc::new(Scripted::new(BYTES));
    let region = builder(&source).build_adopted(adopt(&guest), &pool).unwrap();
    let fill = region.fill_in_background(rate(100 << 20)).unwrap();
    for page in (0..PAGES).step_by(10) {
        guest.balloon(page * PAGE, PAGE).unwrap();
    }
    let progress = fill.wait();
    assert!(progress.is_complete(), "{progress:?}");
    for page in 0..PAGES {
        let expected = if page % 10 == 0 { 0 } else { byte_at((page * PAGE) as u64) };
        assert_eq!(guest.read(page * PAGE), expected, "page {page}");
    }
    let reads = source.reads();
    let faults = |region: &AnyRegion| region.metrics().faults;
    assert!(faults(&region) <= PAGES as u64 / 10 + 1, "{}", faults(&region));
    region.finish().unwrap();
    assert_eq!(source.reads(), reads, "nothing was left to fill");
}
