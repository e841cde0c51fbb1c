//! Nothing is allocated on the way of a fault: seen by an allocator that counts.

use pagestitch::{Chunk, Pool, Region};
use pagestitch_testkit::scripted::Scripted;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, with a counter beside it.
#[expect(unsafe_code, reason = "GlobalAlloc is an unsafe interface")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// The only test of its program: nobody else allocates meanwhile.
#[test]
fn nothing_is_allocated_on_the_way_of_a_fault() {
    const PAGE: usize = 4096;
    let region = Region::builder()
        .chunk(vec![1u8; 300 * PAGE]) // copied from where it lies
        .chunks((0..300).map(|_| vec![2u8; 1000])) // gathered
        .chunk(Chunk::source(Arc::new(Scripted::new(300 * PAGE as u64)))) // read
        .chunk(Chunk::hole(300 * PAGE as u64)) // zeroed
        .build(&Pool::builder().workers(2).start().unwrap())
        .unwrap();
    let bytes = region.as_slice();
    let pages = bytes.len() / PAGE;
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    // Every other page, so that two threads of the pool have been through all of it before the rest is watched.
    let sum: usize = (0..pages).step_by(2).map(|page| usize::from(bytes[page * PAGE])).sum();
    assert!(sum > 0);
    let warm = ALLOCATIONS.load(Ordering::SeqCst);
    let sum: usize = (1..pages).step_by(2).map(|page| usize::from(bytes[page * PAGE])).sum();
    assert!(sum > 0);
    // The last page's worker may still be counting.
    while region.metrics().pages_installed() < pages as u64 {
        thread::yield_now();
    }
    let after = ALLOCATIONS.load(Ordering::SeqCst);
    assert_eq!(after, warm, "{} in the first half", warm - before);
}
