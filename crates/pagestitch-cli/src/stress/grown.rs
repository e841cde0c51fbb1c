//! A region that grows while threads read it. Each reader knows the places of chunks whose append has
//! returned, and their bytes.

use super::context::{Failure, Run, join_all};
use super::limit;
use super::model::{PAGE, random_bytes};
use super::server::RunningServer;
use super::tally::Tally;
use fastrand::Rng;
use pagestitch::source::{FileSource, Memfd, UnsealedMemfd};
use pagestitch::{Budget, Chunk, ErrorKind, Region};
use pagestitch_testkit::memory::discard;
use parking_lot::Mutex;
use std::error::Error;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

/// The place of a chunk, and its bytes.
type Placed = Arc<(Range<usize>, Vec<u8>)>;

/// A region with the chunks that are known to be there.
struct Grown<'a> {
    region: Region,
    run: Run<'a>,
    budget: Option<&'a Budget>,
    align: usize,
    chunks: Mutex<Vec<Placed>>,
    inline: bool,
}

pub(super) fn run(
    rng: &mut Rng,
    run: Run<'_>,
    budget: Option<&Budget>,
    server: &RunningServer,
) -> Result<(), Box<dyn Error>> {
    let capacity = rng.usize(1..12 << 20);
    let align = [1, 1, 8, PAGE][rng.usize(..4)];
    let builder = Region::builder().name("grown").capacity(capacity as u64).align(align as u64);
    let mut builder = budget.iter().fold(builder, |builder, budget| builder.budget(budget));
    let mut chunks = Vec::new();
    if rng.bool() {
        let len = rng.usize(1..=capacity.min(100_000));
        let bytes = random_bytes(rng, len);
        builder = builder.chunk(bytes.clone());
        chunks.push(Arc::new((0..bytes.len(), bytes)));
    }
    let region = builder.build(server.server())?;
    let grown = Grown { region, run, budget, align, chunks: Mutex::new(chunks), inline: server.is_inline() };
    let threads = rng.usize(1..6);
    thread::scope(|scope| {
        let start = |_| {
            let (grown, mut rng) = (&grown, rng.fork());
            scope.spawn(move || grown.use_at_random(&mut rng))
        };
        join_all((0..threads).map(start).collect())
    })?;
    grown.verify_all()?;
    Tally::count(&run.tally.faults, grown.region.metrics().faults);
    Ok(())
}

impl Grown<'_> {
    fn use_at_random(&self, rng: &mut Rng) -> Result<(), Failure> {
        let largest = [100, 9_000, 300_000][rng.usize(..3)];
        for _ in 0..rng.usize(10..150) {
            self.run.beat();
            match rng.u8(..8) {
                0..2 => {
                    let len = rng.usize(1..largest);
                    self.append(rng, len)?;
                }
                // Inline, no thread fills a discarded page for an append.
                2 if !self.inline && !self.region.is_empty() => {
                    let range = range(rng, self.region.len());
                    discard(&self.region, range);
                    Tally::count(&self.run.tally.discards, 1);
                }
                3 if !self.region.is_empty() => {
                    let range = range(rng, self.region.len());
                    let populated = self.region.populate(range.start as u64..range.end as u64);
                    match populated {
                        // The range is longer than the budget.
                        Err(error) if self.budget.is_some() && limit::is_full(&error) => {}
                        populated => populated.map_err(|error| format!("populate fails: {error}"))?,
                    }
                }
                4 if self.budget.is_some() => {
                    let evicted = self.region.evict(..);
                    evicted.map_err(|error| format!("evict fails: {error}"))?;
                }
                _ => self.read(rng)?,
            }
            self.budget.map_or(Ok(()), limit::check)?;
        }
        Ok(())
    }

    fn append(&self, rng: &mut Rng, len: usize) -> Result<(), Failure> {
        let (chunk, bytes) =
            self.chunk(rng, len).map_err(|error| format!("a chunk cannot be made: {error}"))?;
        let before = self.region.len();
        match self.region.append(chunk) {
            Ok(place) => {
                if place.len() != len || place.start < before || place.start % self.align > 0 {
                    return Err(format!("{len} bytes are appended at {place:?}, behind {before} bytes"));
                }
                self.run.verify(&self.region.as_slice()[place.clone()], &bytes, place.start)?;
                self.chunks.lock().push(Arc::new((place, bytes)));
                Tally::count(&self.run.tally.appends, 1);
                Ok(())
            }
            // Other threads may have appended since.
            Err(error) if error.kind() == ErrorKind::TooLarge => {
                let end = self.region.len().next_multiple_of(self.align) + len;
                if end as u64 <= self.region.capacity() {
                    return Err(format!("{len} bytes have room, and are refused: {error}"));
                }
                Ok(())
            }
            Err(error) => Err(format!("an append fails: {error}")),
        }
    }

    /// A random chunk with its bytes.
    fn chunk(&self, rng: &mut Rng, len: usize) -> io::Result<(Chunk, Vec<u8>)> {
        let kind = rng.u8(..5);
        let bytes = if kind == 0 { vec![0; len] } else { random_bytes(rng, len) };
        let chunk = match kind {
            0 => Chunk::hole(len as u64),
            1 => {
                let memfd = UnsealedMemfd::create("stress", len as u64)?;
                memfd.file().write_all_at(&bytes, 0)?;
                Chunk::from(Memfd::from(memfd.seal()?))
            }
            // A budget takes bytes that cannot change.
            2 if !self.inline && self.budget.is_none() => {
                let memfd = UnsealedMemfd::create("file", len as u64)?;
                memfd.file().write_all_at(&bytes, 0)?;
                let file = memfd.file().try_clone()?;
                FileSource::from_file(file, "file").map_err(io::Error::other)?.into()
            }
            _ => Chunk::from(bytes.clone()),
        };
        Ok((chunk, bytes))
    }

    /// Reads a chunk, and all bytes up to the length.
    fn read(&self, rng: &mut Rng) -> Result<(), Failure> {
        let all = self.region.as_slice();
        let chunk = {
            let chunks = self.chunks.lock();
            if chunks.is_empty() {
                return Ok(());
            }
            Arc::clone(&chunks[rng.usize(..chunks.len())])
        };
        let (place, bytes) = &*chunk;
        // The slice may be older than the chunk.
        let end = place.end.min(all.len());
        if let Some(read) = all.get(place.start..end) {
            self.run.verify(read, &bytes[..read.len()], place.start)?;
        }
        let mut read = vec![0; place.len()];
        let done = self.region.read_at(place.start as u64, &mut read);
        done.map_err(|error| format!("a read of an appended chunk fails: {error}"))?;
        self.run.verify(&read, bytes, place.start)
    }

    fn verify_all(&self) -> Result<(), Failure> {
        let mut chunks = self.chunks.lock();
        chunks.sort_by_key(|chunk| chunk.0.start);
        let mut end = 0;
        for chunk in chunks.iter() {
            let (place, bytes) = &**chunk;
            self.run.verify(&self.region.as_slice()[end..place.start], &vec![0; place.start - end], end)?;
            self.run.verify(&self.region.as_slice()[place.clone()], bytes, place.start)?;
            end = place.end;
        }
        if end != self.region.len() {
            return Err(format!("the region has {} bytes, its chunks {end}", self.region.len()));
        }
        Ok(())
    }
}

fn range(rng: &mut Rng, len: usize) -> Range<usize> {
    let start = rng.usize(..len);
    let most = if rng.u8(..8) == 0 { len } else { 20_000 };
    start..(start + rng.usize(1..=most)).min(len)
}
