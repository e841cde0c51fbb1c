//! Write-back: written pages reach their sources by a flush or by the drop, and no error loses one.

use crate::bounded_writes::{
    BUDGET, PAGES, bounded, has_second_round, kill_when, moves_no_pages, round_of, stamped,
};
use crate::changes::records_no_writes;
use crate::machine::rounds;
use crate::waits::until;
use crate::{PAGE, REPORTS, SetOnDrop, discard, pattern, touch};
use nix::libc::{EIO, ENOSPC};
use pagestitch::source::{WritableFile, WritableSource};
use pagestitch::{
    Budget, BuildOption, Chunk, Eager, ErrorKind, Pool, Readahead, Region, SharedRegion, Source, WriteBack,
};
use pagestitch_kernel::Errno;
use pagestitch_testkit::deny::{deny_copies, deny_syncs};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use proptest::prelude::*;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, mpsc};

/// A source that logs its writes, and fails on demand.
#[derive(Default)]
struct Disk(Mutex<State>);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    writes: Vec<(u64, usize)>,
    syncs: usize,
    /// Writes that meet these bytes fail with this errno.
    failing: Option<(Range<u64>, i32)>,
    sync_fails: bool,
    /// Reads that meet these bytes fail.
    unreadable: Option<Range<u64>>,
    /// The next write discards the page at this address.
    discards: Option<usize>,
    /// The most bytes of one write; 0 for no limit.
    most: usize,
}

impl Disk {
    fn of(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { bytes: bytes.to_vec(), ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writes(&self) -> Vec<(u64, usize)> {
        std::mem::take(&mut self.state().writes)
    }
}

impl Source for Disk {
    fn size(&self) -> u64 {
        self.state().bytes.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        let end = offset + into.len() as u64;
        if state.unreadable.as_ref().is_some_and(|range| offset < range.end && range.start < end) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        into.copy_from_slice(&state.bytes[offset as usize..][..into.len()]);
        Ok(())
    }
}

impl WritableSource for Disk {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let discards = self.state().discards.take();
        discards.into_iter().for_each(|page| discard(page, PAGE));
        let mut state = self.state();
        let end = offset + bytes.len() as u64;
        if let Some((failing, errno)) = &state.failing
            && offset < failing.end
            && failing.start < end
        {
            return Err(io::Error::from_raw_os_error(*errno));
        }
        let written = if state.most > 0 { bytes.len().min(state.most) } else { bytes.len() };
        state.bytes[offset as usize..][..written].copy_from_slice(&bytes[..written]);
        state.writes.push((offset, written));
        Ok(written)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state();
        state.syncs += 1;
        if state.sync_fails { Err(io::Error::from_raw_os_error(EIO)) } else { Ok(()) }
    }
}

fn written_back(chunks: impl IntoIterator<Item = Chunk>) -> SharedRegion {
    let builder = Region::builder().chunks(chunks).write_back(WriteBack::ToSource);
    builder.build_shared(&Pool::new().unwrap()).unwrap()
}

fn at(page: usize) -> u64 {
    (page * PAGE) as u64
}

#[test]
fn a_flush_writes_neighbouring_dirty_pages_at_once_and_syncs() {
    if records_no_writes(this_test!()) {
        return;
    }
    let bytes = pattern(1, 20 * PAGE + 50);
    let disk = Disk::of(&bytes);
    let region = written_back([Chunk::writable(Arc::clone(&disk))]);
    region.flush(..).unwrap();
    assert_eq!((disk.writes(), disk.state().syncs), (vec![], 0), "nothing is dirty");
    region.write_at(at(3) + 4090, b"three pages").unwrap();
    region.write_at(at(5), b"a").unwrap();
    region.write_at(at(20) + 49, b"z").unwrap();
    region.flush(at(4)..at(5)).unwrap();
    assert_eq!(disk.writes(), [(at(4), PAGE)], "the page of the range alone");
    region.flush(..).unwrap();
    assert_eq!(disk.writes(), [(at(3), PAGE), (at(5), PAGE), (at(20), 50)]);
    region.write_at(at(6), &[7; 3 * PAGE]).unwrap();
    region.flush(..).unwrap();
    assert_eq!(disk.writes(), [(at(6), 3 * PAGE)]);
    region.flush(..).unwrap();
    assert_eq!((disk.writes(), disk.state().syncs), (vec![], 3));
    let mut all = vec![0; bytes.len()];
    region.read_at(0, &mut all).unwrap();
    assert!(disk.state().bytes == all);
}

/// Pages leave in batches, each in the order of addresses.
#[test]
fn an_eviction_writes_neighbouring_dirty_pages_at_once() {
    if moves_no_pages() {
        return;
    }
    const RUNS: [Range<usize>; 4] = [3..9, 10..11, 20..52, 60..62];
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(&[1; 64 * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    region.populate(..).unwrap();
    RUNS.into_iter().for_each(|run| region.write_at(at(run.start), &vec![2; run.len() * PAGE]).unwrap());
    until(|| {
        region.evict(..).unwrap();
        budget.metrics().dirty_bytes == 0
    });
    assert_eq!(disk.writes(), RUNS.map(|run| (at(run.start), run.len() * PAGE)));
    let is_written = |page: usize| RUNS.iter().any(|run| run.contains(&page));
    let expected: Vec<u8> = (0..64).flat_map(|page| [1 + u8::from(is_written(page)); PAGE]).collect();
    assert!(disk.state().bytes == expected);
}

/// A thread writes one page after the other, and needs room.
#[test]
fn evictions_for_room_write_neighbouring_dirty_pages_at_once() {
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(&vec![1; PAGES * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    (0..PAGES).for_each(|page| region.write_at(at(page), &[2; PAGE]).unwrap());
    let (writes, metrics) = (disk.writes(), budget.metrics());
    let pages = writes.iter().map(|(_, bytes)| bytes / PAGE).sum::<usize>();
    assert!(pages > PAGES / 2, "{metrics:?}");
    assert!(writes.len() < pages / 8, "{pages} pages in {} writes", writes.len());
}

/// A system call that writes changes bytes after the kernel has taken its record of the write.
#[test]
fn a_write_beside_a_flush_is_found_by_the_next_one() {
    if !records_no_writes(this_test!()) {
        write_beside_flushes();
    }
}

/// As where a container's seccomp profile denies that call.
#[test]
fn a_write_beside_a_flush_without_process_vm_writev_is_found_by_the_next_one() {
    if records_no_writes(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        deny_copies(Errno::EPERM);
        write_beside_flushes();
    });
    end.expect_pass();
}

fn write_beside_flushes() {
    const PAGES: usize = 256;
    let (disk, is_over) = (Disk::of(&[0; PAGES * PAGE]), AtomicBool::new(false));
    let region = written_back([Chunk::writable(Arc::clone(&disk))]);
    scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                region.flush(..).unwrap();
            }
        });
        let _is_over = SetOnDrop(&is_over);
        for round in 1..=rounds(100) {
            let bytes = vec![round as u8; PAGES * PAGE];
            region.write_at(0, &bytes).unwrap();
            region.flush(..).unwrap();
            assert!(disk.state().bytes == bytes, "round {round}");
        }
    });
}

fn address(region: &SharedRegion, page: usize) -> usize {
    region.as_ptr().addr().get() + page * PAGE
}

/// A region with write-back, and with a last page that is absent until [`wait_for_events`] touches it.
fn with_a_page_to_touch(disk: &Arc<Disk>, reports: bool) -> SharedRegion {
    let builder = Region::builder().chunk(Chunk::writable(Arc::clone(disk))).report_discards(reports);
    let builder = builder.write_back(WriteBack::ToSource).readahead(Readahead::None);
    builder.build_shared(&Pool::new().unwrap()).unwrap()
}

/// Waits until all earlier events are handled: a discard returns when its event is read, and the event may
/// be handled after a page was poisoned.
fn wait_for_events(region: &SharedRegion) {
    touch(address(region, region.len() / PAGE - 1));
}

/// A page without bytes has nothing to write, and keeps no other page from its source.
#[test]
fn a_dirty_page_that_is_discarded_and_poisoned_fails_no_later_flush() {
    if records_no_writes(this_test!()) {
        return;
    }
    for reports in REPORTS {
        let disk = Disk::of(&[1; 5 * PAGE]);
        let region = with_a_page_to_touch(&disk, reports);
        region.write_at(0, &[2; 4 * PAGE]).unwrap();
        disk.state().failing = Some((0..at(4), ENOSPC));
        assert_eq!(region.flush(..).unwrap_err().kind(), ErrorKind::SourceFailed);
        discard(address(&region, 1), PAGE);
        wait_for_events(&region);
        disk.state().unreadable = Some(at(1)..at(2));
        region.populate(at(1)..at(2)).unwrap_err();
        disk.state().failing = None;
        region.flush(..).unwrap();
        let written = [2, 1, 2, 2, 1].map(|byte| [byte; PAGE]).concat();
        assert!(disk.state().bytes == written);
        disk.state().unreadable = None;
        region.retry_failed(..).unwrap();
        let mut all = vec![0; 5 * PAGE];
        region.read_at(0, &mut all).unwrap();
        assert!(all == written);
        region.finish().unwrap();
        assert!(disk.state().bytes == written);
    }
}

#[test]
fn a_page_that_is_discarded_during_a_flush_and_poisoned_fails_that_flush_only() {
    if records_no_writes(this_test!()) {
        return;
    }
    /// More than a flush writes at once.
    const PAGES: usize = (3 << 20) / PAGE;
    for reports in REPORTS {
        let disk = Disk::of(&vec![1; (PAGES + 1) * PAGE]);
        let region = with_a_page_to_touch(&disk, reports);
        region.write_at(0, &[2; PAGES * PAGE]).unwrap();
        let gone = PAGES / 2;
        {
            let mut state = disk.state();
            state.discards = Some(address(&region, gone));
            state.unreadable = Some(at(gone)..at(gone + 1));
        }
        assert_eq!(region.flush(..).unwrap_err().kind(), ErrorKind::SourceFailed);
        wait_for_events(&region);
        // The event of the discard may have come after the failure, of which this one tells again.
        let _ = region.flush(..);
        region.flush(..).unwrap();
        let state = disk.state();
        let is_written = |page: usize| state.bytes[page * PAGE..][..PAGE] == [2; PAGE];
        assert!((0..PAGES).all(|page| is_written(page) == (page != gone)));
    }
}

#[test]
fn a_page_of_several_chunks_goes_back_to_each_source() {
    if records_no_writes(this_test!()) {
        return;
    }
    let locks = [1, 2, 3].map(|byte| Arc::new(Mutex::new(vec![byte; 1000])));
    let shared = Arc::new(RwLock::new(vec![4u8; 2 * PAGE]));
    let mut chunks: Vec<_> = locks.iter().map(|lock| Chunk::writable(Arc::clone(lock))).collect();
    chunks.push(Chunk::writable(Arc::clone(&shared)).range(100..));
    let region = written_back(chunks);
    region.write_at(995, b"abcdefghij").unwrap();
    region.write_at(3_000, b"k").unwrap();
    region.flush(..).unwrap();
    assert_eq!(&locks[0].lock().unwrap()[994..], b"\x01abcde");
    assert_eq!(&locks[1].lock().unwrap()[..6], b"fghij\x02");
    assert_eq!(&shared.read().unwrap()[99..102], b"\x04k\x04");
}

#[test]
fn an_error_keeps_the_pages_dirty_and_names_chunk_offset_and_errno() {
    if records_no_writes(this_test!()) {
        return;
    }
    for errno in [EIO, ENOSPC] {
        let disks = [Disk::of(&[1; 4 * PAGE]), Disk::of(&[2; 4 * PAGE])];
        let region = written_back(disks.iter().map(|disk| Chunk::writable(Arc::clone(disk))));
        disks[1].state().failing = Some((at(2)..at(3), errno));
        for page in [1, 5, 6] {
            region.write_at(at(page), b"new").unwrap();
        }
        let error = region.flush(..).unwrap_err();
        assert_eq!((error.kind(), error.chunk()), (ErrorKind::SourceFailed, Some(1)));
        assert_eq!(error.raw_os_error(), Some(errno));
        assert_eq!(error.failure().unwrap().source_offset(), at(1), "where the write starts");
        assert_eq!(disks[0].writes(), [(at(1), PAGE)], "other pages are written");
        assert!(region.flush(..).is_err(), "the pages are still dirty");
        disks[1].state().failing = None;
        region.flush(..).unwrap();
        assert_eq!(disks[1].writes(), [(at(1), 2 * PAGE)]);
        assert_eq!(&disks[1].state().bytes[2 * PAGE..][..4], b"new\x02");
    }
}

#[test]
fn a_failed_sync_is_returned_by_each_later_flush_of_the_range() {
    if records_no_writes(this_test!()) {
        return;
    }
    let disk = Disk::of(&[1; 8 * PAGE]);
    let region = written_back([Chunk::writable(Arc::clone(&disk))]);
    disk.state().sync_fails = true;
    region.write_at(at(2), b"new").unwrap();
    assert_eq!(region.flush(at(0)..at(4)).unwrap_err().raw_os_error(), Some(EIO));
    disk.state().sync_fails = false;
    region.write_at(at(6), b"new").unwrap();
    region.flush(at(4)..at(8)).unwrap();
    for range in [at(3)..at(5), at(0)..at(1)] {
        assert_eq!(region.flush(range).unwrap_err().raw_os_error(), Some(EIO));
    }
}

/// A page that has left is in its source, and not synced: a failed sync of any other page may have lost it.
#[test]
fn a_failed_sync_is_returned_for_pages_that_have_left_too() {
    if moves_no_pages() {
        return println!("SKIPPED {}: no written page leaves", this_test!());
    }
    for chunks in [1, 2] {
        let disk = Disk::of(&[1; 16 * PAGE]);
        let bytes = 16 * PAGE as u64 / chunks;
        let parts = (0..chunks)
            .map(|part| Chunk::writable(Arc::clone(&disk)).range(part * bytes..(part + 1) * bytes));
        let budget = Budget::bytes(8 << 20).unwrap();
        let other = Disk::of(&[1; PAGE]);
        let builder =
            Region::builder().chunks(parts).chunk(Chunk::writable(Arc::clone(&other))).budget(&budget);
        let region = builder.write_back(WriteBack::ToSource).build_shared(&Pool::new().unwrap()).unwrap();
        for page in [2, 13, 16] {
            region.write_at(at(page), b"new").unwrap();
        }
        assert_eq!(region.evict(at(13)..at(14)).unwrap(), PAGE as u64);
        until(|| !disk.writes().is_empty());
        disk.state().sync_fails = true;
        assert_eq!(region.flush(at(2)..at(3)).unwrap_err().raw_os_error(), Some(EIO));
        disk.state().sync_fails = false;
        for page in [13, 2] {
            let error = region.flush(at(page)..at(page + 1)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(EIO), "page {page} of {chunks} chunks");
        }
        region.flush(at(16)..at(17)).unwrap();
        assert_eq!(other.state().syncs, 1);
        assert_eq!(region.finish().unwrap_err().raw_os_error(), Some(EIO));
    }
}

/// The kernel tells one caller of a lost write, and any region of the file may have lost some.
#[test]
fn a_failed_sync_of_a_file_is_told_to_each_of_its_regions() {
    if records_no_writes(this_test!()) {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(8 * PAGE as u64).unwrap();
    let file = Arc::new(WritableFile::open(file.path()).unwrap());
    let regions = [0, 1].map(|_| written_back([Chunk::writable(Arc::clone(&file))]));
    regions.iter().zip([1, 2]).for_each(|(region, page)| region.write_at(at(page), b"new").unwrap());
    let failed = scope(|scope| {
        let flush = || {
            deny_syncs(Errno::EIO);
            regions[0].flush(..).unwrap_err().raw_os_error()
        };
        scope.spawn(flush).join().unwrap()
    });
    assert_eq!(failed, Some(EIO));
    assert_eq!(regions[1].flush(..).unwrap_err().raw_os_error(), Some(EIO));
    assert!(WritableSource::sync(&*file).is_err());
}

#[test]
fn a_source_of_several_chunks_is_synced_once() {
    let disk = Disk::of(&[1; 8 * PAGE]);
    let page = PAGE as u64;
    let part = |part| Chunk::writable(Arc::clone(&disk)).range(part * page..(part + 1) * page);
    let builder = || Region::builder().chunks((0..8).map(part)).write_back(WriteBack::ToSource);
    let budget = Budget::bytes(8 << 20).unwrap();
    for builder in [builder(), builder().budget(&budget)] {
        let Ok(region) = builder.build_shared(&Pool::new().unwrap()) else {
            println!("SKIPPED in part {}: no written page leaves, or no write is recorded", this_test!());
            continue;
        };
        let before = disk.state().syncs;
        (0..8).for_each(|page| region.write_at(at(page), b"new").unwrap());
        region.flush(..).unwrap();
        assert_eq!(disk.state().syncs, before + 1);
    }
}

#[test]
fn short_writes_are_gone_on_with() {
    if records_no_writes(this_test!()) {
        return;
    }
    let disk = Disk::of(&[1; 4 * PAGE]);
    let region = written_back([Chunk::writable(Arc::clone(&disk))]);
    disk.state().most = 1000;
    region.write_at(at(1), &[2; 2 * PAGE]).unwrap();
    region.flush(..).unwrap();
    assert_eq!(disk.writes().len(), (2 * PAGE).div_ceil(1000));
    let expected = [[1; PAGE], [2; PAGE], [2; PAGE], [1; PAGE]].concat();
    assert!(disk.state().bytes == expected);
}

#[test]
fn the_drop_of_a_region_flushes() {
    if records_no_writes(this_test!()) {
        return;
    }
    let builder = |disk: &Arc<Disk>| {
        Region::builder().chunk(Chunk::writable(Arc::clone(disk))).write_back(WriteBack::ToSource)
    };
    let pool = Pool::new().unwrap();
    let disk = Disk::of(&[1; 2 * PAGE]);
    let mut region = builder(&disk).build(&pool).unwrap();
    region.as_mut_slice().expect("writable")[5] = 9;
    drop(region);
    assert_eq!(disk.state().bytes[5], 9);
    let region = builder(&disk).build_shared(&pool).unwrap();
    region.write_at(at(1), &[8]).unwrap();
    let _metrics = region.close();
    assert_eq!(disk.state().bytes[PAGE], 8);
}

#[test]
fn an_error_of_the_last_flush_reaches_the_caller_of_finish_or_the_callback() {
    if records_no_writes(this_test!()) {
        return;
    }
    let pool = Pool::new().unwrap();
    let (tell, told) = mpsc::channel();
    let region = |disk: &Arc<Disk>| {
        let tell = tell.clone();
        let builder = Region::builder().chunk(Chunk::writable(Arc::clone(disk)));
        let builder = builder.write_back(WriteBack::ToSource);
        let builder = builder.on_page_failure(move |offset, failure| {
            tell.send((offset, failure.source_offset())).unwrap();
        });
        let region = builder.build_shared(&pool).unwrap();
        for page in [1, 4, 5] {
            region.write_at(at(page), b"new").unwrap();
        }
        region
    };
    let disk = Disk::of(&[1; 8 * PAGE]);
    disk.state().failing = Some((at(5)..at(6), ENOSPC));
    let error = region(&disk).finish().unwrap_err();
    assert_eq!((error.kind(), error.raw_os_error()), (ErrorKind::SourceFailed, Some(ENOSPC)));
    assert_eq!((disk.writes(), told.try_recv().ok()), (vec![(at(1), PAGE)], None), "told once");
    drop(region(&disk));
    let _metrics = region(&disk).close();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [(at(4), at(4)), (at(4), at(4))]);

    disk.state().failing = None;
    disk.state().sync_fails = true;
    assert_eq!(region(&disk).finish().unwrap_err().raw_os_error(), Some(EIO));
    disk.state().sync_fails = false;
    assert!(region(&disk).finish().unwrap().pages_installed() >= 3);
    assert_eq!(told.try_iter().count(), 0);
    let plain = Region::builder().chunk(vec![7u8; PAGE]).build(&pool).unwrap();
    assert_eq!(plain.finish().unwrap().pages_installed(), 0);
}

#[test]
fn a_region_that_cannot_write_back_is_refused() {
    let pool = Pool::new().unwrap();
    let disk = || Chunk::writable(Disk::of(&[1; PAGE]));
    let builder = || Region::builder().write_back(WriteBack::ToSource);
    let option = Some(BuildOption::WriteBack);
    for chunk in [Chunk::from(vec![1u8; 10]), Chunk::hole(10)] {
        let error = builder().chunk(disk()).chunk(chunk).build(&pool).unwrap_err();
        assert_eq!(
            (error.kind(), error.option(), error.chunk()),
            (ErrorKind::OptionConflict, option, Some(1))
        );
    }
    let error = builder().chunk(disk()).build(Eager).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::UnsuitableServer, option));
    let plain = Region::builder().chunk(disk()).writable().build(&pool).unwrap();
    assert_eq!(plain.flush(..).unwrap_err().option(), option);
}

const KILLED_PAGES: usize = 256;

fn file_region(path: &Path) -> SharedRegion {
    written_back([Chunk::writable(Arc::new(WritableFile::open(path).unwrap()))])
}

/// The child is killed while it writes whole pages and flushes them.
#[test]
fn a_kill_during_write_back_leaves_old_or_new_bytes_in_each_page() {
    let body = child::body(this_test!(), |path| {
        let region = file_region(Path::new(path));
        for round in 1..=u8::MAX {
            for page in 0..KILLED_PAGES {
                region.write_at(at(page), &stamped(page, round.into())).unwrap();
            }
            println!("round {round}");
            region.flush(..).unwrap();
        }
        panic!("the parent kills this process before");
    });
    if records_no_writes(this_test!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for _ in 0..3 {
        File::create(&path).unwrap().set_len(at(KILLED_PAGES)).unwrap();
        let file = File::open(&path).unwrap();
        // The file changes only by a write-back.
        kill_when(body.spawn(&path), || has_second_round(0, &file));
        let bytes = fs::read(&path).unwrap();
        let rounds: Vec<_> =
            bytes.chunks(PAGE).enumerate().map(|(page, bytes)| round_of(page, bytes)).collect();
        let (least, most) = (rounds.iter().min().unwrap(), rounds.iter().max().unwrap());
        assert!(most - least <= 1, "old bytes or new ones: {rounds:?}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u8, usize),
    Flush(usize, usize),
    Reopen,
}

const SIZE: usize = 9 * PAGE + 123;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..SIZE, any::<u8>(), 1..2 * PAGE).prop_map(|(start, byte, len)| Step::Write(start, byte, len)),
        2 => (0..SIZE, 0..SIZE).prop_map(|(one, other)| Step::Flush(one.min(other), one.max(other))),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_writes_flushes_and_reopens_are_those_of_a_vector(steps in prop::collection::vec(step(), 1..20)) {
        if records_no_writes(this_test!()) {
            return Ok(());
        }
        let mut expected = pattern(9, SIZE);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, &expected).unwrap();
        let mut region = file_region(&path);
        for step in steps {
            match step {
                Step::Write(start, byte, len) => {
                    let bytes = vec![byte; len.min(SIZE - start)];
                    expected[start..start + bytes.len()].copy_from_slice(&bytes);
                    region.write_at(start as u64, &bytes).unwrap();
                }
                Step::Flush(start, end) => {
                    region.flush(start as u64..end as u64).unwrap();
                    let bytes = fs::read(&path).unwrap();
                    prop_assert!(bytes[start..end] == expected[start..end]);
                }
                Step::Reopen => {
                    drop(region);
                    prop_assert!(fs::read(&path).unwrap() == expected);
                    region = file_region(&path);
                }
            }
            let mut all = vec![0; SIZE];
            region.read_at(0, &mut all).unwrap();
            prop_assert!(all == expected);
        }
    }
}
