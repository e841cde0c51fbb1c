//! Meters and metrics of a region, while it lives and after its drop.

use crate::readahead::read_slowly;
use crate::{PAGE, pattern, until};
use pagestitch::{Budget, Chunk, Pool, Readahead, Region};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

#[test]
fn a_fault_is_in_flight_as_long_as_its_source_is_read() {
    let source = Arc::new(Scripted::new(10 * PAGE as u64).holding(5 * PAGE as u64..6 * PAGE as u64));
    let region = Region::builder()
        .chunk(Chunk::source(Arc::clone(&source)))
        .readahead(Readahead::None)
        .build(&Pool::new().unwrap())
        .unwrap();
    let meter = region.meter();
    assert_eq!((meter.in_flight(), meter.oldest()), (0, None));
    scope(|scope| {
        scope.spawn(|| region.as_slice()[5 * PAGE + 7]);
        source.wait_until_held(1);
        assert_eq!(meter.in_flight(), 1);
        // The age of a fault is the subject, so a clock measures it.
        thread::sleep(Duration::from_millis(3));
        let (offset, age) = meter.oldest().unwrap();
        assert_eq!(offset, 5 * PAGE as u64);
        assert!(age >= Duration::from_millis(3), "{age:?}");
        source.release();
    });
    until(|| meter.in_flight() == 0 && meter.oldest().is_none());
}

#[test]
fn a_meter_outlives_its_region_and_each_number_has_a_method() {
    let pool = Pool::new().unwrap();
    let mut region = Region::builder()
        .name("metered")
        .chunk(vec![1; 20 * PAGE])
        .writable()
        .record_latency()
        .build(&pool)
        .unwrap();
    let meter = region.meter();
    region.as_mut_slice().unwrap()[3 * PAGE] = 2;
    region.populate(10 * PAGE as u64..20 * PAGE as u64).unwrap();
    let metrics = region.close();
    let again = meter.clone();
    assert_eq!(again.metrics(), metrics);
    assert_eq!((again.region(), again.faults(), again.faults_writing()), ("metered", 1, 1));
    assert_eq!(again.pages_copied(), metrics.pages_copied);
    assert_eq!(again.bytes_copied(), metrics.pages_copied * PAGE as u64);
    assert_eq!((again.bytes_mapped(), again.source_errors(), again.faults_minor()), (0, 0, 0));
    let named: u64 = metrics.all().filter(|(name, _)| *name == "pages_copied").map(|(_, value)| value).sum();
    assert_eq!(named, metrics.pages_copied);
    let latency = again.latency().unwrap();
    assert_eq!(latency.queue.count(), 1);
    assert!(latency.fill.count() >= 2 && latency.fill.count() == latency.resolve.count());
    assert!(
        latency.resolve.max() >= latency.resolve.quantile(0.5)
            && latency.resolve.quantile(0.5) > Duration::ZERO
    );
    pool.stop().expect("a meter holds no region");
}

#[test]
fn each_failed_read_of_a_source_is_counted() {
    let test = this_test!();
    child::run(test, || {
        let source = Arc::new(Scripted::new(10 * PAGE as u64).failing(5 * PAGE as u64..6 * PAGE as u64));
        let region = Region::builder().chunk(Chunk::source(source)).build(&Pool::new().unwrap()).unwrap();
        let meter = region.meter();
        region.populate(..).unwrap_err();
        region.retry_failed(..).unwrap_err();
        // Without poison markers a retry need not read the source again.
        let least = if crate::signal_of_lost_page() == crate::SIGBUS { 2 } else { 1 };
        assert!(meter.source_errors() >= least, "{:?}", meter.metrics());
        assert_eq!(meter.pages_poisoned(), 1);
    })
    .expect_pass();
}

#[test]
fn a_region_that_does_not_record_latency_has_none() {
    let region = Region::builder().chunk(vec![1; 10]).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice()[5], 1);
    assert!(region.meter().latency().is_none());
}

#[test]
fn coverage_counts_present_and_poisoned_pages() {
    let source = Arc::new(Scripted::new(100 * PAGE as u64).failing(95 * PAGE as u64..96 * PAGE as u64));
    let region = Region::builder().chunk(Chunk::source(source)).build(&Pool::new().unwrap()).unwrap();
    region.populate(0..25 * PAGE as u64).unwrap();
    region.populate(95 * PAGE as u64..96 * PAGE as u64).unwrap_err();
    let meter = region.meter();
    let seen = |parts: usize| -> Vec<_> {
        meter.coverage(parts).iter().map(|part| (part.pages, part.present, part.poisoned)).collect()
    };
    assert_eq!(seen(4), [(25, 25, 0), (25, 0, 0), (25, 0, 0), (25, 0, 1)]);
    assert_eq!(seen(3), [(33, 25, 0), (33, 0, 0), (34, 0, 1)]);
    assert_eq!(seen(1000).len(), 100, "no more parts than pages");
    drop(region);
    assert_eq!(seen(1), [(100, 25, 1)]);
}

#[test]
fn coverage_counts_pages_that_have_left_and_come_back() {
    let (budget, pages) = (Budget::bytes(8 << 20).unwrap(), 1024);
    let pool = Pool::builder().workers(1).start().unwrap();
    let builder = Region::builder().chunk(pattern(7, pages * PAGE)).readahead(Readahead::None);
    let region = builder.budget(&budget).build(&pool).unwrap();
    let meter = region.meter();
    let seen = || -> Vec<_> {
        let parts = meter.coverage(4);
        parts.iter().map(|part| (part.pages, part.present, part.evicted, part.returned)).collect()
    };
    region.populate(0..512 * PAGE as u64).unwrap();
    assert_eq!(seen(), [(256, 256, 0, 0), (256, 256, 0, 0), (256, 0, 0, 0), (256, 0, 0, 0)]);
    assert_eq!(region.evict(0..256 * PAGE as u64).unwrap(), 256 * PAGE as u64);
    assert_eq!(seen(), [(256, 0, 256, 0), (256, 256, 0, 0), (256, 0, 0, 0), (256, 0, 0, 0)]);
    region.populate(0..100 * PAGE as u64).unwrap();
    assert_eq!(seen()[0], (256, 100, 156, 100));
    drop(region);
    assert_eq!(seen()[0], (256, 100, 156, 100), "a meter outlives its region");
}

#[test]
fn used_and_unused_readahead_pages_are_counted() {
    let pool = Pool::builder().name("metered").start().unwrap();
    let bytes = pattern(3, 8 << 20);
    let build = || Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
    let (all, little, in_haste) = (build(), build(), build());
    read_slowly(&all, &bytes, "metered");
    read_slowly(&little, &bytes[..100 * PAGE], "metered");
    // A fast reader passes pages that no worker has filled ahead yet.
    assert!(in_haste.as_slice() == bytes);
    let (all, little, in_haste) = (all.meter(), little.meter(), in_haste.meter());
    assert!(all.pages_ahead_used() > 100, "{:?}", all.metrics());
    assert!(little.pages_ahead_unused() > 0 && little.pages_ahead_used() < 100, "{:?}", little.metrics());
    for meter in [all, little, in_haste] {
        assert_eq!(meter.pages_ahead_used() + meter.pages_ahead_unused(), meter.pages_ahead());
    }
}
