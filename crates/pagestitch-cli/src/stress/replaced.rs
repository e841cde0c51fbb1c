//! A region whose pages get other bytes while threads read them: each page has its old bytes or its new ones.
//!
//! The bytes of a page follow from a number, and 0 is a page of zeros. Each page has a list of its numbers.
//! A replacing thread adds the new number before the call, and counts it as valid after the call. So a reader
//! may find each number that was added before its read ended, from the last one that was valid when it began.

use super::context::{Failure, Run, join_all};
use super::limit;
use super::model::PAGE;
use super::server::RunningServer;
use super::tally::Tally;
use fastrand::Rng;
use pagestitch::{Budget, Chunk, ErrorKind, SharedRegion};
use pagestitch_testkit::memory::{Split, discard_shared};
use parking_lot::Mutex;
use std::error::Error;
use std::ops::Range;
use std::thread;

/// A region with the numbers of its pages.
struct Replaced<'a> {
    region: SharedRegion,
    run: Run<'a>,
    budget: Option<&'a Budget>,
    /// The kernel keeps pages of the region.
    is_locked: bool,
    pages: Vec<Mutex<Numbers>>,
    /// The pages that are being replaced. A thread replaces those of one lock.
    parts: Vec<Mutex<()>>,
}

/// The numbers of a page, the oldest first.
struct Numbers {
    all: Vec<u64>,
    /// The index of the last one that was valid.
    valid: usize,
}

pub(super) fn run(
    rng: &mut Rng,
    run: Run<'_>,
    budget: Option<&Budget>,
    server: &RunningServer,
    is_locked: bool,
) -> Result<(), Box<dyn Error>> {
    let most = [100, 3000][rng.usize(..2)];
    let pages = rng.usize(1..most);
    let numbers: Vec<u64> = (0..pages).map(|_| rng.u64(1..)).collect();
    let builder = SharedRegion::builder().name("replaced").chunk(bytes_of(&numbers));
    let builder = budget.iter().fold(builder, |builder, budget| builder.budget(budget));
    // Without a number, a region of a Manual reads events, and its own thread would wait for them.
    let builder = if budget.is_none() { builder.report_discards(server.is_pool()) } else { builder };
    let region = builder.build_shared(server.server())?;
    let new = |number| Mutex::new(Numbers { all: vec![number], valid: 0 });
    let pages = numbers.into_iter().map(new).collect::<Vec<_>>();
    let parts = pages.chunks(PART).map(|_| Mutex::new(())).collect();
    let replaced = Replaced { region, run, budget, is_locked, pages, parts };
    let threads = rng.usize(1..5);
    thread::scope(|scope| {
        let start = |_| {
            let (replaced, mut rng) = (&replaced, rng.fork());
            scope.spawn(move || replaced.use_at_random(&mut rng))
        };
        join_all((0..threads).map(start).collect())
    })?;
    replaced.read(&(0..replaced.pages.len()))?;
    Ok(())
}

impl Replaced<'_> {
    fn use_at_random(&self, rng: &mut Rng) -> Result<(), Failure> {
        for _ in 0..rng.usize(10..150) {
            self.run.beat();
            let pages = self.range(rng);
            let range = (pages.start * PAGE) as u64..(pages.end * PAGE) as u64;
            let done = match rng.u8(..16) {
                0..4 => self.replace(rng)?,
                4 if pages.len() <= 64 => self.region.populate(range),
                5 if self.budget.is_some() => self.region.evict(range).map(drop),
                6 => {
                    discard_shared(&self.region, range.start as usize..range.end as usize);
                    Tally::count(&self.run.tally.discards, 1);
                    Ok(())
                }
                7 => {
                    let split = if rng.bool() { Split::Advise(rng.bool()) } else { Split::PageOut };
                    split.shared(&self.region, range.start as usize..range.end as usize);
                    Ok(())
                }
                8 if self.budget.is_some() => match self.region.pin(range) {
                    Err(error) if limit::is_full(&error) => Ok(()),
                    pinned => pinned,
                },
                9 if self.budget.is_some() => self.region.unpin(..),
                _ => self.read(&pages).map(Ok)?,
            };
            done.map_err(|error| format!("a call fails: {error}"))?;
            self.budget.map_or(Ok(()), limit::check)?;
        }
        Ok(())
    }

    fn range(&self, rng: &mut Rng) -> Range<usize> {
        let start = rng.usize(..self.pages.len());
        let most = if rng.u8(..8) == 0 { self.pages.len() } else { 6 };
        start..(start + rng.usize(1..=most)).min(self.pages.len())
    }

    /// Gives pages other bytes, or zeros.
    fn replace(&self, rng: &mut Rng) -> Result<Result<(), pagestitch::Error>, Failure> {
        let part = rng.usize(..self.parts.len());
        let _alone = self.parts[part].lock();
        let (first, end) = (part * PART, self.pages.len().min((part + 1) * PART));
        let first = rng.usize(first..end);
        let pages = first..rng.usize(first + 1..=end);
        let zeros = rng.u8(..3) == 0;
        let numbers: Vec<u64> = pages.clone().map(|_| if zeros { 0 } else { rng.u64(1..) }).collect();
        for (page, number) in self.pages[pages.clone()].iter().zip(&numbers) {
            page.lock().all.push(*number);
        }
        let range = (pages.start * PAGE) as u64..(pages.end * PAGE) as u64;
        let done = match zeros {
            true => self.region.discard(range),
            false if rng.bool() => self.region.replace(range, shifted(rng, &numbers)),
            false => self.region.replace(range, bytes_of(&numbers)),
        };
        // After an error the pages have their bytes as before.
        match done {
            Err(error) if self.is_locked && error.kind() == ErrorKind::Kernel => return Ok(Ok(())),
            Err(error) => return Ok(Err(error)),
            Ok(()) => {}
        }
        for page in &self.pages[pages] {
            let mut page = page.lock();
            page.valid = page.all.len() - 1;
        }
        Tally::count(&self.run.tally.replacements, 1);
        Ok(Ok(()))
    }

    fn read(&self, pages: &Range<usize>) -> Result<(), Failure> {
        let valid: Vec<usize> = self.pages[pages.clone()].iter().map(|page| page.lock().valid).collect();
        let mut read = vec![0; pages.len() * PAGE];
        let done = self.region.read_at((pages.start * PAGE) as u64, &mut read);
        done.map_err(|error| format!("pages {pages:?} cannot be read: {error}"))?;
        for ((page, bytes), valid) in pages.clone().zip(read.chunks(PAGE)).zip(valid) {
            let numbers = self.pages[page].lock();
            let is_one = numbers.all[valid..].iter().rev().any(|number| bytes_of(&[*number]) == bytes);
            if !is_one {
                return Err(format!("page {page} has neither its old nor its new bytes"));
            }
        }
        Tally::count(&self.run.tally.bytes_verified, read.len() as u64);
        Ok(())
    }
}

/// The bytes of pages with these numbers.
fn bytes_of(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(numbers.len() * PAGE);
    for number in numbers {
        let word = |at: u64| if *number == 0 { 0 } else { number.wrapping_mul(2 * at + 1) };
        (0..PAGE as u64 / 8).for_each(|at| bytes.extend_from_slice(&word(at).to_ne_bytes()));
    }
    bytes
}

/// The same as a part of a longer memory, at an odd offset.
fn shifted(rng: &mut Rng, numbers: &[u64]) -> Chunk {
    let start = rng.usize(..5000);
    let bytes = [vec![0xaa; start], bytes_of(numbers), vec![0xaa]].concat();
    let end = (bytes.len() - 1) as u64;
    Chunk::from(bytes).range(start as u64..end)
}

/// The pages that one thread replaces at a time.
const PART: usize = 50;
