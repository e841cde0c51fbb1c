//! Released sources until they are freed. A worker frees none, because a thread that holds the lock of
//! the allocator may touch a page meanwhile, and to free gigabytes takes a tenth of a second.
//!
//! `populate` and the drop of a region free what waits of the region. Besides, a thread frees all that
//! waits in the regions of a server, once that is [`ENOUGH`]. It is not woken for less, because to wake
//! it costs as much as a fault; and not started before the regions have so many bytes. If it cannot
//! start, they wait for the calls.
//!
//! The sources of a region that wait are a stack of their numbers. Each is pushed once, so a stack that
//! is taken off as a whole changes no more.

use crate::guard::discard;
use crate::signals::NoSignals;
use crate::source::{Memory, Source};
use bytes::Bytes;
use pagestitch_kernel::fork::ForkGeneration;
use std::collections::HashMap;
use std::iter;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};

/// The regions of a server that release sources, and the thread that frees these.
#[derive(Debug)]
pub(crate) struct DeferredFree {
    regions: Mutex<Regions>,
    /// The bytes that wait, in all regions.
    waiting: AtomicU64,
    thread: OnceLock<Thread>,
    has_ended: AtomicBool,
    /// A forked child has no such thread, and the lock of its copy may be held forever.
    made_in: ForkGeneration,
}

#[derive(Debug, Default)]
struct Regions {
    /// By the address of their sources.
    known: HashMap<usize, Arc<Sources>>,
    /// The bytes of all these sources.
    bytes: u64,
}

/// The part of a region in a [`DeferredFree`], until its drop.
#[derive(Debug)]
pub(crate) struct Member {
    frees: Arc<DeferredFree>,
    sources: Arc<Sources>,
}

/// The sources of a region.
#[derive(Debug)]
struct Sources {
    /// The number of the source that was released last and waits, or [`BOTTOM`].
    top: AtomicUsize,
    all: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    /// `None`: not released.
    memory: Option<Memory>,
    /// The number of the source below in the stack.
    below: AtomicUsize,
}

impl DeferredFree {
    pub(crate) fn new() -> Self {
        Self {
            regions: Mutex::default(),
            waiting: AtomicU64::new(0),
            thread: OnceLock::new(),
            has_ended: AtomicBool::new(false),
            made_in: ForkGeneration::current(),
        }
    }

    /// Adds the sources of a region, by their numbers.
    pub(crate) fn add(self: &Arc<Self>, sources: impl Iterator<Item = Option<Memory>>) -> Member {
        let all = sources.map(|memory| Waiting { memory, below: AtomicUsize::new(BOTTOM) }).collect();
        let sources = Arc::new(Sources { top: AtomicUsize::new(BOTTOM), all });
        let mut regions = self.regions();
        regions.bytes += sources.bytes();
        regions.known.insert(Arc::as_ptr(&sources).addr(), Arc::clone(&sources));
        if regions.bytes >= ENOUGH && self.thread.get().is_none() {
            self.start();
        }
        drop(regions);
        Member { frees: Arc::clone(self), sources }
    }

    /// Starts the thread. Without one, sources wait for calls.
    fn start(self: &Arc<Self>) {
        let (frees, _quiet) = (Arc::clone(self), NoSignals::until_dropped());
        let named = thread::Builder::new().name(String::from("pagestitch/free"));
        if let Ok(started) = named.spawn(move || frees.run()) {
            let _ = self.thread.set(started.thread().clone());
        }
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        self.has_ended.store(true, Ordering::SeqCst);
        self.thread.get().into_iter().for_each(Thread::unpark);
    }

    fn run(&self) {
        while !self.has_ended.load(Ordering::SeqCst) {
            thread::park();
            // Taken under the lock, so that the sources that still wait are those of the drop; freed outside,
            // because destructors may drop regions.
            let taken: Vec<_> = self.regions().known.values().flat_map(|sources| sources.take()).collect();
            self.free(taken);
        }
    }

    fn free(&self, taken: impl IntoIterator<Item = Bytes>) {
        let mut freed = 0;
        for source in taken {
            freed += source.len() as u64;
            discard(source);
        }
        self.waiting.fetch_sub(freed, Ordering::SeqCst);
    }

    fn regions(&self) -> MutexGuard<'_, Regions> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// Adds a released source to those that wait. Allocates nothing, frees nothing and takes no lock.
    pub(crate) fn push(&self, source: usize, bytes: u64) {
        // Counted before the thread can find it.
        let waiting = self.frees.waiting.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.sources.push(source);
        if waiting >= ENOUGH {
            self.frees.thread.get().into_iter().for_each(Thread::unpark);
        }
    }

    /// Frees the sources that wait, in this thread.
    pub(crate) fn free_waiting(&self) {
        self.frees.free(self.sources.take());
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if !self.frees.made_in.is_current() {
            return;
        }
        let mut regions = self.frees.regions();
        regions.bytes -= self.sources.bytes();
        let known = regions.known.remove(&Arc::as_ptr(&self.sources).addr());
        drop(regions);
        drop(known);
        self.free_waiting();
    }
}

impl Sources {
    fn bytes(&self) -> u64 {
        self.all.iter().filter_map(|source| source.memory.as_ref()).map(Source::size).sum()
    }

    fn push(&self, source: usize) {
        let mut top = self.top.load(Ordering::SeqCst);
        loop {
            self.all[source].below.store(top, Ordering::Relaxed);
            // Publishes the store.
            match self.top.compare_exchange(top, source, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return,
                Err(other) => top = other,
            }
        }
    }

    /// Takes all sources off the stack.
    fn take(&self) -> impl Iterator<Item = Bytes> + '_ {
        let mut next = self.top.swap(BOTTOM, Ordering::SeqCst);
        let numbers = iter::from_fn(move || {
            let source = self.all.get(next)?;
            next = source.below.load(Ordering::Relaxed);
            Some(source)
        });
        numbers.filter_map(|source| source.memory.as_ref()?.take_released())
    }
}

/// The bytes that wake the thread.
const ENOUGH: u64 = 4 << 20;
/// The number of no source.
const BOTTOM: usize = usize::MAX;
