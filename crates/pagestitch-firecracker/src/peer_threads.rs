//! Threads for work that a peer can delay: reading its messages, and closing the descriptors that
//! it sent.
//!
//! The last close of a descriptor takes as long as its sender likes: a socket with `SO_LINGER`, or
//! a file of a FUSE daemon that does not answer. The kernel also closes descriptors in `recvmsg(2)`
//! if they do not fit, and when a connection with unread messages is closed. So the thread of the
//! handler does none of these. Each waiting thread counts against the user of its peer, so that the
//! peers of one user leave threads to others.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Threads that read, refuse and close, and their results.
#[derive(Debug)]
pub(crate) struct PeerThreads<T>(Arc<Shared<T>>);

/// Sends the result of a thread to the handler.
#[derive(Debug)]
pub(crate) struct ResultSender<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    /// The number of running threads, by user.
    running: Mutex<HashMap<u32, usize>>,
    /// None after the handler has closed the queue.
    results: Mutex<Option<Vec<T>>>,
    /// Readable after a thread has ended or sent a result.
    wake_fd: EventFd,
}

impl<T: Send + 'static> PeerThreads<T> {
    pub(crate) fn new() -> io::Result<Self> {
        let wake_fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (running, results) = (Mutex::default(), Mutex::new(Some(Vec::new())));
        Ok(Self(Arc::new(Shared { running, results, wake_fd })))
    }

    /// True if another thread may run for a peer of this user.
    pub(crate) fn has_room(&self, user: u32) -> bool {
        let running = self.0.running();
        running.values().sum::<usize>() < MAX_THREADS
            && running.get(&user).is_none_or(|&count| count < MAX_THREADS_PER_USER)
    }

    /// Starts a thread that works on `thing`. Returns `thing` if no thread may or can start.
    pub(crate) fn start<A: Send + 'static>(
        &self,
        user: u32,
        thing: A,
        work: fn(A, &ResultSender<T>),
    ) -> Result<(), A> {
        if !self.has_room(user) {
            return Err(thing);
        }
        // The thread receives `thing` by a channel, so that it comes back if no thread starts.
        let (give, take) = channel();
        let results = ResultSender(Arc::clone(&self.0));
        *self.0.running().entry(user).or_default() += 1;
        let ends = CountGuard { shared: Arc::clone(&self.0), user };
        let run = move || {
            let _ends = ends;
            if let Ok(thing) = take.recv() {
                work(thing, &results);
            }
        };
        match thread::Builder::new().name("firecracker/peer".into()).stack_size(STACK).spawn(run) {
            Ok(_) => give.send(thing).map_err(|unsent| unsent.0),
            Err(error) => {
                tracing::warn!(%error, "cannot start a thread for a peer, which waits: raise the limit on threads (ulimit -u)");
                Err(thing)
            }
        }
    }

    /// Takes the results that have arrived since the last call.
    pub(crate) fn take_results(&self) -> Vec<T> {
        let _ = self.0.wake_fd.read();
        self.0.results().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Takes the results and closes the queue: from now on a thread drops its result itself.
    pub(crate) fn close(&self) -> Vec<T> {
        self.0.results().take().unwrap_or_default()
    }
}

impl<T> ResultSender<T> {
    pub(crate) fn send(&self, result: T) {
        let mut result = Some(result);
        if let Some(results) = self.0.results().as_mut() {
            results.extend(result.take());
        }
        // The drop may block, so it must not hold the lock.
        drop(result);
        let _ = self.0.wake_fd.write(1);
    }
}

impl<T> AsFd for PeerThreads<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake_fd.as_fd()
    }
}

impl<T> Shared<T> {
    fn results(&self) -> MutexGuard<'_, Option<Vec<T>>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decrements the count of a thread, however the thread ends.
struct CountGuard<T> {
    shared: Arc<Shared<T>>,
    user: u32,
}

impl<T> Drop for CountGuard<T> {
    fn drop(&mut self) {
        let mut running = self.shared.running();
        if let Some(count) = running.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.user);
            }
        }
        drop(running);
        let _ = self.shared.wake_fd.write(1);
    }
}

/// The most threads that run for peers.
const MAX_THREADS: usize = 32;
/// The most threads that run for the peers of one user.
const MAX_THREADS_PER_USER: usize = 8;
/// The stack of a thread. The message that it parses is on the heap.
const STACK: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use pagestitch_testkit::wait;
    use std::sync::mpsc::Receiver;

    #[test]
    fn threads_that_wait_for_one_user_leave_threads_to_another() {
        let peer_threads = PeerThreads::new().unwrap();
        let (release, held) = channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let hold = |held: Arc<Mutex<Receiver<()>>>, _: &ResultSender<u32>| {
            let _ = held.lock().unwrap().recv();
        };
        for _ in 0..MAX_THREADS_PER_USER {
            peer_threads.start(1, Arc::clone(&held), hold).unwrap();
        }
        assert!(!peer_threads.has_room(1));
        assert!(peer_threads.start(1, Arc::clone(&held), hold).is_err());
        peer_threads.start(2, 7, |thing, results| results.send(thing)).unwrap();
        wait::until("a result", || peer_threads.take_results() == [7]);
        drop(release);
        wait::until("the end of all threads", || peer_threads.0.running().is_empty());
        assert!(peer_threads.has_room(1));
    }
}
