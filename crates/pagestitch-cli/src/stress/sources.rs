//! Sources that fail, panic, drop requests or delay, in announced ranges only.

use super::tally::Tally;
use pagestitch::Source;
use pagestitch::source::{Fetch, Reply};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// A source of bytes that fails in a range.
pub(super) struct FaultySource {
    pub(super) bytes: Arc<[u8]>,
    /// Reads that overlap this range fail in one of several ways until the source is repaired.
    pub(super) bad: Range<u64>,
    pub(super) repaired: AtomicBool,
    pub(super) granularity: u64,
    /// One of so many reads is delayed.
    pub(super) slow: u64,
    pub(super) reads: AtomicU64,
    pub(super) tally: Arc<Tally>,
}

impl FaultySource {
    /// Delays the read if its turn has come. Returns a number that selects the way to fail, or
    /// none.
    fn fate(&self, range: &Range<u64>) -> Option<u64> {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        if number % self.slow == self.slow - 1 {
            Tally::count(&self.tally.delays_injected, 1);
            thread::sleep(Duration::from_micros(300 + number % 7 * 500));
        }
        let bad = range.start < self.bad.end
            && self.bad.start < range.end
            && !self.repaired.load(Ordering::Relaxed);
        bad.then(|| {
            Tally::count(&self.tally.failures_injected, 1);
            number
        })
    }

    fn slice(&self, range: &Range<u64>) -> &[u8] {
        &self.bytes[range.start as usize..range.end as usize]
    }
}

impl Source for FaultySource {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + into.len() as u64;
        match self.fate(&range) {
            None => into.copy_from_slice(self.slice(&range)),
            Some(number) if number % 3 == 0 => std::panic::panic_any(ON_PURPOSE),
            Some(_) => {
                // An error after half of the bytes, none of which may become visible.
                into[..range.end.saturating_sub(range.start) as usize / 2].fill(0xee);
                return Err(io::Error::from(io::ErrorKind::ConnectionReset));
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        String::from("faulty")
    }

    fn granularity(&self) -> u64 {
        self.granularity
    }
}

/// The same source, answering later from another thread.
pub(super) struct FaultyFetch(pub(super) Arc<FaultySource>);

impl Fetch for FaultyFetch {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn fetch(&self, offset: u64, reply: Reply) {
        let faulty = Arc::clone(&self.0);
        let answer = move || {
            let range = offset..offset + reply.len() as u64;
            match faulty.fate(&range) {
                None => reply.answer(faulty.slice(&range)),
                Some(number) if number % 3 == 0 => drop(reply),
                Some(number) if number % 3 == 1 => reply.answer(b"too short"),
                Some(_) => reply.fail(io::Error::from(io::ErrorKind::TimedOut)),
            }
        };
        // If no thread can start, this thread answers.
        if let Err(unstarted) = start(answer) {
            unstarted();
        }
    }

    fn name(&self) -> String {
        String::from("faulty fetch")
    }

    fn granularity(&self) -> u64 {
        self.0.granularity
    }
}

fn start<F: FnOnce() + Send + 'static>(work: F) -> Result<(), F> {
    let work = Arc::new(parking_lot::Mutex::new(Some(work)));
    let given = Arc::clone(&work);
    let started = thread::Builder::new().spawn(move || given.lock().take().map(|work| work()));
    match started {
        Ok(_) => Ok(()),
        Err(_) => work.lock().take().map_or(Ok(()), Err),
    }
}

pub(super) const ON_PURPOSE: &str = "a source panics on purpose";
