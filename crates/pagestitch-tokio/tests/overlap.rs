//! Fetches overlap up to the limit; reads that a runtime drops are errors; a task serves faults.

use bytes::Bytes;
use pagestitch::source::FailureReason;
use pagestitch::{ErrorKind, Manual, Pool, Readahead, Region};
use pagestitch_tokio::{AsyncSource, chunk, serve};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};

const PAGE: usize = 4096;
const PAGES: usize = 64;

/// A source with a latency, which counts the reads that run at once. The time of overlapping reads is the
/// subject, so a clock makes the latency.
struct Far {
    takes: Duration,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Far {
    fn new(takes: Duration) -> Arc<Self> {
        Arc::new(Self { takes, now: AtomicUsize::new(0), most: AtomicUsize::new(0) })
    }
}

impl AsyncSource for Far {
    fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }

    async fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(self.takes).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        match offset as usize / PAGE {
            13 => Err(io::Error::other("unlucky")),
            14 => Ok(Bytes::from_static(b"short")),
            15 => panic!("a defect of the source"),
            _ => Ok((offset..offset + len as u64).map(byte_at).collect()),
        }
    }

    fn name(&self) -> String {
        String::from("far")
    }
}

fn byte_at(offset: u64) -> u8 {
    (offset / 7) as u8 | 1
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Touches all pages without an error at once, each in a thread of its own; returns the elapsed
/// time.
fn touch_all(region: &Region) -> Duration {
    let started = Instant::now();
    thread::scope(|scope| {
        for page in (0..PAGES).filter(|page| !(13..16).contains(page)) {
            scope.spawn(move || {
                assert_eq!(region.as_slice()[page * PAGE + 5], byte_at((page * PAGE) as u64 + 5))
            });
        }
    });
    started.elapsed()
}

#[test]
fn concurrent_fetches_divide_the_time_of_their_faults() {
    let runtime = runtime();
    for (concurrency, rounds) in [(16, 4), (64, 1)] {
        let far = Far::new(Duration::from_millis(50));
        let pool = Pool::builder().workers(1).start().unwrap();
        let region = Region::builder()
            .chunk(chunk(Arc::clone(&far), runtime.handle(), concurrency))
            .readahead(Readahead::None)
            .build(&pool)
            .unwrap();
        let took = touch_all(&region);
        println!("{concurrency} at once: {took:?}");
        assert!(took >= Duration::from_millis(50 * rounds), "{took:?}");
        assert!(took < Duration::from_millis(50 * (rounds + 2)), "{concurrency} at once: {took:?}");
        let most = far.most.load(Ordering::SeqCst);
        assert!(most <= concurrency && most > concurrency / 2, "{most} at once");
        assert_eq!(region.close().pages_buffered, 61);
    }
}

#[test]
fn a_failed_fetch_is_an_error() {
    let runtime = runtime();
    let far = chunk(Far::new(Duration::from_millis(1)), runtime.handle(), 4);
    let region = Region::builder().name("sky").chunk(far).build(&Pool::new().unwrap()).unwrap();
    let reason = |page: usize| {
        let error = region.read_at((page * PAGE) as u64, &mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SourceFailed);
        error.failure().expect("a page has failed").reason()
    };
    assert_eq!(reason(13), FailureReason::Source);
    assert_eq!(reason(14), FailureReason::WrongLength);
    assert_eq!(reason(15), FailureReason::NoReply);
    assert!(region.plan().to_string().contains("far"));
    region.populate(0..13 * PAGE as u64).unwrap();
    // A read after the shutdown fails like one that the shutdown interrupted.
    drop(runtime);
    assert_eq!(reason(20), FailureReason::NoReply);
}

/// The pages of a sequential reader are fetched ahead of it, many at once, in fewer requests than
/// pages.
#[test]
fn readahead_fetches_ahead_of_a_reader() {
    let runtime = runtime();
    let (reads, len) = (Arc::new(AtomicUsize::new(0)), 2000 * PAGE as u64);
    struct Counted(Arc<AtomicUsize>, u64);
    impl AsyncSource for Counted {
        fn size(&self) -> u64 {
            self.1
        }
        async fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
            self.0.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok((offset..offset + len as u64).map(byte_at).collect())
        }
    }
    let source = Arc::new(Counted(Arc::clone(&reads), len));
    let region =
        Region::builder().chunk(chunk(source, runtime.handle(), 8)).build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice().iter().zip(0..).all(|(&byte, offset)| byte == byte_at(offset)));
    let reads = reads.load(Ordering::SeqCst);
    assert!(reads < 400, "{reads} requests for 2000 pages");
}

#[test]
fn a_task_serves_faults_beside_fetches() {
    let runtime = runtime();
    let manual = Manual::new().unwrap();
    let region = Region::builder()
        .chunk(chunk(Far::new(Duration::from_millis(5)), runtime.handle(), 64))
        .chunk(vec![9; 100 * PAGE])
        .readahead(Readahead::None)
        .build(&manual)
        .unwrap();
    let server = runtime.spawn(serve(manual));
    touch_all(&region);
    assert!(region.as_slice()[PAGES * PAGE..].iter().all(|&byte| byte == 9));
    assert_eq!(region.close().pages_installed(), 61 + 100);
    server.abort();
}

/// Dropping a region waits for the pending answers of its source.
#[test]
fn a_region_may_be_dropped_while_pages_are_fetched() {
    let runtime = runtime();
    let pool = Pool::new().unwrap();
    for _ in 0..20 {
        let far = chunk(Far::new(Duration::from_millis(3)), runtime.handle(), 2);
        let region = Region::builder().chunk(far).build(&pool).unwrap();
        assert_eq!(region.as_slice()[0], byte_at(0));
    }
}

#[test]
fn the_pool_limits_its_fetches() {
    let runtime = runtime();
    let far = Far::new(Duration::from_millis(10));
    let pool = Pool::builder().workers(2).max_in_flight(6).start().unwrap();
    let region = Region::builder()
        .chunk(chunk(Arc::clone(&far), runtime.handle(), 64))
        .readahead(Readahead::None)
        .build(&pool)
        .unwrap();
    touch_all(&region);
    let most = far.most.load(Ordering::SeqCst);
    // The two workers have the other places. They are free, because no worker waits for a fetch.
    assert_eq!(most, 4, "{most} at once");
}
