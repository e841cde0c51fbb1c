//! Whole blocks of 2 MiB: a block is filled in a huge page and moved in, for readahead, `populate`
//! and dense faults alike, with the right bytes.

use crate::donated::huge_kib;
use crate::{PAGE, discard, pattern, reason, stray_write, touch, until};
use pagestitch::source::FailureReason;
use pagestitch::{Chunk, Pool, Readahead, Region};
use pagestitch_kernel::staging;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;
use std::thread;

const BLOCK: usize = 2 << 20;
const BLOCK_PAGES: u64 = 512;

/// A region of many small chunks, so that several chunks meet in most pages.
fn stitched(bytes: &[u8]) -> Region {
    staging::never_pause();
    let chunks = bytes.chunks(10_007).map(<[u8]>::to_vec);
    Region::builder().chunks(chunks).build(&Pool::new().unwrap()).unwrap()
}

/// True if this machine can stage and move blocks; prints the reason otherwise.
fn staged(region: &Region) -> bool {
    region.plan().staged().inspect_err(|why| println!("SKIPPED in part: {why}")).is_ok()
}

#[test]
fn a_whole_block_moves_in_as_a_huge_page() {
    let bytes = pattern(1, 4 * BLOCK + 5000);
    let region = stitched(&bytes);
    region.populate(..).unwrap();
    assert!(region.as_slice() == bytes);
    if staged(&region) {
        assert!(region.metrics().pages_staged >= BLOCK_PAGES);
        assert!(region.plan().to_string().contains("filled in a huge page and moved in"));
        // A machine may run out of huge pages, but not in this short time.
        assert!(huge_kib(region.as_slice()) > 0, "moved as small pages");
    }
    assert_eq!(region.close().pages_installed(), 4 * BLOCK_PAGES + 2);
}

#[test]
fn readahead_fills_whole_blocks() {
    let bytes = pattern(2, 16 * BLOCK);
    let region = stitched(&bytes);
    assert!(region.as_slice() == bytes);
    let staged = staged(&region);
    let seen = region.close();
    // On one CPU the reader may keep the CPU from the workers.
    let beside = thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    assert!(!staged || !beside || seen.pages_staged >= BLOCK_PAGES, "{seen:?}");
}

#[test]
fn a_dense_block_is_filled_in_any_order_of_faults() {
    let bytes = pattern(3, 4 * BLOCK);
    let region = stitched(&bytes);
    // Each page of one block, in an order that no readahead follows, and one page of another block.
    assert_eq!(region.as_slice()[3 * BLOCK], bytes[3 * BLOCK]);
    for page in (0..512).map(|i| BLOCK + i * 201 % 512 * PAGE) {
        assert_eq!(region.as_slice()[page], bytes[page]);
    }
    until(|| region.metrics().pages_installed() > BLOCK_PAGES);
    assert!(region.metrics().faults < 300, "{:?}", region.metrics());
    assert!(region.as_slice()[BLOCK..2 * BLOCK] == bytes[BLOCK..2 * BLOCK]);
}

#[test]
fn written_pages_keep_their_bytes_when_their_block_is_filled() {
    let bytes = pattern(4, 2 * BLOCK);
    let chunks = bytes.chunks(10_007).map(<[u8]>::to_vec);
    let mut region = Region::builder().chunks(chunks).writable().build(&Pool::new().unwrap()).unwrap();
    let written = region.as_mut_slice().unwrap();
    for page in (0..512).map(|i| i * 201 % 512 * PAGE) {
        written[page] = 0;
    }
    region.populate(..).unwrap();
    let expected = |i: usize| if i < BLOCK && i.is_multiple_of(PAGE) { 0 } else { bytes[i] };
    assert!(region.as_slice().iter().enumerate().all(|(i, &byte)| byte == expected(i)));
}

#[test]
fn holes_in_a_block_take_no_memory() {
    let region = Region::builder()
        .chunk(vec![1u8; PAGE])
        .chunk(Chunk::hole((2 * BLOCK - 2 * PAGE) as u64))
        .chunk(vec![2u8; PAGE])
        .build(&Pool::new().unwrap())
        .unwrap();
    region.populate(..).unwrap();
    let seen = region.close();
    assert_eq!((seen.pages_copied, seen.pages_zeroed, seen.pages_staged), (2, 2 * BLOCK_PAGES - 2, 0));
}

#[test]
fn a_failing_page_poisons_no_other_page_of_its_block() {
    let bad = (BLOCK + 7 * PAGE) as u64;
    let source = Arc::new(Scripted::new(3 * BLOCK as u64).failing(bad..bad + 1));
    let region = Region::builder().chunk(Chunk::source(source)).build(&Pool::new().unwrap()).unwrap();
    let error = region.populate(..).unwrap_err();
    assert_eq!((error.chunk(), reason(&error)), (Some(0), FailureReason::Source), "{error}");
    for page in (0..3 * 512).filter(|page| *page != 512 + 7) {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    assert_eq!(region.close().pages_poisoned, 1);
}

#[test]
fn populate_with_many_threads_fills_all_pages_before_a_failure() {
    let (blocks, bad) = (40, (30 * BLOCK + 5) as u64);
    let source = Arc::new(Scripted::new((blocks * BLOCK) as u64).failing(bad..bad + 1));
    let region = Region::builder().chunk(Chunk::source(source)).build(&Pool::new().unwrap()).unwrap();
    region.populate(..).unwrap_err();
    let before = region.metrics().faults;
    for page in 0..30 * 512 {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    assert_eq!(region.metrics().faults, before, "all pages before the failure were filled");
}

#[test]
fn a_discarded_block_is_filled_again() {
    for reports in crate::REPORTS {
        let bytes = pattern(5, 3 * BLOCK);
        staging::never_pause();
        let builder = Region::builder().chunk(bytes.clone()).keep_sources().report_discards(reports);
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        for _ in 0..3 {
            region.populate(..).unwrap();
            discard(region.as_ptr().addr().get() + BLOCK / 2, BLOCK);
            assert!(region.as_slice() == bytes);
        }
    }
}

#[test]
fn readahead_none_fills_touched_pages_only() {
    let builder = Region::builder().chunk(pattern(6, 2 * BLOCK)).readahead(Readahead::None);
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    let touched = (0..200).map(|i| i * 201 % 512 * PAGE);
    assert!(touched.map(|page| region.as_slice()[page]).all(|byte| byte != 0));
    assert_eq!(region.close().pages_installed(), 200);
}

#[test]
fn a_stray_write_to_a_hardware_read_only_region_is_a_signal() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(7, 2 * BLOCK);
        let region =
            Region::builder().chunk(bytes).hardware_read_only().build(&Pool::new().unwrap()).unwrap();
        assert!(
            region
                .plan()
                .to_string()
                .contains("copied page by page: the region is built hardware_read_only()")
        );
        region.populate(..).unwrap();
        assert_eq!(region.metrics().pages_staged, 0);
        assert_ne!(touch(region.as_ptr().addr().get()), 0);
        stray_write(region.as_ptr().addr().get());
        println!("written");
    });
    assert_eq!(end.signal(), Some(nix::libc::SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("written"));
}

#[test]
fn the_plan_promises_no_huge_pages_where_the_process_has_none() {
    let end = child::run(this_test!(), || {
        nix::sys::prctl::set_thp_disable(true).unwrap();
        let bytes = pattern(8, 2 * BLOCK);
        let region = Region::builder().chunk(bytes.clone()).build(&Pool::new().unwrap()).unwrap();
        assert!(region.plan().staged().is_err());
        region.populate(..).unwrap();
        assert!(region.as_slice() == bytes);
        assert_eq!(region.close().pages_staged, 0);
    });
    end.expect_pass();
}
