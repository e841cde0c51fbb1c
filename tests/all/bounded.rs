//! Regions with a budget: pages leave, and come back with the same bytes. `memory_from_outside` looks at their memory.

use crate::bounded_writes::{Disk, bounded, moves_no_pages, word};
use crate::inline_files::file_of;
use crate::machine::rounds;
use crate::waits::until;
use crate::{PAGE, discard};
use pagestitch::{Budget, BuildOption, Chunk, Eager, ErrorKind, Inline, OnFailure, Pool, Region, Server};
use pagestitch::{Readahead, Replacement, SharedRegion, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::this_test;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// A source of which each word differs.
fn words(bytes: usize) -> Vec<u8> {
    (0..bytes as u64 / 8).flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// Numbers below a limit, the same ones in each run.
fn random(seed: u64, limit: usize) -> impl Iterator<Item = usize> {
    (0u64..).map(move |step| {
        let mut hasher = DefaultHasher::new();
        (seed, step).hash(&mut hasher);
        hasher.finish() as usize % limit
    })
}

fn pool(workers: usize) -> Pool {
    Pool::builder().workers(workers).start().unwrap()
}

/// Reads random pages of a region of 18 MiB in a budget of 6 MiB, with several threads.
fn read_at_random(server: impl Into<Server>, threads: u64) {
    let (bytes, budget) = (words(18 << 20), Budget::bytes(BUDGET).unwrap());
    let region = Region::builder().chunk(bytes.clone()).budget(&budget).build(server).unwrap();
    scope(|scope| {
        for seed in 0..threads {
            let (region, bytes) = (&region, &bytes);
            scope.spawn(move || {
                for at in random(seed, bytes.len() / 8).take(READS / threads as usize) {
                    assert_eq!(region.as_slice()[at * 8..][..8], bytes[at * 8..][..8], "word {at}");
                }
            });
        }
    });
    let metrics = budget.metrics();
    assert!(metrics.refaults > 100, "{metrics:?}");
    assert!(metrics.evictions >= metrics.soft_faults + metrics.refaults, "{metrics:?}");
    assert!(budget.evictions() > 500, "{} evictions", budget.evictions());
    assert!(budget.resident_bytes() <= BUDGET && budget.overruns() == 0, "{metrics:?}");
    drop(region);
    assert!(budget.resident_bytes() <= budget.standby_bytes(), "only the standby list is left");
}

#[test]
fn pages_that_come_back_have_their_bytes() {
    read_at_random(&pool(1), 1);
}

#[test]
fn several_workers_evict_at_once() {
    read_at_random(&pool(4), 4);
}

#[test]
fn signal_handlers_evict_at_once() {
    read_at_random(Inline, 1);
    read_at_random(Inline, 4);
}

#[test]
fn a_long_scan_displaces_pages_in_use_with_fifo_alone() {
    for replacement in [Replacement::S3Fifo, Replacement::Fifo] {
        let budget = Budget::bytes(BUDGET).unwrap().with_replacement(replacement).unwrap();
        let region = Region::builder().chunk(words(32 << 20)).readahead(Readahead::None).budget(&budget);
        let region = region.build(&pool(1)).unwrap();
        let pages = BUDGET as usize / PAGE;
        let touch = |page: usize| assert_ne!(region.as_slice()[page * PAGE + 8], 0, "page {page}");
        let hot = || (0..100).for_each(touch);
        hot();
        (100..2 * pages).for_each(touch);
        hot();
        (2 * pages..4 * pages).for_each(touch);
        let before = budget.metrics();
        hot();
        let after = budget.metrics();
        let again = after.refaults + after.soft_faults - before.refaults - before.soft_faults;
        match replacement {
            Replacement::Fifo => assert!(again > 90, "{again} of 100 pages came again"),
            _ => assert!(again < 10, "{again} of 100 pages came again"),
        }
    }
}

#[test]
fn pages_in_memory_leave_in_a_new_order_too() {
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = Region::builder().chunk(words(16 << 20)).readahead(Readahead::None).budget(&budget);
    let region = region.build(&pool(1)).unwrap();
    let touch = |page: usize| assert_ne!(region.as_slice()[page * PAGE + 8], 0, "page {page}");
    (0..2_000).for_each(touch);
    let _ = budget.clone().with_replacement(Replacement::Fifo).unwrap();
    (2_000..4_000).for_each(touch);
    let before = budget.metrics().refaults;
    (1_000..2_000).for_each(touch);
    let metrics = budget.metrics();
    assert!(
        metrics.refaults > before + 900 && metrics.overruns == 0,
        "{before} refaults before, {metrics:?}"
    );
}

#[test]
fn a_tebibyte_with_a_budget_is_read_and_takes_no_more_than_the_budget() {
    const TEBIBYTE: u64 = 1 << 40;
    let (budget, source) = (Budget::bytes(BUDGET).unwrap(), Arc::new(Scripted::new(TEBIBYTE)));
    let region = Region::builder().chunk(Chunk::source(source)).budget(&budget).readahead(Readahead::None);
    let region = region.build_shared(&pool(2)).unwrap();
    let mut byte = [0];
    for page in random(1, TEBIBYTE as usize / PAGE).take(4_000) {
        let offset = (page * PAGE) as u64 + 7;
        region.read_at(offset, &mut byte).unwrap();
        assert_eq!(byte[0], byte_at(offset), "byte {offset}");
    }
    assert!(budget.resident_bytes() <= BUDGET && budget.overruns() == 0, "{:?}", budget.metrics());
    assert!(budget.evictions() > 1_000, "{:?}", budget.metrics());
}

/// A budget of 32 MiB has room for 896 waiting pages, or 64.
fn the_standby_list_has_the_length_it_is_worth(server: Server) {
    const BUDGET: u64 = 32 << 20;
    const MOST: usize = 14_000;
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = Region::builder().chunk(vec![7u8; MOST * PAGE]).budget(&budget);
    let region = region.readahead(Readahead::None).build(server).unwrap();
    let touch = |page: usize| assert_eq!(region.as_slice()[page * PAGE], 7);
    // No page is touched again before the others.
    (0..2 * MOST).for_each(|step| touch(step * 4099 % MOST));
    let standby = budget.standby_bytes();
    assert!(standby <= 256 * PAGE as u64, "{standby} bytes of pages that do not come back");
    let resident = budget.resident_bytes();
    assert!(resident > BUDGET / 100 * 95, "the regions have the other memory: {resident} bytes");
    if moves_no_pages() {
        return;
    }
    // One page of four that leaves is touched again soon.
    let mut pages = random(1, 11_000);
    let is_long = (0..100).any(|_| {
        pages.by_ref().take(10_000).for_each(touch);
        budget.standby_bytes() >= 512 * PAGE as u64
    });
    assert!(is_long, "{:?}", budget.metrics());
    assert!(budget.resident_bytes() <= BUDGET);
}

#[test]
fn the_standby_list_is_short_while_few_pages_come_back() {
    the_standby_list_has_the_length_it_is_worth((&pool(1)).into());
}

#[test]
fn the_standby_list_of_signal_handlers_is_short_while_few_pages_come_back() {
    the_standby_list_has_the_length_it_is_worth(Inline.into());
}

/// Pages that come back leave holes in the standby list, which its end meets later.
#[test]
fn holes_of_the_standby_list_are_used_again() {
    const ALL: usize = 14_000;
    const FEW: usize = 512;
    if moves_no_pages() {
        return println!("SKIPPED {}: no page waits in a slot", this_test!());
    }
    let budget = Budget::bytes(32 << 20).unwrap();
    // Pages that an application has leave wait in slots, if written ones go back.
    let region = bounded(&budget, Chunk::writable(Disk::of(vec![7; ALL * PAGE])), 1);
    let touch = |page: usize| assert_ne!(word(&region, page).load(Ordering::Relaxed), 0);
    let mut sweep = (0..).map(|step| step * 4099 % ALL);
    for round in 0..12 {
        (0..FEW).for_each(touch);
        let soft_before = budget.soft_faults();
        // The worker may still hold the last pages, or the slots.
        let mut left = 0;
        until(|| {
            left += region.evict(..(FEW * PAGE) as u64).unwrap();
            left >= (FEW * PAGE / 2) as u64
        });
        (0..FEW).for_each(touch);
        let came_back = budget.soft_faults() - soft_before;
        assert!(came_back > 200, "round {round}: {came_back} of {FEW} pages come back");
        sweep.by_ref().take(3000).for_each(touch);
    }
    assert!(budget.resident_bytes() <= budget.limit(), "{:?}", budget.metrics());
}

/// A worker, and the threads that touch an inline region, take each other's pages away.
#[test]
fn a_worker_and_signal_handlers_share_a_budget() {
    let (bytes, budget, pool) = (words(12 << 20), Budget::bytes(BUDGET).unwrap(), pool(1));
    let build =
        |server: Server| Region::builder().chunk(bytes.clone()).budget(&budget).build(server).unwrap();
    let regions = [build(Inline.into()), build((&pool).into())];
    scope(|scope| {
        for (seed, region) in (0..).zip(&regions) {
            let bytes = &bytes;
            scope.spawn(move || {
                for at in random(seed, bytes.len() / 8).take(READS / 2) {
                    assert_eq!(region.as_slice()[at * 8..][..8], bytes[at * 8..][..8], "word {at}");
                }
            });
        }
    });
    let resident = regions.map(|region| {
        drop(region);
        budget.resident_bytes()
    });
    assert!(resident[0] < BUDGET && resident[1] <= budget.standby_bytes(), "{resident:?}");
    assert_eq!(budget.overruns(), 0);
}

#[test]
fn the_last_budget_of_a_builder_is_that_of_its_region() {
    let [first, last] = [(); 2].map(|()| Budget::bytes(BUDGET).unwrap());
    let builder = Region::builder().budget(&first).chunk(vec![7u8; 18 << 20]).budget(&last);
    let region = builder.build(&pool(1)).unwrap();
    assert!(region.as_slice().iter().step_by(4096).all(|byte| *byte == 7));
    assert_eq!((first.resident_bytes(), first.evictions()), (0, 0));
    assert!(last.resident_bytes() <= BUDGET && last.evictions() > 500, "{:?}", last.metrics());
}

#[test]
fn each_region_of_a_pool_keeps_within_its_own_budget() {
    each_region_keeps_within_its_own_budget(&pool(2));
}

#[test]
fn each_inline_region_keeps_within_its_own_budget() {
    each_region_keeps_within_its_own_budget(Inline);
}

fn each_region_keeps_within_its_own_budget(server: impl Into<Server>) {
    let (bytes, server) = (words(18 << 20), server.into());
    let parts = [5, 7].map(|mebibytes| {
        let budget = Budget::bytes(mebibytes << 20).unwrap();
        let builder = Region::builder().chunk(bytes.clone()).budget(&budget);
        (budget, builder.build(server.clone()).unwrap())
    });
    let is_over = AtomicBool::new(false);
    let most = scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut most = [0; 2];
            loop {
                // Read before, so that the last sample is one of the end.
                let is_last = is_over.load(Ordering::SeqCst);
                for (most, (budget, _)) in most.iter_mut().zip(&parts) {
                    *most = budget.resident_bytes().max(*most);
                }
                if is_last {
                    break most;
                }
                thread::yield_now();
            }
        });
        let readers: Vec<_> = (0..)
            .zip(&parts)
            .map(|(seed, (_, region))| {
                let bytes = &bytes;
                scope.spawn(move || {
                    for at in random(seed, bytes.len() / 8).take(READS) {
                        assert_eq!(region.as_slice()[at * 8..][..8], bytes[at * 8..][..8], "word {at}");
                    }
                })
            })
            .collect();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        is_over.store(true, Ordering::SeqCst);
        sampler.join().unwrap()
    });
    for (most, (budget, _)) in most.iter().zip(&parts) {
        let metrics = budget.metrics();
        assert!(*most <= budget.limit() && *most > budget.limit() / 4 * 3, "{most} bytes: {metrics:?}");
        assert!(metrics.evictions > 300 && metrics.overruns == 0, "{metrics:?}");
    }
    let [(small, region), (large, _kept)] = parts;
    let before = large.resident_bytes();
    drop(region);
    assert!(small.resident_bytes() <= small.standby_bytes(), "{:?}", small.metrics());
    assert!(large.resident_bytes() >= before / 4 * 3, "{:?}", large.metrics());
}

/// Other threads hold the right to choose and the pages of the ended region on their way out.
#[test]
fn inline_regions_of_a_budget_end_while_signal_handlers_evict_their_pages() {
    let (bytes, budget) = (words(3 << 20), Budget::bytes(BUDGET).unwrap());
    let is_over = AtomicBool::new(false);
    scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|seed| {
                let (bytes, budget, is_over) = (words(8 << 20), &budget, &is_over);
                scope.spawn(move || {
                    let builder = Region::builder().chunk(bytes.clone()).budget(budget);
                    let region = builder.build(Inline).unwrap();
                    for at in random(seed, bytes.len() / 8) {
                        if is_over.load(Ordering::Relaxed) {
                            return;
                        }
                        assert_eq!(region.as_slice()[at * 8..][..8], bytes[at * 8..][..8], "word {at}");
                    }
                })
            })
            .collect();
        for _ in 0..rounds(10) {
            let builder = Region::builder().chunk(bytes.clone()).budget(&budget);
            let region = builder.build(Inline).unwrap();
            for at in (0..bytes.len()).step_by(4096) {
                assert_eq!(region.as_slice()[at], bytes[at], "byte {at}");
            }
        }
        is_over.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    assert!(budget.evictions() > rounds(1_000) && budget.overruns() == 0, "{:?}", budget.metrics());
    assert!(budget.resident_bytes() <= budget.standby_bytes(), "only the standby list is left");
}

#[test]
fn a_long_read_and_a_long_populate_of_a_bounded_region() {
    read_and_populate(&pool(1));
    read_and_populate(Inline);
}

fn read_and_populate(server: impl Into<Server>) {
    let (bytes, budget) = (words(24 << 20), Budget::bytes(BUDGET).unwrap());
    let region = Region::builder().chunk(bytes.clone()).budget(&budget).build(server).unwrap();
    let mut copy = vec![0; bytes.len()];
    region.read_at(0, &mut copy).unwrap();
    assert!(copy == bytes, "read_at of more than the budget");
    assert!(budget.resident_bytes() <= BUDGET);
    region.populate(..4 << 20).unwrap();
    let error = region.populate(..).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::LimitReached, Some(BuildOption::Budget)));
    assert_eq!(budget.overruns(), 0);
}

#[test]
fn holes_do_not_count() {
    let budget = Budget::bytes(BUDGET).unwrap();
    let builder = Region::builder().chunk(Chunk::hole(24 << 20)).chunk(vec![7u8; 10_000]).budget(&budget);
    let region = builder.build(&pool(1)).unwrap();
    assert_eq!(region.as_slice().chunks(100).map(|bytes| usize::from(bytes[0])).sum::<usize>(), 700);
    assert!(budget.resident_bytes() <= 3 * 4096, "{}", budget.resident_bytes());
}

#[test]
fn a_discarded_page_of_a_bounded_region_is_filled_again_and_counts_once() {
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = Region::builder().chunk(words(64 << 10)).budget(&budget).build(&pool(1)).unwrap();
    let before = region.as_slice().to_vec();
    for _ in 0..3 {
        discard(region.as_ptr().addr().get(), region.len());
        assert_eq!(region.as_slice(), before);
    }
    // A reader runs on before the worker notes that the page was counted already.
    until(|| budget.resident_bytes() == 64 << 10);
}

/// A page of one byte, whose second read takes until it is released.
#[derive(Debug, Default)]
struct Slow {
    reads: AtomicUsize,
    is_released: AtomicBool,
}

impl Source for Slow {
    fn size(&self) -> u64 {
        4096
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.reads.fetch_add(1, Ordering::SeqCst) == 1 {
            until(|| self.is_released.load(Ordering::SeqCst));
        }
        into.fill(7);
        Ok(())
    }
}

/// The discarded page is still the oldest one of the budget while it is filled again.
#[test]
fn a_page_that_is_being_filled_again_does_not_leave() {
    let (pool, budget) = (pool(4), Budget::bytes(BUDGET).unwrap());
    let source = Arc::new(Slow::default());
    let build =
        |chunk: Chunk| SharedRegion::builder().chunk(chunk).budget(&budget).build_shared(&pool).unwrap();
    let refilled = build(Chunk::source(Arc::clone(&source)));
    let other = build(words(6 << 20).into());
    assert_eq!(refilled.view().touch(0), 7);
    discard(refilled.as_ptr().addr().get(), 4096);
    scope(|scope| {
        let again = scope.spawn(|| refilled.view().touch(0));
        until(|| source.reads.load(Ordering::SeqCst) == 2);
        for page in (0..other.len()).step_by(4096) {
            let _ = other.view().touch(page);
        }
        // A worker evicts after the last touch has its page.
        until(|| budget.evictions() >= 64);
        let reads = source.reads.load(Ordering::SeqCst);
        source.is_released.store(true, Ordering::SeqCst);
        assert_eq!((again.join().unwrap(), reads), (7, 2), "two threads fill the page at once");
    });
}

#[test]
fn a_budget_that_cannot_work_is_refused() {
    let refused = |bytes| {
        let error = Budget::bytes(bytes).unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Budget)));
    };
    [0, (4 << 20) - 1, 1 << 60].into_iter().for_each(refused);
    let least = Budget::bytes(4 << 20).unwrap();
    let error = Region::builder().chunk("text").budget(&least).build(&pool(64)).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Budget)));
}

#[test]
fn a_share_of_the_memory_is_above_0_and_at_most_1() {
    for share in [0.0, -0.5, 1.01, f64::NAN, f64::INFINITY] {
        let error = Budget::share_of_cgroup(share).unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Budget)));
    }
    let [tenth, fifth] = [0.1, 0.2].map(|share| Budget::share_of_cgroup(share).unwrap().limit());
    assert!(tenth > 0 && fifth.abs_diff(2 * tenth) <= 2 * 4096, "{tenth} {fifth}");
}

#[test]
fn a_region_that_cannot_lose_pages_refuses_a_budget() {
    let (budget, pool) = (Budget::bytes(BUDGET).unwrap(), pool(1));
    let builder = || Region::builder().chunk("text").budget(&budget);
    let errors = [
        builder().writable().build_shared(&pool).unwrap_err(),
        builder().writable().track_changes().build_shared(&pool).unwrap_err(),
        builder().inherit_on_fork().build(&pool).unwrap_err(),
        builder().release_sources().build(&pool).unwrap_err(),
        builder().build(Eager).unwrap_err(),
        builder().chunk(Chunk::from("more").on_failure(OnFailure::Zeros)).build(&pool).unwrap_err(),
        builder().chunk(file_of(b"more")).build(Inline).unwrap_err(),
    ];
    for error in &errors {
        assert_eq!(error.option(), Some(BuildOption::Budget), "{error}");
    }
    assert_eq!((errors[5].chunk(), errors[6].chunk()), (Some(1), Some(1)));
    assert_eq!(budget.resident_bytes(), 0);
}

const BUDGET: u64 = 6 << 20;
/// Few, because an emulated guest takes 10 ms to drop a page.
const READS: usize = 3_600;
