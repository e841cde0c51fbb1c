//! Regions whose pages are those of a memfd: other processes map them.

use crate::changes::records_no_writes;
use crate::donated::pages_of;
use crate::guests::adopt;
use crate::shared::memfd_of;
use crate::{
    PAGE, SIGSEGV, become_ordinary_user, discard, is_readable, lacks_poison, pattern, reason, touch, until,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::PollTimeout;
use pagestitch::source::{FailureReason, SharedFile};
use pagestitch::{
    BuildOption, Chunk, ErrorKind, Inline, Manual, Method, PlanReason, Pool, Readahead, Region, Server,
    SharedRegion,
};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const PAGES: usize = 12;

fn on_memfd(chunk: impl Into<Chunk>, server: impl Into<Server>) -> SharedRegion {
    let builder = Region::builder().name("guest").chunk(chunk.into()).writable().readahead(Readahead::None);
    builder.on_memfd().build_shared(server).unwrap()
}

fn file(region: &SharedRegion) -> &File {
    region.file().expect("the region is on a memfd")
}

fn in_file(region: &SharedRegion, page: usize) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    file(region).read_exact_at(&mut bytes, (page * PAGE) as u64).unwrap();
    bytes
}

/// A second mapping of the memfd, as another process has one.
fn other_mapping(region: &SharedRegion, pool: &Pool) -> SharedRegion {
    let memfd = SharedFile::try_from(file(region).try_clone().unwrap()).unwrap();
    let other = Region::builder().chunk(memfd).writable().require_zero_copy().build_shared(pool).unwrap();
    assert!(other.plan().runs().iter().all(|run| run.method == Method::Map));
    other
}

fn punch(region: &SharedRegion, page: usize, pages: usize) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file(region), flags, (page * PAGE) as i64, (pages * PAGE) as i64).unwrap();
}

fn read(region: &SharedRegion, page: usize) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    region.read_at((page * PAGE) as u64, &mut bytes).unwrap();
    bytes
}

fn page_of(bytes: &[u8], page: usize) -> &[u8] {
    &bytes[page * PAGE..(page + 1) * PAGE]
}

#[test]
fn each_server_fills_pages_that_the_memfd_has_from_then_on() {
    let (bytes, pool, manual) = (pattern(1, PAGES * PAGE), Pool::new().unwrap(), Manual::new().unwrap());
    let servers = [(Server::from(&pool), true), (Server::from(Inline), true), (Server::from(&manual), false)];
    for (server, faults) in servers {
        let region = on_memfd(bytes.clone(), server);
        let start = region.as_ptr().addr().get();
        assert_eq!(region.plan().runs()[0].method, Method::Copy);
        if faults {
            assert_eq!(touch(start + 3 * PAGE + 5), bytes[3 * PAGE + 5]);
            assert_eq!(in_file(&region, 3), page_of(&bytes, 3));
            assert_eq!(in_file(&region, 4), [0; PAGE], "a page that is not filled is zeros for others");
        }
        region.populate(..).unwrap();
        let other = other_mapping(&region, &pool);
        assert!((0..PAGES).all(|page| read(&other, page) == page_of(&bytes, page)));
        region.write_at(2 * PAGE as u64 - 2, b"ours").unwrap();
        other.write_at(9 * PAGE as u64, b"theirs").unwrap();
        assert_eq!(&in_file(&region, 2)[..2], b"rs");
        assert_eq!(touch(start + 9 * PAGE), b't');
    }
}

#[test]
fn a_page_that_another_mapping_touches_first_is_zeros_and_a_populated_one_is_not() {
    let (bytes, pool) = (pattern(2, PAGES * PAGE), Pool::new().unwrap());
    let region = on_memfd(bytes.clone(), &pool);
    region.populate(..PAGE as u64).unwrap();
    let other = other_mapping(&region, &pool);
    assert_eq!(read(&other, 0), page_of(&bytes, 0));
    assert_eq!(read(&other, 1), [0; PAGE]);
    other.write_at(2 * PAGE as u64 + 7, b"first").unwrap();
    assert_eq!(read(&region, 1), [0; PAGE]);
    region.populate(..).unwrap();
    assert_eq!(&read(&region, 2)[6..13], b"\0first\0");
    assert_eq!(read(&region, 3), page_of(&bytes, 3));
}

#[test]
fn an_adopted_mapping_of_another_process_is_filled_through_the_same_memfd() {
    if lacks_poison(this_test!()) {
        return;
    }
    let (pool, source) = (Pool::new().unwrap(), Arc::new(Scripted::new((PAGES * PAGE) as u64)));
    let region = on_memfd(Chunk::source(Arc::clone(&source)), &pool);
    // A guest of this process stands for the other one, with a mapping and a userfaultfd of its own.
    let guest = Guest::in_file(file(&region), PAGES * PAGE).unwrap();
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
    let adopted = builder.build_adopted(adopt(&guest), &pool).unwrap();
    assert_eq!(touch(region.as_ptr().addr().get() + 5 * PAGE), byte_at(5 * PAGE as u64));
    assert!((0..PAGES * PAGE).step_by(PAGE).all(|offset| guest.read(offset) == byte_at(offset as u64)));
    assert_eq!(source.reads(), PAGES as u64, "each page is filled once, by the first of the two");
    assert_eq!(read(&region, 7)[0], byte_at(7 * PAGE as u64));
    adopted.finish().unwrap();
}

#[test]
fn a_page_that_is_taken_out_of_the_memfd_is_filled_again_and_an_unmapped_one_is_kept() {
    let (bytes, pool) = (pattern(3, PAGES * PAGE), Pool::new().unwrap());
    for server in [Server::from(&pool), Server::from(Inline)] {
        let region = on_memfd(bytes.clone(), server);
        region.populate(..).unwrap();
        let start = region.as_ptr().addr().get();
        for page in 1..5 {
            region.write_at((page * PAGE) as u64, b"new").unwrap();
        }
        punch(&region, 1, 2);
        assert_eq!(touch(start + PAGE), bytes[PAGE]);
        assert_eq!(read(&region, 2), page_of(&bytes, 2));
        discard(start + 3 * PAGE, 2 * PAGE);
        assert_eq!(&read(&region, 3)[..3], b"new");
        assert_eq!(touch(start + 4 * PAGE), b'n');
        // A range that is punched as a whole is populated as a whole.
        punch(&region, 0, PAGES);
        region.populate(..).unwrap();
        assert!((0..PAGES).all(|page| in_file(&region, page) == page_of(&bytes, page)));
    }
}

#[test]
fn changes_finds_a_written_page_that_the_kernel_has_unmapped() {
    if records_no_writes(this_test!()) {
        return;
    }
    let (bytes, pool) = (pattern(4, PAGES * PAGE), Pool::new().unwrap());
    let builder = Region::builder().chunk(bytes).writable().track_changes().on_memfd();
    let region = builder.build_shared(&pool).unwrap();
    region.populate(..).unwrap();
    let changes = || region.changes().unwrap().collect::<Vec<_>>();
    let pages = |pages: std::ops::Range<usize>| (pages.start * PAGE) as u64..(pages.end * PAGE) as u64;
    assert_eq!(changes(), [], "a page that is only filled has not changed");
    let start = region.as_ptr().addr().get();
    region.write_at(3 * PAGE as u64, b"new").unwrap();
    assert_eq!(changes(), [pages(3..4)]);
    assert_eq!(changes(), []);
    for page in [5, 8] {
        region.write_at((page * PAGE) as u64, b"new").unwrap();
    }
    discard(start + 5 * PAGE, PAGE);
    let found = changes();
    assert!(found.contains(&pages(5..6)) && found.contains(&pages(8..9)), "{found:?}");
    discard(start, PAGES * PAGE);
    region.write_at(2 * PAGE as u64, b"new").unwrap();
    assert!(changes().contains(&pages(2..3)), "a page that was unmapped and then written");
}

#[test]
fn chunks_of_every_kind_are_copied_into_the_memfd_and_memory_of_others_is_refused() {
    let (bytes, pool) = (pattern(5, 2 * PAGE), Pool::new().unwrap());
    let region = Region::builder()
        .chunk(vec![1u8; PAGE + 7])
        .chunk(vec![2u8; PAGE - 7])
        .chunk(Chunk::hole(2 * PAGE as u64))
        .chunk(crate::zero_copy::memfd(&bytes))
        .chunk(pages_of(&bytes))
        .chunk(Chunk::copy_on_write(memfd_of(&bytes).0))
        .on_memfd()
        .build_shared(&pool)
        .unwrap();
    let expected = [vec![1; PAGE + 7], vec![2; PAGE - 7], vec![0; 2 * PAGE], bytes.repeat(3)].concat();
    let mut all = vec![0; region.len()];
    region.read_at(0, &mut all).unwrap();
    assert!(all == expected);
    file(&region).read_exact_at(&mut all, 0).unwrap();
    assert!(all == expected);
    assert!(region.plan().runs().iter().any(|run| run.reason == PlanReason::OnMemfd), "{}", region.plan());
    let error = Region::builder().chunk(memfd_of(&bytes).0).on_memfd().build_shared(&pool).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::OptionConflict, Some(BuildOption::OnMemfd)));
    assert_eq!(error.chunk(), Some(0));
}

#[test]
fn a_read_only_region_refuses_writes_and_other_processes_write() {
    let (bytes, pool) = (pattern(6, PAGES * PAGE), Pool::new().unwrap());
    let region = Region::builder().chunk(bytes).on_memfd().hardware_read_only().build_shared(&pool).unwrap();
    region.populate(..).unwrap();
    assert_eq!(region.write_at(0, b"no").unwrap_err().kind(), ErrorKind::ReadOnly);
    file(&region).write_all_at(b"yes", 10).unwrap();
    assert_eq!(&read(&region, 0)[10..13], b"yes");
    assert!(file(&region).set_len(PAGE as u64).is_err(), "its length is sealed");
}

#[test]
fn a_region_on_a_memfd_has_shards_and_grows() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let builder = Region::builder().name("a\0name".repeat(60)).chunk(vec![7u8; 9 << 20]).shards(4).on_memfd();
    let region = builder.build_shared(&pool).unwrap();
    assert_eq!(region.shards().len(), 4);
    region.populate(..).unwrap();
    assert_eq!(in_file(&region, (9 << 20) / PAGE - 1), [7; PAGE]);
    let log = Region::builder().capacity(1 << 20).on_memfd().build_shared(&pool).unwrap();
    log.append(vec![1u8; 5_000]).unwrap();
    log.append(vec![2u8; 5_000]).unwrap();
    assert_eq!(read(&log, 1), [vec![1; 5_000 - PAGE], vec![2; 2 * PAGE - 5_000]].concat());
    assert_eq!(in_file(&log, 1), read(&log, 1));
}

#[test]
fn a_failed_page_of_a_memfd_is_filled_by_a_retry() {
    if lacks_poison(this_test!()) {
        return;
    }
    let pool = Pool::new().unwrap();
    let source = Arc::new(Scripted::new((PAGES * PAGE) as u64).failing(2 * PAGE as u64..3 * PAGE as u64));
    let region = on_memfd(Chunk::source(Arc::clone(&source)), &pool);
    let error = region.read_at(2 * PAGE as u64, &mut [0]).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Source);
    assert_eq!(in_file(&region, 2), [0; PAGE]);
    source.repair();
    region.retry_failed(..).unwrap();
    assert_eq!(read(&region, 2)[0], byte_at(2 * PAGE as u64));
}

#[test]
fn a_thread_that_waits_at_the_end_of_a_region_on_a_memfd_gets_a_signal() {
    let end = child::run(this_test!(), || {
        let manual = Manual::new().unwrap();
        let region = on_memfd(pattern(8, PAGE), &manual);
        let start = region.as_ptr().addr().get();
        let waits = std::thread::spawn(move || touch(start));
        until(|| is_readable(&manual, PollTimeout::ZERO));
        drop(region);
        waits.join().unwrap();
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
}

#[test]
fn an_ordinary_user_has_regions_on_memfds() {
    let end = child::run(this_test!(), || {
        become_ordinary_user();
        let (bytes, pool) = (pattern(7, PAGES * PAGE), Pool::new().unwrap());
        let region = on_memfd(bytes.clone(), &pool);
        assert_eq!(read(&region, 3), page_of(&bytes, 3));
        region.write_at(5 * PAGE as u64, b"new").unwrap();
        discard(region.as_ptr().addr().get(), PAGES * PAGE);
        assert_eq!(&read(&region, 5)[..3], b"new");
        punch(&region, 5, 1);
        assert_eq!(read(&region, 5), page_of(&bytes, 5));
    });
    end.expect_pass();
}
