//! The pages that were written since the last question: too many may be reported, never too few.

use crate::donated::pages_of;
use crate::firecracker::{PAGES, connect, expected};
use crate::handler::RunningHandler;
use crate::machine::rounds;
use crate::shared::memfd_of;
use crate::{HANG, PAGE, REPORTS, SetOnDrop, discard, own_memory, pattern, touch, until};
use pagestitch::source::FileSource;
use pagestitch::{
    BuildOption, Chunk, Eager, Error, ErrorKind, Inline, Pool, Readahead, Region, Server, SharedRegion,
    Source,
};
use pagestitch_firecracker::{Extents, Handler, Snapshot};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Features, Support};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// True, with a line that says so, where the kernel records no writes (before Linux 6.7).
pub(crate) fn records_no_writes(test: &str) -> bool {
    let lacks = !Support::current().has(Features::WRITE_PROTECT_ASYNC);
    if lacks {
        println!("SKIPPED {test}: this kernel records no writes (Linux 6.7)");
    }
    lacks
}

fn tracked(chunk: impl Into<Chunk>, server: impl Into<Server>) -> SharedRegion {
    Region::builder().chunk(chunk.into()).writable().track_changes().build_shared(server).unwrap()
}

fn pages(pages: Range<usize>) -> Range<u64> {
    (pages.start * PAGE) as u64..(pages.end * PAGE) as u64
}

fn changes(region: &SharedRegion) -> Vec<Range<u64>> {
    region.changes().unwrap().collect()
}

fn write(region: &SharedRegion, page: usize) {
    region.write_at((page * PAGE) as u64 + 5, b"new").unwrap();
}

#[test]
fn each_written_page_is_reported_once_by_every_server() {
    if records_no_writes(this_test!()) {
        return;
    }
    let bytes = pattern(1, 40 * PAGE + 100);
    let pool = Pool::new().unwrap();
    for server in [Server::from(&pool), Server::from(Inline)] {
        let region = tracked(bytes.clone(), server);
        region.populate(..(20 * PAGE) as u64).unwrap();
        assert_eq!(changes(&region), [], "a page that is only filled has not changed");
        for page in [3, 4, 19, 25] {
            write(&region, page);
        }
        region.write_at(40 * PAGE as u64 + 99, b"!").unwrap();
        let end = 40 * PAGE as u64..40 * PAGE as u64 + 100;
        assert_eq!(changes(&region), [pages(3..5), pages(19..20), pages(25..26), end]);
        assert_eq!(changes(&region), []);
        write(&region, 4);
        assert_eq!(changes(&region), [pages(4..5)]);
    }
}

/// The kernel waits for the bytes of a page in the middle of the write, and a scan comes meanwhile.
#[test]
fn a_write_whose_bytes_come_late_is_reported_after_it() {
    if records_no_writes(this_test!()) {
        return;
    }
    let (pool, source) = (Pool::builder().workers(2).start().unwrap(), Scripted::new(2 * PAGE as u64));
    let source = Arc::new(source.holding(PAGE as u64..2 * PAGE as u64));
    let late = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&pool).unwrap();
    if !late.serves_system_calls() {
        return println!("SKIPPED: the kernel waits for no page of an ordinary user");
    }
    let region = tracked(vec![0; 2 * PAGE], &pool);
    region.populate(..).unwrap();
    scope(|scope| {
        let writer = scope.spawn(|| region.write_at(0, late.as_slice()).unwrap());
        source.wait_until_held(1);
        let beside = changes(&region);
        source.release();
        writer.join().unwrap();
        let after = changes(&region);
        assert!(after.iter().any(|range| range.end == 2 * PAGE as u64), "{beside:?}, then {after:?}");
    });
}

/// A page without bytes has none to save. Once it has those of its source again, it has changed.
#[test]
fn a_written_page_that_is_discarded_and_poisoned_is_reported_after_a_retry() {
    if records_no_writes(this_test!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changes");
    let saved = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let read_only = File::open(&path).unwrap();
    for reports in REPORTS {
        for is_reported in [false, true] {
            let source = Arc::new(Fickle::default());
            let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).writable();
            let builder = builder.track_changes().report_discards(reports).readahead(Readahead::None);
            let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
            region.write_at(0, &[2; 3 * PAGE]).unwrap();
            if is_reported {
                assert_eq!(changes(&region), [pages(0..3)]);
                region.write_at(0, &[3; 3 * PAGE]).unwrap();
            }
            assert_eq!(region.save_changes(&read_only).unwrap_err().kind(), ErrorKind::Io);
            discard(region.as_ptr().addr().get() + PAGE, PAGE);
            // The event of the discard is handled, and not only read: the events of a region come in order.
            touch(region.as_ptr().addr().get() + 3 * PAGE);
            assert_eq!(region.save_changes(&read_only).unwrap_err().kind(), ErrorKind::Io);
            source.fails.store(true, Ordering::SeqCst);
            region.populate(PAGE as u64..2 * PAGE as u64).unwrap_err();
            let ranges: Vec<_> = region.save_changes(&saved).unwrap().collect();
            assert_eq!(ranges, [pages(0..1), pages(2..3)]);
            assert_eq!(changes(&region), []);
            source.fails.store(false, Ordering::SeqCst);
            region.retry_failed(..).unwrap();
            assert_eq!(changes(&region), [pages(1..2)]);
        }
    }
}

/// A source whose reads fail at times.
#[derive(Default)]
struct Fickle {
    fails: AtomicBool,
}

impl Source for Fickle {
    fn size(&self) -> u64 {
        4 * PAGE as u64
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("it fails"));
        }
        into.fill(1);
        Ok(())
    }
}

#[test]
fn more_runs_than_the_kernel_returns_at_once_are_all_reported() {
    if records_no_writes(this_test!()) {
        return;
    }
    let region = tracked(Chunk::hole(3000 * PAGE as u64), &Pool::new().unwrap());
    for page in (0..3000).step_by(2) {
        write(&region, page);
    }
    let reported = changes(&region);
    assert!(reported.iter().cloned().eq((0..3000).step_by(2).map(|page| pages(page..page + 1))));
    assert_eq!(changes(&region), []);
}

#[test]
fn pages_of_every_kind_of_chunk_are_tracked() {
    if records_no_writes(this_test!()) {
        return;
    }
    let bytes = pattern(2, 4 * PAGE);
    let mut region = Region::builder()
        .chunk(vec![1u8; 2 * PAGE + 7])
        .chunk(vec![2u8; 2 * PAGE - 7])
        .chunk(Chunk::hole(4 * PAGE as u64))
        .chunk(crate::zero_copy::memfd(&bytes))
        .chunk(pages_of(&bytes))
        .chunk(Chunk::source(Arc::new(Scripted::new(4 * PAGE as u64))))
        .writable()
        .track_changes()
        .build(&Pool::new().unwrap())
        .unwrap();
    let before = region.as_slice().to_vec();
    assert_eq!(region.changes().unwrap().len(), 0, "reads change nothing");
    let written = [1, 2, 5, 9, 13, 18];
    for page in written {
        region.write_at((page * PAGE) as u64, &[0xee]).unwrap();
    }
    let reported: Vec<_> = region.changes().unwrap().collect();
    assert_eq!(reported, [pages(1..3), pages(5..6), pages(9..10), pages(13..14), pages(18..19)]);
    let mut expected = before;
    written.iter().for_each(|page| expected[page * PAGE] = 0xee);
    assert!(region.as_slice() == expected);
}

#[test]
fn whole_blocks_arrive_by_copies_that_leave_a_record() {
    if records_no_writes(this_test!()) {
        return;
    }
    let region = tracked(pattern(3, 4 * HUGE), &Pool::new().unwrap());
    region.populate(..).unwrap();
    let metrics = region.metrics();
    assert_eq!((metrics.pages_staged, metrics.pages_installed()), (0, 4 * 512));
    assert_eq!(changes(&region), [], "a page that is moved in would count as written");
}

#[test]
fn a_written_page_that_is_discarded_is_reported_again() {
    if records_no_writes(this_test!()) {
        return;
    }
    let bytes = pattern(4, 3 * HUGE);
    let pool = Pool::new().unwrap();
    for server in [Server::from(&pool), Server::from(Inline)] {
        let region = tracked(bytes.clone(), server);
        let start = region.as_ptr().addr().get();
        let first = start.next_multiple_of(HUGE) - start;
        // A single page, and a whole block, whose page table the kernel may free.
        for range in [5 * PAGE..6 * PAGE, first..first + HUGE] {
            let page = range.start / PAGE;
            write(&region, page);
            assert_eq!(changes(&region), [pages(page..page + 1)]);
            discard(start + range.start, range.len());
            assert_eq!(changes(&region), [pages(page..page + 1)], "it has the bytes of its source again");
            assert_eq!(changes(&region), []);

            write(&region, page);
            assert_eq!(changes(&region), [pages(page..page + 1)]);
            discard(start + range.start, range.len());
            let mut byte = [0];
            region.read_at(range.start as u64 + 5, &mut byte).unwrap();
            assert_eq!(byte[0], bytes[range.start + 5]);
            assert_eq!(changes(&region), [pages(page..page + 1)], "it was filled again since");
            discard(start + range.start, range.len());
            assert!(changes(&region).len() <= 1);
            assert_eq!(changes(&region), []);
        }
    }
}

/// The discarding thread continues when its report is read, and may ask before the reader is done.
#[test]
fn the_first_discard_is_reported_by_a_call_right_behind_it() {
    if records_no_writes(this_test!()) {
        return;
    }
    let pool = Pool::new().unwrap();
    for _ in 0..50 {
        let region = tracked(Chunk::hole(8 * PAGE as u64), &pool);
        write(&region, 2);
        write(&region, 5);
        assert_eq!(changes(&region), [pages(2..3), pages(5..6)]);
        assert_eq!(changes(&region), []);
        discard(region.as_ptr().addr().get() + 4 * PAGE, 3 * PAGE);
        assert_eq!(changes(&region), [pages(5..6)]);
    }
}

/// Writers that stay right behind the fills, while another thread asks for changes and copies them to a
/// shadow. A lost write leaves a page of the shadow as it was.
#[test]
fn a_writer_right_behind_each_fill_loses_no_write() {
    if records_no_writes(this_test!()) {
        return;
    }
    let count = rounds(6 * 512) as usize;
    let bytes = pattern(5, count * PAGE);
    let region = tracked(bytes.clone(), &Pool::new().unwrap());
    let mut shadow = bytes;
    let (next, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let copy = |shadow: &mut Vec<u8>| {
        for run in region.changes().unwrap() {
            region.read_at(run.start, &mut shadow[run.start as usize..run.end as usize]).unwrap();
        }
    };
    scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let (region, next) = (&region, &next);
                scope.spawn(move || {
                    let mut byte = [0];
                    loop {
                        // Neighbours meet in one fill, because pages are filled ahead.
                        let page = next.fetch_add(1, Ordering::Relaxed);
                        if page >= count {
                            break;
                        }
                        let at = (page * PAGE + 17 * writer) as u64;
                        region.read_at(at, &mut byte).unwrap();
                        region.write_at(at, &[byte[0] ^ 0x55]).unwrap();
                        // A page behind, which was reported since, perhaps.
                        region.write_at((page / 2 * PAGE + 2000 + writer) as u64, &[page as u8]).unwrap();
                    }
                })
            })
            .collect();
        let (done, shadow, copy) = (&done, &mut shadow, &copy);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                copy(shadow);
            }
        });
        let _done = SetOnDrop(done);
        until(|| writers.iter().all(|writer| writer.is_finished()));
    });
    copy(&mut shadow);
    let mut all = vec![0; count * PAGE];
    region.read_at(0, &mut all).unwrap();
    let lost: Vec<_> =
        (0..count).filter(|page| all[page * PAGE..][..PAGE] != shadow[page * PAGE..][..PAGE]).collect();
    assert!(lost.is_empty(), "lost writes in pages {lost:?}");
}

#[test]
fn a_poisoned_page_has_not_changed_and_is_tracked_after_its_repair() {
    if records_no_writes(this_test!()) {
        return;
    }
    let source = Arc::new(Scripted::new(8 * PAGE as u64).failing(pages(3..4)));
    let region = tracked(Chunk::source(Arc::clone(&source)), &Pool::new().unwrap());
    assert!(region.populate(pages(3..4)).is_err());
    write(&region, 5);
    assert_eq!(changes(&region), [pages(5..6)]);
    source.repair();
    region.retry_failed(..).unwrap();
    region.populate(..).unwrap();
    // The scan has armed the marker of the poisoned page too.
    assert_eq!(changes(&region), []);
    write(&region, 3);
    assert_eq!(changes(&region), [pages(3..4)]);
}

#[test]
fn a_combination_without_a_record_is_refused_with_the_reason() {
    let pool = Pool::new().unwrap();
    let builder = || Region::builder().chunk(vec![7u8; PAGE]).track_changes();
    let refused = |error: Error, kind| {
        assert_eq!((error.kind(), error.option()), (kind, Some(BuildOption::TrackChanges)), "{error}");
    };
    use ErrorKind::{OptionConflict, UnsuitableServer};
    refused(builder().build(&pool).unwrap_err(), OptionConflict);
    refused(builder().writable().build(Eager).unwrap_err(), UnsuitableServer);
    let inherited = builder().writable().inherit_on_fork().build(&pool).unwrap_err();
    refused(inherited, OptionConflict);
    let shared = Region::builder().chunk(memfd_of(&[1; PAGE]).0).writable().track_changes();
    let error = shared.build_shared(&pool).unwrap_err();
    assert_eq!(error.chunk(), Some(0));
    refused(error, OptionConflict);
    let untracked = Region::builder().chunk(vec![7u8; PAGE]).writable().build_shared(&pool).unwrap();
    refused(untracked.changes().unwrap_err(), OptionConflict);
    if records_no_writes(this_test!()) {
        refused(builder().writable().build(&pool).unwrap_err(), ErrorKind::Unsupported);
        return;
    }
    let private = Chunk::copy_on_write(memfd_of(&[1; 2 * PAGE]).0);
    let region = tracked(private, &pool);
    write(&region, 1);
    assert_eq!(changes(&region), [pages(1..2)]);
}

#[test]
fn changes_that_cannot_be_saved_are_left_for_the_next_call() {
    if records_no_writes(this_test!()) {
        return;
    }
    let region = tracked(pattern(6, 20 * PAGE), &Pool::new().unwrap());
    write(&region, 7);
    let read_only = File::open("/proc/self/exe").unwrap();
    assert_eq!(region.save_changes(&read_only).unwrap_err().kind(), ErrorKind::Io);
    write(&region, 9);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[9; 30 * PAGE], 0).unwrap();
    assert!(region.save_changes(&file).unwrap().eq([pages(7..8), pages(9..10)]));
    let mut saved = vec![1; 20 * PAGE];
    file.read_exact_at(&mut saved, 0).unwrap();
    let mut page = vec![0; PAGE];
    region.read_at(7 * PAGE as u64, &mut page).unwrap();
    assert_eq!(&saved[7 * PAGE..8 * PAGE], page);
    assert!(saved[..7 * PAGE].iter().all(|&byte| byte == 0), "older data is gone");
    assert_eq!(file.metadata().unwrap().len(), 20 * PAGE as u64);
}

/// A snapshot of a running guest: its base, and the pages that it has written since.
#[test]
fn saved_changes_are_a_diff_from_which_a_guest_is_restored() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        let expected = expected();
        (0..PAGES).for_each(|page| {
            let at = page * PAGE + page % PAGE;
            assert_eq!(guest.read(at), expected[at], "byte {at}");
        });
    });
    if records_no_writes(this_test!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| folder.path().join(name));
    let expected = expected();
    let mut old = expected.clone();
    let written: Vec<usize> = (0..PAGES).filter(|page| page % 50 == 7).collect();
    written.iter().for_each(|page| old[page * PAGE..][..PAGE].fill(0xaa));
    fs::write(&base, &old).unwrap();
    let region = tracked(Chunk::from(FileSource::open(&base).unwrap()), &Pool::new().unwrap());
    for page in &written {
        region.write_at((page * PAGE) as u64, &expected[page * PAGE..][..PAGE]).unwrap();
    }
    let saved = region.save_changes(&File::create(&diff).unwrap()).unwrap();
    assert_eq!(saved.len(), written.len());
    Extents::new(region.len() as u64, saved).expect("whole pages").write(&diff).unwrap();
    let snapshot = Snapshot::open([base, diff]).unwrap();
    let builder = Handler::builder(snapshot).own_memory(own_memory()).handshake_timeout(HANG);
    let mut running = RunningHandler::start(folder, builder);
    body.spawn(running.socket()).wait().expect_pass();
    running.stop();
}
