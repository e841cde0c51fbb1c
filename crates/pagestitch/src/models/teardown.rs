//! Teardown: threads wait in faults while the region is dropped, in the steps of `api/any.rs`.

use super::faults::{BOTH, Region};
use super::kernel::Found;
use crate::space::page_table::Wake;
use pagestitch_kernel::Page;
use pagestitch_kernel::gate::Gate;
use pagestitch_kernel::sync::atomic::{AtomicBool, Ordering};
use pagestitch_kernel::sync::model::explore;
use shuttle::thread;
use std::sync::Arc;

struct Dropped {
    region: Arc<Region>,
    gate: Gate,
    /// True once sources may be freed.
    freed: AtomicBool,
    /// Foreign memory: absent pages are poisoned, instead of a fence over the range.
    adopted: bool,
}

impl Dropped {
    fn work(&self) {
        while let Some(events) = self.region.kernel.read() {
            let Some(_guard) = self.gate.enter() else { return };
            for page in events.faults {
                assert!(!self.freed.load(Ordering::SeqCst), "a source is called after the gate closed");
                self.region.serve(page);
            }
        }
    }

    fn drop_region(&self) {
        // Intake stops, and the drop waits for the workers inside the gate.
        self.region.kernel.stop();
        self.gate.close();
        self.freed.store(true, Ordering::SeqCst);
        if self.adopted {
            for page in BOTH.iter() {
                self.region.kernel.poison(page);
            }
            // No close: the owner holds the uffd too.
            self.region.kernel.unregister();
            self.region.kernel.wake(BOTH);
        } else {
            self.region.kernel.fence();
            self.region.kernel.wake(BOTH);
            self.region.kernel.close();
        }
    }
}

fn run(touchers: usize, workers: usize, adopted: bool) {
    let (region, freed) = (Region::new(2, None), AtomicBool::new(false));
    let shared = Arc::new(Dropped { region, gate: Gate::new(), freed, adopted });
    let spawn = |body: fn(&Dropped)| {
        let shared = Arc::clone(&shared);
        thread::spawn(move || body(&shared))
    };
    let workers: Vec<_> = (0..workers).map(|_| spawn(Dropped::work)).collect();
    let touchers: Vec<_> = (0..touchers)
        .map(|page| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let found = shared.region.kernel.touch(Page(page % 2));
                assert_ne!(found, Found::Zeros);
            })
        })
        .collect();
    shared.drop_region();
    touchers.into_iter().chain(workers).for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_waiting_thread_gets_a_signal_or_its_bytes() {
    explore("a drop while a thread waits", || run(1, 1, false));
}

#[test]
fn waiting_threads_get_a_signal_or_their_bytes() {
    explore("a drop while threads wait", || run(3, 2, false));
}

#[test]
fn threads_waiting_in_adopted_memory_get_a_signal_or_their_bytes() {
    explore("a drop of adopted memory", || run(3, 2, true));
}
