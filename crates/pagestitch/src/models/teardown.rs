//! Teardown: threads wait in pages while the region is dropped, step by step as in `region/core.rs`.

use super::faults::Region;
use super::kernel::Found;
use crate::region::page_table::Wake;
use pagestitch_kernel::gate::Gate;
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::{Page, Span};
use shuttle::thread;
use std::sync::Arc;

struct Dropped {
    region: Arc<Region>,
    gate: Gate,
}

impl Dropped {
    fn work(&self) {
        while let Some(events) = self.region.kernel.read() {
            let Some(_visit) = self.gate.enter() else { return };
            events.faults.into_iter().for_each(|page| self.region.serve(page));
        }
    }

    fn drop_region(&self) {
        // Intake stops, and who is at work is waited for.
        self.region.kernel.stop();
        self.gate.close();
        self.region.kernel.seal();
        self.region.kernel.wake(Span { first: Page(0), pages: 2 });
        self.region.kernel.close();
    }
}

fn run(touchers: usize, workers: usize) {
    let shared = Arc::new(Dropped { region: Region::new(2, None), gate: Gate::new() });
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
    explore("a drop while a thread waits", || run(1, 1));
}

#[test]
fn threads_that_wait_get_a_signal_or_their_bytes() {
    explore("a drop while threads wait", || run(3, 2));
}
