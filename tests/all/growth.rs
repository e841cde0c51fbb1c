//! Regions that grow: appended bytes are right in each page, readers see no other bytes, and no byte
//! exists behind the length.

use crate::zero_copy::memfd;
use crate::{PAGE, SIGSEGV, discard, lacks_poison, pattern, reason, serve_until, touch, until};
use pagestitch::source::{FailureReason, Memory, Pages, SharedFile, UnsealedMemfd};
use pagestitch::{
    BuildOption, Chunk, Eager, Error, ErrorKind, FillRate, Inline, Manual, Method, OnFailure, PlanReason,
    Pool, Region, Server, SharedRegion, Source,
};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use proptest::prelude::*;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// Under ThreadSanitizer a process has addresses for two such regions, and tests run side by side.
const CAPACITY: u64 = if cfg!(sanitized = "thread") { 1 << 36 } else { 1 << 40 };

fn pool() -> Server {
    Server::from(&Pool::new().unwrap())
}

fn servers() -> [Server; 2] {
    [pool(), Inline.into()]
}

fn log(server: &Server) -> Region {
    Region::builder().name("log").capacity(CAPACITY).build(server.clone()).unwrap()
}

#[test]
fn a_region_without_chunks_grows_byte_by_byte() {
    for server in servers() {
        let log = log(&server);
        assert!(log.is_empty() && log.as_slice().is_empty() && log.plan().runs().is_empty());
        log.populate(..).unwrap();
        let bytes = pattern(1, 3 * PAGE);
        for (at, &byte) in bytes.iter().enumerate() {
            assert_eq!(log.append(vec![byte]).unwrap(), at..at + 1);
            assert_eq!(log.as_slice()[at], byte);
        }
        assert!(log.as_slice() == bytes && log.chunk_count() == bytes.len());
        assert_eq!(log.chunk_range(100), Some(100..101));
        assert_eq!(log.capacity(), CAPACITY);
        assert!((3..=6).contains(&log.metrics().pages_installed()));
    }
}

#[test]
fn a_stream_at_the_end_of_the_bytes_of_the_build_fills_no_closed_page() {
    let log = Region::builder().chunk(vec![1u8; PAGE + 1]).capacity(CAPACITY).build(pool()).unwrap();
    // Two faults in a row begin a stream, of which a worker fills the next pages.
    assert_eq!((log.as_slice()[0], log.as_slice()[PAGE]), (1, 1));
    let place = log.append(vec![2u8; 3 * PAGE]).unwrap();
    assert!(log.as_slice()[place].iter().all(|&byte| byte == 2));
}

#[test]
fn the_last_page_has_appended_bytes_whether_it_was_touched_or_not() {
    for server in servers() {
        let bytes = pattern(2, 20 * PAGE);
        for touched in [false, true] {
            let log = log(&server);
            let mut len = 0;
            for part in [100, 2 * PAGE, 1, PAGE - 101, PAGE, 3 * PAGE + 5] {
                let slice = log.as_slice();
                if touched && len > 0 {
                    assert_eq!(slice[len - 1], bytes[len - 1]);
                }
                assert_eq!(log.append(bytes[len..len + part].to_vec()).unwrap(), len..len + part);
                assert_eq!(slice.len(), len, "a slice ends at the length at its call");
                len += part;
            }
            assert!(log.as_slice() == &bytes[..len], "touched: {touched}");
        }
    }
}

/// The last whole pages are the memfd's own. The page in which it ends is not, so that it can take
/// more bytes.
#[test]
fn chunks_follow_a_source_that_is_mapped_in_place() {
    for server in servers() {
        let bytes = pattern(3, 5 * PAGE + 10);
        let builder = Region::builder().chunk(memfd(&bytes)).capacity(CAPACITY);
        let log = builder.build(server).unwrap();
        assert!(log.as_slice() == bytes && log.metrics().pages_in_place == 5);
        log.append(memfd(&bytes)).unwrap();
        assert!(log.as_slice() == [&bytes[..], &bytes[..]].concat());
        let plan = log.plan();
        let last = plan.runs().last().unwrap();
        assert_eq!((last.method, last.reason), (Method::Copy, PlanReason::Appended));
        assert_eq!((plan.runs()[0].chunks.clone(), last.chunks.clone()), (0..1, 1..2));
    }
}

/// Appends bytes to an empty region while threads read it. `next` tells the length of a part from that of the part before.
pub(crate) fn append_beside_readers(log: &Region, bytes: &[u8], next: fn(usize) -> usize) {
    let done = AtomicBool::new(false);
    scope(|scope| {
        for reader in 0..3 {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let seen = log.as_slice();
                    // One reads all, one the last bytes, one the second half.
                    let start = [0, seen.len().saturating_sub(100), seen.len() / 2][reader];
                    assert!(seen[start..] == bytes[start..seen.len()], "from {start} of {}", seen.len());
                    let last = log.chunk_count().checked_sub(1).and_then(|chunk| log.chunk_range(chunk));
                    assert!(last.is_none_or(|last| last.end as usize <= log.len()));
                }
            });
        }
        let (mut at, mut part) = (0, 1);
        while at < bytes.len() {
            part = next(part);
            let end = bytes.len().min(at + part);
            assert_eq!(log.append(bytes[at..end].to_vec()).unwrap(), at..end);
            at = end;
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(log.as_slice() == bytes);
}

#[test]
fn readers_see_each_byte_right_while_chunks_are_appended() {
    for server in servers() {
        append_beside_readers(&log(&server), &pattern(4, 4 << 20), |part| (part * 7 + 13) % 20_000 + 1);
    }
}

#[test]
fn several_threads_append_whole_chunks() {
    for server in servers() {
        let log = log(&server);
        scope(|scope| {
            for thread in 1..=4u8 {
                let log = &log;
                scope.spawn(move || {
                    for part in 0..100 {
                        let place = log.append(vec![thread; 1 + part * 3]).unwrap();
                        assert!(log.as_slice()[place].iter().all(|&byte| byte == thread));
                    }
                });
            }
        });
        let mut of = [0; 5];
        for range in log.chunk_ranges() {
            let chunk = &log.as_slice()[range.start as usize..range.end as usize];
            assert!(chunk.iter().all(|byte| byte == &chunk[0]));
            of[chunk[0] as usize] += chunk.len();
        }
        assert_eq!(of, [0, 14_950, 14_950, 14_950, 14_950]);
    }
}

/// The last page is being filled while a chunk is appended: the append waits, and the page has the
/// bytes of both.
#[test]
fn an_append_waits_for_the_thread_that_fills_the_last_page() {
    let source = Arc::new(Scripted::new(100).holding(0..100));
    let log = log(&pool());
    log.append(Chunk::source(Arc::clone(&source))).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| log.as_slice()[99]);
        source.wait_until_held(1);
        let writer = scope.spawn(|| log.append(vec![5; PAGE]).unwrap());
        source.release();
        assert_eq!((reader.join().unwrap(), writer.join().unwrap()), (byte_at(99), 100..100 + PAGE));
    });
    assert!(log.as_slice()[100..].iter().all(|&byte| byte == 5));
}

#[test]
fn a_source_that_fails_leaves_the_region_as_it_was() {
    if lacks_poison(this_test!()) {
        return;
    }
    {
        let log = log(&pool());
        log.append(vec![7; 10]).unwrap();
        let bad = || Chunk::source(Arc::new(Scripted::new(2 * PAGE as u64).failing(0..1)));
        assert_eq!(log.as_slice()[9], 7);
        let error = log.append(bad()).unwrap_err();
        assert_eq!(
            (error.kind(), error.chunk(), log.len()),
            (ErrorKind::SourceFailed, Some(1), 10),
            "{error}"
        );
        let panics = Scripted::new(PAGE as u64).panicking(0..1);
        assert_eq!(
            reason(&log.append(Chunk::source(Arc::new(panics))).unwrap_err()),
            FailureReason::Panicked
        );
        log.append(vec![8; PAGE - 10]).unwrap();
        // Nothing of the next page is read now, so the touch meets the failure.
        let place = log.append(bad()).unwrap();
        assert_eq!(log.read_at(place.start as u64, &mut [0]).unwrap_err().kind(), ErrorKind::SourceFailed);
        assert_eq!(log.read_at(place.start as u64 + PAGE as u64, &mut [0]).ok(), Some(()));
        // A poisoned last page stays poisoned for the next chunk, and is retried with it.
        let bad = Arc::new(Scripted::new(10).failing(0..1));
        log.append(Chunk::source(Arc::clone(&bad))).unwrap();
        log.populate(log.len() as u64 - 1..).unwrap_err();
        let place = log.append(vec![9; 10]).unwrap();
        assert_eq!(log.read_at(place.start as u64, &mut [0]).unwrap_err().kind(), ErrorKind::SourceFailed);
        bad.repair();
        log.retry_failed(place.start as u64 - 1..).unwrap();
        assert_eq!(log.as_slice()[place.start - 1..place.end], [&[byte_at(9)][..], &[9; 10]].concat());
    }
}

#[test]
fn appends_that_cannot_be_are_refused() {
    let pool = Pool::new().unwrap();
    let small = Region::builder().name("log").chunk("12345").capacity(10).build(&pool).unwrap();
    let refused = |error: Error, kind| assert_eq!(error.kind(), kind, "{error}");
    let error = small.append("123456").unwrap_err();
    refused(error, ErrorKind::TooLarge);
    refused(small.append("").unwrap_err(), ErrorKind::InvalidChunk);
    refused(small.append(Chunk::hole(u64::MAX)).unwrap_err(), ErrorKind::TooLarge);
    let part = Chunk::from("abc").range(1..4);
    refused(small.append(part).unwrap_err(), ErrorKind::InvalidChunk);
    let odd = Chunk::from("abc").align(3);
    refused(small.append(odd).unwrap_err(), ErrorKind::InvalidChunk);
    let donated = Pages::new(PAGE).unwrap();
    refused(small.append(donated).unwrap_err(), ErrorKind::InvalidChunk);
    let file = SharedFile::try_from(&UnsealedMemfd::create("m", 3).unwrap()).unwrap();
    refused(small.append(file).unwrap_err(), ErrorKind::SharedSource);
    assert_eq!(small.append("12345").unwrap(), 5..10);
    refused(small.append("1").unwrap_err(), ErrorKind::TooLarge);

    let fixed = Region::builder().chunk("12345").build(&pool).unwrap();
    let error = fixed.append("1").unwrap_err();
    assert_eq!(error.option(), Some(BuildOption::Capacity));
    refused(error, ErrorKind::InvalidOption);
    assert_eq!(fixed.capacity(), 5);
    let inner = Memory::new(fixed);
    refused(log(&Inline.into()).append(inner).unwrap_err(), ErrorKind::NestedRegion);

    let builder = || Region::builder().chunk("12345").capacity(10);
    let error = Region::builder().chunk("12345").capacity(4).build(&pool).unwrap_err();
    refused(error, ErrorKind::InvalidOption);
    for builder in [
        builder().hardware_read_only(),
        builder().inherit_on_fork(),
        builder().require_zero_copy(),
        builder().release_sources(),
        builder().record(),
    ] {
        refused(builder.build(&pool).unwrap_err(), ErrorKind::OptionConflict);
    }
    refused(builder().build(Eager).unwrap_err(), ErrorKind::UnsuitableServer);
    let async_source = Chunk::source(Arc::new(Scripted::new(10)));
    refused(log(&Inline.into()).append(async_source).unwrap_err(), ErrorKind::UnsuitableServer);
}

#[test]
fn a_memfd_that_is_filled_later_cannot_be_appended() {
    let pool = Pool::new().unwrap();
    let log = SharedRegion::builder().capacity(CAPACITY).build_shared(&pool).unwrap();
    let lazy = crate::lazy::chunk_of(&[1; PAGE], false);
    assert_eq!(log.append(lazy).unwrap_err().kind(), ErrorKind::InvalidChunk);
}

#[test]
fn a_touch_behind_the_last_page_is_a_signal() {
    let end = child::run(this_test!(), || {
        let log = log(&pool());
        log.append(vec![7; PAGE + 1]).unwrap();
        assert_eq!((log.as_slice()[PAGE], log.as_slice().len()), (7, PAGE + 1));
        let byte = touch(log.as_ptr().addr().get() + 2 * PAGE);
        println!("read a byte: {byte}");
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
}

#[test]
fn readahead_and_requested_fills_reach_appended_bytes() {
    let bytes = pattern(5, 8 << 20);
    let log = log(&pool());
    let mut readers = 0;
    for part in bytes.chunks(3 << 20) {
        let place = log.append(part.to_vec()).unwrap();
        // A sequential reader, across the old end.
        assert!(log.as_slice()[readers..place.end - 5000] == bytes[readers..place.end - 5000]);
        readers = place.end - 5000;
    }
    assert!(log.as_slice() == bytes);
    assert!(log.metrics().pages_ahead > 100, "{:?}", log.metrics());
    let place = log.append(bytes.clone()).unwrap();
    let prefetch = log.prefetch(place.start as u64..).unwrap();
    log.append(bytes.clone()).unwrap();
    let progress = prefetch.wait();
    assert_eq!((progress.pages_failed, log.len()), (0, 3 * bytes.len()));
    assert!(log.fill_in_background(FillRate::Unlimited).unwrap().wait().is_complete());
    log.append(vec![1; PAGE]).unwrap();
    log.populate(..).unwrap();
    let coverage = log.meter().coverage(1)[0];
    assert_eq!((coverage.pages, coverage.present), (6145, 6145));
    assert!(log.as_slice()[..3 * bytes.len()].chunks(bytes.len()).all(|part| part == bytes));
}

#[test]
fn a_manual_serves_appended_bytes() {
    let mut manual = Manual::new().unwrap();
    let log = log(&(&manual).into());
    let bytes = pattern(6, 3 * PAGE);
    log.append(bytes[..100].to_vec()).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| {
            until(|| log.len() == bytes.len());
            log.as_slice() == bytes
        });
        log.append(bytes[100..].to_vec()).unwrap();
        serve_until(&mut manual, 10, || reader.is_finished());
        assert!(reader.join().unwrap());
    });
}

/// The thread that serves appends behind a page that was filled and discarded: a write to it would wait
/// for the same thread.
#[test]
fn the_thread_of_a_manual_appends_behind_a_discarded_page() {
    let mut manual = Manual::new().unwrap();
    let log = Region::builder().capacity(CAPACITY).report_discards(false).build(&manual).unwrap();
    let bytes = pattern(8, 20 * 777);
    scope(|scope| {
        let appender = scope.spawn(|| {
            for part in bytes.chunks(777) {
                let end = log.append(part.to_vec()).unwrap().end;
                log.populate(end as u64 - 1..).unwrap();
                discard(log.as_ptr().addr().get() + (end - 1) / PAGE * PAGE, PAGE);
            }
        });
        appender.join().unwrap();
        let reader = scope.spawn(|| log.as_slice() == bytes);
        serve_until(&mut manual, 10, || reader.is_finished());
        assert!(reader.join().unwrap());
    });
}

/// More threads than the first table of filling callers has slots for.
#[test]
fn an_append_below_a_fill_of_the_last_page_is_refused_beside_many_callers() {
    let log = Arc::new(log(&pool()));
    let held = Arc::new(Scripted::new(300 * PAGE as u64).holding(0..300 * PAGE as u64));
    let other = Region::builder().chunk(Chunk::source(Arc::clone(&held))).build(pool()).unwrap();
    let refused = Arc::new(Mutex::new(None));
    let appending = Appending { log: Arc::downgrade(&log), refused: Arc::clone(&refused) };
    log.append(Chunk::source(Arc::new(appending))).unwrap();
    scope(|scope| {
        for page in 0..300 {
            let other = &other;
            scope.spawn(move || other.populate(page * PAGE as u64..(page + 1) * PAGE as u64).unwrap());
        }
        held.wait_until_held(300);
        assert_eq!(log.populate(..).unwrap_err().kind(), ErrorKind::SourceFailed);
        assert_eq!(*refused.lock().unwrap(), Some(ErrorKind::InUse));
        held.release();
    });
}

/// A source that appends to its own region when it is read.
struct Appending {
    log: Weak<Region>,
    /// The kind of the append's error.
    refused: Arc<Mutex<Option<ErrorKind>>>,
}

impl Source for Appending {
    fn size(&self) -> u64 {
        10
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        let log = self.log.upgrade().expect("the test has it");
        let error = log.append("1").expect_err("this thread fills the page");
        *self.refused.lock().unwrap() = Some(error.kind());
        Err(io::Error::other(error))
    }
}

#[test]
fn an_aligned_chunk_follows_padding_of_zeros() {
    let pool = Pool::new().unwrap();
    let log = Region::builder().chunk("1").align(8).capacity(CAPACITY).build(&pool).unwrap();
    assert_eq!(log.as_slice(), b"1");
    assert_eq!(log.append("2").unwrap(), 8..9);
    assert_eq!(log.append(Chunk::from("3").align(16)).unwrap(), 16..17);
    assert_eq!(log.as_slice(), b"1\0\0\0\0\0\0\x002\0\0\0\0\0\0\x003");
    assert_eq!((log.chunk_count(), log.chunk_at(7), log.chunk_at(8)), (3, None, Some(1)));
    let aligned = Region::builder().chunk("1").page_aligned().capacity(CAPACITY).build(&pool).unwrap();
    assert_eq!(aligned.append("2").unwrap(), PAGE..PAGE + 1);
}

#[test]
fn a_region_that_changes_grows_with_files() {
    let pool = Pool::new().unwrap();
    let file = UnsealedMemfd::create("m", 100).unwrap();
    let log = SharedRegion::builder().capacity(CAPACITY).writable().build_shared(&pool).unwrap();
    log.append(SharedFile::try_from(&file).unwrap()).unwrap();
    log.write_at(90, &[1; 10]).unwrap();
    let place = log.append(vec![2; PAGE]).unwrap();
    let mut bytes = [0; 20];
    log.read_at(90, &mut bytes).unwrap();
    assert_eq!((&bytes[..10], &bytes[10..]), (&[1; 10][..], &[2; 10][..]));
    assert_eq!(log.write_at(place.end as u64 - 1, &[0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[test]
fn discarded_pages_come_back_with_the_appended_bytes() {
    for server in servers() {
        let log = log(&server);
        let bytes = pattern(7, 50 * PAGE);
        for part in bytes.chunks(777) {
            let end = log.append(part.to_vec()).unwrap().end;
            assert_eq!(log.as_slice()[end - 1], bytes[end - 1]);
            let last = log.as_ptr().addr().get() + (end - 1) / PAGE * PAGE;
            discard(last, PAGE);
        }
        assert!(log.as_slice() == bytes);
    }
}

#[test]
fn a_forked_child_appends_nothing() {
    let log = log(&pool());
    log.append("1").unwrap();
    let child = ForkedChild::start(|| {
        let refused = log.append("2").unwrap_err().kind() == ErrorKind::ForkedChild;
        i32::from(!refused)
    });
    assert!(child.succeeds());
    assert_eq!(log.append("2").unwrap(), 1..2);
}

#[test]
fn failure_policies_of_appended_chunks_hold() {
    let log = log(&pool());
    let bad = || Chunk::source(Arc::new(Scripted::new(PAGE as u64).failing(0..PAGE as u64)));
    for _ in 0..3 {
        log.append(bad().on_failure(OnFailure::Zeros)).unwrap();
        log.append(vec![1; PAGE]).unwrap();
    }
    log.populate(..).unwrap();
    assert!(log.as_slice().iter().enumerate().all(|(at, &byte)| byte as usize == at / PAGE % 2));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Random appends and reads, against a vector.
    #[test]
    fn a_region_that_grows_has_the_bytes_of_a_vector(
        steps in prop::collection::vec((0usize..4, 1usize..30_000, any::<u64>()), 1..60), inline in any::<bool>(),
    ) {
        let server = if inline { Inline.into() } else { pool() };
        let (log, mut model) = (log(&server), Vec::new());
        for (kind, bytes, seed) in steps {
            let chunk = match kind {
                0 => Chunk::hole(bytes as u64),
                1 => Chunk::from(memfd(&pattern(seed, bytes))),
                _ => Chunk::from(pattern(seed, bytes)),
            };
            let place = log.append(chunk).unwrap();
            prop_assert_eq!(place, model.len()..model.len() + bytes);
            model.extend(if kind == 0 { vec![0; bytes] } else { pattern(seed, bytes) });
            let at = seed as usize % model.len();
            let end = model.len().min(at + 5000);
            prop_assert!(log.as_slice()[at..end] == model[at..end], "{at}..{end}");
        }
        prop_assert!(log.as_slice() == model);
    }
}
