//! A write to a page in memory waits where nearly all pages of the budget are dirty: some go back to their sources.

use crate::bounded_writes::{BUDGET, Disk, PAGES, bounded, builder, moves_no_pages, pool, word};
use crate::inline_writes::file;
use crate::{PAGE, discard};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::{Budget, Chunk, Inline, SharedRegion};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Not so many that pages leave for the room of others.
const FEW: usize = BUDGET as usize / PAGE * 25 / 32;
/// More than may be dirty, and less than [`FEW`].
const DIRTY_MAX: u64 = BUDGET / 4 * 3;

/// Reads all pages, and then writes to them one by one.
fn all_pages_cannot_be_dirty(budget: &Budget, region: &SharedRegion) {
    assert!((0..FEW).all(|page| word(region, page).load(Ordering::Relaxed) == 0));
    assert_eq!(budget.evictions(), 0);
    for page in 0..FEW {
        word(region, page).store(page as u64 + 1, Ordering::Relaxed);
        assert!(budget.metrics().dirty_bytes <= DIRTY_MAX, "{:?}", budget.metrics());
    }
    assert!(budget.metrics().write_backs > 0, "{:?}", budget.metrics());
    assert!((0..FEW).all(|page| word(region, page).load(Ordering::Relaxed) == page as u64 + 1));
}

#[test]
fn a_writer_waits_for_the_worker_that_writes_pages_back() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = bounded(&budget, Chunk::writable(Disk::of(vec![0; FEW * PAGE])), 1);
    all_pages_cannot_be_dirty(&budget, &region);
}

#[test]
fn a_writer_writes_pages_back_in_its_signal_handler() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = builder(&budget, file(&vec![0; FEW * PAGE]).1).build_shared(Inline).unwrap();
    all_pages_cannot_be_dirty(&budget, &region);
}

/// The pages that should leave first are those of a source that a handler must not call.
#[test]
fn a_signal_handler_waits_for_the_thread_that_calls_a_source() {
    if moves_no_pages() {
        return;
    }
    const HALF: usize = FEW / 2;
    let budget = Budget::bytes(BUDGET).unwrap();
    let disk = Disk::of(vec![0; HALF * PAGE]);
    let served = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    (0..HALF).for_each(|page| word(&served, page).store(page as u64 + 1, Ordering::Relaxed));
    let region = builder(&budget, file(&vec![0; HALF * PAGE]).1).build_shared(Inline).unwrap();
    assert!((0..HALF).all(|page| word(&region, page).load(Ordering::Relaxed) == 0));
    assert_eq!(budget.metrics().write_backs, 0);
    for page in 0..HALF {
        word(&region, page).store(page as u64 + 1, Ordering::Relaxed);
        assert!(budget.metrics().dirty_bytes <= DIRTY_MAX, "{:?}", budget.metrics());
    }
    assert!((0..HALF).any(|page| disk.word(page) == page as u64 + 1));
    let values =
        (0..HALF).map(|page| [&served, &region].map(|region| word(region, page).load(Ordering::Relaxed)));
    assert!(values.enumerate().all(|(page, values)| values == [page as u64 + 1; 2]));
}

#[test]
fn a_source_that_takes_no_bytes_holds_up_no_writer() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let disk = Disk::of(vec![0; FEW * PAGE]);
    disk.fail_from(0, nix::libc::EIO);
    let region = bounded(&budget, Chunk::writable(disk), 1);
    assert!((0..FEW).all(|page| word(&region, page).load(Ordering::Relaxed) == 0));
    (0..FEW).for_each(|page| word(&region, page).store(page as u64 + 1, Ordering::Relaxed));
    assert_eq!((budget.metrics().dirty_bytes, budget.metrics().write_backs), ((FEW * PAGE) as u64, 0));
    assert!((0..FEW).all(|page| word(&region, page).load(Ordering::Relaxed) == page as u64 + 1));
}

#[test]
fn a_write_at_of_many_pages_waits_in_between() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = bounded(&budget, Chunk::writable(Disk::of(vec![0; FEW * PAGE])), 1);
    region.populate(..).unwrap();
    region.write_at(0, &vec![1; FEW * PAGE]).unwrap();
    assert!(budget.metrics().dirty_bytes <= DIRTY_MAX, "{:?}", budget.metrics());
    let mut seen = vec![0; FEW * PAGE];
    region.read_at(0, &mut seen).unwrap();
    assert!(seen.iter().all(|&byte| byte == 1));
}

#[test]
fn discarded_pages_hold_up_no_writer() {
    if moves_no_pages() {
        return;
    }
    let (budget, pool) = (Budget::bytes(BUDGET).unwrap(), pool(1));
    let build = |pages: usize| {
        builder(&budget, Chunk::writable(Disk::of(vec![0; pages * PAGE]))).build_shared(&pool).unwrap()
    };
    let (given_back, written) = (build(FEW), build(60));
    (0..FEW).for_each(|page| word(&given_back, page).store(1, Ordering::Relaxed));
    discard(given_back.as_ptr().addr().get(), FEW * PAGE);
    // Each round has a batch of the discarded pages leave, until none counts as dirty.
    let rounds = (0..200).take_while(|&round| {
        let before = budget.evictions();
        (0..60).for_each(|page| word(&written, page).store(round, Ordering::Relaxed));
        written.flush(..).unwrap();
        round < 20 || budget.evictions() > before
    });
    assert!(rounds.count() < 100, "{:?}", budget.metrics());
    assert!(budget.metrics().dirty_bytes <= DIRTY_MAX, "{:?}", budget.metrics());
}

/// The kernel has no memory for further mappings. One buffer is in store since the build.
#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer ends a process that has no memory")]
fn pages_go_back_where_the_kernel_has_no_memory_for_buffers() {
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            return;
        }
        let (budget, pool) = (Budget::bytes(BUDGET).unwrap(), pool(1));
        let build = |chunk: Chunk| builder(&budget, chunk);
        let served = build(Chunk::writable(Disk::of(vec![0; PAGES * PAGE]))).build_shared(&pool).unwrap();
        let inline = build(file(&vec![0; PAGES * PAGE]).1).build_shared(Inline).unwrap();
        let (_, most) = getrlimit(Resource::RLIMIT_AS).unwrap();
        // The allocator may ask for a little, and a buffer has 256 KiB.
        let pages = fs::read_to_string("/proc/self/statm").unwrap();
        let now = pages.split(' ').next().unwrap().parse::<usize>().unwrap() * PAGE;
        setrlimit(Resource::RLIMIT_AS, (now + (200 << 10)) as u64, most).unwrap();
        for region in [&served, &inline] {
            (0..PAGES).for_each(|page| word(region, page).store(page as u64 + 1, Ordering::Relaxed));
            assert!((0..PAGES).all(|page| word(region, page).load(Ordering::Relaxed) == page as u64 + 1));
        }
        setrlimit(Resource::RLIMIT_AS, most, most).unwrap();
        let seen = budget.metrics();
        assert!(seen.write_backs > 1_000 && seen.overruns == 0 && seen.write_failures == 0, "{seen:?}");
        served.flush(..).unwrap();
        inline.flush(..).unwrap();
    });
    end.expect_pass();
}
