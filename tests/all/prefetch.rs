//! Prefetches that the application requests: they return at once, come after faults, and end when
//! their handle or their region is dropped.

use crate::guests::{adopt, lacks_poison};
use crate::machine::rounds;
use crate::wrappers::{Noted, Prompt};
use crate::{PAGE, comes_true, discard, serve_until, until};
use pagestitch::source::{Fetch, Reply};
use pagestitch::{
    AnyRegion, Chunk, Eager, Error, ErrorKind, Inline, Manual, Pool, PrefetchHandle, PrefetchProgress,
    Readahead, Region, Server,
};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at, is_filled};
use pagestitch_testkit::this_test;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

const PAGES: usize = 2000;
const BYTES: u64 = (PAGES * PAGE) as u64;

fn builder(source: &Arc<Scripted>) -> pagestitch::Builder {
    Region::builder().name("r").chunk(Chunk::source(Arc::clone(source))).readahead(Readahead::None)
}

fn is_right(region: &Region) -> bool {
    is_filled(0, region.as_slice())
}

fn counts(progress: PrefetchProgress) -> [u64; 3] {
    [progress.pages_filled, progress.pages_failed, progress.pages_skipped]
}

#[test]
fn a_prefetch_fills_the_whole_range_without_a_fault() {
    for workers in 1..=3 {
        let pool = Pool::builder().workers(workers).start().unwrap();
        let source = Arc::new(Scripted::new(BYTES));
        let region = builder(&source).build(&pool).unwrap();
        let part = region.prefetch(5 * PAGE as u64 + 1..=7 * PAGE as u64).unwrap();
        assert_eq!(counts(part.wait()), [3, 0, 0]);
        let all = region.prefetch(..).unwrap();
        assert_eq!(counts(all.wait()), [PAGES as u64 - 3, 0, 0]);
        assert!(all.is_done() && is_right(&region));
        let nothing = region.prefetch(7..7).unwrap();
        assert!(nothing.is_done());
        assert_eq!(counts(nothing.wait()), [0; 3]);
        assert_eq!(region.prefetch(..BYTES + 1).unwrap_err().kind(), ErrorKind::OutOfRange);
        let metrics = region.close();
        assert_eq!((metrics.faults, metrics.pages_ahead), (0, PAGES as u64));
    }
}

/// The hanging source occupies all workers but one: faults of other regions are served.
#[test]
fn a_prefetch_of_a_source_that_hangs_returns_at_once_and_leaves_a_worker_to_faults() {
    let pool = Pool::builder().workers(3).max_workers(3).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).holding(0..BYTES));
    let region = builder(&source).build(&pool).unwrap();
    let other = Region::builder().chunk(vec![8; 50 * PAGE]).readahead(Readahead::None).build(&pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    source.wait_until_held(2);
    assert!(other.as_slice().iter().all(|&byte| byte == 8));
    assert_eq!((source.reads(), prefetch.is_done()), (2, false));
    source.release();
    assert_eq!(counts(prefetch.wait()), [PAGES as u64, 0, 0]);
}

#[test]
fn a_source_that_hangs_holds_up_no_prefetch_of_another_region() {
    for workers in [1, 3] {
        let pool = Pool::builder().workers(workers).max_workers(8).start().unwrap();
        let (source, good) =
            (Arc::new(Scripted::new(BYTES).holding(0..BYTES)), Arc::new(Scripted::new(BYTES)));
        let (hangs, other) = (builder(&source).build(&pool).unwrap(), builder(&good).build(&pool).unwrap());
        let mut held: Vec<_> = (0..2).map(|_| hangs.prefetch(..).unwrap()).collect();
        source.wait_until_held(1);
        let prefetch = other.prefetch(..).unwrap();
        let is_over = comes_true(|| prefetch.is_done());
        assert!(source.reads() <= 2, "the region that hangs takes no more workers");
        source.release();
        assert!(is_over, "it waits for a source of another region");
        assert!(is_right(&other));
        held.drain(..).for_each(|held| assert_eq!(held.wait().pages_failed, 0));
        assert!(is_right(&hangs));
    }
}

#[test]
fn dropping_the_handle_cancels_a_prefetch_and_detaching_it_does_not() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let held = || Arc::new(Scripted::new(BYTES).holding(0..PAGE as u64));
    let source = held();
    let region = builder(&source).build(&pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    source.wait_until_held(1);
    drop(prefetch);
    source.release();
    let meter = region.meter();
    // Its turn comes after that of the cancelled one.
    assert_eq!(counts(region.prefetch(BYTES - 1..).unwrap().wait()), [1, 0, 0]);
    assert!(
        meter.pages_ahead() <= 512 + 1 && source.reads() <= 2,
        "at most the block: {:?}",
        meter.metrics()
    );

    let source = held();
    let region = builder(&source).build(&pool).unwrap();
    region.prefetch(..).unwrap().detach();
    source.wait_until_held(1);
    source.release();
    until(|| region.metrics().pages_ahead == PAGES as u64);
}

#[test]
fn a_fault_comes_before_the_pages_that_a_prefetch_has_not_begun() {
    let pool = Pool::builder().workers(2).start().unwrap();
    // Both blocks before the page, because a worker that is held up for 10 ms is replaced.
    let source = Arc::new(Scripted::new(BYTES).holding(0..513 * PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    source.wait_until_held(1);
    assert_eq!(region.as_slice()[1000 * PAGE], byte_at(1000 * PAGE as u64));
    source.release();
    let [filled, failed, skipped] = counts(prefetch.wait());
    // The worker of the fault may still hold the page when its thread has it.
    assert!((filled, failed) == (PAGES as u64 - 1, 0) && skipped <= 1, "{filled}, {failed}, {skipped}");
    assert_eq!(region.close().faults, 1);
}

#[test]
fn a_page_that_a_fault_is_filling_is_left_to_it() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let at = 1000 * PAGE as u64;
    let source = Arc::new(Scripted::new(BYTES).holding(at..at + PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice()[at as usize]);
        source.wait_until_held(1);
        assert_eq!(counts(region.prefetch(..).unwrap().wait()), [PAGES as u64 - 1, 0, 1]);
        source.release();
        assert_eq!(reader.join().unwrap(), byte_at(at));
    });
}

#[test]
fn a_failing_source_poisons_no_page_and_the_other_pages_are_filled() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).failing(700 * PAGE as u64..701 * PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    let [filled, failed, skipped] = counts(region.prefetch(..).unwrap().wait());
    assert_eq!((filled + failed, skipped), (PAGES as u64, 0));
    assert!((1..=64).contains(&failed), "{failed} pages of one read");
    assert!(region.failures().is_empty());
    assert_eq!(region.metrics().pages_poisoned, 0);
    // The touch of a page beside the failing one succeeds, and that of the failing page poisons it.
    assert_eq!(region.as_slice()[699 * PAGE], byte_at(699 * PAGE as u64));
    if lacks_poison(this_test!()) {
        return;
    }
    region.populate(..).unwrap_err();
    let [.., skipped] = counts(region.prefetch(..).unwrap().wait());
    assert_eq!(skipped, 1, "the poisoned page");
    source.repair();
    region.retry_failed(..).unwrap();
    region.prefetch(..).unwrap().wait();
    assert!(is_right(&region));
}

#[test]
fn a_region_that_is_dropped_ends_its_prefetch() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).holding(0..PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    let prefetches = [0, 1].map(|_| region.prefetch(..).unwrap());
    source.wait_until_held(1);
    scope(|scope| {
        let dropped = scope.spawn(|| drop(region));
        thread::yield_now();
        source.release();
        dropped.join().unwrap();
        let progress = prefetches.each_ref().map(|prefetch| counts(prefetch.wait()));
        assert!(progress[0][0] <= PAGES as u64 && prefetches.iter().all(PrefetchHandle::is_done));
    });
    let reads = source.reads();
    drop(prefetches);
    pool.stop().unwrap();
    assert_eq!(source.reads(), reads);
}

#[test]
fn a_prefetch_is_over_in_a_forked_child_and_goes_on_in_the_parent() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).holding(0..PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    source.wait_until_held(1);
    let child = ForkedChild::start(|| {
        let is_refused = region.prefetch(..).is_err_and(|error| error.kind() == ErrorKind::ForkedChild);
        let is_over = prefetch.is_done() && counts(prefetch.wait()) == [0; 3];
        i32::from(!is_refused || !is_over)
    });
    assert!(child.succeeds());
    assert!(!prefetch.is_done());
    source.release();
    assert_eq!(counts(prefetch.wait()), [PAGES as u64, 0, 0]);
}

#[test]
fn a_page_that_is_discarded_after_its_prefetch_is_filled_again() {
    for reports in crate::REPORTS {
        let pool = Pool::builder().workers(2).start().unwrap();
        let source = Arc::new(Scripted::new(BYTES));
        let region = builder(&source).report_discards(reports).build(&pool).unwrap();
        let start = region.as_ptr().addr().get();
        let prefetch = region.prefetch(..).unwrap();
        for round in 0..50 {
            discard(start + round * 37 * PAGE, 5 * PAGE);
        }
        prefetch.wait();
        assert!(is_right(&region));
    }
}

#[test]
fn pages_that_their_owner_discards_during_a_prefetch_are_zeros() {
    if lacks_poison(this_test!()) {
        return;
    }
    let pool = Pool::builder().workers(2).start().unwrap();
    let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
    let source = Arc::new(Scripted::new(BYTES));
    let region = builder(&source).build_adopted(adopt(&guest), &pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    for page in (0..PAGES).step_by(10) {
        guest.balloon(page * PAGE, PAGE).unwrap();
    }
    prefetch.wait();
    for page in 0..PAGES {
        let expected = if page % 10 == 0 { 0 } else { byte_at((page * PAGE) as u64) };
        assert_eq!(guest.read(page * PAGE), expected, "page {page}");
    }
    region.finish().unwrap();
}

/// A source whose replies wait until the test answers them.
#[derive(Default)]
struct Held {
    replies: Mutex<Vec<Reply>>,
    fails: AtomicBool,
    most: AtomicUsize,
}

impl Fetch for Held {
    fn size(&self) -> u64 {
        BYTES
    }

    fn fetch(&self, _: u64, reply: Reply) {
        let mut replies = self.replies.lock().unwrap();
        replies.push(reply);
        self.most.fetch_max(replies.len(), Ordering::SeqCst);
    }
}

impl Held {
    fn open(&self) -> usize {
        self.replies.lock().unwrap().len()
    }

    fn answer_all(&self) {
        let replies: Vec<_> = self.replies.lock().unwrap().drain(..).collect();
        for reply in replies {
            let sevens = vec![7; reply.len()];
            match self.fails.load(Ordering::SeqCst) {
                true => reply.fail(std::io::ErrorKind::ConnectionReset.into()),
                false => reply.answer(&sevens),
            }
        }
    }

    fn answer_until(&self, done: impl Fn() -> bool) {
        until(|| {
            self.answer_all();
            done()
        });
    }
}

/// The pool's only worker is free while many requests are open.
#[test]
fn a_prefetch_of_an_asynchronous_source_occupies_no_worker() {
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let held = Arc::new(Held::default());
    let region = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).build(&pool).unwrap();
    let other = Region::builder().chunk(vec![8; 50 * PAGE]).readahead(Readahead::None).build(&pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    until(|| held.open() == 16);
    assert!(other.as_slice().iter().all(|&byte| byte == 8));
    assert!(held.open() == 16 && !prefetch.is_done());
    held.fails.store(true, Ordering::SeqCst);
    held.answer_all();
    held.fails.store(false, Ordering::SeqCst);
    held.answer_until(|| prefetch.is_done());
    let [filled, failed, skipped] = counts(prefetch.wait());
    assert_eq!((filled, failed, skipped), (PAGES as u64 - 16 * 64, 16 * 64, 0));
    assert!(held.most.load(Ordering::SeqCst) <= 16 + 8 && region.failures().is_empty());
    let again = region.prefetch(..).unwrap();
    held.answer_until(|| again.is_done());
    assert!(region.as_slice().iter().all(|&byte| byte == 7));
}

#[test]
fn a_prefetch_waits_for_the_limits_of_its_pool_and_its_region_without_a_worker() {
    let limited = Pool::builder().workers(1).max_workers(1).max_in_flight(3).start().unwrap();
    let open = Pool::builder().workers(1).max_workers(1).start().unwrap();
    for (pool, region_limit, most) in [(&limited, None, 2), (&open, Some(1), 1)] {
        let held = Arc::new(Held::default());
        let builder = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).readahead(Readahead::None);
        let builder = region_limit.into_iter().fold(builder, |builder, most| builder.max_in_flight(most));
        let region = builder.build(pool).unwrap();
        let other = Region::builder().chunk(vec![8; 50 * PAGE]).readahead(Readahead::None);
        let other = other.build(pool).unwrap();
        let prefetch = region.prefetch(..).unwrap();
        until(|| held.open() == most);
        assert!(other.as_slice().iter().all(|&byte| byte == 8));
        held.answer_until(|| prefetch.is_done());
        assert_eq!(held.most.load(Ordering::SeqCst), most);
        assert_eq!(counts(prefetch.wait()), [PAGES as u64, 0, 0]);
        assert!(region.as_slice().iter().all(|&byte| byte == 7));
    }
}

/// The requests in flight are answered, and no other one is sent.
#[test]
fn dropping_the_handle_sends_no_more_requests() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let held = Arc::new(Held::default());
    let region = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).build(&pool).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    until(|| held.open() == 16);
    drop(prefetch);
    held.answer_all();
    assert_eq!(region.metrics().pages_ahead, 16 * 64);
    let last = region.prefetch(BYTES - 1..).unwrap();
    held.answer_until(|| last.is_done());
    assert_eq!(region.metrics().pages_ahead, 16 * 64 + 1);
}

#[test]
fn a_prefetch_reads_each_unit_of_a_source_once() {
    const UNIT: u64 = 64 << 10;
    let pool = Pool::builder().workers(2).start().unwrap();
    let noted = Arc::new(Noted::new(10 * UNIT, UNIT));
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&noted))).build(&pool).unwrap();
    for range in [UNIT + 5..UNIT + 6, 2 * UNIT - 1..4 * UNIT + 1, 0..10 * UNIT] {
        region.prefetch(range).unwrap().wait();
    }
    let reads: u64 = noted.reads().iter().map(|(_, len)| *len as u64).sum();
    assert_eq!(reads, 10 * UNIT);
    assert!(noted.reads().iter().all(|(offset, _)| offset % UNIT == 0), "{:?}", noted.reads());
}

/// One call of the loop does not take as long as the whole prefetch.
#[test]
fn a_manual_prefetches_in_its_loop_until_it_is_dropped() {
    let mut manual = Manual::new().unwrap();
    let region = Region::builder().chunk(vec![7; 64 << 20]).build(&manual).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    let mut calls = 0;
    serve_until(&mut manual, 64, || {
        calls += 1;
        prefetch.is_done()
    });
    assert!(calls > 10, "{calls} calls");
    assert_eq!(counts(prefetch.wait()), [16 << 10, 0, 0]);
    let more = Region::builder().chunk(vec![7; 64 << 20]).build(&manual).unwrap();
    let unserved = more.prefetch(..).unwrap();
    drop(manual);
    assert_eq!(counts(unserved.wait()), [0; 3]);
    assert_eq!(more.prefetch(..).unwrap_err().kind(), ErrorKind::ServerStopped);
}

/// Each kind of region with each server: the prefetch fills it, or the error says why not.
#[test]
fn each_kind_of_region_is_prefetched_or_refused_by_each_server() {
    let (pool, mut manual) = (Pool::new().unwrap(), Manual::new().unwrap());
    let servers: [(&str, Server); 4] = [
        ("pool", (&pool).into()),
        ("manual", (&manual).into()),
        ("inline", Inline.into()),
        ("eager", Eager.into()),
    ];
    let mut check = |what: &str, region: &AnyRegion| {
        let result = region.prefetch(..);
        if what == "inline" {
            return assert_eq!(result.unwrap_err().kind(), ErrorKind::UnsuitableServer);
        }
        let prefetch = result.unwrap();
        serve_until(&mut manual, 64, || prefetch.is_done());
        // No page of an eager region is absent.
        let filled = if what == "eager" { 0 } else { 4 };
        assert_eq!(counts(prefetch.wait()), [filled, 0, 0], "{what}");
        assert_eq!(prefetch.progress().pages_left, 0);
    };
    let builder = || Region::builder().name("r").chunk(vec![7; 4 * PAGE]);
    for (name, server) in &servers {
        check(name, &builder().build(server.clone()).unwrap());
        check(name, &builder().build_shared(server.clone()).unwrap());
        if matches!(*name, "pool" | "manual") {
            let guest = Guest::new(&[4 * PAGE], false).unwrap();
            let region = builder().build_adopted(adopt(&guest), server.clone()).unwrap();
            check(name, &region);
            region.finish().unwrap();
        }
    }
}

/// Prefetches of three threads meet faults, each other, cancellations and the drop of their region. Each
/// one that is awaited ends.
#[test]
fn prefetches_end_while_others_begin_are_cancelled_and_lose_their_region() {
    let limited = Pool::builder().workers(2).max_in_flight(4).start().unwrap();
    let open = Pool::builder().workers(3).start().unwrap();
    for round in 0..rounds(60) {
        let pool = if round % 2 == 0 { &limited } else { &open };
        let chunk = match round % 3 {
            0 => Chunk::fetch(Arc::new(Prompt::new(BYTES, 1))),
            1 => Chunk::fetch(Arc::new(Prompt::new(BYTES, 64 << 10))),
            _ => Chunk::source(Arc::new(Scripted::new(BYTES))),
        };
        let region = Region::builder().chunk(chunk).build(pool).unwrap();
        let kept = Mutex::new(Vec::new());
        scope(|scope| {
            for thread in 0..3_u64 {
                let (region, kept) = (&region, &kept);
                scope.spawn(move || {
                    for step in 0..10_u64 {
                        let at = (round * 31 + thread * 17 + step * 7919) % PAGES as u64;
                        let start = at * PAGE as u64;
                        let prefetch = region.prefetch(start..).unwrap();
                        match step % 4 {
                            0 => drop(prefetch),
                            1 => assert_eq!(region.as_slice()[start as usize], byte_at(start)),
                            2 => assert_eq!(prefetch.wait().pages_left, 0),
                            _ => kept.lock().unwrap().push(prefetch),
                        }
                    }
                });
            }
        });
        drop(region);
        assert!(kept.into_inner().unwrap().iter().all(PrefetchHandle::is_done));
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn a_prefetch_is_a_future_that_is_ready_when_it_is_over() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).holding(0..PAGE as u64));
    let region = builder(&source).build(&pool).unwrap();
    let mut prefetch = pin!(region.prefetch(..).unwrap());
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    source.wait_until_held(1);
    assert_eq!(prefetch.as_mut().poll(&mut context), Poll::Pending);
    source.release();
    loop {
        match prefetch.as_mut().poll(&mut context) {
            Poll::Ready(progress) => return assert_eq!(counts(progress), [PAGES as u64, 0, 0]),
            Poll::Pending => thread::park(),
        }
    }
}

/// Runs its task at once, in the thread that wakes it: the task requests another prefetch.
struct RunsAtOnce(Arc<Region>, AtomicUsize);

impl Wake for RunsAtOnce {
    fn wake(self: Arc<Self>) {
        self.0.prefetch(..).unwrap().detach();
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_task_that_runs_in_the_thread_that_wakes_it_may_prefetch() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).holding(0..PAGE as u64));
    let region = Arc::new(builder(&source).build(&pool).unwrap());
    let before = region.prefetch(..8192).unwrap();
    source.wait_until_held(1);
    let waker = Arc::new(RunsAtOnce(Arc::clone(&region), AtomicUsize::new(0)));
    let mut cancelled = Box::pin(region.prefetch(8192..).unwrap());
    assert!(cancelled.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&waker)))).is_pending());
    drop(cancelled);
    source.release();
    before.wait();
    until(|| waker.1.load(Ordering::SeqCst) > 0);
    until(|| region.metrics().pages_ahead == PAGES as u64);
}

/// The last owner of a region, as the waker of a task is whose executor has ended. Its token is dropped
/// after the region.
struct Owns {
    region: Region,
    _token: Arc<()>,
}

impl Wake for Owns {
    fn wake(self: Arc<Self>) {}
}

#[test]
fn the_waker_of_a_prefetch_may_be_the_last_owner_of_its_region() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Scripted::new(BYTES).holding(0..PAGE as u64));
    let token = Arc::new(());
    let owner = Arc::new(Owns { region: builder(&source).build(&pool).unwrap(), _token: Arc::clone(&token) });
    let meter = owner.region.meter();
    let mut prefetch = pin!(owner.region.prefetch(..).unwrap());
    source.wait_until_held(1);
    assert!(prefetch.as_mut().poll(&mut Context::from_waker(&Waker::from(owner))).is_pending());
    source.release();
    until(|| prefetch.is_done() && Arc::strong_count(&token) == 1);
    assert_eq!(meter.metrics().pages_ahead, PAGES as u64);
    let other = Region::builder().chunk(vec![8; 50 * PAGE]).build(&pool).unwrap();
    assert!(other.as_slice().iter().all(|&byte| byte == 8));
}

#[test]
fn the_waker_of_an_asynchronous_prefetch_may_be_the_last_owner_of_its_region() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let source = Arc::new(Held::default());
    let region = Region::builder().chunk(Chunk::fetch(Arc::clone(&source))).build(&pool).unwrap();
    let token = Arc::new(());
    let owner = Arc::new(Owns { region, _token: Arc::clone(&token) });
    let mut prefetch = pin!(owner.region.prefetch(..).unwrap());
    until(|| source.open() > 0);
    assert!(prefetch.as_mut().poll(&mut Context::from_waker(&Waker::from(owner))).is_pending());
    source.answer_until(|| prefetch.is_done() && Arc::strong_count(&token) == 1);
    let other = Region::builder().chunk(vec![8; 50 * PAGE]).build(&pool).unwrap();
    assert!(other.as_slice().iter().all(|&byte| byte == 8));
}

#[test]
fn handles_and_progress_can_be_sent_between_threads() {
    const fn is_sent<T: Send + Sync + Unpin + 'static>() {}
    is_sent::<PrefetchHandle>();
    is_sent::<PrefetchProgress>();
    is_sent::<Result<PrefetchHandle, Error>>();
}
