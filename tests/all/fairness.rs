//! One pool, many regions: a slow one does not hold up the others, and a limit is kept.

use pagestitch::{Chunk, Pool, Readahead, Region, Source};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

/// A source that takes its time, and knows how many ask it at once.
struct Slow {
    pages: usize,
    takes: Duration,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Slow {
    fn new(pages: usize, takes: Duration) -> Arc<Self> {
        Arc::new(Self { pages, takes, now: AtomicUsize::new(0), most: AtomicUsize::new(0) })
    }
}

impl Source for Slow {
    fn size(&self) -> u64 {
        (self.pages * PAGE) as u64
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        thread::sleep(self.takes);
        into.fill(7);
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

fn region(source: &Arc<Slow>, pool: &Pool, most: Option<usize>) -> Region {
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(source))).readahead(Readahead::None);
    most.into_iter().fold(builder, |builder, most| builder.in_flight(most)).build(pool).unwrap()
}

/// Eight threads wait for a source of 100 ms all the time; single touches of another region's memory do not wait for them.
#[test]
fn a_region_with_a_slow_source_does_not_hold_up_the_others() {
    let pool = Pool::builder().workers(3).start().unwrap();
    let slow = Slow::new(4000, Duration::from_millis(100));
    let (slow_region, stop) = (region(&slow, &pool, None), AtomicBool::new(false));
    let quick_region =
        Region::builder().chunk(vec![1; 300 * PAGE]).readahead(Readahead::None).build(&pool).unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let (slow_region, stop) = (&slow_region, &stop);
            scope.spawn(move || {
                for page in (thread * 500..(thread + 1) * 500).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    assert_eq!(slow_region.as_slice()[page * PAGE], 7);
                }
            });
        }
        // Until it is known to be slow.
        crate::until(|| slow_region.metrics().pages_read >= 3);
        let mut latencies: Vec<Duration> = (0..300)
            .map(|page| {
                let started = Instant::now();
                assert_eq!(quick_region.as_slice()[page * PAGE], 1);
                started.elapsed()
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        latencies.sort();
        println!("p50 {:?}, p99 {:?}, max {:?}", latencies[150], latencies[297], latencies[299]);
        // Behind the eight, each would wait for two or three of their turns. Others may be at work on this machine.
        assert!(latencies[200] < Duration::from_millis(50), "two of three in half of what the source takes");
    });
    assert_eq!(slow.most.load(Ordering::SeqCst).min(3), slow.most.load(Ordering::SeqCst));
}

#[test]
fn no_more_faults_of_a_region_are_served_at_once_than_it_may_have() {
    let pool = Pool::builder().workers(6).start().unwrap();
    let slow = Slow::new(64, Duration::from_millis(5));
    let region = region(&slow, &pool, Some(2));
    thread::scope(|scope| {
        for thread in 0..16 {
            let region = &region;
            scope.spawn(move || {
                (0..4).for_each(|page| assert_eq!(region.as_slice()[(page * 16 + thread) * PAGE], 7))
            });
        }
    });
    assert_eq!(slow.most.load(Ordering::SeqCst), 2);
    assert_eq!(region.close().pages_read, 64);
}

/// Regions come and go while others fault, and those that go while faults of theirs wait for a berth.
#[test]
fn regions_come_and_go_beside_a_slow_one() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let slow = Slow::new(400, Duration::from_millis(2));
    let (slow_region, stop) = (region(&slow, &pool, None), AtomicBool::new(false));
    thread::scope(|scope| {
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
