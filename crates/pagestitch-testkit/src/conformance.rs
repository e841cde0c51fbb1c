//! Checks of the contract of a source, as far as it can be checked.
//!
//! ```
//! use std::sync::Arc;
//! use pagestitch::source::Memory;
//! use pagestitch_testkit::conformance;
//!
//! let bytes: Vec<u8> = (0..20_000).map(|i| (i % 251) as u8).collect();
//! conformance::check(Arc::new(Memory::from(bytes.clone())), &bytes);
//! ```

use pagestitch::source::Fetch;
use pagestitch::{Chunk, Pool, Region, Source};
use std::sync::Arc;
use std::thread;

/// Checks that `source` begins with the bytes `expected`, in each way in which pagestitch reads it.
///
/// A source of endless size, such as [`Hole`](pagestitch::source::Hole), is checked as far as
/// `expected` goes.
///
/// # Panics
///
/// If the source breaks its contract. The message names the broken part.
pub fn check<S: Source + 'static>(source: Arc<S>, expected: &[u8]) {
    describes_itself((|| source.size(), || source.name(), || source.granularity()), expected);
    fills_all_of_the_buffer(&*source, expected);
    does_not_depend_on_the_split(&*source, expected);
    answers_several_threads(&*source, expected);
    shows_through_a_region(|| Chunk::source(Arc::clone(&source)), expected);
}

/// As [`check`], for an asynchronous source: checks it through regions, whose touches and reads send
/// its requests from several threads.
///
/// # Panics
///
/// If the source breaks its contract. The message names the broken part.
pub fn check_fetch<F: Fetch + 'static>(source: Arc<F>, expected: &[u8]) {
    describes_itself((|| source.size(), || source.name(), || source.granularity()), expected);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| shows_through_a_region(|| Chunk::fetch(Arc::clone(&source)), expected));
        }
    });
}

fn describes_itself(
    (size, name, granularity): (impl Fn() -> u64, impl Fn() -> String, impl Fn() -> u64),
    expected: &[u8],
) {
    assert!(!expected.is_empty(), "give the suite some bytes to expect");
    let (bytes, known) = (size(), expected.len());
    assert!(bytes >= known as u64, "size() is {bytes}, less than the {known} bytes expected");
    assert_eq!(bytes, size(), "size() must not change between two calls");
    assert_eq!(granularity(), granularity(), "granularity() must not change between two calls");
    assert!(!name().is_empty(), "name() must say something: it stands in errors and plans");
}

fn fills_all_of_the_buffer(source: &dyn Source, expected: &[u8]) {
    for before in [0x00, 0xff] {
        let mut into = vec![before; expected.len()];
        source.read_at(0, &mut into).expect("read_at of the whole");
        assert!(
            into == expected,
            "read_at must fill all of the buffer with the source's bytes, whatever it held"
        );
    }
    source.read_at(expected.len() as u64, &mut []).expect("read_at of nothing, at the end");
}

fn does_not_depend_on_the_split(source: &dyn Source, expected: &[u8]) {
    for step in [1, 7, 4096, 4099, 65_536] {
        // Single bytes of a long source would take long, so only its head is read.
        let part = &expected[..expected.len().min(step * 1000)];
        for (index, piece) in part.chunks(step).enumerate() {
            let mut into = vec![0xaa; piece.len()];
            let offset = (index * step) as u64;
            source.read_at(offset, &mut into).unwrap_or_else(|error| panic!("read_at({offset}): {error}"));
            assert!(
                into == piece,
                "{} bytes at {offset} differ from the same bytes of a longer read",
                piece.len()
            );
        }
    }
}

fn answers_several_threads(source: &dyn Source, expected: &[u8]) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| does_not_depend_on_the_split(source, expected));
        }
    });
}

fn shows_through_a_region(chunk: impl Fn() -> Chunk, expected: &[u8]) {
    let pool = Pool::builder().workers(2).start().expect("a pool");
    let len = expected.len() as u64;
    // The odd byte in front lets every page of the second copy start inside a page of the source.
    let region = Region::builder()
        .chunk(chunk().range(0..len))
        .chunk(vec![0x55])
        .chunk(chunk().range(0..len))
        .build(&pool)
        .expect("a region of the source");
    assert!(region.as_slice()[..expected.len()] == *expected, "the bytes differ when touched in a region");
    let mut second = vec![0; expected.len()];
    region.read_at(len + 1, &mut second).expect("read_at of the region");
    assert!(second == *expected, "the bytes differ when read at an odd offset of a region");
}
