//! A writable region whose written pages go back to their sources, which fail at times: no byte is lost.
//!
//! The region is cut into parts. A thread that writes to a part or reads it holds the lock of its expected
//! bytes, so that a flush of the part returns with exactly these bytes in the sources.

use super::context::{Failure, Run, join_all};
use super::limit;
use super::model::{PAGE, random_bytes};
use super::server::RunningServer;
use super::store::{Failures, Fault, Store};
use super::tally::Tally;
use fastrand::Rng;
use pagestitch::{Budget, ErrorKind, Inline, SharedRegion, WriteBack};
use pagestitch_testkit::memory::{Split, word_of};
use parking_lot::{Mutex, MutexGuard};
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

/// A region with its sources and its expected bytes.
struct Written<'a> {
    region: SharedRegion,
    run: Run<'a>,
    budget: Option<&'a Budget>,
    /// The sources, with the bytes of the region that they have.
    stores: Vec<(Arc<Store>, Range<usize>)>,
    /// The expected bytes of each part.
    parts: Vec<Mutex<Vec<u8>>>,
}

pub(super) fn run(
    rng: &mut Rng,
    run: Run<'_>,
    budget: Option<&Budget>,
    server: &RunningServer,
    failures: Failures,
) -> Result<(), Box<dyn Error>> {
    let Some(written) = Written::random(rng, run, budget, server, failures)? else {
        Tally::count(&run.tally.written_back_skipped, 1);
        return Ok(());
    };
    Tally::count(&run.tally.written_back, 1);
    let threads = rng.usize(1..5);
    thread::scope(|scope| {
        let start = |_| {
            let (written, mut rng) = (&written, rng.fork());
            scope.spawn(move || written.use_at_random(&mut rng))
        };
        join_all((0..threads).map(start).collect())
    })?;
    written.end(rng)?;
    Ok(())
}

impl<'a> Written<'a> {
    /// `None` on a kernel that cannot record writes, or cannot move pages.
    fn random(
        rng: &mut Rng,
        run: Run<'a>,
        budget: Option<&'a Budget>,
        server: &RunningServer,
        failures: Failures,
    ) -> Result<Option<Self>, pagestitch::Error> {
        let (mut bytes, mut stores, is_inline) = (Vec::new(), Vec::new(), rng.u8(..3) == 0);
        let builder = SharedRegion::builder().name("written").write_back(WriteBack::ToSource);
        let align = if rng.u8(..4) == 0 { PAGE } else { 1 };
        let mut builder =
            budget.iter().fold(builder, |builder, budget| builder.budget(budget)).align(align as u64);
        // More than a budget in most rounds.
        let largest = if rng.u8(..3) == 0 { 200_000 } else { 6 << 20 };
        for _ in 0..rng.usize(1..6) {
            bytes.resize(bytes.len().next_multiple_of(align), 0);
            let (start, len) = (bytes.len(), rng.usize(1..largest));
            let new = random_bytes(rng, len);
            bytes.extend_from_slice(&new);
            let store = match is_inline {
                true => Store::in_file(rng, run.tally, &new)?,
                false => Store::random(rng, run.tally, new, failures),
            };
            builder = builder.chunk(store.chunk());
            stores.push((store, start..bytes.len()));
        }
        let region = match builder.build_shared(if is_inline { Inline.into() } else { server.server() }) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(None),
            built => built?,
        };
        Tally::count(&run.tally.written_back_inline, u64::from(is_inline));
        let parts = bytes.chunks(PART).map(|part| Mutex::new(part.to_vec())).collect();
        Ok(Some(Self { region, run, budget, stores, parts }))
    }

    fn use_at_random(&self, rng: &mut Rng) -> Result<(), Failure> {
        for _ in 0..rng.usize(20..200) {
            self.run.beat();
            let (number, mut expected) = self.part(rng);
            let range = range(rng, expected.len());
            match rng.u8(..16) {
                0..4 => self.write(rng, number, &mut expected, &range)?,
                4..6 => self.write_word(rng, number, &mut expected, range.start)?,
                6..8 => self.read_word(number, &expected, range.start)?,
                8 => self.flush_part(rng, number, &mut expected)?,
                9 => {
                    drop(expected);
                    self.flush(rng)?;
                }
                10 => {
                    drop(expected);
                    self.move_pages(rng)?;
                }
                11 => {
                    let start = number * PART + range.start;
                    self.check(self.region.populate(start as u64..(start + range.len()) as u64))?;
                }
                12 => self
                    .split(rng)
                    .shared(&self.region, number * PART + range.start..number * PART + range.end),
                _ => self.read(number, &expected, &range)?,
            }
        }
        Ok(())
    }

    fn part(&self, rng: &mut Rng) -> (usize, MutexGuard<'_, Vec<u8>>) {
        let number = rng.usize(..self.parts.len());
        (number, self.parts[number].lock())
    }

    fn write(
        &self,
        rng: &mut Rng,
        number: usize,
        expected: &mut [u8],
        range: &Range<usize>,
    ) -> Result<(), Failure> {
        let bytes = random_bytes(rng, range.len());
        let start = number * PART + range.start;
        match self.region.write_at(start as u64, &bytes) {
            Ok(()) => expected[range.clone()].copy_from_slice(&bytes),
            Err(error) => {
                self.check(Err(error))?;
                // Some of the pages have the new bytes.
                self.learn(start, &bytes, &mut expected[range.clone()])?;
            }
        }
        Ok(())
    }

    /// Reads the bytes of a write that had no room: each one is old or new.
    fn learn(&self, start: usize, new: &[u8], expected: &mut [u8]) -> Result<(), Failure> {
        for (at, (new, expected)) in new.iter().zip(expected).enumerate() {
            let mut byte = [0];
            while let Err(error) = self.region.read_at((start + at) as u64, &mut byte) {
                self.check(Err(error))?;
                self.run.beat();
                let _ = self.region.retry_failed(..);
            }
            if byte[0] != *new && byte[0] != *expected {
                return Err(format!("byte {} is neither the old nor the new one", start + at));
            }
            *expected = byte[0];
        }
        Ok(())
    }

    fn read(&self, number: usize, expected: &[u8], range: &Range<usize>) -> Result<(), Failure> {
        let mut read = vec![0; range.len()];
        let start = number * PART + range.start;
        match self.region.read_at(start as u64, &mut read) {
            Ok(()) => self.run.verify(&read, &expected[range.clone()], start),
            Err(error) => self.check(Err(error)),
        }
    }

    /// Writes eight bytes through the pointer.
    fn write_word(
        &self,
        rng: &mut Rng,
        number: usize,
        expected: &mut [u8],
        at: usize,
    ) -> Result<(), Failure> {
        let Some(at) = self.word_at(expected, at) else { return Ok(()) };
        let value = rng.u64(..);
        word_of(&self.region, number * PART + at).store(value, Ordering::Relaxed);
        expected[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        Ok(())
    }

    /// Reads eight bytes through the pointer.
    fn read_word(&self, number: usize, expected: &[u8], at: usize) -> Result<(), Failure> {
        let Some(at) = self.word_at(expected, at) else { return Ok(()) };
        let read = word_of(&self.region, number * PART + at).load(Ordering::Relaxed).to_ne_bytes();
        self.run.verify(&read, &expected[at..at + 8], number * PART + at)
    }

    /// An aligned word of a part. `None` if a touch may be a signal, because a page has no room.
    fn word_at(&self, expected: &[u8], at: usize) -> Option<usize> {
        let at = at / 8 * 8;
        (!self.may_be_full() && at + 8 <= expected.len()).then_some(at)
    }

    /// True if all writes of a store fail for a moment.
    fn may_be_full(&self) -> bool {
        self.budget.is_some() && self.stores.iter().any(|(store, _)| matches!(store.fault, Fault::Moment))
    }

    /// Flushes a part, and compares the bytes in the sources. Writes to bad bytes of a store at times, whose
    /// flush has to fail.
    fn flush_part(&self, rng: &mut Rng, number: usize, expected: &mut [u8]) -> Result<(), Failure> {
        let (start, len) = (number * PART, expected.len());
        let bad = self.bad_byte(start..start + len);
        if let Some(at) = bad {
            self.write(rng, number, expected, &(at - start..at - start + 1))?;
        }
        let range = start as u64..(start + len) as u64;
        let flushed = self.flush_range(range)?;
        match (flushed, bad) {
            (true, Some(at)) => Err(format!("a flush of byte {at} succeeds, which its source does not take")),
            (true, None) => self.compare(start, expected),
            (false, _) => Ok(()),
        }
    }

    /// The first byte in a range that its store does not take.
    fn bad_byte(&self, range: Range<usize>) -> Option<usize> {
        let mut all = self.stores.iter();
        all.find_map(|(store, bytes)| {
            let Fault::Bytes(bad) = &store.fault else { return None };
            let at = range.start.max(bytes.start + bad.start as usize);
            let is_bad = at < range.end.min(bytes.start + bad.end as usize);
            let in_store = (at as u64).checked_sub(bytes.start as u64)?;
            (is_bad && store.must_fail(&(in_store..in_store + 1))).then_some(at)
        })
    }

    /// Compares the bytes in the sources.
    fn compare(&self, start: usize, expected: &[u8]) -> Result<(), Failure> {
        for (store, bytes) in &self.stores {
            let (from, to) = (bytes.start.max(start), bytes.end.min(start + expected.len()));
            if from >= to {
                continue;
            }
            if let Some(at) = store.difference(from - bytes.start, &expected[from - start..to - start]) {
                return Err(format!("byte {} is flushed, and its source lacks it", bytes.start + at));
            }
        }
        Ok(())
    }

    /// Flushes while other threads write.
    fn flush(&self, rng: &mut Rng) -> Result<(), Failure> {
        let range = if rng.bool() { 0..self.region.len() } else { range(rng, self.region.len()) };
        self.flush_range(range.start as u64..range.end as u64).map(drop)
    }

    /// True if the flush succeeds.
    fn flush_range(&self, range: Range<u64>) -> Result<bool, Failure> {
        Tally::count(&self.run.tally.flushes, 1);
        match self.region.flush(range.clone()) {
            Ok(()) => Ok(true),
            Err(_) if self.stores.iter().any(|(store, _)| store.may_fail()) => {
                Tally::count(&self.run.tally.flushes_failed, 1);
                Ok(false)
            }
            Err(error) => Err(format!("the flush of {range:?} fails, and no source does: {error}")),
        }
    }

    /// Has pages leave or stay.
    fn move_pages(&self, rng: &mut Rng) -> Result<(), Failure> {
        let range = range(rng, self.region.len());
        let pages = range.start as u64..range.end as u64;
        let Some(budget) = self.budget else { return Ok(()) };
        match rng.u8(..4) {
            0 => {
                Tally::count(&self.run.tally.pins, 1);
                match self.region.pin(pages) {
                    // Other pages are pinned.
                    Err(error) if limit::is_full(&error) => {}
                    pinned => self.check(pinned)?,
                }
            }
            1 => self.check(self.region.unpin(..))?,
            _ => self.check(self.region.evict(pages).map(drop))?,
        }
        limit::check(budget)
    }

    /// A random call that splits a mapping.
    fn split(&self, rng: &mut Rng) -> Split {
        let may_lock = !self.stores.iter().any(|(store, _)| store.fails_to_write());
        match rng.u8(..6) {
            0 | 1 if may_lock => Split::Lock(rng.bool()),
            2 => Split::PageOut,
            _ => Split::Advise(rng.bool()),
        }
    }

    /// An error is right if written pages leave no room.
    fn check(&self, done: Result<(), pagestitch::Error>) -> Result<(), Failure> {
        match done {
            Ok(()) => Ok(()),
            Err(error) if limit::is_full(&error) && self.may_be_full() => {
                Tally::count(&self.run.tally.errors_as_declared, 1);
                Ok(())
            }
            Err(error) => Err(format!("a call fails, and no source leaves it without room: {error}")),
        }
    }

    /// Repairs the sources. All bytes are in the region then, and in the sources after a flush.
    fn end(self, rng: &mut Rng) -> Result<(), Failure> {
        let was_unsynced = self.stores.iter().any(|(store, _)| store.has_failed_to_sync());
        self.stores.iter().for_each(|(store, _)| store.repair());
        if rng.bool() {
            self.retry()?;
        }
        let flushed = if rng.bool() { Some(self.region.flush(..)) } else { None };
        if rng.bool() {
            self.retry()?;
            (0..self.parts.len()).try_for_each(|number| {
                let expected = self.parts[number].lock();
                self.read(number, &expected, &(0..expected.len()))
            })?;
        }
        let Self { region, run, budget, stores, parts } = self;
        Tally::count(&run.tally.faults, region.metrics().faults);
        let finished = region.finish().map(drop);
        for ended in flushed.into_iter().chain([finished]) {
            match ended {
                Ok(()) if was_unsynced => return Err(String::from("a flush succeeds after a failed sync")),
                Err(error) if !was_unsynced => {
                    return Err(format!("a flush fails after the repair: {error}"));
                }
                _ => {}
            }
        }
        let expected = parts.into_iter().flat_map(Mutex::into_inner).collect::<Vec<u8>>();
        for (store, bytes) in stores {
            if let Some(at) = store.difference(0, &expected[bytes.clone()]) {
                return Err(format!("byte {} is lost: its source has another one", bytes.start + at));
            }
        }
        budget.map_or(Ok(()), limit::check)
    }

    /// Fills pages again that had no room.
    fn retry(&self) -> Result<(), Failure> {
        self.region.retry_failed(..).map_err(|error| format!("the retry fails: {error}"))
    }
}

fn range(rng: &mut Rng, len: usize) -> Range<usize> {
    let start = rng.usize(..len);
    let most = if rng.u8(..8) == 0 { len } else { 20_000 };
    start..(start + rng.usize(1..=most)).min(len)
}

/// The bytes of a part: several runs of pages that go back together.
const PART: usize = 1 << 18;
