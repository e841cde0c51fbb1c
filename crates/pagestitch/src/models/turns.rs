//! Read turns: of the workers woken for adopted memory, one reads at a time, and no event stays
//! unread.

use super::kernel::{Content, Kernel};
use crate::serve::pace::Pace;
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::{Page, Span};
use shuttle::thread;
use std::sync::Arc;

/// The steps of a worker after epoll wakes it.
fn wake_up(pace: &Pace, kernel: &Kernel) {
    use crate::space::page_table::Wake;
    let Some(mut turn) = pace.turn() else { return };
    loop {
        let mut faults = kernel.read_now().faults;
        if turn.has_read(std::time::Instant::now()) {
            faults.extend(kernel.read_now().faults);
        }
        for page in faults {
            kernel.copy(page, Content::Bytes);
            kernel.wake(Span { first: page, pages: 1 });
        }
        if turn.ends(false) {
            return;
        }
    }
}

fn run(nanoseconds: u64) {
    let shared = Arc::new((Pace::default(), Kernel::new(3)));
    shared.0.took(nanoseconds);
    let threads = (0..3).flat_map(|page| {
        let (toucher, worker) = (Arc::clone(&shared), Arc::clone(&shared));
        // A fault wakes one worker, which runs sooner or later.
        let toucher = thread::spawn(move || {
            toucher.1.touch(Page(page));
        });
        let worker = thread::spawn(move || {
            worker.1.wait_for_fault(Page(page));
            wake_up(&worker.0, &worker.1);
        });
        [toucher, worker]
    });
    threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn no_event_is_left_unread_where_sources_are_quick() {
    explore("turns, quick sources", || run(1_000));
}

#[test]
fn no_event_is_left_unread_where_sources_are_slow() {
    explore("turns, slow sources", || run(50_000_000));
}
