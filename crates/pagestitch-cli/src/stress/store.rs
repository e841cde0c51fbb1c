//! A source that takes bytes back, and whose writes and syncs fail as announced.

use super::context::difference;
use super::sources::ON_PURPOSE;
use super::tally::Tally;
use fastrand::Rng;
use nix::errno::Errno;
use pagestitch::source::{UnsealedMemfd, WritableFile, WritableSource};
use pagestitch::{Chunk, Source};
use parking_lot::Mutex;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The failures that a round can bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failures {
    /// All bytes are taken, because locked pages cannot leave, and there would be no room beside those that
    /// cannot be written.
    None,
    /// Some bytes are always taken, so that there is room for the pages of other regions.
    Some,
    /// No bytes are taken for a moment.
    All,
}

/// The failures of a store, until it is repaired.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    None,
    /// One of so many writes fails, wherever it goes.
    OneOf(u64),
    /// Writes that overlap these bytes fail.
    Bytes(Range<u64>),
    /// All writes fail for a moment.
    Moment,
    /// A sync fails once. Each later flush of its range has to tell.
    Sync,
}

/// Bytes in memory that take writes, also in parts.
pub(super) struct Store {
    bytes: Mutex<Vec<u8>>,
    /// The bytes are in this file instead, which takes all writes.
    file: Option<Arc<WritableFile>>,
    pub(super) fault: Fault,
    repaired: AtomicBool,
    /// The end of the moment.
    until: Instant,
    /// One of so many writes takes a part of the bytes.
    short: u64,
    /// One of so many writes is delayed.
    slow: u64,
    calls: AtomicU64,
    sync_failed: AtomicBool,
    tally: Arc<Tally>,
}

impl Store {
    pub(super) fn random(rng: &mut Rng, tally: &Arc<Tally>, bytes: Vec<u8>, failures: Failures) -> Arc<Self> {
        let size = bytes.len() as u64;
        let fault = match rng.u8(..8) {
            0..5 if failures == Failures::None => Fault::None,
            0 | 1 => Fault::OneOf(rng.u64(4..40)),
            2 | 3 => {
                let start = rng.u64(..size);
                Fault::Bytes(start..rng.u64(start + 1..=size).min(start + 30_000))
            }
            4 if failures == Failures::All => Fault::Moment,
            5 => Fault::Sync,
            _ => Fault::None,
        };
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            file: None,
            fault,
            repaired: AtomicBool::new(false),
            until: Instant::now() + Duration::from_millis(rng.u64(1..300)),
            short: rng.u64(2..30),
            slow: rng.u64(20..200),
            calls: AtomicU64::new(0),
            sync_failed: AtomicBool::new(false),
            tally: Arc::clone(tally),
        })
    }

    /// A store that a signal handler can read.
    pub(super) fn in_file(
        rng: &mut Rng,
        tally: &Arc<Tally>,
        bytes: &[u8],
    ) -> Result<Arc<Self>, pagestitch::Error> {
        let file = UnsealedMemfd::create("store", bytes.len() as u64)?.file().try_clone()?;
        file.write_all_at(bytes, 0)?;
        let source = Arc::new(WritableFile::from_file(file, "store")?);
        let store = Self::random(rng, tally, vec![0], Failures::None);
        let mut store = Arc::into_inner(store).expect("no other thread has it");
        (store.file, store.fault) = (Some(source), Fault::None);
        Ok(Arc::new(store))
    }

    pub(super) fn chunk(self: &Arc<Self>) -> Chunk {
        self.file
            .as_ref()
            .map_or_else(|| Chunk::writable(Arc::clone(self)), |file| Chunk::writable(Arc::clone(file)))
    }

    /// Ends all failures.
    pub(super) fn repair(&self) {
        self.repaired.store(true, Ordering::SeqCst);
    }

    /// True if writes fail.
    pub(super) fn fails_to_write(&self) -> bool {
        !matches!(self.fault, Fault::None | Fault::Sync)
    }

    /// True if an error of a flush was announced.
    pub(super) fn may_fail(&self) -> bool {
        !matches!(self.fault, Fault::None)
    }

    /// True if each write of these bytes fails.
    pub(super) fn must_fail(&self, range: &Range<u64>) -> bool {
        let is_bad = matches!(&self.fault, Fault::Bytes(bad) if overlap(bad, range));
        is_bad && !self.repaired.load(Ordering::SeqCst)
    }

    /// True if a sync has failed, so that flushes fail from now on.
    pub(super) fn has_failed_to_sync(&self) -> bool {
        self.sync_failed.load(Ordering::SeqCst)
    }

    /// Compares a range with expected bytes; returns the offset of the first difference.
    pub(super) fn difference(&self, start: usize, expected: &[u8]) -> Option<usize> {
        let mut bytes = vec![0; expected.len()];
        match &self.file {
            Some(file) => file.read_at(start as u64, &mut bytes).expect("a file in memory"),
            None => bytes.copy_from_slice(&self.bytes.lock()[start..start + expected.len()]),
        }
        difference(&bytes, expected).map(|at| start + at)
    }

    fn fails(&self, number: u64, range: &Range<u64>) -> bool {
        if self.repaired.load(Ordering::SeqCst) {
            return false;
        }
        match &self.fault {
            Fault::None | Fault::Sync => false,
            Fault::OneOf(many) => number.is_multiple_of(*many),
            Fault::Bytes(bad) => overlap(bad, range),
            Fault::Moment => Instant::now() < self.until,
        }
    }

    fn take(&self, offset: u64, bytes: &[u8]) {
        self.bytes.lock()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Fails in one of several ways. Some of the bytes may be taken.
    fn fail(&self, number: u64, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        Tally::count(&self.tally.write_failures_injected, 1);
        match number % 5 {
            0 => Err(Errno::EIO.into()),
            1 => Err(Errno::ENOSPC.into()),
            2 => Ok(0),
            3 => std::panic::panic_any(ON_PURPOSE),
            _ => {
                self.take(offset, &bytes[..bytes.len() / 2]);
                Err(Errno::EIO.into())
            }
        }
    }
}

impl Source for Store {
    fn size(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.bytes.lock()[offset as usize..][..into.len()]);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("store")
    }
}

impl WritableSource for Store {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        if number % self.slow == self.slow - 1 {
            Tally::count(&self.tally.delays_injected, 1);
            thread::sleep(Duration::from_micros(200 + number % 7 * 300));
        }
        if self.fails(number, &(offset..offset + bytes.len() as u64)) {
            return self.fail(number / 3, offset, bytes);
        }
        if number % self.short == 1 {
            Tally::count(&self.tally.short_writes_injected, 1);
            if number % 4 == 1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let some = bytes.len().div_ceil(3);
            self.take(offset, &bytes[..some]);
            return Ok(some);
        }
        self.take(offset, bytes);
        Ok(bytes.len())
    }

    fn sync(&self) -> io::Result<()> {
        let fails = matches!(self.fault, Fault::Sync) && !self.repaired.load(Ordering::SeqCst);
        if fails && !self.sync_failed.swap(true, Ordering::SeqCst) {
            Tally::count(&self.tally.write_failures_injected, 1);
            return Err(Errno::EIO.into());
        }
        Ok(())
    }
}

const fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}
