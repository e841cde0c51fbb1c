//! The hand-over of a shard: a worker hangs in a source, and the watchdog starts another worker at its
//! post. The steps are those of `serve/worker.rs` and `serve/watchdog.rs`.

use super::kernel::{Answer, Content, Found, Kernel};
use crate::serve::worker_table::{HELD_UP_AFTER, WorkerTable};
use crate::space::page_table::Wake;
use pagestitch_kernel::Page;
use pagestitch_kernel::sync::atomic::{AtomicBool, Ordering};
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::sync::{Condvar, Mutex};
use shuttle::thread::{self, JoinHandle};
use std::collections::VecDeque;
use std::sync::Arc;

struct Pool {
    kernel: Kernel,
    workers: WorkerTable,
    /// The faults that a worker has read and not begun.
    queued: Mutex<VecDeque<Page>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// True once the source of the first page answers.
    answers: (Mutex<bool>, Condvar),
    stopped: AtomicBool,
}

impl Pool {
    fn start_worker(self: &Arc<Self>) {
        let Some(slot) = self.workers.add(0) else { return };
        let pool = Arc::clone(self);
        let worker = thread::spawn(move || pool.work(slot));
        self.threads.lock().unwrap().push(worker);
    }

    fn work(&self, slot: usize) {
        self.workers.mark_working(slot);
        self.serve_queued(slot);
        self.workers.mark_waiting(slot);
        while self.kernel.wait_for_work(|| self.has_queued()) {
            self.workers.mark_working(slot);
            let mut faults = self.kernel.read_now().faults.into_iter();
            let first = faults.next();
            self.queued.lock().unwrap().extend(faults);
            self.kernel.poke();
            first.into_iter().for_each(|page| self.serve(slot, page));
            self.serve_queued(slot);
            self.workers.mark_waiting(slot);
            // A worker ends after a while without work. Here it does so at once.
            if self.workers.has_replacements() && self.workers.try_remove(slot) {
                return;
            }
        }
    }

    fn serve_queued(&self, slot: usize) {
        loop {
            let next = self.queued.lock().unwrap().pop_front();
            let Some(page) = next else { return };
            self.serve(slot, page);
        }
    }

    fn has_queued(&self) -> bool {
        !self.queued.lock().unwrap().is_empty()
    }

    fn serve(&self, slot: usize, page: Page) {
        self.workers.step(slot);
        if page == HANGING {
            let (answers, changed) = &self.answers;
            let mut answers = answers.lock().unwrap();
            while !*answers {
                answers = changed.wait(answers).unwrap();
            }
        }
        if self.kernel.copy(page, Content::Bytes) == Answer::AlreadyThere {
            self.kernel.wake(page.span());
        }
    }

    fn watch(self: &Arc<Self>) {
        let mut seen = Vec::new();
        while !self.stopped.load(Ordering::SeqCst) {
            self.workers.observe(&mut seen, HELD_UP_AFTER);
            if self.workers.abandoned(&seen).next().is_some() {
                self.start_worker();
            }
            thread::yield_now();
        }
    }
}

fn run() {
    let pool = Arc::new(Pool {
        kernel: Kernel::new(3),
        workers: WorkerTable::new(1, 3).unwrap(),
        queued: Mutex::default(),
        threads: Mutex::default(),
        answers: Default::default(),
        stopped: AtomicBool::new(false),
    });
    pool.start_worker();
    let spawn = |body: fn(&Arc<Pool>)| {
        let pool = Arc::clone(&pool);
        thread::spawn(move || body(&pool))
    };
    let watchdog = spawn(Pool::watch);
    let touch = |page: usize| {
        let pool = Arc::clone(&pool);
        thread::spawn(move || assert_eq!(pool.kernel.touch(Page(page)), Found::Bytes))
    };
    let hangs = touch(HANGING.0);
    // The other pages need no answer of that source.
    [touch(1), touch(2)].into_iter().for_each(|other| other.join().unwrap());
    *pool.answers.0.lock().unwrap() = true;
    pool.answers.1.notify_all();
    hangs.join().unwrap();
    assert!(pool.workers.working() > 0, "a worker stays at the post");
    pool.stopped.store(true, Ordering::SeqCst);
    watchdog.join().unwrap();
    pool.kernel.stop();
    let threads = std::mem::take(&mut *pool.threads.lock().unwrap());
    threads.into_iter().for_each(|worker| worker.join().unwrap());
}

/// The page whose source does not answer at first.
const HANGING: Page = Page(0);

#[test]
fn a_worker_that_hangs_delays_no_other_page_of_its_shard() {
    explore("the hand-over of a shard", run);
}
