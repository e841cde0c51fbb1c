//! Regions that are served inline, and whose written pages go back to their sources: no write is lost.

use crate::bounded_writes::{
    BUDGET, Disk, PAGES, a_kill_leaves_old_or_new_bytes, bounded, builder, mix, moves_no_pages, stamped,
    word, write_and_verify, write_beside_flushes,
};
use crate::changes::records_no_writes;
use crate::machine::rounds;
use crate::waits::until;
use crate::{PAGE, SetOnDrop, pattern};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::{self, EIO, EPERM};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pagestitch::source::{FailureReason, WritableFile};
use pagestitch::{Budget, Chunk, ErrorKind, Inline, Pool, Region, SharedRegion, WriteBack};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A file in memory that takes written pages.
pub(crate) fn file(bytes: &[u8]) -> (File, Chunk) {
    let file =
        File::from(memfd_create("table", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    let source = WritableFile::from_file(file.try_clone().unwrap(), "table").unwrap();
    (file, Chunk::writable(Arc::new(source)))
}

fn inline(budget: &Budget, chunk: Chunk) -> SharedRegion {
    builder(budget, chunk).build_shared(Inline).unwrap()
}

pub(crate) fn word_of(file: &File, page: usize) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, (page * PAGE) as u64).unwrap();
    u64::from_ne_bytes(bytes)
}

fn load(region: &SharedRegion, page: usize) -> u64 {
    word(region, page).load(Ordering::Relaxed)
}

fn store(region: &SharedRegion, page: usize, value: u64) {
    word(region, page).store(value, Ordering::Relaxed);
}

/// Writes to pages that are absent, present, and in standby.
pub(crate) fn write_more_than_a_budget() {
    if moves_no_pages() {
        return;
    }
    let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
    let region = inline(&budget, chunk);
    let shadow = write_and_verify(&region, 1, 3 * PAGES);
    region.flush(..).unwrap();
    shadow.iter().enumerate().for_each(|(page, expected)| {
        assert_eq!((word_of(&file, page), load(&region, page)), (*expected, *expected), "page {page}");
    });
    assert!(budget.metrics().write_backs > 500 && budget.metrics().soft_faults > 0, "{:?}", budget.metrics());
}

/// Reads a few pages, and writes to them until some go back before the others are written: to a file that takes them, and
/// to one that takes none.
pub(crate) fn write_to_more_pages_than_may_be_dirty() {
    if moves_no_pages() {
        return;
    }
    const FEW: usize = BUDGET as usize / PAGE * 25 / 32;
    for takes_none in [false, true] {
        let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; FEW * PAGE]));
        let region = inline(&budget, chunk);
        (0..FEW).for_each(|page| assert_eq!(load(&region, page), 0));
        if takes_none {
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        }
        (0..FEW).for_each(|page| store(&region, page, 1));
        let seen = budget.metrics();
        assert!(if takes_none { seen.write_failures > 0 } else { seen.write_backs > 0 }, "{seen:?}");
    }
}

/// Writes to pages until a file has not taken one of them back. No write needs room.
pub(crate) fn write_to_a_file_that_takes_no_page() {
    if moves_no_pages() {
        return;
    }
    let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
    let region = inline(&budget, chunk);
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let pages = (0..PAGES).take_while(|_| budget.metrics().write_failures == 0);
    let written = pages.inspect(|&page| store(&region, page, page as u64 + 1)).count();
    assert!(written < PAGES && budget.metrics().resident_bytes <= BUDGET, "{:?}", budget.metrics());
    (0..written)
        .for_each(|page| assert_eq!((load(&region, page), word_of(&file, page)), (page as u64 + 1, 0)));
}

/// A handler cannot tell of it. The thread of the budget does, which writes the page once more.
#[test]
fn a_file_that_takes_no_page_of_an_inline_region_is_reported() {
    if moves_no_pages() {
        return;
    }
    const LAST: usize = PAGES - 1;
    let seals: fn(&File) = |file| _ = fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let truncates: fn(&File) = |file| file.set_len((LAST * PAGE) as u64).unwrap();
    for (refuses, length, reason) in
        [(seals, PAGES, FailureReason::Source), (truncates, LAST, FailureReason::Truncated)]
    {
        let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
        let told = Arc::new(Mutex::new(None));
        let tell = Arc::clone(&told);
        let builder = builder(&budget, chunk).on_page_failure(move |offset, failure| {
            tell.lock().unwrap().get_or_insert((offset, failure.reason()));
        });
        let region = builder.build_shared(Inline).unwrap();
        store(&region, LAST, 7);
        refuses(&file);
        until(|| {
            (0..LAST).for_each(|page| assert_eq!(load(&region, page), 0));
            told.lock().unwrap().is_some()
        });
        assert_eq!(*told.lock().unwrap(), Some(((LAST * PAGE) as u64, reason)));
        assert_eq!((load(&region, LAST), file.metadata().unwrap().len()), (7, (length * PAGE) as u64));
        if length < PAGES {
            file.set_len((PAGES * PAGE) as u64).unwrap();
            region.flush(..).unwrap();
            assert_eq!(word_of(&file, LAST), 7);
        }
    }
}

#[test]
pub(crate) fn no_write_is_lost_while_pages_of_an_inline_region_leave_and_flushes_go_on() {
    if moves_no_pages() {
        return;
    }
    for threads in [1, 3] {
        let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
        let region = inline(&budget, chunk);
        let shadow = write_beside_flushes(&region, &budget, threads);
        let metrics = budget.metrics();
        assert!(metrics.evictions > 1_000 && metrics.write_backs > 500, "{metrics:?}");
        assert!(metrics.refaults > 500 && metrics.write_failures == 0, "{metrics:?}");
        assert!(metrics.resident_bytes <= BUDGET && metrics.overruns == 0, "{metrics:?}");
        region.finish().unwrap();
        for (page, expected) in shadow.iter().enumerate() {
            assert_eq!(word_of(&file, page), *expected, "page {page}");
        }
        assert_eq!(budget.metrics().dirty_bytes, 0);
    }
}

/// The processor tells whether a touch is a write.
#[test]
#[cfg(target_arch = "x86_64")]
fn only_written_pages_of_an_inline_region_are_dirty() {
    if moves_no_pages() {
        return;
    }
    let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&pattern(3, 64 * PAGE)));
    let region = inline(&budget, chunk);
    (0..32).for_each(|page| assert_eq!(load(&region, page), word_of(&file, page)));
    assert_eq!(budget.metrics().dirty_bytes, 0);
    // A present page, and an absent one.
    store(&region, 5, 1);
    store(&region, 40, 2);
    store(&region, 40, 3);
    assert_eq!(budget.metrics().dirty_bytes, 2 * PAGE as u64);
    // One fault for each page, and one more for the page that was written after it was read.
    assert_eq!((region.metrics().faults, region.metrics().faults_spurious), (34, 0));
    region.flush(..).unwrap();
    assert_eq!((word_of(&file, 5), word_of(&file, 40), budget.metrics().write_backs), (1, 3, 2));
    store(&region, 5, 4);
    region.flush(..).unwrap();
    assert_eq!((word_of(&file, 5), budget.metrics().write_backs), (4, 3));
}

/// Without a budget, the kernel keeps the record of writes.
#[test]
fn written_pages_of_an_inline_region_without_a_budget_go_back() {
    if records_no_writes(this_test!()) {
        return;
    }
    let (file, chunk) = file(&pattern(3, 64 * PAGE));
    let region = Region::builder().chunk(chunk).write_back(WriteBack::ToSource).build_shared(Inline).unwrap();
    (0..64).filter(|page| page % 3 > 0).for_each(|page| _ = load(&region, page));
    (0..64).step_by(2).for_each(|page| store(&region, page, page as u64 + 7));
    region.finish().unwrap();
    let expected = pattern(3, 64 * PAGE);
    for page in 0..64 {
        let before = u64::from_ne_bytes(expected[page * PAGE..][..8].try_into().unwrap());
        assert_eq!(word_of(&file, page), if page % 2 == 0 { page as u64 + 7 } else { before }, "page {page}");
    }
}

#[test]
fn copies_of_the_kernel_into_and_from_an_inline_region_lose_no_byte() {
    if moves_no_pages() {
        return;
    }
    let mut expected = pattern(9, PAGES * PAGE);
    let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&expected));
    let region = inline(&budget, chunk);
    for round in 0..rounds(60) {
        let random = mix(round + 1) as usize;
        let at = random % (PAGES * PAGE - (2 << 20));
        let bytes = vec![round as u8; random / PAGE % (2 << 20)];
        expected[at..at + bytes.len()].copy_from_slice(&bytes);
        region.write_at(at as u64, &bytes).unwrap();
        let mut read = vec![0; 1 << 20];
        let from = (at + random % PAGE).saturating_sub(1 << 19);
        region.read_at(from as u64, &mut read).unwrap();
        assert!(read == expected[from..from + read.len()], "round {round}");
        if round % 8 == 0 {
            region.evict(at as u64..).unwrap();
        }
    }
    region.finish().unwrap();
    let mut bytes = vec![0; PAGES * PAGE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected);
}

/// Handlers evict pages of all regions of their budget, except for a budget with write-back.
#[test]
fn inline_regions_and_regions_with_write_back_share_a_budget() {
    if moves_no_pages() {
        return;
    }
    let bytes = pattern(5, PAGES * PAGE);
    let read_only = |budget: &Budget| Region::builder().chunk(bytes.clone()).budget(budget).build(Inline);
    for is_first in [true, false] {
        let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
        let before = is_first.then(|| read_only(&budget).unwrap());
        if let Some(region) = &before {
            assert!(region.as_slice() == bytes);
        }
        let written = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
        let read = before.unwrap_or_else(|| read_only(&budget).unwrap());
        let is_over = AtomicBool::new(false);
        let shadow = scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    assert!(read.as_slice() == bytes);
                }
            });
            let _is_over = SetOnDrop(&is_over);
            write_and_verify(&written, 1, rounds(6_000) as usize)
        });
        let metrics = budget.metrics();
        assert!(metrics.write_backs > 100 && metrics.resident_bytes <= BUDGET, "{metrics:?}");
        written.finish().unwrap();
        for (page, expected) in shadow.iter().enumerate() {
            assert_eq!(disk.word(page), *expected, "page {page}");
        }
        // The thread that evicted goes on without written pages.
        assert!(read.as_slice() == bytes);
    }
}

/// Writes that succeed now and then make no room here, and the fault has patience as long as there are some.
#[test]
fn an_inline_fault_without_room_waits_until_the_source_takes_pages_back() {
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let written = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    let bytes = pattern(4, PAGES * PAGE);
    let region = inline(&budget, file(&bytes).1);
    written.pin(..PAGE as u64).unwrap();
    disk.fail_from(1, EIO);
    let error = (0..PAGES).find_map(|page| written.write_at((page * PAGE) as u64, &[7; 8]).err()).unwrap();
    assert_eq!(error.failure().unwrap().reason(), FailureReason::NoRoom);
    scope(|scope| {
        let reader = scope.spawn(|| load(&region, 3));
        let before = budget.metrics().write_failures;
        until(|| {
            written.write_at(0, &[7; 8]).unwrap();
            written.flush(..PAGE as u64).unwrap();
            assert!(!reader.is_finished(), "there is no room");
            budget.metrics().write_failures > before + 3
        });
        disk.fail_from(1, 0);
        assert_eq!(reader.join().unwrap().to_ne_bytes(), bytes[3 * PAGE..][..8]);
    });
    written.retry_failed(..).unwrap();
    written.finish().unwrap();
}

/// As the pages of a pool; the page stays absent, because a handler keeps no failure.
#[test]
fn an_inline_budget_full_of_pages_that_cannot_go_back_raises_a_signal_and_loses_none() {
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            std::process::exit(0);
        }
        let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
        let region = inline(&budget, chunk);
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        let write = |page: usize| region.write_at((page * PAGE) as u64, &(page as u64 + 1).to_ne_bytes());
        let (full, error) = (0..PAGES).find_map(|page| write(page).err().map(|error| (page, error))).unwrap();
        assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
        assert!(full > PAGES / 4 && budget.resident_bytes() <= BUDGET, "{full} {:?}", budget.metrics());
        assert_eq!(region.flush(..).unwrap_err().raw_os_error(), Some(EPERM));
        for page in 0..full {
            assert_eq!(load(&region, page), page as u64 + 1);
        }
        println!("all pages are there");
        load(&region, PAGES - 1);
    });
    if end.signal() != Some(libc::SIGBUS) {
        return end.expect_pass();
    }
    assert!(end.output().contains("all pages are there"), "{}", end.output());
}

/// The kernel counts the writes of the thread that the handlers interrupt.
#[test]
fn evictions_of_an_inline_region_write_neighbouring_dirty_pages_at_once() {
    let writes = || {
        let counts = std::fs::read_to_string("/proc/thread-self/io").ok()?;
        let calls = counts.lines().find_map(|line| line.strip_prefix("syscw: "))?;
        Some(calls.parse::<u64>().unwrap())
    };
    if moves_no_pages() {
        return;
    }
    let Some(before) = writes() else {
        return println!("SKIPPED {}: this kernel counts no writes of threads", this_test!());
    };
    let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
    let region = inline(&budget, chunk);
    (0..PAGES).for_each(|page| store(&region, page, page as u64 + 1));
    let (writes, pages) = (writes().unwrap() - before, budget.metrics().write_backs);
    assert!(pages > PAGES as u64 / 2 && writes < pages / 4, "{pages} pages in {writes} writes");
    region.finish().unwrap();
    (0..PAGES).for_each(|page| assert_eq!(word_of(&file, page), page as u64 + 1));
}

/// The child is killed while its signal handlers write pages to a file.
#[test]
fn a_kill_while_pages_of_an_inline_region_leave_leaves_old_or_new_bytes_in_each_page_of_the_file() {
    a_kill_leaves_old_or_new_bytes(child::body(this_test!(), |path| {
        let file = WritableFile::open(Path::new(path)).unwrap();
        let budget = Budget::bytes(BUDGET).unwrap();
        let region = inline(&budget, Chunk::writable(Arc::new(file)));
        for round in 1..=u8::MAX {
            for page in 0..PAGES {
                // A touch has other pages leave in the handler. A store in the place of the call could leave part of
                // a page to the file.
                let _ = load(&region, page);
                region.write_at((page * PAGE) as u64, &stamped(page, round.into())).unwrap();
            }
        }
        panic!("the parent kills this process before");
    }));
}

/// A forked child has neither the region nor the thread that evicts.
#[test]
fn the_thread_that_evicts_for_handlers_ends_with_its_budget() {
    if moves_no_pages() {
        return;
    }
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.flat_map(|task| std::fs::read_to_string(task.path().join("comm")));
        names.filter(|name| name.trim() == "pagestitch/wb").count()
    };
    let end = child::run(this_test!(), || {
        let budget = Budget::bytes(BUDGET).unwrap();
        let regions: Vec<_> = (0..3).map(|_| inline(&budget, file(&[7; PAGE]).1)).collect();
        until(|| threads() == 1);
        drop(regions);
        assert_eq!(threads(), 1, "the next region needs it");
        let pool = Pool::builder().workers(1).start().unwrap();
        drop(builder(&budget, file(&[7; PAGE]).1).build_shared(&pool).unwrap());
        drop(budget);
        until(|| threads() == 0);
    });
    end.expect_pass();
}
