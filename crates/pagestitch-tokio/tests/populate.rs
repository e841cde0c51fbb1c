//! A populate that no thread waits for: it fills the range, returns the error of a source, and is
//! cancelled by its drop.

use bytes::Bytes;
use pagestitch::{Chunk, Eager, ErrorKind, Inline, Manual, Pool, Readahead, Region, Server};
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::wait;
use pagestitch_tokio::{AsyncSource, chunk, populate, serve};
use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

const PAGE: usize = 4096;
const BYTES: usize = 2000 * PAGE;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).max_blocking_threads(1).enable_all().build().unwrap()
}

/// The limit ends a hang and orders nothing.
fn until(done: impl FnMut() -> bool) {
    assert!(wait::comes_true(Duration::from_secs(120), done));
}

fn scripted(source: &Arc<Scripted>, server: impl Into<Server>) -> Arc<Region> {
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(source))).readahead(Readahead::None);
    Arc::new(builder.build(server).unwrap())
}

fn is_right(region: &Region) -> bool {
    region.as_slice().iter().zip(0..).all(|(&byte, offset)| byte == byte_at(offset))
}

/// The only thread for blocking calls is taken by another call.
#[test]
fn populate_fills_the_range_without_a_thread_that_waits() {
    let (runtime, pool) = (runtime(), Pool::builder().workers(1).start().unwrap());
    let (end, ends) = std::sync::mpsc::channel::<()>();
    runtime.spawn_blocking(move || ends.recv());
    let source = Arc::new(Scripted::new(BYTES as u64));
    let region = scripted(&source, &pool);
    runtime.block_on(populate(&region, 5..6)).unwrap();
    assert_eq!(region.metrics().pages_installed(), 1);
    runtime.block_on(populate(&region, ..)).unwrap();
    assert!(is_right(&region));
    assert_eq!(region.metrics().faults, 0);
    drop(end);
}

#[test]
fn populate_fills_each_kind_of_server() {
    let (runtime, manual) = (runtime(), Manual::new().unwrap());
    let build = |server: Server| Arc::new(Region::builder().chunk(vec![7; BYTES]).build(server).unwrap());
    let by_manual = build((&manual).into());
    let server = runtime.spawn(serve(manual));
    let by_pool = build((&Pool::new().unwrap()).into());
    for region in [by_manual, by_pool, build(Inline.into()), build(Eager.into())] {
        runtime.block_on(populate(&region, ..)).unwrap();
        assert!(region.as_slice().iter().all(|&byte| byte == 7));
        assert_eq!(region.metrics().faults, 0);
        let error = runtime.block_on(populate(&region, ..BYTES as u64 + 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }
    server.abort();
}

#[test]
fn populate_returns_the_error_of_a_source() {
    let (runtime, pool) = (runtime(), Pool::builder().workers(1).start().unwrap());
    let bad = 700 * PAGE as u64;
    let source = Arc::new(Scripted::new(BYTES as u64).failing(bad..bad + 1));
    let region = scripted(&source, &pool);
    let error = runtime.block_on(populate(&region, ..)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceFailed);
    let failed: Vec<_> = region.failures().into_iter().map(|(offset, _)| offset).collect();
    assert_eq!(failed, [bad]);
    assert_eq!(runtime.block_on(populate(&region, ..)).unwrap_err().kind(), ErrorKind::SourceFailed);
    source.repair();
    region.retry_failed(..).unwrap();
    runtime.block_on(populate(&region, ..)).unwrap();
    assert!(is_right(&region));
}

#[test]
fn dropping_the_future_asks_for_no_further_page() {
    let (runtime, pool) = (runtime(), Pool::builder().workers(1).start().unwrap());
    let source = Arc::new(Scripted::new(BYTES as u64).holding(0..BYTES as u64));
    let region = scripted(&source, &pool);
    let waits = runtime.spawn({
        let region = Arc::clone(&region);
        async move { populate(&region, ..).await }
    });
    source.wait_until_held(1);
    waits.abort();
    assert!(runtime.block_on(waits).unwrap_err().is_cancelled());
    source.release();
    let region = Arc::into_inner(region).expect("the future holds the region no longer");
    assert!(region.close().pages_installed() <= 512, "no more than the block in progress");
    assert_eq!(source.reads(), 1);
}

/// The rest is populated on a thread for blocking calls, which stops after the read in progress.
#[test]
fn dropping_the_future_ends_the_blocking_rest() {
    let (runtime, pool) = (runtime(), Pool::builder().workers(2).start().unwrap());
    let at = 100 * PAGE as u64;
    let source = Arc::new(Scripted::new(BYTES as u64).holding(at..at + 1));
    let region = scripted(&source, &pool);
    std::thread::scope(|scope| {
        // The prefetch skips the page of this fault, for which the blocking rest waits.
        let reader = scope.spawn(|| region.as_slice()[at as usize]);
        source.wait_until_held(1);
        let waits = runtime.spawn({
            let region = Arc::clone(&region);
            async move { populate(&region, ..).await }
        });
        until(|| Arc::strong_count(&region) == 3);
        waits.abort();
        assert!(runtime.block_on(waits).unwrap_err().is_cancelled());
        source.release();
        assert_eq!(reader.join().unwrap(), byte_at(at));
    });
    until(|| Arc::strong_count(&region) == 1);
}

/// A source whose reads never end.
#[derive(Default)]
struct Endless(AtomicUsize);

impl AsyncSource for Endless {
    fn size(&self) -> u64 {
        BYTES as u64
    }

    async fn read(&self, _: u64, _: usize) -> io::Result<Bytes> {
        self.0.fetch_add(1, Ordering::SeqCst);
        pending().await
    }
}

/// A thousand futures of a source that hangs occupy no worker and no thread of the runtime.
#[test]
fn a_thousand_futures_occupy_no_thread() {
    let (runtime, pool) = (runtime(), Pool::builder().workers(1).max_workers(1).start().unwrap());
    let other = Region::builder().chunk(vec![8; 50 * PAGE]).build(&pool).unwrap();
    let endless = Arc::new(Endless::default());
    let far = chunk(Arc::clone(&endless), runtime.handle(), 1 << 20);
    let region = Arc::new(Region::builder().chunk(far).build(&pool).unwrap());
    let mut futures: Vec<_> = (0..1000)
        .map(|page| Box::pin(populate(&region, page * PAGE as u64..(page + 1) * PAGE as u64)))
        .collect();
    for future in &mut futures {
        let polled = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
    }
    until(|| endless.0.load(Ordering::SeqCst) == 1000);
    assert!(other.as_slice().iter().all(|&byte| byte == 8), "the worker is free");
    runtime.block_on(runtime.spawn_blocking(|| ())).expect("a blocking thread is free");
    drop(futures);
    // Ends the reads, for which the drop of the region waits.
    drop(runtime);
    assert_eq!(Arc::into_inner(region).unwrap().close().pages_installed(), 0);
}
