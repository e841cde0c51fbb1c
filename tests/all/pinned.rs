//! Pages that leave or stay because the application asks for it.

use crate::PAGE;
use crate::waits::until;
use pagestitch::{Budget, BuildOption, ErrorKind, Pool, Region};
use pagestitch_testkit::scope::scope;
use std::sync::atomic::{AtomicBool, Ordering};

const BUDGET: u64 = 5 << 20;

fn pool() -> Pool {
    Pool::builder().workers(1).start().unwrap()
}

fn bytes(pages: usize) -> Vec<u8> {
    (0..pages * PAGE).map(|at| (at / PAGE % 251) as u8 + 1).collect()
}

fn bounded(pages: usize) -> (Budget, Region) {
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = Region::builder().chunk(bytes(pages)).budget(&budget).build(&pool()).unwrap();
    (budget, region)
}

/// Touches each page of a region of pages that differ.
fn touch_all(region: &Region) {
    for page in 0..region.len() / PAGE {
        assert_eq!(region.as_slice()[page * PAGE], (page % 251) as u8 + 1);
    }
}

#[test]
fn evicted_pages_leave_and_come_back_with_their_bytes() {
    let (budget, region) = bounded(300);
    region.populate(..).unwrap();
    assert_eq!(region.evict(..10).unwrap(), PAGE as u64);
    assert_eq!(region.evict(..).unwrap(), 299 * PAGE as u64);
    assert_eq!(region.evict(..).unwrap(), 0);
    assert_eq!(budget.evictions(), 300);
    assert!(budget.resident_bytes() <= BUDGET / 8, "only the standby list is left");
    touch_all(&region);
    until(|| budget.resident_bytes() >= 300 * PAGE as u64);
    // The policy has each page once: all of them leave again.
    for _ in 0..20 {
        region.evict(..).unwrap();
        touch_all(&region);
    }
    until(|| budget.resident_bytes() - budget.standby_bytes() == 300 * PAGE as u64);
    assert_eq!(budget.overruns(), 0);
}

#[test]
fn pinned_pages_stay_while_others_leave() {
    let (budget, region) = bounded(2_000);
    region.pin(..50 * PAGE as u64).unwrap();
    let installed = region.metrics().pages_installed();
    assert_eq!(installed, 50);
    touch_all(&region);
    // The worker evicts after the last touch has its page.
    until(|| budget.evictions() > 500);
    assert_eq!(region.evict(..50 * PAGE as u64).unwrap(), 0);
    assert_eq!(region.as_slice()[..50 * PAGE], bytes(50));
    region.unpin(..).unwrap();
    // The worker may still use the slots of the standby list, or evict these pages itself.
    until(|| {
        assert_eq!(region.as_slice()[..50 * PAGE], bytes(50));
        region.evict(..50 * PAGE as u64).unwrap() > 0
    });
    assert_eq!(region.as_slice()[..50 * PAGE], bytes(50));
}

#[test]
fn pins_have_half_of_a_budget() {
    let (budget, region) = bounded(2_000);
    let error = region.pin(..).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::LimitReached, Some(BuildOption::Budget)));
    let half = BUDGET / 2;
    region.pin(..half).unwrap();
    // A second pin of the same pages takes no more room.
    region.pin(..half).unwrap();
    assert_eq!(region.pin(half..half + 1).unwrap_err().kind(), ErrorKind::LimitReached);
    touch_all(&region);
    let other = Region::builder().chunk(bytes(1)).budget(&budget).build(&pool()).unwrap();
    assert_eq!(other.pin(..).unwrap_err().kind(), ErrorKind::LimitReached);
    drop(region);
    other.pin(..).unwrap();
    assert_eq!(budget.overruns(), 0);
}

#[test]
fn a_pin_beside_evictions_keeps_its_pages() {
    let (_, region) = bounded(1_500);
    let done = AtomicBool::new(false);
    scope(|scope| {
        let scan = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                touch_all(&region);
                region.evict(..).unwrap();
            }
        });
        for round in 0..10 {
            let range = round * 10 * PAGE as u64..(round + 1) * 10 * PAGE as u64;
            region.pin(range.clone()).unwrap();
            assert_eq!(region.evict(range.clone()).unwrap(), 0);
            region.unpin(range).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        scan.join().unwrap();
    });
    touch_all(&region);
}

#[test]
fn a_region_without_a_budget_pins_by_filling_and_evicts_nothing() {
    let region = Region::builder().chunk(bytes(10)).build(&pool()).unwrap();
    region.pin(..).unwrap();
    assert_eq!(region.metrics().pages_installed(), 10);
    region.unpin(..).unwrap();
    let error = region.evict(..).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::OptionConflict, Some(BuildOption::Budget)));
    assert_eq!(region.evict(..1 << 20).unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[cfg(not(sanitized))] // Sanitizers make mlock(2) do nothing.
#[test]
fn locked_pages_stay() {
    let (budget, region) = bounded(20);
    region.populate(..).unwrap();
    crate::lock_pages(&region.as_slice()[..4 * PAGE]);
    assert_eq!(region.evict(..).unwrap(), 16 * PAGE as u64);
    assert!(budget.metrics().kept >= 1);
    touch_all(&region);
}

/// Such a region has a budget and no page in it.
#[test]
fn a_region_whose_pages_are_all_in_place_has_none_to_evict() {
    let memfd = crate::zero_copy::memfd(&bytes(3));
    let budget = Budget::bytes(BUDGET).unwrap();
    let builder = Region::builder().chunk(memfd).budget(&budget);
    let region = builder.build(&pool()).unwrap();
    touch_all(&region);
    assert_eq!(region.evict(..).unwrap(), 0);
    region.pin(..).unwrap();
    region.unpin(..).unwrap();
}
