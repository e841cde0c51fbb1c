//! What a peer can make wait is done in threads of its own: to read its messages, and to close what it sent.
//!
//! The last close of a descriptor waits as long as its sender likes: a socket with `SO_LINGER`, a file of a FUSE daemon that does
//! not answer. The kernel closes descriptors also in `recvmsg(2)`, where they do not fit, and when a connection is closed that has
//! unread messages. So the thread that sees to all guests does none of these. A thread that waits is counted to the user whose
//! peer it works for: one user's peers leave threads to others.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Threads that read, refuse and close, and what they have found out.
#[derive(Debug)]
pub(crate) struct Errands<T>(Arc<Shared<T>>);

/// Tells what an errand has found out, before it closes what it has.
#[derive(Debug)]
pub(crate) struct Report<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    /// Threads that run, by user.
    running: Mutex<HashMap<u32, usize>>,
    /// None where no handler asks for them any more.
    results: Mutex<Option<Vec<T>>>,
    /// Readable where one has ended or reported.
    bell: EventFd,
}

impl<T: Send + 'static> Errands<T> {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (running, results) = (Mutex::default(), Mutex::new(Some(Vec::new())));
        Ok(Self(Arc::new(Shared { running, results, bell })))
    }

    /// Whether a thread can be had for a user's peer.
    pub(crate) fn has_room(&self, user: u32) -> bool {
        let running = self.0.running();
        running.values().sum::<usize>() < MOST && running.get(&user).is_none_or(|&count| count < MOST_OF_ONE)
    }

    /// How many run.
    pub(crate) fn running(&self) -> usize {
        self.0.running().values().sum()
    }

    /// Starts a thread that works on `thing`, which is given back where there is none.
    pub(crate) fn start<A: Send + 'static>(
        &self,
        user: u32,
        thing: A,
        work: fn(A, &Report<T>),
    ) -> Result<(), A> {
        if !self.has_room(user) {
            return Err(thing);
        }
        // Where no thread can be had, what was to go into it comes back.
        let (give, take) = channel();
        let report = Report(Arc::clone(&self.0));
        *self.0.running().entry(user).or_default() += 1;
        let ends = Ends { shared: Arc::clone(&self.0), user };
        let run = move || {
            let _ends = ends;
            if let Ok(thing) = take.recv() {
                work(thing, &report);
            }
        };
        match thread::Builder::new().name("firecracker/peer".into()).stack_size(STACK).spawn(run) {
            Ok(_) => give.send(thing).map_err(|unsent| unsent.0),
            Err(error) => {
                tracing::warn!(%error, "no thread for a peer: it waits");
                Err(thing)
            }
        }
    }

    /// What has been found out since it was last asked.
    pub(crate) fn results(&self) -> Vec<T> {
        let _ = self.0.bell.read();
        self.0.results().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The same, for the last time: from now on an errand closes what it would have told.
    pub(crate) fn end(&self) -> Vec<T> {
        self.0.results().take().unwrap_or_default()
    }
}

impl<T> Report<T> {
    pub(crate) fn tell(&self, result: T) {
        let mut result = Some(result);
        if let Some(results) = self.0.results().as_mut() {
            results.extend(result.take());
        }
        // What is closed here is closed without the lock: that may wait.
        drop(result);
        let _ = self.0.bell.write(1);
    }
}

impl<T> AsFd for Errands<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
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

/// Counts a thread out, however it ends.
struct Ends<T> {
    shared: Arc<Shared<T>>,
    user: u32,
}

impl<T> Drop for Ends<T> {
    fn drop(&mut self) {
        let mut running = self.shared.running();
        if let Some(count) = running.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.user);
            }
        }
        drop(running);
        let _ = self.shared.bell.write(1);
    }
}

/// Threads that wait for peers, at most.
const MOST: usize = 32;
/// And those of one user.
const MOST_OF_ONE: usize = 8;
/// A thread parses a message, which is read onto the heap.
const STACK: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::Receiver;

    #[test]
    fn threads_that_wait_for_one_user_leave_threads_to_another() {
        let errands = Errands::new().unwrap();
        let (release, held) = channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let wait = |held: Arc<Mutex<Receiver<()>>>, _: &Report<u32>| {
            let _ = held.lock().unwrap().recv();
        };
        for _ in 0..MOST_OF_ONE {
            errands.start(1, Arc::clone(&held), wait).unwrap();
        }
        assert!(!errands.has_room(1));
        assert!(errands.start(1, Arc::clone(&held), wait).is_err());
        errands.start(2, 7, |thing, report| report.tell(thing)).unwrap();
        while errands.results() != [7] {
            thread::yield_now();
        }
        drop(release);
        while errands.running() > 0 {
            thread::yield_now();
        }
        assert!(errands.has_room(1));
    }
}
