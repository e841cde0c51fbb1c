//! A source with a limit on concurrent reads.

use super::immutable::no_file;
use super::{Complete, Fetch, Reply, Source};
use crate::guard::quietly;
use crossbeam_channel::bounded;
use parking_lot::{Mutex, MutexGuard};
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, ThreadId};
use std::time::Duration;
use std::{fmt, io};

/// A wrapper with a limit on the reads that its source serves at once, over all regions and guests
/// that share it. The other reads wait in the order of their requests.
///
/// A read of a [`Source`] that waits holds its worker, as a slow read does. A request to a [`Fetch`]
/// waits in a queue and holds no thread; the thread that answers another request sends it.
/// [`PoolBuilder::max_in_flight`](crate::PoolBuilder::max_in_flight) limits the requests of a pool
/// over all of its sources.
///
/// **Signals.** A read waits for the threads that have the slots. So a signal handler that interrupts a
/// thread in [`populate`](crate::AnyRegion::populate), [`read_at`](crate::Region::read_at) or
/// [`retry_failed`](crate::AnyRegion::retry_failed) must touch no absent page of this source: it could
/// wait forever for the thread that it has interrupted. Block the signal around these calls.
///
/// ```
/// use pagestitch::source::{FileSource, Limited};
/// use pagestitch::{Chunk, Pool, Region};
/// use std::sync::Arc;
///
/// let file = Arc::new(Limited::new(FileSource::open("/proc/self/exe")?, 4));
/// let pool = Pool::new()?;
/// let first = Region::builder().chunk(Chunk::source(Arc::clone(&file))).build(&pool)?;
/// let second = Region::builder().chunk(Chunk::source(file)).build(&pool)?;
/// assert_eq!(first.as_slice()[1..4], second.as_slice()[1..4]);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Clone)]
pub struct Limited<S> {
    inner: Arc<S>,
    slots: Arc<Slots>,
}

impl<S> Limited<S> {
    /// Lets `most` reads of `source` run at once. Clones share the limit.
    ///
    /// # Panics
    ///
    /// If `most` is 0, because no read could ever run.
    #[must_use]
    pub fn new(source: S, most: usize) -> Self {
        assert!(most > 0, "most is 0, so no read could ever run: allow 1 or more");
        Self { inner: Arc::new(source), slots: Arc::new(Slots::new(most)) }
    }
}

impl<S: Source> Source for Limited<S> {
    forward!(self => self.inner; size, name, granularity);

    fn direct(&self) -> Option<&dyn Any> {
        no_file(self.inner.direct())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let _slot = self.slots.wait();
        self.inner.read_at(offset, into)
    }
}

impl<S: Fetch + 'static> Fetch for Limited<S> {
    forward!(self => self.inner; size, name, granularity);

    fn fetch(&self, offset: u64, reply: Reply) {
        let inner = Arc::clone(&self.inner);
        self.slots.run(Box::new(move |slot| {
            let (bytes, failures) = (reply.len(), reply.failures());
            let held = Box::new(Held { reply, slot });
            inner.fetch(offset, Reply::to_pages(held, bytes).after(failures));
        }));
    }
}

impl<S> fmt::Debug for Limited<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limited").field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// A reply that frees a slot after its answer.
#[derive(Debug)]
struct Held {
    reply: Reply,
    slot: Slot,
}

impl Complete for Held {
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>) {
        let Self { reply, slot } = *self;
        // The thread that waits for these bytes goes before the next request.
        reply.complete(answer);
        drop(slot);
    }

    fn retry(self: Box<Self>, pause: Duration, error: io::Error) {
        let Self { reply, slot } = *self;
        reply.retry_after(pause, error);
        drop(slot);
    }
}

/// The slots of the reads that run, and the queue of the others.
struct Slots {
    state: Mutex<State>,
}

struct State {
    free: usize,
    /// Invariant: if a slot is free, the queue is empty, or a thread of `starting` is about to empty
    /// it.
    queue: VecDeque<Waiter>,
    /// The threads inside [`Slots::release`], which start reads of the queue.
    starting: Vec<ThreadId>,
}

/// Starts a read that has its slot.
type Waiter = Box<dyn FnOnce(Slot) + Send>;

impl Slots {
    const fn new(most: usize) -> Self {
        let state = State { free: most, queue: VecDeque::new(), starting: Vec::new() };
        Self { state: Mutex::new(state) }
    }

    /// Blocks until the calling thread has a slot.
    fn wait(self: &Arc<Self>) -> Slot {
        if self.state.lock().take() {
            return Slot(Arc::clone(self));
        }
        let (sender, slot) = bounded(1);
        self.run(Box::new(move |slot| drop(sender.send(slot))));
        slot.recv().expect("each waiter of the queue gets a slot")
    }

    /// Starts a read now, or when a slot is free.
    fn run(self: &Arc<Self>, waiter: Waiter) {
        let mut state = self.state.lock();
        if !state.take() {
            return state.queue.push_back(waiter);
        }
        drop(state);
        waiter(Slot(Arc::clone(self)));
    }

    /// Gives a slot back, and starts the reads that wait for one. A source may answer inside its
    /// `fetch`, which comes back here: the outer call then goes on, so that the stack does not grow
    /// with the queue.
    fn release(self: &Arc<Self>) {
        let this = thread::current().id();
        let mut state = self.state.lock();
        state.free += 1;
        if state.starting.contains(&this) {
            return;
        }
        state.starting.push(this);
        while state.free > 0 {
            let Some(waiter) = state.queue.pop_front() else { break };
            state.free -= 1;
            // A source that panics drops its reply, which fails the request and frees the slot.
            MutexGuard::unlocked(&mut state, || quietly(|| waiter(Slot(Arc::clone(self)))));
        }
        state.starting.retain(|thread| *thread != this);
    }
}

impl State {
    /// Takes a free slot, unless others wait for one.
    fn take(&mut self) -> bool {
        let takes = self.free > 0 && self.queue.is_empty();
        self.free -= usize::from(takes);
        takes
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Slots").field("free", &state.free).field("waiting", &state.queue.len()).finish()
    }
}

/// The right to read, until it is dropped.
#[derive(Debug)]
struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.release();
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Answers inside `fetch`, except for the first request.
    struct Prompt(Mutex<Option<Reply>>, AtomicUsize);

    impl Fetch for Prompt {
        fn size(&self) -> u64 {
            u64::MAX
        }

        fn fetch(&self, offset: u64, reply: Reply) {
            match offset {
                0 => *self.0.lock() = Some(reply),
                _ if offset % 1000 == 0 => panic!("scripted to panic"),
                _ => {
                    assert_eq!(self.1.fetch_add(1, Ordering::Relaxed) as u64 % 999 + 1, offset % 1000);
                    reply.answer(&[1]);
                }
            }
        }
    }

    #[derive(Debug)]
    struct Counted(Arc<AtomicUsize>);

    impl Complete for Counted {
        fn complete(self: Box<Self>, answer: io::Result<&[u8]>) {
            self.0.fetch_add(if answer.is_ok() { 1 } else { 1_000_000 }, Ordering::Relaxed);
        }

        fn retry(self: Box<Self>, _: Duration, _: io::Error) {
            unreachable!("no request is repeated")
        }
    }

    /// The requests start in order, one after the other. The stack does not grow with them, and a
    /// source that panics ends its own request only.
    #[test]
    fn a_long_queue_of_requests_starts_in_order() {
        const REQUESTS: usize = 50_000;
        let limited = Limited::new(Prompt(Mutex::new(None), AtomicUsize::new(0)), 1);
        let answers = Arc::new(AtomicUsize::new(0));
        for offset in 0..REQUESTS {
            limited.fetch(offset as u64, Reply::to_pages(Box::new(Counted(Arc::clone(&answers))), 1));
        }
        assert_eq!(answers.load(Ordering::Relaxed), 0, "the first request has the slot");
        let first = limited.inner.0.lock().take().unwrap();
        first.answer(&[1]);
        let panics = REQUESTS / 1000 - 1;
        assert_eq!(answers.load(Ordering::Relaxed), REQUESTS - panics + panics * 1_000_000);
        assert_eq!(limited.slots.state.lock().free, 1);
    }
}
