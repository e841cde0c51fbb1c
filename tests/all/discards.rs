//! Regions whose discards the kernel does not report: a discarded page is noticed when it is touched,
//! populated or prefetched.

use crate::guests::adopt;
use crate::{PAGE, discard, lacks_poison, pattern, touch, until};
use pagestitch::{BuildOption, Chunk, Eager, ErrorKind, Inline, Manual, Pool, Readahead, Region};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::this_test;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn pool(workers: usize) -> Pool {
    Pool::builder().workers(workers).max_workers(workers).start().unwrap()
}

/// A region without reports.
fn region(bytes: &[u8], pool: &Pool) -> Region {
    Region::builder().chunk(bytes.to_vec()).keep_sources().report_discards(false).build(pool).unwrap()
}

/// The only worker is inside a source: with reports, the thread would wait for it.
#[test]
fn an_unreported_discard_waits_for_no_worker() {
    let (pool, bytes) = (pool(1), pattern(1, 20 * PAGE));
    let slow = Arc::new(Scripted::new(10).holding(0..1));
    let other = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).build(&pool).unwrap();
    let region = region(&bytes, &pool);
    region.populate(..).unwrap();
    scope(|scope| {
        let hangs = scope.spawn(|| other.as_slice()[0]);
        slow.wait_until_held(1);
        discard(region.as_ptr().addr().get() + 3 * PAGE, 5 * PAGE);
        // The caller's own thread fills them.
        let mut read = vec![0; bytes.len()];
        region.read_at(0, &mut read).unwrap();
        assert!(read == bytes);
        slow.release();
        hangs.join().unwrap();
    });
}

#[test]
fn unreported_discards_are_found_by_each_way_to_the_bytes() {
    let (pool, bytes) = (pool(2), pattern(2, 600 * PAGE));
    // Readahead of one round would fill pages in the next one.
    let builder = Region::builder().chunk(bytes.clone()).keep_sources().readahead(Readahead::None);
    let region = builder.report_discards(false).build(&pool).unwrap();
    let start = region.as_ptr().expose_provenance().get();
    for round in 0..4 {
        region.populate(..).unwrap();
        discard(start + round * 40 * PAGE, 300 * PAGE);
        match round {
            0 => assert!(region.as_slice() == bytes),
            1 => region.populate(..).unwrap(),
            2 => assert_eq!(region.prefetch(..).unwrap().wait().pages_filled, 300),
            _ => {
                let mut read = vec![0; bytes.len()];
                region.read_at(0, &mut read).unwrap();
                assert!(read == bytes);
            }
        }
        let before = region.metrics().faults;
        assert!((0..600).all(|page| touch(start + page * PAGE) == bytes[page * PAGE]));
        assert_eq!(region.metrics().faults, before, "round {round}: a page was left absent");
    }
}

/// One fault tells of the discarded pages around it, so that a reader's pages are filled ahead again.
#[test]
fn readahead_follows_a_reader_of_unreported_discards() {
    let (pool, bytes) = (pool(2), pattern(3, 512 * PAGE));
    let region = region(&bytes, &pool);
    region.populate(..).unwrap();
    let before = region.metrics().faults;
    discard(region.as_ptr().addr().get(), region.len());
    assert!(region.as_slice() == bytes);
    let faults = region.metrics().faults - before;
    assert!(faults < 200, "{faults} faults for 512 pages");
}

/// The poison marker goes with the page, and the source is read again.
#[test]
fn an_unreported_discard_of_a_poisoned_page_reads_the_source_again() {
    if lacks_poison(this_test!()) {
        return;
    }
    for populates in [true, false] {
        let source = Arc::new(Scripted::new(4 * PAGE as u64).failing(PAGE as u64..PAGE as u64 + 1));
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
        let region = builder.report_discards(false).build(&pool(1)).unwrap();
        let start = region.as_ptr().expose_provenance().get();
        region.populate(..).unwrap_err();
        source.repair();
        region.populate(..).unwrap_err();
        discard(start + PAGE, PAGE);
        if populates {
            region.populate(..).unwrap();
        }
        assert_eq!(touch(start + PAGE), byte_at(PAGE as u64));
        until(|| region.failures().is_empty());
    }
}

/// A loop of discards in one region neither slows another region nor hangs with two workers.
#[test]
fn a_loop_of_unreported_discards_leaves_faults_alone() {
    let (pool, bytes) = (pool(2), pattern(4, 64 * PAGE));
    let (busy, other) = (region(&bytes, &pool), region(&bytes, &pool));
    let (start, done) = (busy.as_ptr().expose_provenance().get(), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                discard(start, 64 * PAGE);
            }
        });
        scope.spawn(|| (0..50).for_each(|_| assert!(busy.as_slice() == bytes)));
        for _ in 0..200 {
            discard(other.as_ptr().addr().get(), 64 * PAGE);
            assert!(other.as_slice() == bytes);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!((busy.metrics().retries, other.metrics().retries), (0, 0), "the kernel has refused a fill");
}

/// The pages of a writable region have their sources' bytes again, and written pages stay.
#[test]
fn unreported_discards_of_a_writable_region_take_only_what_is_discarded() {
    let (pool, bytes) = (pool(2), pattern(5, 30 * PAGE));
    let builder = Region::builder().chunk(bytes.clone()).writable().report_discards(false);
    let mut region = builder.build(&pool).unwrap();
    for round in 0..20 {
        let (kept, lost) = (round % 30, (round + 7) % 30);
        region.as_mut_slice().unwrap()[kept * PAGE] = 111;
        region.as_mut_slice().unwrap()[lost * PAGE] = 222;
        discard(region.as_ptr().addr().get() + lost * PAGE, PAGE);
        assert_eq!(
            (region.as_slice()[kept * PAGE], region.as_slice()[lost * PAGE]),
            (111, bytes[lost * PAGE])
        );
    }
}

#[test]
fn a_manual_serves_unreported_discards() {
    let mut manual = Manual::new().unwrap();
    let bytes = pattern(6, 10 * PAGE);
    let builder = Region::builder().chunk(bytes.clone()).keep_sources().report_discards(false);
    let region = builder.build(&manual).unwrap();
    for _ in 0..3 {
        region.populate(..).unwrap();
        discard(region.as_ptr().addr().get() + 2 * PAGE, 3 * PAGE);
        scope(|scope| {
            let reader = scope.spawn(|| region.as_slice() == bytes);
            while !reader.is_finished() {
                manual.serve_ready(64);
            }
            assert!(reader.join().unwrap());
        });
    }
    drop(region);
}

#[test]
fn reports_are_refused_where_no_worker_reads_them() {
    let builder = || Region::builder().chunk(vec![7u8; PAGE]);
    let error = builder().report_discards(true).build(Inline).unwrap_err();
    assert_eq!(
        (error.kind(), error.option()),
        (ErrorKind::UnsuitableServer, Some(BuildOption::ReportDiscards))
    );
    assert_eq!(builder().report_discards(false).build(Inline).unwrap().as_slice(), [7; PAGE]);
    for reports in crate::REPORTS {
        assert_eq!(builder().report_discards(reports).build(Eager).unwrap().as_slice(), [7; PAGE]);
        let guest = Guest::new(&[PAGE], false).unwrap();
        let adopted = builder().report_discards(reports).build_adopted(adopt(&guest), &pool(1));
        let error = adopted.unwrap_err();
        assert_eq!(
            (error.kind(), error.option()),
            (ErrorKind::OptionConflict, Some(BuildOption::ReportDiscards))
        );
    }
}
