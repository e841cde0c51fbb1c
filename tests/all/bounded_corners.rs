//! Regions with a budget in rare orders of their threads and calls: no write is lost, and no page stays for
//! ever.

use crate::bounded_writes::{BUDGET, Disk, builder, moves_no_pages, pool, word};
use crate::{PAGE, discard};
use pagestitch::{Budget, Chunk};
use pagestitch_testkit::scope::scope;
use std::sync::atomic::Ordering;

/// Discarded pages are missing, also those that a flush reads in place.
#[test]
fn a_flush_of_discarded_padding_ends() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let chunk = || Chunk::writable(Disk::of(vec![1; PAGE / 2])).align(PAGE as u64);
    let region = builder(&budget, chunk()).chunk(chunk()).build_shared(&pool(1)).unwrap();
    region.write_at(PAGE as u64 - 10, &[7; 20]).unwrap();
    discard(region.as_ptr().expose_provenance().get(), PAGE);
    scope(|scope| {
        scope.spawn(|| region.flush(..).unwrap());
    });
    assert_eq!(word(&region, 0).load(Ordering::Relaxed).to_ne_bytes(), [1; 8]);
}
