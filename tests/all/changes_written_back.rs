//! Changes of regions whose written pages go back to their sources: a flush takes none away from `changes()`, and the
//! other way round.

use crate::bounded_writes::{BUDGET, Disk, PAGES, moves_no_pages, word};
use crate::changes::records_no_writes;
use crate::{PAGE, SetOnDrop};
use pagestitch::source::WritableFile;
use pagestitch::{Budget, Chunk, ErrorKind, Inline, Pool, Region, Server, SharedRegion, WriteBack};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::this_test;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn pages(pages: Range<usize>) -> Range<u64> {
    (pages.start * PAGE) as u64..(pages.end * PAGE) as u64
}

fn changes(region: &SharedRegion) -> Vec<Range<u64>> {
    region.changes().unwrap().collect()
}

fn write(region: &SharedRegion, page: usize, value: u64) {
    region.write_at((page * PAGE) as u64, &value.to_ne_bytes()).unwrap();
}

fn build(chunk: Chunk, budget: Option<&Budget>, server: impl Into<Server>) -> SharedRegion {
    let builder = Region::builder().chunk(chunk).write_back(WriteBack::ToSource).track_changes();
    let builder = budget.into_iter().fold(builder, |builder, budget| builder.budget(budget));
    builder.build_shared(server).unwrap()
}

#[test]
fn a_flush_and_a_look_at_changes_find_each_written_page() {
    if records_no_writes(this_test!()) {
        return;
    }
    let disk = Disk::of(vec![0; 20 * PAGE]);
    let region = build(Chunk::writable(Arc::clone(&disk)), None, &Pool::new().unwrap());
    [3, 4, 9].into_iter().for_each(|page| write(&region, page, 1));
    region.flush(pages(4..5)).unwrap();
    assert_eq!(changes(&region), [pages(3..5), pages(9..10)]);
    assert_eq!(changes(&region), []);
    assert_eq!([3, 4, 9].map(|page| disk.word(page)), [0, 1, 0]);
    region.flush(..).unwrap();
    assert_eq!([3, 4, 9].map(|page| disk.word(page)), [1, 1, 1]);
    assert_eq!(changes(&region), []);
    write(&region, 4, 2);
    assert_eq!(changes(&region), [pages(4..5)]);
    region.flush(..).unwrap();
    assert_eq!((disk.word(4), changes(&region)), (2, Vec::new()));
}

#[test]
fn a_page_with_a_budget_is_reported_until_it_is_in_its_source_and_once_more() {
    if moves_no_pages() {
        return println!("SKIPPED {}: no written page leaves", this_test!());
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; 200 * PAGE]));
    let region = build(Chunk::writable(Arc::clone(&disk)), Some(&budget), &Pool::new().unwrap());
    region.populate(..).unwrap();
    assert_eq!(changes(&region), [], "a page that is only filled has not changed");
    let written = [pages(3..4), pages(62..66), pages(199..200)];
    [3, 62, 63, 64, 65, 199].into_iter().for_each(|page| write(&region, page, 1));
    assert_eq!(changes(&region), written);
    // These writes are no faults.
    [3, 199].into_iter().for_each(|page| write(&region, page, 2));
    assert_eq!(changes(&region), written);
    [3, 199].into_iter().for_each(|page| write(&region, page, 3));
    region.flush(..).unwrap();
    assert_eq!(changes(&region), written);
    assert_eq!(changes(&region), []);
    write(&region, 64, 4);
    assert_eq!(region.evict(pages(64..65)).unwrap(), PAGE as u64);
    assert_eq!(changes(&region), [pages(64..65)]);
    region.flush(..).unwrap();
    assert_eq!((disk.word(64), disk.word(199)), (4, 3));
}

#[test]
fn changes_that_cannot_be_saved_are_found_again_with_a_budget() {
    if moves_no_pages() {
        return println!("SKIPPED {}: no written page leaves", this_test!());
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; 20 * PAGE]));
    let region = build(Chunk::writable(disk), Some(&budget), &Pool::new().unwrap());
    write(&region, 7, 1);
    region.flush(..).unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    region.save_changes(&read_only).unwrap_err();
    let file = tempfile::tempfile().unwrap();
    assert!(region.save_changes(&file).unwrap().eq([pages(7..8)]));
    assert_eq!(changes(&region), []);
}

/// Two threads write all pages again and again, and a copy follows the changes, while pages leave and go back.
fn a_copy_that_follows_the_changes_has_every_write(budget: Option<&Budget>, server: Server) {
    let file = tempfile::tempfile().unwrap();
    file.set_len((PAGES * PAGE) as u64).unwrap();
    let source = Arc::new(WritableFile::from_file(file, "table").unwrap());
    let region = build(Chunk::writable(source), budget, server);
    let (mut copy, is_over) = (vec![0; PAGES * PAGE], AtomicBool::new(false));
    let follow = |copy: &mut [u8]| {
        for run in region.changes().unwrap() {
            region.read_at(run.start, &mut copy[run.start as usize..run.end as usize]).unwrap();
        }
    };
    let writer = |first: usize| {
        for value in 1..4 {
            (first..PAGES)
                .step_by(2)
                .for_each(|page| word(&region, page * 1009 % PAGES).store(value, Ordering::SeqCst));
        }
    };
    scope(|scope| {
        let follower = scope.spawn(|| {
            let mut rounds = 0;
            while !is_over.load(Ordering::SeqCst) {
                follow(&mut copy);
                rounds += 1;
            }
            rounds
        });
        let over = SetOnDrop(&is_over);
        let flusher = scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                region.flush(..).unwrap();
            }
        });
        let writers = [0, 1].map(|first| scope.spawn(move || writer(first)));
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        drop(over);
        flusher.join().unwrap();
        assert!(follower.join().unwrap() > 1);
    });
    follow(&mut copy);
    let mut bytes = vec![0; PAGES * PAGE];
    region.read_at(0, &mut bytes).unwrap();
    assert!(copy == bytes, "a write is not among the changes");
    region.finish().unwrap();
}

#[test]
#[cfg_attr(sanitized, ignore = "copies of all pages, again and again, take minutes")]
fn a_copy_that_follows_the_changes_of_a_pool_has_every_write() {
    if records_no_writes(this_test!()) {
        return;
    }
    a_copy_that_follows_the_changes_has_every_write(None, (&Pool::new().unwrap()).into());
}

#[test]
#[cfg_attr(sanitized, ignore = "copies of all pages, again and again, take minutes")]
fn a_copy_that_follows_the_changes_has_every_write_with_a_budget() {
    if moves_no_pages() {
        return println!("SKIPPED {}: no written page leaves", this_test!());
    }
    for server in [Server::from(&Pool::new().unwrap()), Inline.into()] {
        let budget = Budget::bytes(BUDGET).unwrap();
        a_copy_that_follows_the_changes_has_every_write(Some(&budget), server);
        assert!(budget.metrics().write_backs > PAGES as u64 / 4, "{:?}", budget.metrics());
    }
}

#[test]
fn changes_with_a_budget_need_write_back() {
    let budget = Budget::bytes(BUDGET).unwrap();
    let builder = Region::builder().chunk(vec![1; PAGE]).writable().track_changes().budget(&budget);
    let error = builder.build_shared(&Pool::new().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OptionConflict);
}
