//! Read turns: of the workers woken for adopted memory, one reads at a time, and no event stays
//! unread.

use super::kernel::{Content, Kernel};
use crate::serve::read_turn::TurnLock;
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::{Page, Span};
use shuttle::thread;
use std::sync::Arc;

/// The steps of a worker after epoll wakes it.
fn wake_up(lock: &TurnLock, kernel: &Kernel, fast: bool) {
    use crate::space::page_table::Wake;
    let Some(mut turn) = lock.try_acquire() else { return };
    loop {
        let mut faults = kernel.read_now().faults;
        if turn.after_read(std::time::Instant::now(), fast) {
            faults.extend(kernel.read_now().faults);
        }
        for page in faults {
            kernel.copy(page, Content::Bytes);
            kernel.wake(Span { first: page, pages: 1 });
        }
        if turn.try_release(false) {
            return;
        }
    }
}

fn run(fast: bool) {
    let shared = Arc::new((TurnLock::default(), Kernel::new(3)));
    let threads = (0..3).flat_map(|page| {
        let (toucher, worker) = (Arc::clone(&shared), Arc::clone(&shared));
        // A fault wakes one worker, which runs sooner or later.
        let toucher = thread::spawn(move || {
            toucher.1.touch(Page(page));
        });
        let worker = thread::spawn(move || {
            worker.1.wait_for_fault(Page(page));
            wake_up(&worker.0, &worker.1, fast);
        });
        [toucher, worker]
    });
    threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn no_event_is_left_unread_where_sources_are_fast() {
    explore("turns, fast sources", || run(true));
}

#[test]
fn no_event_is_left_unread_where_sources_are_slow() {
    explore("turns, slow sources", || run(false));
}
