//! Inline regions, where the touching thread fills its page in a signal handler: the same bytes,
//! from many threads, beside other handlers.

use crate::donated::pages_of;
use crate::machine::rounds;
use crate::{PAGE, discard, handle_bus_errors, pattern, touch, until};
use pagestitch::source::{Memfd, SharedFile, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, Inline, Pool, Region};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

fn stitched(bytes: &[u8]) -> Region {
    let chunks = bytes.chunks(1500).map(<[u8]>::to_vec);
    Region::builder().chunks(chunks).build(Inline).unwrap()
}

#[test]
fn an_inline_region_shows_every_byte_without_a_worker() {
    let bytes = pattern(1, 300 * PAGE + 77);
    let region = stitched(&bytes);
    assert!(region.as_slice() == bytes);
    let seen = region.close();
    assert_eq!((seen.faults, seen.pages_installed(), seen.pages_ahead), (301, 301, 0));
}

#[test]
fn every_kind_of_inline_chunk_shows_its_bytes() {
    let memfd = UnsealedMemfd::create("inline", 2 * PAGE as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(memfd.file(), &[5; 2 * PAGE], 0).unwrap();
    let memfd = Memfd::from(memfd.seal().unwrap());
    let donated = pattern(2, 3 * PAGE);
    let region = Region::builder()
        .chunk(Chunk::from(memfd.clone()))
        .chunk(pages_of(&donated))
        .chunk(vec![6u8; 100])
        .chunk(Chunk::from(memfd).range(1..PAGE as u64))
        .chunk(Chunk::hole(3 * PAGE as u64))
        .chunk(vec![7u8; PAGE])
        .build(Inline)
        .unwrap();
    let mut expected = vec![5; 2 * PAGE];
    expected.extend(donated);
    expected.extend([6; 100]);
    expected.extend([5; PAGE - 1]);
    expected.extend([0; 3 * PAGE]);
    expected.extend([7; PAGE]);
    assert!(region.as_slice() == expected);
}

#[test]
fn borrowed_memory_is_served_inline() {
    let bytes = pattern(3, 10 * PAGE);
    pagestitch::scope(|scope| {
        let region = scope.region().borrow(&bytes).build(Inline).unwrap();
        assert!(region.as_slice() == bytes);
    });
}

#[test]
fn a_chunk_that_a_signal_handler_must_not_read_is_refused() {
    let chunk = Chunk::source(Arc::new(Scripted::new(100)));
    let builder = Region::builder().name("fast").chunk(vec![1u8; 10]).chunk(chunk);
    let error = builder.build(Inline).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::UnsuitableServer, Some(1)), "{error}");
}

#[test]
fn many_threads_fill_the_same_pages() {
    let bytes = pattern(4, 2000 * PAGE);
    let region = stitched(&bytes);
    scope(|scope| {
        for reader in 0..8usize {
            let (region, bytes) = (&region, &bytes);
            scope.spawn(move || {
                // Half of the threads start at the other end.
                for i in 0..2000 {
                    let page = PAGE * if reader.is_multiple_of(2) { i } else { 1999 - i };
                    assert!(region.as_slice()[page..page + PAGE] == bytes[page..page + PAGE]);
                }
            });
        }
    });
    assert_eq!(region.close().pages_installed(), 2000);
}

#[test]
fn inline_regions_are_built_and_dropped_during_faults() {
    let bytes = pattern(5, 100 * PAGE);
    let done = AtomicBool::new(false);
    scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..rounds(100) {
                    let region = stitched(&bytes[..20 * PAGE]);
                    assert!(region.as_slice() == &bytes[..20 * PAGE]);
                }
                done.store(true, Ordering::SeqCst);
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                assert!(stitched(&bytes).as_slice() == bytes);
            }
        });
    });
}

#[test]
fn a_discarded_page_is_filled_again() {
    let bytes = pattern(6, 50 * PAGE);
    let region = stitched(&bytes);
    for _ in 0..3 {
        assert!(region.as_slice() == bytes);
        discard(region.as_ptr().addr().get() + 10 * PAGE, 20 * PAGE);
    }
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_writable_inline_region_is_populated() {
    let bytes = pattern(7, 1200 * PAGE);
    let mut region = Region::builder().chunk(bytes.clone()).writable().build(Inline).unwrap();
    assert!(!region.serves_system_calls());
    region.as_mut_slice().unwrap()[700 * PAGE] = 0;
    region.populate(..).unwrap();
    let before = region.metrics().faults;
    assert_eq!(region.as_slice()[700 * PAGE], 0);
    assert!(region.as_slice()[..700 * PAGE] == bytes[..700 * PAGE]);
    assert_eq!(region.metrics().faults, before);
}

#[test]
fn a_fault_keeps_errno() {
    let region = stitched(&pattern(8, 10 * PAGE));
    nix::errno::Errno::set_raw(77);
    std::hint::black_box(region.as_slice()[5 * PAGE]);
    assert_eq!(nix::errno::Errno::last_raw(), 77);
}

#[test]
fn an_earlier_sigbus_handler_gets_signals_outside_regions() {
    let end = child::run(this_test!(), || {
        handle_bus_errors(count);
        let region = stitched(&pattern(9, 10 * PAGE));
        assert_ne!(region.as_slice()[PAGE], 0);
        assert_eq!(SEEN.load(Ordering::SeqCst), 0, "a fault of a region is not passed on");
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
        assert_eq!(SEEN.load(Ordering::SeqCst), 1);
        assert_ne!(region.as_slice()[2 * PAGE], 0, "our handler is still installed");
        assert_eq!(SEEN.load(Ordering::SeqCst), 1);
    });
    end.expect_pass();
}

static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: i32) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_bus_error_outside_regions_ends_the_process() {
    let end = child::run(this_test!(), || {
        let region = stitched(&pattern(10, 10 * PAGE));
        assert_ne!(region.as_slice()[PAGE], 0);
        // Past the end of a truncated file.
        let memfd = UnsealedMemfd::create("short", PAGE as u64).unwrap();
        let file = SharedFile::try_from(&memfd).unwrap();
        let shared = Region::builder().chunk(Arc::new(file)).build_shared(Inline).unwrap();
        memfd.file().set_len(0).unwrap();
        println!("read {}", touch(shared.as_ptr().addr().get()));
    });
    assert_eq!(end.signal(), Some(nix::libc::SIGBUS), "{}", end.output());
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "memory of the sanitizer may lie where the region was")]
fn a_dropped_inline_region_is_a_signal_and_not_zeros() {
    let end = child::run(this_test!(), || {
        let region = stitched(&pattern(11, 10 * PAGE));
        let address = region.as_ptr().addr().get();
        drop(region);
        println!("read {}", touch(address));
    });
    assert_eq!(end.signal(), Some(nix::libc::SIGSEGV), "{}", end.output());
}

#[test]
fn an_inline_region_and_a_pool_serve_side_by_side() {
    let bytes = pattern(12, 100 * PAGE);
    let pool = Pool::new().unwrap();
    let (inline, pooled) =
        (Arc::new(stitched(&bytes)), Region::builder().chunk(bytes.clone()).build(&pool).unwrap());
    assert!(inline.as_slice() == pooled.as_slice());
    until(|| pooled.metrics().pages_installed() == 100);
    assert_eq!(inline.metrics().pages_installed(), 100);
}
