//! Readahead: a sequential reader finds the next pages filled, a random one does not, and pages
//! filled ahead hold their bytes.

use crate::contention::is_idle;
use crate::{PAGE, comes_true, pattern, until};
use pagestitch::{Chunk, Pool, Readahead, Region};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

#[test]
fn a_sequential_reader_takes_few_faults() {
    let bytes = pattern(1, 8192 * PAGE);
    let pool = Pool::builder().name("ahead").start().unwrap();
    let region = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
    read_slowly(&region, &bytes, "ahead");
    let seen = region.close();
    assert!(seen.faults < 8192 / 4, "{seen:?}");
    assert!(seen.pages_ahead > 8192 / 2, "{seen:?}");
    assert_eq!(seen.pages_installed(), 8192);
}

const READERS: usize = 16;
/// The pages of the part of each reader.
const PART: usize = 1024;

/// As the threads of a parallel scan do, each in its own part.
#[test]
fn sixteen_interleaved_readers_take_few_faults_each() {
    assert_each_is_followed("sixteen", |region| {
        for page in 0..PART {
            for reader in 0..READERS {
                assert_eq!(region.as_slice()[(reader * PART + page) * PAGE], 7);
            }
            if page % 64 == 0 {
                until(|| is_idle("sixteen"));
            }
        }
    });
}

/// The faults of these readers meet in the table of the streams, and the pages ahead of them in the queue of the
/// workers.
#[test]
fn sixteen_threads_that_read_at_once_take_few_faults_each() {
    assert_each_is_followed("threads", |region| {
        let (wrong, step) = (&AtomicUsize::new(0), &Barrier::new(READERS));
        scope(|scope| {
            for bytes in region.as_slice().chunks(PART * PAGE) {
                scope.spawn(move || {
                    for pages in bytes.chunks(64 * PAGE) {
                        // Not asserted here, because the others would wait for a thread that panics.
                        let ours = pages.iter().step_by(PAGE).filter(|&&byte| byte != 7).count();
                        wrong.fetch_add(ours, Ordering::Relaxed);
                        if step.wait().is_leader() {
                            comes_true(|| is_idle("threads"));
                        }
                        step.wait();
                    }
                });
            }
        });
        assert_eq!(wrong.load(Ordering::Relaxed), 0);
    });
}

/// Reads a region by [`READERS`] readers, and checks that readahead fills nearly all pages. Without a place for each
/// reader in the table of the streams, only blocks that are dense by then are filled ahead: half of the pages.
fn assert_each_is_followed(pool: &str, read: impl Fn(&Region)) {
    let pages = (READERS * PART) as u64;
    let server = Pool::builder().name(pool).start().unwrap();
    let round = |_| {
        let region = Region::builder().chunk(vec![7u8; READERS * PART * PAGE]).build(&server).unwrap();
        read(&region);
        let seen = region.close();
        assert!(seen.faults < pages / 4, "{seen:?}");
        seen.pages_ahead
    };
    // On a loaded machine a reader may be faster than the workers.
    let ahead: Vec<_> = (0..10).map(round).take_while(|&ahead| ahead <= pages * 3 / 4).collect();
    assert!(ahead.len() < 10, "pages ahead: {ahead:?}");
}

/// Reads page after page, and lets the pool finish its readahead every 64 pages.
pub(crate) fn read_slowly(region: &Region, bytes: &[u8], pool: &str) {
    for page in 0..bytes.len() / PAGE {
        assert_eq!(region.as_slice()[page * PAGE], bytes[page * PAGE]);
        if page % 64 == 0 {
            until(|| is_idle(pool));
        }
    }
}

#[test]
fn random_touches_fill_one_page_each() {
    // One touch in each block, in an order without a stream. A second touch in a block could make
    // it dense, where a worker waited long for a CPU.
    let (block, blocks) = (512, 41);
    let region =
        Region::builder().chunk(vec![1u8; blocks * block * PAGE]).build(&Pool::new().unwrap()).unwrap();
    for i in 0..blocks {
        let page = i * 17 % blocks * block + i * 7919 % block;
        assert_eq!(region.as_slice()[page * PAGE], 1);
    }
    let seen = region.close();
    assert_eq!((seen.faults, seen.pages_ahead, seen.pages_installed()), (41, 0, 41));
}

#[test]
fn readahead_none_fills_nothing_ahead() {
    let builder = Region::builder().chunk(vec![1u8; 100 * PAGE]).readahead(Readahead::None);
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice().iter().all(|&byte| byte == 1));
    assert_eq!(region.close().faults, 100);
}

#[test]
fn a_failure_of_readahead_poisons_no_page() {
    let source = Arc::new(Scripted::new(100 * PAGE as u64).failing(20 * PAGE as u64..20 * PAGE as u64 + 1));
    let region =
        Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
    for page in 0..10 {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    assert_eq!(region.metrics().pages_poisoned, 0, "page 20 was not touched");
    region.read_at(20 * PAGE as u64, &mut [0]).unwrap_err();
    until(|| region.metrics().pages_poisoned == 1);
    assert_eq!(region.as_slice()[21 * PAGE], byte_at(21 * PAGE as u64));
}

#[test]
fn many_readers_of_one_region_see_the_right_bytes() {
    let bytes = pattern(2, 2000 * PAGE + 77);
    let region = Region::builder()
        .chunks(bytes.chunks(5_000).map(<[u8]>::to_vec))
        .build(&Pool::builder().workers(3).start().unwrap())
        .unwrap();
    scope(|scope| {
        for reader in 0..6 {
            let (region, bytes) = (&region, &bytes);
            scope.spawn(move || {
                let start = reader * 300 * PAGE;
                assert!(region.as_slice()[start..] == bytes[start..]);
            });
        }
    });
    assert_eq!(region.close().pages_installed(), 2001);
}
