//! Asynchronous fetches that fail, and fetches at a limit: no fetch occupies a worker.

use crate::bounded_writes::moves_no_pages;
use crate::{assert_faults, until};
use pagestitch::source::{Fetch, Reply, Source};
use pagestitch::{Budget, Chunk, OnFailure, Pool, Readahead, Region, Retry};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

const PAGE: usize = 4096;
const PAGES: usize = 32;

/// A source whose replies wait until the test answers them.
#[derive(Default)]
struct Held {
    replies: Mutex<Vec<Reply>>,
    asked: AtomicUsize,
}

impl Held {
    fn open(&self) -> usize {
        self.replies.lock().unwrap().len()
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn take(&self) -> Reply {
        until(|| self.open() > 0);
        self.replies.lock().unwrap().remove(0)
    }

    fn answer(&self) {
        let reply = self.take();
        let sevens = vec![7; reply.len()];
        reply.answer(&sevens);
    }

    fn fail(&self) {
        self.take().fail(io::ErrorKind::ConnectionReset.into());
    }
}

impl Fetch for Held {
    fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }

    fn fetch(&self, _: u64, reply: Reply) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.replies.lock().unwrap().push(reply);
    }
}

/// A pool with one worker, which must never wait for a fetch, and a region of its own to show that.
fn one_worker(max_in_flight: Option<usize>) -> (Pool, Region) {
    let pool = Pool::builder().workers(1).max_workers(1);
    let pool = max_in_flight.into_iter().fold(pool, |pool, most| pool.max_in_flight(most)).start().unwrap();
    let other = Region::builder().chunk(vec![8; PAGES * PAGE]).readahead(Readahead::None);
    let other = other.build(&pool).unwrap();
    (pool, other)
}

fn retry(times: u32, pause: Duration) -> OnFailure {
    OnFailure::Retry(Retry::times(times).pause(pause, pause))
}

#[test]
fn a_chunk_that_retries_is_fetched_without_a_worker() {
    let (pool, other) = one_worker(None);
    let held = Arc::new(Held::default());
    let chunk = Chunk::fetch(Arc::clone(&held)).on_failure(retry(3, Duration::from_millis(1)));
    let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice()[5 * PAGE]);
        for failures in 1..=2 {
            until(|| held.open() == 1);
            assert_eq!(other.as_slice()[failures * PAGE], 8, "the worker waits for the fetch");
            held.fail();
        }
        held.answer();
        assert_eq!(reader.join().unwrap(), 7);
    });
    let metrics = region.close();
    assert_eq!((held.asked(), metrics.source_retries, metrics.source_errors), (3, 2, 2));
    assert_eq!(metrics.pages_poisoned, 0);
    assert_faults(&metrics, 1);
}

/// The source asks to be asked again, as the wrapper `Retrying` does.
#[test]
fn a_reply_that_asks_for_a_retry_occupies_no_worker() {
    let (pool, other) = one_worker(None);
    let held = Arc::new(Held::default());
    let chunk = Chunk::fetch(Arc::clone(&held));
    let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice()[5 * PAGE]);
        for failures in 0..3 {
            let reply = held.take();
            assert_eq!(reply.failures(), failures);
            reply.retry_after(Duration::from_millis(1), io::ErrorKind::ConnectionReset.into());
        }
        assert_eq!(other.as_slice()[0], 8);
        held.answer();
        assert_eq!(reader.join().unwrap(), 7);
    });
    let metrics = region.close();
    assert_eq!((metrics.source_retries, metrics.pages_poisoned), (3, 0));
    assert_faults(&metrics, 1);
}

/// The limit leaves no permit to a fetch: the worker waits for it.
#[test]
fn a_limit_that_is_the_number_of_workers_lets_a_worker_wait_for_its_fetch() {
    let (pool, _) = one_worker(Some(1));
    let held = Arc::new(Held::default());
    let region = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).readahead(Readahead::None);
    let region = region.build(&pool).unwrap();
    scope(|scope| {
        let readers = [0, 1].map(|page| {
            let region = &region;
            scope.spawn(move || region.as_slice()[page * PAGE])
        });
        until(|| held.open() == 1);
        while readers.iter().any(|reader| !reader.is_finished()) {
            assert!(held.open() <= 1);
            if held.open() == 1 {
                held.answer();
            }
            thread::yield_now();
        }
    });
}

/// A source whose read blocks until the test ends it.
struct Hanging(Mutex<mpsc::Receiver<()>>, Arc<AtomicBool>);

impl Source for Hanging {
    fn size(&self) -> u64 {
        PAGE as u64
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        self.1.store(true, Ordering::SeqCst);
        let _ = self.0.lock().unwrap().recv();
        into.fill(9);
        Ok(())
    }
}

/// The only worker hangs while a fault waits for a permit: the permit that comes back goes to the
/// replacement, which then serves that fault.
#[test]
fn a_worker_that_hangs_is_replaced_while_a_fault_waits_for_a_permit() {
    let pool = Pool::builder().workers(1).max_in_flight(2).start().unwrap();
    let region =
        |chunk: Chunk| Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
    let (held, (end, ends), hangs) =
        (Arc::new(Held::default()), mpsc::channel(), Arc::new(AtomicBool::new(false)));
    let other = region(Chunk::from(vec![8; PAGES * PAGE]));
    let fetched = region(Chunk::fetch(Arc::clone(&held)));
    let hanging = region(Chunk::source(Arc::new(Hanging(Mutex::new(ends), Arc::clone(&hangs)))));
    scope(|scope| {
        // A failed test ends the source, too.
        let end = end;
        let readers = [0, 1].map(|page| {
            let fetched = &fetched;
            scope.spawn(move || fetched.as_slice()[page * PAGE])
        });
        until(|| held.open() == 1 && fetched.metrics().faults >= 2);
        assert_eq!(other.as_slice()[0], 8);
        let blocked = scope.spawn(|| hanging.as_slice()[0]);
        until(|| hangs.load(Ordering::SeqCst));
        held.answer();
        held.answer();
        readers.into_iter().for_each(|reader| assert_eq!(reader.join().unwrap(), 7));
        assert_eq!(other.as_slice()[PAGE], 8);
        drop(end);
        assert_eq!(blocked.join().unwrap(), 9);
    });
}

/// A source that asks for a retry of each first request, and answers the second one.
#[derive(Default)]
struct FailsOnce(AtomicUsize);

impl Fetch for FailsOnce {
    fn size(&self) -> u64 {
        (MANY * PAGE) as u64
    }

    fn fetch(&self, _: u64, reply: Reply) {
        self.0.fetch_add(1, Ordering::SeqCst);
        if reply.failures() == 0 {
            return reply.retry_after(Duration::from_secs(1), io::ErrorKind::ConnectionReset.into());
        }
        let sevens = vec![7; reply.len()];
        reply.answer(&sevens);
    }
}

const MANY: usize = 1100;

/// No limit makes a thread fault again, which would ask the failing source without a pause.
#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer needs much memory for a thousand threads")]
fn any_number_of_threads_wait_for_the_retries_of_their_fetches() {
    let (pool, _) = one_worker(None);
    let source = Arc::new(FailsOnce::default());
    let region = Region::builder().chunk(Chunk::fetch(Arc::clone(&source))).readahead(Readahead::None);
    let region = region.build(&pool).unwrap();
    scope(|scope| {
        for page in 0..MANY {
            let region = &region;
            let read = move || assert_eq!(region.as_slice()[page * PAGE], 7);
            thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, read).unwrap();
        }
    });
    let metrics = region.close();
    // The kernel may report the fault of a waiting thread again, but not without end.
    let (asked, faults) = (source.0.load(Ordering::SeqCst), metrics.faults as usize);
    assert!(
        (2 * MANY..=3 * MANY).contains(&asked) && (MANY..=2 * MANY).contains(&faults),
        "{asked}, {faults}"
    );
}

#[test]
fn a_fetch_that_fails_too_often_poisons_its_page() {
    child::run(this_test!(), || {
        let (pool, _) = one_worker(None);
        let held = Arc::new(Held::default());
        let chunk = Chunk::fetch(Arc::clone(&held)).on_failure(retry(2, Duration::from_millis(1)));
        let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
        if !region.serves_system_calls() {
            return println!("SKIPPED {}: no page faults of the kernel for this user", this_test!());
        }
        scope(|scope| {
            let memory = region.as_slice();
            let mut file = tempfile::tempfile().unwrap();
            // The kernel reads the page, so that a poisoned page is an error and no signal.
            let reader = scope.spawn(move || io::Write::write(&mut file, &memory[..10]).map_err(|_| ()));
            (0..3).for_each(|_| held.fail());
            assert_eq!(reader.join().unwrap(), Err(()));
        });
        assert_eq!(region.failures()[0].1.attempts(), 3);
        // The worker counts a page after the fault has ended.
        until(|| region.metrics().pages_poisoned == 1);
    })
    .expect_pass();
}

#[test]
fn a_failed_fetch_is_zeros_where_its_chunk_declares_zeros() {
    let (pool, _) = one_worker(None);
    let held = Arc::new(Held::default());
    let chunk = Chunk::fetch(Arc::clone(&held)).on_failure(OnFailure::Zeros);
    let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
    scope(|scope| {
        let readers = [0, 1].map(|page| {
            let region = &region;
            scope.spawn(move || region.as_slice()[page * PAGE + 1])
        });
        until(|| held.open() == 2);
        held.fail();
        held.answer();
        let mut seen = readers.map(|reader| reader.join().unwrap());
        seen.sort_unstable();
        assert_eq!(seen, [0, 7]);
    });
    assert_eq!(held.asked(), 2, "the worker has read the source itself");
    let metrics = region.close();
    assert_eq!((metrics.pages_zeroed_on_failure, metrics.pages_poisoned, metrics.source_errors), (1, 0, 1));
}

/// One chunk retries and another one has no policy: both are fetched without a worker.
#[test]
fn a_policy_of_one_chunk_changes_nothing_for_the_others() {
    let (pool, other) = one_worker(None);
    let (held, plain) = (Arc::new(Held::default()), Arc::new(Held::default()));
    let region = Region::builder()
        .chunk(Chunk::fetch(Arc::clone(&held)).on_failure(retry(1, Duration::from_millis(1))))
        .chunk(Chunk::fetch(Arc::clone(&plain)))
        .readahead(Readahead::None)
        .build(&pool)
        .unwrap();
    scope(|scope| {
        let readers = [0, PAGES].map(|page| {
            let region = &region;
            scope.spawn(move || region.as_slice()[page * PAGE])
        });
        until(|| held.open() == 1 && plain.open() == 1);
        assert_eq!(other.as_slice()[0], 8);
        held.answer();
        plain.answer();
        readers.into_iter().for_each(|reader| assert_eq!(reader.join().unwrap(), 7));
    });
}

/// Ten threads fault, and no more fetches are open than the limit allows. The worker stays free, and a fault
/// waits in a queue and is not repeated.
fn at_the_limit(region: &Region, other: &Region, held: &Held, most: usize) {
    let highest = AtomicU32::new(0);
    scope(|scope| {
        let readers: Vec<_> =
            (0..10).map(|page| scope.spawn(move || region.as_slice()[page * PAGE])).collect();
        for answered in 0..10 {
            until(|| held.asked() == (answered + most).min(10));
            assert_eq!(other.as_slice()[answered * PAGE], 8, "the worker waits for the fetch");
            highest.fetch_max(held.open() as u32, Ordering::SeqCst);
            held.answer();
        }
        readers.into_iter().for_each(|reader| assert_eq!(reader.join().unwrap(), 7));
    });
    assert_eq!(highest.into_inner() as usize, most);
    assert_faults(&region.metrics(), 10);
}

#[test]
fn a_limit_of_a_region_counts_its_fetches_and_occupies_no_worker() {
    let (pool, other) = one_worker(None);
    let held = Arc::new(Held::default());
    let builder = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).readahead(Readahead::None);
    let region = builder.max_in_flight(2).build(&pool).unwrap();
    at_the_limit(&region, &other, &held, 2);
}

#[test]
fn a_limit_of_a_pool_counts_its_fetches_and_occupies_no_worker() {
    let (pool, other) = one_worker(Some(4));
    let held = Arc::new(Held::default());
    let builder = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).readahead(Readahead::None);
    let region = builder.build(&pool).unwrap();
    at_the_limit(&region, &other, &held, 3);
}

#[test]
fn limits_of_a_region_and_of_its_pool_hold_together() {
    let (pool, other) = one_worker(Some(3));
    let (held, free) = (Arc::new(Held::default()), Arc::new(Held::default()));
    let builder = Region::builder().chunk(Chunk::fetch(Arc::clone(&held))).readahead(Readahead::None);
    let region = builder.max_in_flight(1).build(&pool).unwrap();
    let builder = Region::builder().chunk(Chunk::fetch(Arc::clone(&free))).readahead(Readahead::None);
    let unlimited = builder.build(&pool).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| unlimited.as_slice()[0]);
        until(|| free.open() == 1);
        at_the_limit(&region, &other, &held, 1);
        free.answer();
        assert_eq!(reader.join().unwrap(), 7);
    });
}

/// A source that answers on threads of its own, and counts its open requests.
#[derive(Default)]
struct Open {
    now: AtomicUsize,
    most: AtomicUsize,
}

struct Counted(Arc<Open>);

impl Fetch for Counted {
    fn size(&self) -> u64 {
        300 * PAGE as u64
    }

    fn fetch(&self, _: u64, reply: Reply) {
        let open = Arc::clone(&self.0);
        open.most.fetch_max(open.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        thread::spawn(move || {
            let sevens = vec![7; reply.len()];
            open.now.fetch_sub(1, Ordering::SeqCst);
            reply.answer(&sevens);
        });
    }
}

/// Readahead stays within the limits, and the reader gets all of its pages.
#[test]
fn a_prefetch_is_within_the_limits() {
    for (of_region, of_pool, most) in [(None, Some(4), 2), (Some(1), None, 1), (Some(3), Some(4), 2)] {
        // On one CPU a reader may be faster than all prefetches.
        until(|| {
            let (ahead, open) = read_in_order(of_region, of_pool);
            assert!(open <= most, "{of_region:?} {of_pool:?}: {open}");
            // With a limit of one fault, it may be so each time.
            ahead > 0 || of_region == Some(1)
        });
    }
}

/// Reads a region with limits from its start to its end. Returns the pages filled ahead, and the most
/// requests that were open at once.
fn read_in_order(of_region: Option<usize>, of_pool: Option<usize>) -> (u64, usize) {
    let open = Arc::new(Open::default());
    let pool = of_pool.into_iter().fold(Pool::builder(), |pool, most| pool.max_in_flight(most));
    // A worker that a slow machine holds up is not replaced, because a replacement's fault counts.
    let pool = pool.workers(2).max_workers(2).start().unwrap();
    let region = Region::builder().chunk(Chunk::fetch(Arc::new(Counted(Arc::clone(&open)))));
    let region = of_region.into_iter().fold(region, |region, most| region.max_in_flight(most));
    let region = region.build(&pool).unwrap();
    assert!(region.as_slice().iter().all(|&byte| byte == 7));
    (region.close().pages_ahead, open.most.load(Ordering::SeqCst))
}

/// A source that answers at once, and counts its requests.
#[derive(Default)]
struct Prompt(AtomicUsize);

impl Fetch for Prompt {
    fn size(&self) -> u64 {
        16 << 20
    }

    fn fetch(&self, _: u64, reply: Reply) {
        self.0.fetch_add(1, Ordering::SeqCst);
        let sevens = vec![7; reply.len()];
        reply.answer(&sevens);
    }
}

/// The pages of a region with a budget that wait in standby are not requested again.
#[test]
fn a_page_that_waits_in_standby_comes_back_without_a_fetch() {
    // All pages that leave pass through the standby list of a budget that is so small.
    let (prompt, budget) = (Arc::new(Prompt::default()), Budget::bytes(5 << 20).unwrap());
    let pool = Pool::builder().workers(1).start().unwrap();
    let builder = Region::builder().chunk(Chunk::fetch(Arc::clone(&prompt))).budget(&budget);
    let region = builder.readahead(Readahead::None).build(&pool).unwrap();
    (0..8_000).for_each(|step: usize| {
        let page = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        assert_eq!(region.as_slice()[page % 1_500 * PAGE], 7);
    });
    let soft = budget.soft_faults();
    assert!(soft > 100 || moves_no_pages(), "{:?}", budget.metrics());
    assert_eq!(region.close().pages_buffered, prompt.0.load(Ordering::SeqCst) as u64);
}
