//! Regions whose pages are all mapped in place, or padding: without a userfaultfd, with each promise
//! of a region.

use crate::immutable::open;
use crate::{PAGE, discard, pattern, touch};
use nix::sys::signal::Signal;
use pagestitch::{Chunk, Eager, ErrorKind, Inline, Manual, Method, PlanReason, Pool, Region, Server};
use pagestitch_kernel::Errno;
use pagestitch_testkit::deny::deny_userfaultfd;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::{child, this_test};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use tempfile::NamedTempFile;

/// The bytes that the first file shows; not whole pages.
const FIRST: usize = 2 * PAGE + 77;
/// The bytes that the second file shows: enough for the same place in 2 MiB as in the file.
const SECOND: usize = (2 << 20) + 77;
/// The offset of the second file's first byte that is shown.
const FROM: usize = 5 * PAGE + 5;
/// The pages of padding between both.
const PADDING: std::ops::Range<usize> = 3..5;
const PAGES: usize = (FROM + SECOND).div_ceil(PAGE);

/// Two files of these bytes, as chunks.
fn chunks() -> ([NamedTempFile; 2], [Chunk; 2]) {
    let files = [(1, FIRST), (2, FROM + SECOND)].map(|(seed, bytes)| {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern(seed, bytes)).unwrap();
        file
    });
    let [first, second] = files.each_ref().map(|file| open(file.path()).unwrap());
    (files, [Chunk::from(first), Chunk::from(second).range(FROM as u64..(FROM + SECOND) as u64)])
}

/// A region of both files with two pages of padding between them, and its bytes.
fn build(server: impl Into<Server>) -> (Region, Vec<u8>) {
    let (_files, chunks) = chunks();
    let builder = Region::builder().name("r").page_aligned().chunks(chunks).require_zero_copy();
    let region = builder.build(server).unwrap();
    let mut bytes = pattern(1, FIRST);
    // The last page of a file shows zeros behind its end.
    bytes.resize(PADDING.end * PAGE, 0);
    bytes.extend(&pattern(2, FROM + SECOND)[PADDING.end * PAGE..]);
    (region, bytes)
}

fn address_of(region: &Region, page: usize) -> usize {
    region.as_ptr().expose_provenance().get() + page * PAGE
}

/// Calls `check` with a region of each server. No loop runs for the `Manual`, because it has no work.
fn on_each_server(check: impl Fn(Region, Vec<u8>)) {
    let manual = Manual::new().unwrap();
    let servers: [Server; 4] =
        [(&Pool::new().unwrap()).into(), (&manual).into(), Inline.into(), Eager.into()];
    for server in servers {
        let (region, bytes) = build(server);
        check(region, bytes);
    }
}

#[test]
fn files_with_padding_between_them_have_no_faults() {
    on_each_server(|region, bytes| {
        assert_eq!((region.offset_of(1), region.len()), (Some(FROM as u64), FROM + SECOND));
        assert!(region.as_slice() == bytes);
        let plan = region.plan();
        let reasons: Vec<_> = plan.runs().iter().map(|run| (run.method, run.reason)).collect();
        let file = (Method::Map, PlanReason::MappedByPromise);
        assert_eq!(reasons, [file, (Method::Zero, PlanReason::Padding), file], "{plan}");
        let parts = region.meter().coverage(1);
        assert_eq!((parts[0].pages, parts[0].present), (PAGES as u64, PAGES as u64));
        let seen = region.close();
        let shown = PAGES - PADDING.len();
        assert_eq!((seen.pages_in_place, seen.pages_installed(), seen.faults), (shown as u64, 0, 0));
    });
}

#[test]
fn a_discarded_page_without_faults_has_its_bytes_again() {
    on_each_server(|region, bytes| {
        assert!(region.as_slice() == bytes);
        discard(address_of(&region, 0), PAGES * PAGE);
        assert!(region.as_slice() == bytes);
        discard(address_of(&region, PADDING.start), PAGE);
        region.populate(..).unwrap();
        region.retry_failed(..).unwrap();
        assert!(region.as_slice() == bytes);
        assert!(region.failures().is_empty());
    });
}

#[test]
fn the_end_of_a_manual_leaves_a_region_without_faults_as_it_is() {
    let manual = Manual::new().unwrap();
    let (region, bytes) = build(&manual);
    drop(manual);
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_write_to_padding_stays_until_it_is_discarded() {
    let (_files, chunks) = chunks();
    let builder = Region::builder().page_aligned().chunks(chunks).writable();
    let mut region = builder.build(&Pool::new().unwrap()).unwrap();
    let at = PADDING.start * PAGE;
    region.as_mut_slice().unwrap()[at - 1..=at].copy_from_slice(&[8, 9]);
    assert_eq!(region.as_slice()[at - 1..=at], [8, 9]);
    let start = address_of(&region, PADDING.start - 1);
    discard(start, 2 * PAGE);
    assert_eq!(region.as_slice()[at - 1..=at], [0, 0], "behind the end of the file, and padding");
}

#[test]
fn a_prefetch_without_faults_ends_at_once() {
    for server in [Server::from(&Pool::new().unwrap()), Eager.into()] {
        let (region, _) = build(server);
        let progress = region.prefetch(..).unwrap().wait();
        assert_eq!(progress.pages_failed, 0, "{progress:?}");
    }
}

#[test]
fn a_region_without_faults_is_built_where_userfaultfd_is_denied() {
    let end = child::run(this_test!(), || {
        deny_userfaultfd(Errno::EPERM);
        let (region, bytes) = build(&Pool::new().unwrap());
        assert!(region.as_slice() == bytes);
        let mut part = vec![0; 3 * PAGE];
        region.read_at(PAGE as u64, &mut part).unwrap();
        assert!(part == bytes[PAGE..4 * PAGE]);
        let (_files, chunks) = chunks();
        let builder = Region::builder().chunks(chunks).chunk(vec![1; 10]);
        let error = builder.build(&Pool::new().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoUserfaultfd, "a chunk in memory needs one: {error}");
    });
    end.expect_pass();
}

#[test]
fn a_region_without_faults_belongs_to_its_pool() {
    let pool = Pool::new().unwrap();
    let (region, bytes) = build(&pool);
    let error = pool.clone().stop().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    assert!(region.as_slice() == bytes);
    drop(region);
    pool.stop().unwrap();
}

#[test]
fn files_that_need_more_mappings_than_allowed_are_copied() {
    let (_files, chunks) = chunks();
    let builder = Region::builder().page_aligned().chunks(chunks).max_mappings(1);
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    let copied = |run: &&pagestitch::PlanRun| run.reason == PlanReason::NoMappings;
    assert_eq!(region.plan().runs().iter().filter(copied).count(), 1, "{}", region.plan());
    assert!(region.as_slice()[FROM..] == pattern(2, FROM + SECOND)[FROM..]);
}

#[test]
fn a_forked_child_has_the_files_and_not_the_padding() {
    let end = child::run(this_test!(), || {
        let (region, bytes) = build(&Pool::new().unwrap());
        let read = |page| i32::from(touch(address_of(&region, page)) != bytes[page * PAGE]);
        assert!(ForkedChild::start(|| read(1) + read(PAGES - 1)).wait().success());
        let ended = ForkedChild::start(|| read(PADDING.start)).wait();
        assert_eq!(ended.signal(), Some(Signal::SIGSEGV as i32), "{ended}");
    });
    end.expect_pass();
}
