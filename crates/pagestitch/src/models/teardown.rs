//! Teardown: threads wait in pages while the region is dropped, step by step as in `api/core.rs`.

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
    /// Sources may be gone, too.
    gone: AtomicBool,
    /// Memory of somebody else's: what is missing is made bad, instead of all being fenced.
    adopted: bool,
}

impl Dropped {
    fn work(&self) {
        while let Some(events) = self.region.kernel.read() {
            let Some(_guard) = self.gate.enter() else { return };
            for page in events.faults {
                assert!(!self.gone.load(Ordering::SeqCst), "a source is called that may be gone");
                self.region.serve(page);
            }
        }
    }

    fn drop_region(&self) {
        // Intake stops, and who is at work is waited for.
        self.region.kernel.stop();
        self.gate.close();
        self.gone.store(true, Ordering::SeqCst);
        if self.adopted {
            for page in BOTH.iter() {
                self.region.kernel.poison(page);
            }
        } else {
            self.region.kernel.fence();
        }
        self.region.kernel.wake(BOTH);
        self.region.kernel.close();
    }
}

fn run(touchers: usize, workers: usize, adopted: bool) {
    let (region, gone) = (Region::new(2, None), AtomicBool::new(false));
    let shared = Arc::new(Dropped { region, gate: Gate::new(), gone, adopted });
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
fn a_thread_that_waits_gets_a_signal_or_its_bytes() {
    explore("a drop while a thread waits", || run(1, 1, false));
}

#[test]
fn threads_that_wait_get_a_signal_or_their_bytes() {
    explore("a drop while threads wait", || run(3, 2, false));
}

#[test]
fn threads_that_wait_in_adopted_memory_get_a_signal_or_their_bytes() {
    explore("a drop of adopted memory", || run(3, 2, true));
}
