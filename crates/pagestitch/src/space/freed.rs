//! Released sources until they are freed. A worker frees none, because a thread that holds the lock of
//! the allocator may touch a page meanwhile, and to free gigabytes takes a tenth of a second.
//!
//! Threads of the application free what waits, when they build, populate or drop a region. A thread of
//! its own does once [`ENOUGH`] bytes wait. It is not woken for less, because to wake it costs as much
//! as a fault; and not started before the sources have so many bytes.

use crate::guard::discard;
use crate::signals::NoSignals;
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};

/// The released sources of a server that are not freed yet.
#[derive(Debug)]
pub(crate) struct Freed {
    queue: (Sender<Bytes>, Receiver<Bytes>),
    /// The weight of the sources in the queue.
    waiting: AtomicU64,
    /// The weight of all sources that may be released.
    expected: Mutex<u64>,
    thread: OnceLock<Thread>,
    has_ended: AtomicBool,
}

impl Freed {
    pub(crate) fn new() -> Self {
        Self {
            queue: bounded(WAITING),
            waiting: AtomicU64::new(0),
            expected: Mutex::default(),
            thread: OnceLock::new(),
            has_ended: AtomicBool::new(false),
        }
    }

    /// Announces sources that weigh so much together. Frees what waits, in this thread.
    ///
    /// # Errors
    ///
    /// That of the start of the thread.
    pub(crate) fn expect(self: &Arc<Self>, weight: u64) -> io::Result<()> {
        self.free_waiting();
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        *expected = expected.saturating_add(weight);
        if *expected < ENOUGH || self.thread.get().is_some() {
            return Ok(());
        }
        let (freed, quiet) = (Arc::clone(self), NoSignals::until_dropped());
        let named = thread::Builder::new().name(String::from("pagestitch/free"));
        let started = named.spawn(move || freed.run())?;
        drop(quiet);
        let _ = self.thread.set(started.thread().clone());
        Ok(())
    }

    /// True if many sources wait. Until they are freed, no other is released.
    pub(crate) fn is_full(&self) -> bool {
        self.queue.0.len() >= WAITING - MARGIN
    }

    /// Takes a released source, if the queue is not [full](Self::is_full). Allocates and frees nothing.
    pub(crate) fn push(&self, source: Bytes) {
        let weight = weight(source.len() as u64);
        let before = self.waiting.fetch_add(weight, Ordering::SeqCst);
        if let Err(full) = self.queue.0.try_send(source) {
            self.waiting.fetch_sub(weight, Ordering::SeqCst);
            return discard(full.into_inner());
        }
        if before < ENOUGH && before + weight >= ENOUGH {
            self.thread.get().into_iter().for_each(Thread::unpark);
        }
    }

    /// Frees what waits, in this thread.
    pub(crate) fn free_waiting(&self) {
        while let Ok(source) = self.queue.1.try_recv() {
            self.waiting.fetch_sub(weight(source.len() as u64), Ordering::SeqCst);
            discard(source);
        }
    }

    /// Ends the thread. Regions may still release sources, which are freed with the last of them.
    pub(crate) fn end(&self) {
        self.has_ended.store(true, Ordering::SeqCst);
        self.thread.get().into_iter().for_each(Thread::unpark);
    }

    fn run(&self) {
        while !self.has_ended.load(Ordering::SeqCst) {
            thread::park();
            self.free_waiting();
        }
    }
}

/// The weight of a source of so many bytes: small ones fill the queue, too.
pub(crate) fn weight(bytes: u64) -> u64 {
    bytes.max(2 * ENOUGH / WAITING as u64)
}

/// The weight that wakes the thread: half of the queue, or 4 MiB.
const ENOUGH: u64 = 4 << 20;
/// The most sources that wait.
const WAITING: usize = 256;
/// More threads do not find room at once.
const MARGIN: usize = 64;
