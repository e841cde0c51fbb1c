//! Wrappers of sources: retries, a limit on concurrent reads, blocks that are read once for all
//! regions. Each of them around a source that blocks, and around one that answers later.

use crate::waits::SetOnDrop;
use crate::zero_copy::memfd;
use crate::{pattern, reason, until};
use pagestitch::source::{Cached, FailureReason, Fetch, Hole, Limited, Memory, Reply, Retrying};
use pagestitch::{Chunk, Error, Method, Pool, Readahead, Region, Retry, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at, fill, is_filled};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const KIB_64: u64 = 64 << 10;

/// A source of known bytes that notes its reads, and fails the first of them.
#[derive(Default)]
pub(crate) struct Noted {
    size: u64,
    granularity: u64,
    failures: AtomicU32,
    lost: Option<u64>,
    reads: Mutex<Vec<(u64, usize)>>,
    running: AtomicUsize,
    most: AtomicUsize,
}

impl Noted {
    pub(crate) fn new(size: u64, granularity: u64) -> Self {
        Self { size, granularity, ..Self::default() }
    }

    pub(crate) fn failing(self, times: u32) -> Self {
        Self { failures: times.into(), ..self }
    }

    /// Fails each read of this byte.
    pub(crate) fn losing(self, byte: u64) -> Self {
        Self { lost: Some(byte), ..self }
    }

    /// The offset and length of each read, in order of the offsets.
    pub(crate) fn reads(&self) -> Vec<(u64, usize)> {
        let mut reads = self.reads.lock().unwrap().clone();
        reads.sort_unstable();
        reads
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.reads.lock().unwrap().push((offset, into.len()));
        let fails = |left: u32| left.checked_sub(1);
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if self.lost.is_some_and(|byte| (offset..offset + into.len() as u64).contains(&byte)) {
            return Err(io::Error::other("the byte is lost"));
        }
        fill(offset, into);
        Ok(())
    }
}

impl Source for Noted {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        // The time itself is the subject: reads that are allowed at once overlap.
        thread::sleep(Duration::from_micros(200));
        let answer = self.read(offset, into);
        self.running.fetch_sub(1, Ordering::SeqCst);
        answer
    }

    fn granularity(&self) -> u64 {
        self.granularity.max(1)
    }
}

/// A source that keeps its requests until the test answers them.
#[derive(Default)]
pub(crate) struct Later {
    pub(crate) noted: Noted,
    asked: Mutex<Vec<(u64, Reply)>>,
}

impl Later {
    pub(crate) fn new(size: u64, granularity: u64) -> Self {
        Self { noted: Noted::new(size, granularity), asked: Mutex::default() }
    }

    pub(crate) fn failing(self, times: u32) -> Self {
        Self { noted: self.noted.failing(times), ..self }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    /// Answers the oldest request. False if there is none.
    pub(crate) fn answer_one(&self) -> bool {
        let mut asked = self.asked.lock().unwrap();
        if asked.is_empty() {
            return false;
        }
        let (offset, reply) = asked.remove(0);
        drop(asked);
        let mut bytes = vec![0; reply.len()];
        match self.noted.read(offset, &mut bytes) {
            Ok(()) => reply.answer(&bytes),
            Err(error) => reply.fail(error),
        }
        true
    }

    /// Answers each request until `done` is set.
    pub(crate) fn answer_until(&self, done: &AtomicBool) {
        while !done.load(Ordering::SeqCst) {
            until(|| self.answer_one() || done.load(Ordering::SeqCst));
        }
    }
}

impl Fetch for Later {
    fn size(&self) -> u64 {
        self.noted.size
    }

    fn fetch(&self, offset: u64, reply: Reply) {
        self.asked.lock().unwrap().push((offset, reply));
    }

    fn granularity(&self) -> u64 {
        self.noted.granularity()
    }
}

fn quickly(times: u32) -> Retry {
    Retry::times(times).pause(Duration::from_micros(100), Duration::from_millis(1))
}

pub(crate) fn region_of<S: Source + 'static>(source: &Arc<S>, pool: &Pool) -> Region {
    let chunk = Chunk::source(Arc::clone(source));
    Region::builder().chunk(chunk).readahead(Readahead::None).build(pool).unwrap()
}

pub(crate) fn region_of_fetch<F: Fetch + 'static>(source: &Arc<F>, pool: &Pool) -> Region {
    let chunk = Chunk::fetch(Arc::clone(source));
    Region::builder().chunk(chunk).readahead(Readahead::None).build(pool).unwrap()
}

pub(crate) fn is_right(region: &Region) -> bool {
    (0..region.len()).step_by(511).all(|at| region.as_slice()[at] == byte_at(at as u64))
}

#[test]
fn wrapped_memory_is_copied_or_mapped_as_memory_is() {
    let bytes = pattern(1, 3 * PAGE as usize);
    let pool = Pool::new().unwrap();
    let wrapped = Cached::new(Retrying::new(Memory::from(bytes.clone()), Retry::times(1)), 1 << 20);
    let region = region_of(&Arc::new(Limited::new(wrapped, 1)), &pool);
    assert_eq!(region.plan().runs()[0].method, Method::Copy);
    assert!(region.as_slice()[..bytes.len()] == bytes);
    let hole = Arc::new(Limited::new(Arc::new(Hole), 1));
    let chunks = [
        Chunk::source(Arc::new(Retrying::new(memfd(&bytes), Retry::times(1)))),
        Chunk::source(hole).range(0..PAGE),
    ];
    let region = Region::builder().chunks(chunks).require_zero_copy().build(&pool).unwrap();
    assert!(region.as_slice()[..bytes.len()] == bytes);
    assert!(region.as_slice()[bytes.len()..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_retrying_source_is_read_again_until_it_answers() {
    let pool = Pool::new().unwrap();
    let source = Arc::new(Retrying::new(Arc::new(Noted::new(PAGE, 1).failing(3)), quickly(3)));
    let region = region_of(&source, &pool);
    assert!(is_right(&region));
    assert_eq!(region.close().pages_poisoned, 0);
}

#[test]
fn a_retrying_source_gives_the_error_of_its_last_read() {
    let pool = Pool::new().unwrap();
    let noted = Arc::new(Noted::new(PAGE, 1).failing(u32::MAX));
    let region = region_of(&Arc::new(Retrying::new(Arc::clone(&noted), quickly(4))), &pool);
    let error = region.read_at(0, &mut [0]).unwrap_err();
    assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::ConnectionReset, "{error}");
    assert_eq!(noted.reads().len(), 5);
    let panics = Arc::new(Scripted::new(PAGE).panicking(0..PAGE));
    let region = region_of(&Arc::new(Retrying::new(Arc::clone(&panics), quickly(4))), &pool);
    let error = region.read_at(0, &mut [0]).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Panicked, "{error}");
    assert_eq!(panics.reads(), 1, "a panic is a defect, which no retry repairs");
}

#[test]
fn a_limited_source_serves_so_many_reads_at_once() {
    let pool = Pool::builder().workers(8).start().unwrap();
    let noted = Arc::new(Noted::new(64 * PAGE, 1));
    let limited = Arc::new(Limited::new(Arc::clone(&noted), 3));
    let regions = [region_of(&limited, &pool), region_of(&limited, &pool)];
    scope(|scope| {
        for thread in 0..8 {
            let region = &regions[thread % 2];
            scope.spawn(move || {
                for page in 0..64 {
                    let at = (page * (2 * thread + 1) % 64) * PAGE as usize;
                    assert_eq!(region.as_slice()[at], byte_at(at as u64));
                }
            });
        }
    });
    let most = noted.most.load(Ordering::SeqCst);
    assert!((2..=3).contains(&most), "{most} reads at once");
    assert_eq!(noted.reads().len(), 128);
}

#[test]
fn a_read_that_hangs_or_panics_takes_no_other_slot_of_a_limited_source() {
    let pool = Pool::builder().workers(4).start().unwrap();
    let source = Scripted::new(16 * PAGE).holding(0..1).panicking(PAGE..3 * PAGE);
    let source = Arc::new(source);
    let region = region_of(&Arc::new(Limited::new(Arc::clone(&source), 2)), &pool);
    scope(|scope| {
        let hangs = scope.spawn(|| region.as_slice()[0]);
        source.wait_until_held(1);
        for page in 1..3 {
            region.read_at(page * PAGE, &mut [0]).unwrap_err();
        }
        for page in 3..16 {
            assert_eq!(region.as_slice()[page * PAGE as usize], byte_at(page as u64 * PAGE));
        }
        assert!(!hangs.is_finished());
        source.release();
        assert_eq!(hangs.join().unwrap(), byte_at(0));
    });
}

/// The only worker serves another region, while each touch of the limited one waits.
#[test]
fn a_request_to_a_limited_fetch_holds_no_thread() {
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let later = Arc::new(Later::new(8 * PAGE, 1));
    let region = region_of_fetch(&Arc::new(Limited::new(Arc::clone(&later), 2)), &pool);
    let other = Region::builder().chunk(pattern(2, 64 << 10)).build(&pool).unwrap();
    scope(|scope| {
        let mut touches = Vec::new();
        for page in 0..8 {
            touches.push(scope.spawn({
                let region = &region;
                move || region.as_slice()[page * PAGE as usize] == byte_at(page as u64 * PAGE)
            }));
        }
        until(|| region.metrics().faults >= 8);
        assert!(other.as_slice()[..] == pattern(2, 64 << 10));
        for answered in 0..8 {
            until(|| later.waiting() == 2.min(8 - answered));
            assert!(later.answer_one());
        }
        assert!(touches.into_iter().all(|touch| touch.join().unwrap()));
    });
    assert_eq!(later.noted.reads().len(), 8);
}

#[test]
fn a_region_with_queued_requests_is_dropped_after_their_answers() {
    let pool = Pool::new().unwrap();
    let later = Arc::new(Later::new(2 * PAGE, 1));
    let limited = Arc::new(Limited::new(Arc::clone(&later), 1));
    let (first, second) = (region_of_fetch(&limited, &pool), region_of_fetch(&limited, &pool));
    // The regions hold the wrapper.
    drop(limited);
    let done = AtomicBool::new(false);
    scope(|scope| {
        let touches = [
            scope.spawn(|| first.as_slice()[1] == byte_at(1)),
            scope.spawn(|| second.as_slice()[1] == byte_at(1)),
        ];
        // The kernel may report a fault more than once.
        until(|| first.metrics().faults + second.metrics().faults >= 2 && later.waiting() == 1);
        scope.spawn(|| later.answer_until(&done));
        let _ended = SetOnDrop(&done);
        assert!(touches.into_iter().all(|touch| touch.join().unwrap()));
        drop(pool);
    });
    // The request of a region that is being dropped is answered, and no page is read for it later.
    let pool = Pool::new().unwrap();
    let limited = Arc::new(Limited::new(Arc::clone(&later), 1));
    let region = Region::builder().chunk(Chunk::fetch(limited)).build(&pool).unwrap();
    done.store(false, Ordering::SeqCst);
    scope(|scope| {
        scope.spawn(|| later.answer_until(&done));
        let _ended = SetOnDrop(&done);
        region.populate(..).unwrap();
        drop((region, pool));
    });
}

#[test]
fn regions_that_share_a_cached_source_read_each_block_once() {
    const SIZE: u64 = 10 * KIB_64 + 5000;
    let pool = Pool::builder().workers(4).start().unwrap();
    let noted = Arc::new(Noted::new(SIZE, KIB_64));
    let cached = Arc::new(Cached::new(Arc::clone(&noted), 2 << 20));
    let regions: Vec<_> = (0..6).map(|_| region_of(&cached, &pool)).collect();
    scope(|scope| {
        for region in &regions {
            scope.spawn(|| assert!(is_filled(0, &region.as_slice()[..SIZE as usize])));
        }
    });
    let blocks = (0..11).map(|block| (block * KIB_64, KIB_64.min(SIZE - block * KIB_64) as usize));
    assert_eq!(noted.reads(), blocks.collect::<Vec<_>>());
}

#[test]
fn concurrent_misses_of_a_block_share_one_read_and_its_error() {
    let pool = Pool::builder().workers(4).start().unwrap();
    let source = Arc::new(Scripted::new(2 * KIB_64).holding(0..1).failing(0..1));
    let cached = Arc::new(Cached::new(Arc::clone(&source), 1 << 20));
    let regions: Vec<_> = (0..4).map(|_| region_of(&cached, &pool)).collect();
    scope(|scope| {
        let reads: Vec<_> =
            regions.iter().map(|region| scope.spawn(|| region.read_at(0, &mut [0]))).collect();
        source.wait_until_held(1);
        assert_eq!(regions[0].as_slice()[KIB_64 as usize], byte_at(KIB_64), "another block");
        assert_eq!(source.reads(), 2);
        source.release();
        for read in reads {
            let error = read.join().unwrap().unwrap_err();
            assert_eq!(reason(&error), FailureReason::Source, "{error}");
        }
    });
    // A thread may have come after the end of the first read.
    let reads = source.reads();
    source.repair();
    let region = region_of(&cached, &pool);
    assert_eq!(region.as_slice()[5], byte_at(5), "an error is not kept");
    assert_eq!(source.reads(), reads + 1);
}

#[test]
fn a_cached_source_that_panics_fails_the_pages_and_hangs_no_reader() {
    let pool = Pool::builder().workers(4).start().unwrap();
    let source = Arc::new(Scripted::new(KIB_64).holding(0..1).panicking(0..1));
    let cached = Arc::new(Cached::new(Arc::clone(&source), 1 << 20));
    let regions: Vec<_> = (0..4).map(|_| region_of(&cached, &pool)).collect();
    scope(|scope| {
        for region in &regions {
            scope.spawn(|| {
                let error = region.read_at(0, &mut [0]).unwrap_err();
                assert_eq!(reason(&error), FailureReason::Panicked, "{error}");
            });
        }
        source.wait_until_held(1);
        source.release();
    });
}

#[test]
fn a_cached_source_keeps_no_more_than_its_capacity() {
    let pool = Pool::builder().workers(4).start().unwrap();
    let noted = Arc::new(Noted::new(16 * KIB_64, KIB_64));
    let cached = Arc::new(Cached::new(Arc::clone(&noted), 4 * KIB_64));
    assert!(is_right(&region_of(&cached, &pool)));
    assert_eq!(noted.reads().len(), 16);
    assert!(is_right(&region_of(&cached, &pool)));
    assert!(noted.reads().len() >= 16 + 12, "12 blocks were removed");
    // One block is being read, and it takes all of the capacity: the other one is read beside it.
    let source = Arc::new(Scripted::new(2 * KIB_64).holding(0..1));
    let cached = Arc::new(Cached::new(Arc::clone(&source), 0));
    let region = region_of(&cached, &pool);
    scope(|scope| {
        let hangs = scope.spawn(|| region.as_slice()[0]);
        source.wait_until_held(1);
        assert_eq!(region.as_slice()[KIB_64 as usize + 5], byte_at(KIB_64 + 5));
        source.release();
        assert_eq!(hangs.join().unwrap(), byte_at(0));
    });
}

/// Chunks that begin inside a page, and inside a block: a page has bytes of two blocks.
#[test]
fn regions_that_share_a_cached_fetch_request_each_block_once() {
    const SIZE: u64 = 6 * KIB_64 + 777;
    let pool = Pool::builder().workers(2).start().unwrap();
    let later = Arc::new(Later::new(SIZE, KIB_64));
    let cached = Arc::new(Cached::new(Arc::clone(&later), 1 << 20));
    let build = |start| {
        let chunk = Chunk::fetch(Arc::clone(&cached)).range(start..SIZE);
        Region::builder().chunk(chunk).build(&pool).unwrap()
    };
    let regions = [0, 100, 4096, 70_001].map(|start| (start, build(start)));
    let done = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| later.answer_until(&done));
        let _ended = SetOnDrop(&done);
        thread::scope(|scope| {
            for (start, region) in &regions {
                scope.spawn(move || {
                    assert_eq!(region.as_slice().len() as u64, SIZE - start);
                    assert!(is_filled(*start, region.as_slice()));
                });
            }
        });
    });
    let blocks = (0..7).map(|block| (block * KIB_64, KIB_64.min(SIZE - block * KIB_64) as usize));
    assert_eq!(later.noted.reads(), blocks.collect::<Vec<_>>());
}

#[test]
fn a_cached_fetch_that_fails_fails_each_waiting_page_and_is_asked_again() {
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let later = Arc::new(Later::new(KIB_64, KIB_64).failing(u32::MAX));
    let cached = Arc::new(Cached::new(Arc::clone(&later), 1 << 20));
    let regions = [region_of_fetch(&cached, &pool), region_of_fetch(&cached, &pool)];
    scope(|scope| {
        let reads: Vec<_> =
            regions.iter().map(|region| scope.spawn(|| region.read_at(0, &mut [0]))).collect();
        until(|| later.waiting() == 1);
        // No event tells that the second reader waits for the block of the first one.
        thread::sleep(Duration::from_millis(1));
        while !reads.iter().all(thread::ScopedJoinHandle::is_finished) {
            later.answer_one();
            thread::yield_now();
        }
        let failed = reads.into_iter().filter_map(|read| read.join().unwrap().err()).count();
        assert_eq!(failed, 2);
    });
    later.noted.failures.store(0, Ordering::SeqCst);
    let region = region_of_fetch(&cached, &pool);
    let done = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| later.answer_until(&done));
        let _ended = SetOnDrop(&done);
        assert_eq!(region.as_slice()[5], byte_at(5), "an error is not kept");
    });
}

/// The read of a request from a cached fetch that answers at once.
fn read_fetched<F: Fetch + 'static>(cached: &Arc<F>, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    let chunk = Chunk::fetch(Arc::clone(cached)).range(offset..offset + len);
    let region = Region::builder().chunk(chunk).build(&Pool::new().unwrap()).unwrap();
    let mut bytes = vec![0; len as usize];
    region.read_at(0, &mut bytes).map(|()| bytes)
}

#[test]
fn a_request_to_a_cached_source_reads_its_own_part_once_after_a_failed_block() {
    let bytes = |offset: u64, len: u64| (offset..offset + len).map(byte_at).collect::<Vec<_>>();
    let noted = || Arc::new(Noted::new(2 * KIB_64, KIB_64).losing(20 * PAGE + 5));
    for (offset, len, is_right, expected) in [
        (17 * PAGE, PAGE, true, vec![(KIB_64, KIB_64 as usize), (17 * PAGE, PAGE as usize)]),
        (20 * PAGE, PAGE, false, vec![(KIB_64, KIB_64 as usize), (20 * PAGE, PAGE as usize)]),
        (KIB_64, KIB_64, false, vec![(KIB_64, KIB_64 as usize)]),
        (0, 2 * KIB_64, false, vec![(0, KIB_64 as usize), (KIB_64, KIB_64 as usize)]),
    ] {
        let source = noted();
        let mut read = vec![0; len as usize];
        let end = Cached::new(Arc::clone(&source), 1 << 20).read_at(offset, &mut read);
        assert_eq!((end.is_ok(), source.reads()), (is_right, expected.clone()), "{len} bytes at {offset}");
        assert!(!is_right || read == bytes(offset, len));
    }
    // The request begins in a block that is read, and ends in one that fails.
    let source = noted();
    let mut read = vec![0; 2 * PAGE as usize];
    Cached::new(Arc::clone(&source), 1 << 20).read_at(15 * PAGE, &mut read).unwrap();
    assert!(read == bytes(15 * PAGE, 2 * PAGE));
    assert_eq!(source.reads().len(), 3);
    let source = noted();
    let cached = Arc::new(Cached::new(Prompt(Arc::clone(&source)), 1 << 20));
    // The page of this region has bytes of both blocks.
    assert!(read_fetched(&cached, 15 * PAGE + 100, PAGE).unwrap() == bytes(15 * PAGE + 100, PAGE));
    assert_eq!(source.reads().len(), 3);
}

#[test]
fn a_page_whose_read_panics_takes_no_other_page_of_its_block() {
    let pool = Pool::new().unwrap();
    let source = Arc::new(Scripted::new(KIB_64).panicking(5 * PAGE..6 * PAGE));
    let region = region_of(&Arc::new(Cached::new(source, 1 << 20)), &pool);
    let error = region.read_at(5 * PAGE, &mut [0]).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Panicked, "{error}");
    assert!(is_right_but(&region, 5));
    // The block is the page, so no other read follows, and no retry.
    let source = Arc::new(Scripted::new(PAGE).panicking(0..PAGE));
    let cached = Cached::new(Arc::clone(&source), 1 << 20);
    let region = region_of(&Arc::new(Retrying::new(cached, quickly(4))), &pool);
    let error = region.read_at(0, &mut [0]).unwrap_err();
    assert_eq!((reason(&error), source.reads()), (FailureReason::Panicked, 1), "{error}");
}

/// A source that changes its granularity.
struct Changing(AtomicU64);

impl Source for Changing {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        fill(offset, into);
        Ok(())
    }

    fn granularity(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

#[test]
fn clones_of_a_cached_source_agree_on_the_size_of_a_block() {
    let source = Arc::new(Changing(AtomicU64::new(KIB_64)));
    let first = Cached::new(Arc::clone(&source), 1 << 20);
    let second = first.clone();
    let mut byte = [0];
    first.read_at(KIB_64 + 7, &mut byte).unwrap();
    source.0.store(PAGE, Ordering::SeqCst);
    second.read_at(PAGE + 7, &mut byte).unwrap();
    assert_eq!((byte[0], second.granularity()), (byte_at(PAGE + 7), KIB_64));
}

/// Has other bytes as a [`Source`] than as a [`Fetch`].
struct TwoFaced;

impl Source for TwoFaced {
    fn size(&self) -> u64 {
        PAGE
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(1);
        Ok(())
    }
}

impl Fetch for TwoFaced {
    fn size(&self) -> u64 {
        PAGE
    }

    fn fetch(&self, _: u64, reply: Reply) {
        let bytes = vec![2; reply.len()];
        reply.answer(&bytes);
    }
}

#[test]
fn a_cached_source_keeps_read_and_fetched_blocks_apart() {
    let pool = Pool::new().unwrap();
    let cached = Arc::new(Cached::new(TwoFaced, 1 << 20));
    for _ in 0..2 {
        assert_eq!(region_of(&cached, &pool).as_slice()[5], 1);
        assert_eq!(region_of_fetch(&cached, &pool).as_slice()[5], 2);
    }
}

pub(crate) fn is_right_but(region: &Region, lost: usize) -> bool {
    let pages = (0..region.len() / PAGE as usize).filter(|page| *page != lost);
    pages.map(|page| page * PAGE as usize).all(|at| region.as_slice()[at] == byte_at(at as u64))
}

/// A fetch that answers at once.
pub(crate) struct Prompt(pub(crate) Arc<Noted>);

impl Prompt {
    pub(crate) fn new(size: u64, granularity: u64) -> Self {
        Self(Arc::new(Noted::new(size, granularity)))
    }
}

impl Fetch for Prompt {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn fetch(&self, offset: u64, reply: Reply) {
        let mut bytes = vec![0; reply.len()];
        match self.0.read(offset, &mut bytes) {
            Ok(()) => reply.answer(&bytes),
            Err(error) => reply.fail(error),
        }
    }

    fn granularity(&self) -> u64 {
        self.0.granularity()
    }
}

/// A page whose fetch is repeated waits in the timer queue: the only worker serves other faults.
#[test]
fn a_retrying_fetch_waits_without_a_thread() {
    // Longer than a loaded machine needs for the other faults.
    const PAUSE: Duration = Duration::from_secs(4);
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let noted = Arc::new(Noted::new(8 * PAGE, 4 * PAGE).failing(1));
    let prompt = Prompt(Arc::clone(&noted));
    let region =
        region_of_fetch(&Arc::new(Retrying::new(prompt, Retry::times(1).pause(PAUSE, PAUSE))), &pool);
    let other = Region::builder().chunk(pattern(3, 64 << 10)).build(&pool).unwrap();
    scope(|scope| {
        let touch = scope.spawn(|| region.as_slice()[5]);
        until(|| noted.reads().len() == 1);
        assert!(other.as_slice()[..] == pattern(3, 64 << 10));
        assert_eq!((noted.reads().len(), touch.is_finished()), (1, false), "the source has its pause");
        assert_eq!(touch.join().unwrap(), byte_at(5));
    });
    assert!(is_right(&region));
    let seen = region.close();
    assert_eq!((seen.source_retries, seen.pages_poisoned), (1, 0));
}

#[test]
fn a_retrying_fetch_that_gives_up_fails_its_page() {
    let pool = Pool::builder().workers(1).start().unwrap();
    for cached in [false, true] {
        let noted = Arc::new(Noted::new(PAGE, 1).failing(u32::MAX));
        let retrying = Arc::new(Retrying::new(Prompt(Arc::clone(&noted)), quickly(3)));
        let region = match cached {
            true => region_of_fetch(&Arc::new(Cached::new(retrying, 1 << 20)), &pool),
            false => region_of_fetch(&retrying, &pool),
        };
        // The request of this call blocks, and sleeps through each pause.
        let error = region.read_at(0, &mut [0]).unwrap_err();
        assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::ConnectionReset, "{error}");
        assert_eq!(noted.reads().len(), 4);
    }
}

/// A request that is sent again goes through each wrapper again, and frees its slot meanwhile.
#[test]
fn wrappers_of_a_fetch_can_be_stacked() {
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let noted = Arc::new(Noted::new(4 * KIB_64, KIB_64).failing(3));
    let limited = Limited::new(Prompt(Arc::clone(&noted)), 1);
    let cached = Arc::new(Cached::new(Retrying::new(limited, quickly(3)), 1 << 20));
    let regions = [region_of_fetch(&cached, &pool), region_of_fetch(&cached, &pool)];
    scope(|scope| {
        for region in &regions {
            scope.spawn(|| assert!(is_right(region)));
        }
    });
    assert_eq!(noted.reads().len(), 4 + 3);
}
