//! A random list of chunks, with the expected bytes of its region.

use super::sources::{FaultyFetch, FaultySource};
use super::tally::Tally;
use fastrand::Rng;
use nix::fcntl::OFlag;
use pagestitch::source::{Cached, Donated, FileSource, Limited, Memfd, Pages, Retrying, UnsealedMemfd};
use pagestitch::{Builder, Chunk, Retry};
use pagestitch_testkit::memory::huge_memfd;
use std::env;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The kind of a region, which decides the chunks that it can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Owned,
    /// Whole pages in total.
    Guest,
    /// No donated pages, and more bytes than the budget in most rounds.
    Bounded,
}

/// The expected content of a region.
pub(super) struct Model {
    pub(super) bytes: Vec<u8>,
    /// Byte ranges of the region whose source may fail.
    failing: Vec<Range<usize>>,
    faulty: Vec<Arc<FaultySource>>,
    /// True if all bytes are in memory, in files or mapped, so that a region can be served inline.
    pub(super) inline: bool,
    /// True if a discarded page can be filled again.
    pub(super) refillable: bool,
    /// The donation of a chunk that uses its end only, and the bytes of its beginning, for a later
    /// chunk.
    head: Option<(Arc<Donated>, Vec<u8>)>,
}

impl Model {
    /// Adds random chunks for a region of this kind.
    pub(super) fn random(
        rng: &mut Rng,
        tally: &Arc<Tally>,
        kind: Kind,
        mut builder: Builder,
    ) -> io::Result<(Self, Builder)> {
        let mut model = Self {
            bytes: vec![],
            failing: vec![],
            faulty: vec![],
            inline: true,
            refillable: true,
            head: None,
        };
        // Few large chunks, some, or so many that whole blocks are gathered from them.
        let (most, largest) = match rng.u8(..8) {
            0 | 1 => (20, 3 << 20),
            _ if kind == Kind::Bounded => (10, 4 << 20),
            2 => (2000, 4000),
            _ => (20, 100_000),
        };
        let kinds: &[u8] = match rng.u8(..4) {
            // Many chunks consist of memory and holes only, because each donation is a mapping, and
            // each failing source takes time.
            _ if most > 20 => &[HOLE, MEMORY, MEMORY],
            0 => &INLINE_KINDS,
            _ if kind == Kind::Bounded => &BOUNDED_KINDS,
            _ => &ALL_KINDS,
        };
        if rng.u8(..8) == 0 {
            // The first chunk, so that it has the same offset in a huge page of the region and of
            // the memfd.
            builder = builder.chunks(model.huge_part(rng, tally));
        }
        for _ in 0..rng.usize(1..most) {
            let len = rng.usize(1..largest);
            let kind = kinds[rng.usize(..kinds.len())];
            builder = builder.chunks(model.chunk(rng, tally, kind, len)?);
        }
        let ragged = model.bytes.len() % PAGE;
        if kind == Kind::Guest && ragged > 0 {
            builder = builder.chunk(model.memory(rng, PAGE - ragged));
        }
        Ok((model, builder))
    }

    /// True if an error in this range was announced. Reads cover whole pages.
    pub(super) fn may_fail(&self, range: &Range<usize>) -> bool {
        let pages = range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE);
        self.failing.iter().any(|bad| bad.start < pages.end && pages.start < bad.end)
    }

    /// Ends all failures.
    pub(super) fn repair(&self) {
        self.faulty.iter().for_each(|source| source.repaired.store(true, Ordering::Relaxed));
    }

    /// A chunk, or several chunks of one donation.
    fn chunk(&mut self, rng: &mut Rng, tally: &Arc<Tally>, kind: u8, len: usize) -> io::Result<Vec<Chunk>> {
        Ok(vec![match kind {
            HOLE => {
                self.bytes.resize(self.bytes.len() + len, 0);
                Chunk::hole(len as u64)
            }
            MEMFD => {
                let memfd = UnsealedMemfd::create("stress", len as u64)?;
                memfd.file().write_all_at(self.random_bytes(rng, len), 0)?;
                Chunk::from(Memfd::from(memfd.seal()?))
            }
            2 => self.donated(rng, len)?,
            FILE if rng.bool() => return self.direct_file(rng, tally, len),
            FILE => {
                // A file that has a name only while it is open.
                let memfd = UnsealedMemfd::create("file", len as u64)?;
                memfd.file().write_all_at(self.random_bytes(rng, len), 0)?;
                Tally::count(&tally.files, 1);
                let file = memfd.file().try_clone()?;
                FileSource::from_file(file, "file").map_err(io::Error::other)?.into()
            }
            4 => self.read(rng, tally, len),
            5 => self.fetched(rng, tally, len),
            6 => return self.rotation(rng, tally, len),
            _ => self.memory(rng, len),
        }])
    }

    /// A file on a disk, which is read around the page cache if it can be. Its pages are those of the region.
    fn direct_file(&mut self, rng: &mut Rng, tally: &Tally, len: usize) -> io::Result<Vec<Chunk>> {
        let gap = (PAGE - self.bytes.len() % PAGE) % PAGE;
        let before = (gap > 0).then(|| self.memory(rng, gap));
        let mut options = File::options();
        let file =
            options.read(true).write(true).custom_flags(OFlag::O_TMPFILE.bits()).open(env::temp_dir())?;
        file.write_all_at(self.random_bytes(rng, len), 0)?;
        let open = || FileSource::from_file(file.try_clone()?, "disk").map_err(io::Error::other);
        let direct = open()?.direct();
        let kind = if direct.is_ok() { &tally.direct_files } else { &tally.files };
        Tally::count(kind, 1);
        let file = direct.or_else(|_| open())?;
        Ok(before.into_iter().chain([file.into()]).collect())
    }

    /// A chunk of a source that fails, which is wrapped at times.
    fn read(&mut self, rng: &mut Rng, tally: &Arc<Tally>, len: usize) -> Chunk {
        let (wrapper, block) = wrapper(rng);
        let source = self.faulty(rng, tally, len, block);
        match wrapper {
            RETRYING => Chunk::source(Arc::new(Retrying::new(source, at_once(rng)))),
            LIMITED => Chunk::source(Arc::new(Limited::new(source, rng.usize(1..4)))),
            CACHED => Chunk::source(Arc::new(Cached::new(source, rng.u64(..500_000)).block(block as u64))),
            _ => Chunk::source(source),
        }
    }

    /// As [`read`](Self::read), for a source that answers later.
    fn fetched(&mut self, rng: &mut Rng, tally: &Arc<Tally>, len: usize) -> Chunk {
        let (wrapper, block) = wrapper(rng);
        let source = FaultyFetch(self.faulty(rng, tally, len, block));
        match wrapper {
            RETRYING => Chunk::fetch(Arc::new(Retrying::new(source, at_once(rng)))),
            LIMITED => Chunk::fetch(Arc::new(Limited::new(source, rng.usize(1..4)))),
            CACHED => Chunk::fetch(Arc::new(Cached::new(source, rng.u64(..500_000)).block(block as u64))),
            _ => Chunk::fetch(Arc::new(source)),
        }
    }

    /// Chunks of one donation, cut anywhere, and in another order.
    fn rotation(&mut self, rng: &mut Rng, tally: &Tally, len: usize) -> io::Result<Vec<Chunk>> {
        Tally::count(&tally.donated_rotations, 1);
        let start = self.bytes.len();
        let bytes = self.random_bytes(rng, len).to_vec();
        let mut pages = Pages::new(len)?;
        pages[..len].copy_from_slice(&bytes);
        let mut ends: Vec<usize> = (0..rng.usize(1..6)).map(|_| rng.usize(..len)).chain([0, len]).collect();
        ends.sort_unstable();
        ends.dedup();
        let mut parts: Vec<Range<usize>> = ends.windows(2).map(|ends| ends[0]..ends[1]).collect();
        let by = rng.usize(..parts.len());
        if rng.bool() {
            parts.rotate_left(by)
        } else {
            rng.shuffle(&mut parts)
        }
        self.bytes.truncate(start);
        (self.refillable, self.inline) = (false, false);
        let (donated, aligned) = (Arc::new(Donated::from(pages)), rng.bool());
        let mut chunks = Vec::new();
        for part in parts {
            // A page can move only to the same offset in a page.
            let gap = (part.start + PAGE - self.bytes.len() % PAGE) % PAGE;
            chunks.extend((aligned && gap > 0).then(|| self.memory(rng, gap)));
            self.bytes.extend(&bytes[part.clone()]);
            chunks.push(Chunk::from(Arc::clone(&donated)).range(part.start as u64..part.end as u64));
        }
        Ok(chunks)
    }

    /// A part of a memfd of huge pages, which ends inside a huge page; none if there are no huge
    /// pages.
    fn huge_part(&mut self, rng: &mut Rng, tally: &Tally) -> Option<Chunk> {
        let (start, len) = (self.bytes.len(), rng.usize(1..4 << 20));
        let len = if rng.bool() { len.next_multiple_of(PAGE) } else { len };
        let memfd = huge_memfd(self.random_bytes(rng, len));
        match memfd.and_then(|memfd| Memfd::from_fd(memfd).map_err(io::Error::other)) {
            Ok(memfd) => {
                Tally::count(&tally.hugetlb_parts, 1);
                Some(Chunk::from(memfd).range(0..len as u64))
            }
            Err(_) => {
                Tally::count(&tally.hugetlb_parts_skipped, 1);
                self.bytes.truncate(start);
                None
            }
        }
    }

    /// The end of a donation, or the beginning of one whose end is an earlier chunk. Usually both
    /// share a page.
    fn donated(&mut self, rng: &mut Rng, len: usize) -> io::Result<Chunk> {
        // A moved page that is discarded is lost, and pages at the edges are read by a worker.
        (self.refillable, self.inline) = (false, false);
        if let Some((donated, head)) = self.head.take() {
            self.bytes.extend(&head);
            return Ok(Chunk::from(donated).range(0..head.len() as u64));
        }
        let cut = if rng.bool() { 0 } else { rng.usize(..len) };
        let mut pages = Pages::new(len)?;
        let (offset, all) = (self.bytes.len(), self.random_bytes(rng, len));
        pages[..len].copy_from_slice(all);
        let head = all[..cut].to_vec();
        self.bytes.drain(offset..offset + cut);
        let donated = Arc::new(Donated::from(pages));
        if cut > 0 {
            self.head = Some((Arc::clone(&donated), head));
        }
        Ok(Chunk::from(donated).range(cut as u64..len as u64))
    }

    fn memory(&mut self, rng: &mut Rng, len: usize) -> Chunk {
        let start = rng.usize(..5000);
        let padding = vec![0xaa; start];
        let bytes = [&padding, self.random_bytes(rng, len), &[0xaa]].concat();
        Chunk::from(bytes).range(start as u64..(start + len) as u64)
    }

    /// A source that fails in a range. With a failing byte, all bytes of its block may fail.
    fn faulty(&mut self, rng: &mut Rng, tally: &Arc<Tally>, len: usize, block: usize) -> Arc<FaultySource> {
        let offset = self.bytes.len();
        let bytes = Arc::from(self.random_bytes(rng, len));
        let bad = if rng.bool() {
            0..0
        } else {
            let start = rng.usize(..len);
            start..rng.usize(start + 1..=len).min(start + 30_000)
        };
        if !bad.is_empty() {
            let end = bad.end.next_multiple_of(block).min(len);
            self.failing.push(offset + bad.start / block * block..offset + end);
        }
        let faulty = Arc::new(FaultySource {
            bytes,
            bad: bad.start as u64..bad.end as u64,
            repaired: AtomicBool::new(false),
            granularity: [1, 1, 8192, 65_536, 1 << 20][rng.usize(..5)],
            slow: rng.u64(5..200),
            reads: AtomicU64::new(0),
            tally: Arc::clone(tally),
        });
        self.faulty.push(Arc::clone(&faulty));
        self.inline = false;
        faulty
    }

    /// Adds bytes without a zero among them.
    fn random_bytes(&mut self, rng: &mut Rng, len: usize) -> &[u8] {
        let start = self.bytes.len();
        self.bytes.extend(random_bytes(rng, len));
        &self.bytes[start..]
    }
}

/// Bytes without a zero among them.
pub(super) fn random_bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut state = rng.u64(..) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8 | 1
    };
    (0..len).map(next).collect()
}

/// A random wrapper, and the size of its blocks; 1 if it has none.
fn wrapper(rng: &mut Rng) -> (u8, usize) {
    let wrapper = rng.u8(..6);
    (wrapper, if wrapper == CACHED { [512, 4096, 65_536][rng.usize(..3)] } else { 1 })
}

/// Retries without a long pause.
fn at_once(rng: &mut Rng) -> Retry {
    Retry::times(rng.u32(..3)).pause(Duration::ZERO, Duration::from_micros(100))
}

pub(super) const PAGE: usize = 4096;
const RETRYING: u8 = 0;
const LIMITED: u8 = 1;
const CACHED: u8 = 2;
const HOLE: u8 = 0;
const MEMFD: u8 = 1;
const FILE: u8 = 3;
const MEMORY: u8 = 9;
const ALL_KINDS: [u8; 10] = [HOLE, MEMFD, 2, FILE, 4, 5, 6, MEMORY, MEMORY, MEMORY];
/// The kinds of chunks that a region with a budget can have.
const BOUNDED_KINDS: [u8; 8] = [HOLE, MEMFD, FILE, 4, 5, MEMORY, MEMORY, MEMORY];
/// The kinds of chunks that a region can have which is served inline.
const INLINE_KINDS: [u8; 5] = [HOLE, MEMFD, FILE, FILE, MEMORY];
