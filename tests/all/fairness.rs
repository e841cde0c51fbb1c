//! Many regions of one pool: a slow region delays no other region, and the limit of concurrent
//! faults holds.

use crate::PAGE;
use crate::guests::{adopt, lacks_poison};
use pagestitch::{Chunk, Pool, Readahead, Region, Source};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::this_test;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

/// A slow source, which counts its concurrent reads. Its latency is the subject, so a clock makes it.
struct Slow {
    pages: usize,
    takes: Duration,
    /// A read that begins while this is set waits until it is cleared.
    held: Mutex<bool>,
    released: Condvar,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Slow {
    fn new(pages: usize, takes: Duration) -> Arc<Self> {
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(Self { pages, takes, held: Mutex::new(false), released: Condvar::new(), now, most })
    }

    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.released.notify_all();
    }
}

impl Source for Slow {
    fn size(&self) -> u64 {
        (self.pages * PAGE) as u64
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        drop(self.released.wait_while(self.held.lock().unwrap(), |held| *held).unwrap());
        thread::sleep(self.takes);
        into.fill(7);
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

fn region(source: &Arc<Slow>, pool: &Pool, most: Option<usize>) -> Region {
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(source))).readahead(Readahead::None);
    most.into_iter().fold(builder, |builder, most| builder.max_in_flight(most)).build(pool).unwrap()
}

/// Eight threads wait for a source that never answers, or answers no longer. True if another region
/// of the pool is read meanwhile.
fn is_read_beside_one_that_hangs(hangs_at_once: bool, other: impl FnOnce(&Pool) -> Region) -> bool {
    is_read_by(&Pool::builder().workers(3).start().unwrap(), hangs_at_once, other)
}

fn is_read_by(pool: &Pool, hangs_at_once: bool, other: impl FnOnce(&Pool) -> Region) -> bool {
    let hanging = Slow::new(800, Duration::from_millis(5));
    hanging.hold(hangs_at_once);
    let (hanging_region, other, stop) = (region(&hanging, pool, None), other(pool), AtomicBool::new(false));
    scope(|scope| {
        for thread in 0..8 {
            let (region, stop) = (&hanging_region, &stop);
            scope.spawn(move || {
                for page in (thread * 100..(thread + 1) * 100).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    assert_eq!(region.as_slice()[page * PAGE], 7);
                }
            });
        }
        // A few slow reads first, so that the region counts as slow.
        crate::until(|| hangs_at_once || hanging_region.metrics().pages_buffered >= 3);
        hanging.hold(true);
        crate::until(|| hanging.now.load(Ordering::SeqCst) >= 2);
        let (done, reader) = mpsc::channel();
        let other = &other;
        scope.spawn(move || done.send(other.as_slice().iter().map(|&byte| usize::from(byte)).sum::<usize>()));
        let read = reader.recv_timeout(crate::HANG);
        stop.store(true, Ordering::Relaxed);
        hanging.hold(false);
        read.is_ok()
    })
}

#[test]
fn a_hanging_source_delays_no_fast_region() {
    let quick = |pool: &Pool| {
        Region::builder().chunk(vec![1; 60 * PAGE]).readahead(Readahead::None).build(pool).unwrap()
    };
    assert!(is_read_beside_one_that_hangs(false, quick));
    assert!(is_read_beside_one_that_hangs(true, quick));
}

/// A slow region is not delayed either, because one worker stays free of the hanging region.
#[test]
fn a_hanging_source_delays_no_slow_region() {
    let slow = |pool: &Pool| region(&Slow::new(20, Duration::from_millis(3)), pool, None);
    assert!(is_read_beside_one_that_hangs(false, slow));
    assert!(is_read_beside_one_that_hangs(true, slow));
}

/// The replacement of the only worker serves all regions, slow regions too.
#[test]
fn a_hanging_region_in_the_only_worker_delays_no_other_region() {
    for hangs_at_once in [false, true] {
        let slow = |pool: &Pool| region(&Slow::new(20, Duration::from_millis(3)), pool, None);
        assert!(is_read_by(&Pool::builder().workers(1).start().unwrap(), hangs_at_once, slow));
    }
}

/// Without another worker, the last worker serves only regions that do not hang.
#[test]
fn at_max_workers_one_worker_serves_the_regions_that_do_not_hang() {
    for hangs_at_once in [false, true] {
        let pool = || Pool::builder().workers(3).max_workers(3).start().unwrap();
        let quick = |pool: &Pool| Region::builder().chunk(vec![1; 60 * PAGE]).build(pool).unwrap();
        assert!(is_read_by(&pool(), hangs_at_once, quick));
        let slow = |pool: &Pool| region(&Slow::new(20, Duration::from_millis(3)), pool, None);
        assert!(is_read_by(&pool(), hangs_at_once, slow));
    }
}

/// While its faults are fast, all workers but one leave adopted memory to a reader. That reader then
/// hangs in the source, and no worker may take its place.
#[test]
fn a_hanging_page_of_adopted_memory_delays_no_other_page() {
    if lacks_poison(this_test!()) {
        return;
    }
    const PAGES: usize = 4000;
    for most in [2, 8] {
        let pool = Pool::builder().workers(2).max_workers(most).start().unwrap();
        let at = PAGES * PAGE / 2;
        let source = Arc::new(Scripted::new((PAGES * PAGE) as u64).holding(at as u64..at as u64 + 1));
        let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
        let region = builder.build_adopted(adopt(&guest), &pool).unwrap();
        scope(|scope| {
            let (done, threads) = mpsc::channel();
            for thread in 0..4 {
                let (done, guest) = (done.clone(), &guest);
                scope.spawn(move || {
                    for offset in (thread * PAGE..PAGES * PAGE).step_by(4 * PAGE) {
                        assert_eq!(guest.read(offset), byte_at(offset as u64));
                    }
                    done.send(thread)
                });
            }
            let others: Vec<_> = (0..3).map_while(|_| threads.recv_timeout(crate::HANG).ok()).collect();
            source.release();
            assert!(others.len() == 3 && !others.contains(&0), "{others:?}");
            assert_eq!(threads.recv_timeout(crate::HANG), Ok(0));
        });
        region.finish().unwrap();
    }
}

#[test]
fn concurrent_faults_of_a_region_stay_within_its_limit() {
    let pool = Pool::builder().workers(6).start().unwrap();
    let slow = Slow::new(64, Duration::from_millis(5));
    let region = region(&slow, &pool, Some(2));
    scope(|scope| {
        for thread in 0..16 {
            let region = &region;
            scope.spawn(move || {
                (0..4).for_each(|page| assert_eq!(region.as_slice()[(page * 16 + thread) * PAGE], 7))
            });
        }
    });
    assert_eq!(slow.most.load(Ordering::SeqCst), 2);
    assert_eq!(region.close().pages_buffered, 64);
}

/// Regions are built and dropped beside faults of a slow region, some with faults that wait for
/// admission.
#[test]
fn regions_are_built_and_dropped_beside_a_slow_region() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let slow = Slow::new(400, Duration::from_millis(2));
    let (slow_region, stop) = (region(&slow, &pool, None), AtomicBool::new(false));
    scope(|scope| {
        for thread in 0..4 {
            let (slow_region, stop) = (&slow_region, &stop);
            scope.spawn(move || {
                for page in (thread * 100..(thread + 1) * 100).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    assert_eq!(slow_region.as_slice()[page * PAGE], 7);
                }
            });
        }
        for _ in 0..50 {
            let other = region(&Slow::new(10, Duration::from_millis(2)), &pool, None);
            assert_eq!(other.as_slice()[5 * PAGE], 7);
            let quick = Region::builder().chunk(vec![3; 10 * PAGE]).build(&pool).unwrap();
            assert_eq!(quick.as_slice()[9 * PAGE], 3);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// More sources hang than the pool has workers, because each held worker is replaced.
#[test]
fn hanging_regions_do_not_starve_a_fast_region_that_is_built_later() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let hanging: Vec<_> = (0..5).map(|_| Slow::new(1, Duration::ZERO)).collect();
    hanging.iter().for_each(|source| source.hold(true));
    let regions: Vec<_> = hanging.iter().map(|source| region(source, &pool, None)).collect();
    let later = OnceLock::new();
    scope(|scope| {
        regions.iter().for_each(|region| drop(scope.spawn(|| assert_eq!(region.as_slice()[0], 7))));
        let held = |source: &Arc<Slow>| source.now.load(Ordering::SeqCst) == 1;
        let all_held = crate::comes_true(|| hanging.iter().all(held));
        let quick = || Region::builder().chunk(vec![1; 60 * PAGE]).build(&pool).unwrap();
        let quick = later.get_or_init(quick);
        let (done, reader) = mpsc::channel();
        scope.spawn(move || done.send(quick.as_slice().iter().all(|&byte| byte == 1)));
        let read = reader.recv_timeout(crate::HANG);
        let metrics = pool.metrics();
        hanging.iter().for_each(|source| source.hold(false));
        assert!(all_held, "each fault has a worker");
        assert_eq!(read, Ok(true), "a fast region is served beside hanging ones");
        assert!(metrics.working > 5 && metrics.replacements >= 4, "{metrics:?}");
    });
    crate::until(|| pool.metrics().working == 2 && pool.metrics().held_up == 0);
    assert_eq!(pool.metrics().shortages, 0);
    drop(regions);
    drop(later);
    assert_eq!(pool.stop().unwrap().workers, 2);
}
