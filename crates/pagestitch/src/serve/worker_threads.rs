//! The join handles of a pool's workers.

use std::mem;
use std::thread::JoinHandle;

/// The threads of a pool's workers.
#[derive(Debug, Default)]
pub(super) struct Threads {
    running: Vec<JoinHandle<u64>>,
    /// The number of faults that ended threads have served.
    served: u64,
}

impl Threads {
    pub(super) fn push(&mut self, thread: JoinHandle<u64>) {
        let all = mem::take(&mut self.running).into_iter();
        let (ended, running): (Vec<_>, _) = all.partition(JoinHandle::is_finished);
        self.running = running;
        self.served += ended.into_iter().filter_map(|thread| thread.join().ok()).sum::<u64>();
        self.running.push(thread);
    }

    pub(super) fn take(&mut self) -> (Vec<JoinHandle<u64>>, u64) {
        (mem::take(&mut self.running), self.served)
    }
}
