//! Out of core: reading more bytes than memory holds.
//!
//! | from | systems | memory |
//! |---|---|---|
//! | memory | a region with a budget, of a pool or inline; a plain handler that drops its oldest page; prototypes that do the least; without a limit | a quarter, of the region |
//! | a file | a region with a budget; `mmap`; plain reads around the page cache, and a prototype of them with a bound | a quarter, of a cgroup with the whole process and its page cache |
//!
//! | at | a touch |
//! |---|---|
//! | random, zipf, scan + hot set | reads a page |
//! | sequential | reads all words of a page |
//! | misses | reads a page that is not in memory, so that touches a second are misses a second |
//! | half writing | reads a page; every other one writes too, and the time of a file has that of the flush |
//!
//! Each read compares bytes. After a run that writes, all bytes of the written pages are compared in the file.

use crate::affinity::allowed;
use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::ooc::memory::{MemorySource, write_prototype, write_region};
use crate::ooc::{Counts, Pattern, ReadTask, Trace, Way, has_cgroups, has_write_back, measure, write_pages};
use crate::prototypes::evict::{Bounded, moves_no_pages};
use crate::systems::{CHUNK, Data, PAGE, sum};
use crate::team::at_once;
use nix::fcntl::OFlag;
use pagestitch::{Budget, Inline, Placement, Pool, Readahead, Region, Server};
use std::env;
use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let mut cases = from_memory(options);
    cases.extend(from_file(options));
    cases
}

/// The cases with a source in memory. All threads have the same CPU.
fn from_memory(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(2 << 30), options.seed);
    warm(data.bytes());
    let touches = options.size(1 << 18);
    let refused = moves_no_pages();
    refused.inspect(|reason| eprintln!("SKIPPED ooc: {MOVING}, and writes to memory: {reason}"));
    let moves = refused.is_none();
    let mut cases = Vec::new();
    for pattern in PATTERNS {
        for (system, run) in SYSTEMS {
            let data = Arc::clone(&data);
            let run = move |seed| run(&data, &data.trace(pattern, touches, seed));
            let case = Case::new(system, run).at(format!("memory, {}", pattern.name()));
            cases.push(case.chunks_of(CHUNK).against(&[FIFO, UNLIMITED, EAGER, MOVING]));
        }
        if moves && pattern == Pattern::Random {
            cases.push(moving(&data, touches));
        }
    }
    if moves && has_write_back() {
        cases.extend(writing(options, touches));
    }
    cases
}

/// The prototype of random reads.
fn moving(data: &Arc<Data>, touches: usize) -> Case {
    let data = Arc::clone(data);
    let run = move |seed| {
        let trace = data.trace(Pattern::Random, touches, seed);
        let memory = Bounded::new(&*data, data.pages(), data.pages() / QUARTER, false);
        memory.serve(|| data.touch(&trace, memory.view().as_slice()))
    };
    let case = Case::new(MOVING, run).at(format!("memory, {}", Pattern::Random.name()));
    case.chunks_of(CHUNK).against(&[FIFO])
}

/// The cases that write to memory.
fn writing(options: &Options, touches: usize) -> impl Iterator<Item = Case> {
    let pages = options.size(2 << 30) / PAGE;
    let sizes = (pages, pages / QUARTER);
    WRITERS.into_iter().map(move |(system, run)| {
        let run = move |seed| run(sizes, &Trace::new(Pattern::HalfWriting, sizes, touches, seed));
        let point = format!("memory, {}", Pattern::HalfWriting.name());
        Case::new(system, run).at(point).against(&[MOVING_WRITES])
    })
}

/// Makes memory of so many pages of which so many are in memory at a time, and writes to it.
type Writes = fn((usize, usize), &Trace) -> Sample;

const WRITERS: [(&str, Writes); 4] = [
    ("pool, budget", |sizes, trace| write_region(MemorySource::Bytes, sizes, trace, &pool())),
    ("pool, budget, memfd", |sizes, trace| write_region(MemorySource::Memfd, sizes, trace, &pool())),
    ("inline, budget, memfd", |sizes, trace| write_region(MemorySource::Memfd, sizes, trace, Inline)),
    (MOVING_WRITES, write_prototype),
];

/// Makes the bytes appear, and touches them.
type Run = fn(&Data, &Trace) -> Sample;

const SYSTEMS: [(&str, Run); 5] = [
    ("pool, budget", |data, trace| with_budget(data, trace, Readahead::Adaptive, &pool())),
    ("inline, budget", |data, trace| with_budget(data, trace, Readahead::None, Inline)),
    (FIFO, |data, trace| {
        let cpu = allowed()[0];
        let plain = data.bounded_manual_page(cpu, data.pages() / QUARTER);
        data.touch(trace, plain.bytes())
    }),
    (UNLIMITED, |data, trace| {
        data.touch(trace, data.builder(Readahead::Adaptive).build(&pool()).expect("a region").as_slice())
    }),
    // With the time of the copy.
    (EAGER, |data, trace| {
        let mut sample = Sample::default();
        let copied = Sample::of(0, 0, || sample = data.touch(trace, &data.eager_small(1)));
        Sample { time: copied.time, processor: copied.processor, ..sample }
    }),
];

fn with_budget(data: &Data, trace: &Trace, readahead: Readahead, server: impl Into<Server>) -> Sample {
    let budget = Budget::bytes((data.bytes() / QUARTER) as u64).expect("a budget");
    let region: Region = data.builder(readahead).budget(&budget).build(server).expect("a region");
    data.fill(trace, region.as_slice());
    let before = Counts::of(&region.metrics(), &budget);
    let sample = data.measure(trace, region.as_slice());
    let shares = Counts::of(&region.metrics(), &budget).since(before, trace.touches.len());
    let hits = trace.hits_with_perfect_bits(data.pages() / QUARTER);
    Sample {
        reads: Some(shares.reads),
        soft_faults: Some(shares.soft_faults),
        of_perfect_bits: hits.map(|hits| (1.0 - shares.waits) / hits),
        ..sample
    }
}

fn pool() -> Pool {
    Pool::builder().placement(Placement::Cpus(vec![allowed()[0]])).start().expect("a pool")
}

impl Data {
    fn trace(&self, pattern: Pattern, touches: usize, seed: u64) -> Trace {
        Trace::new(pattern, (self.pages(), self.pages() / QUARTER), touches, seed)
    }

    /// Touches memory that repeats the chunks, first to fill the memory and then to measure.
    fn touch(&self, trace: &Trace, bytes: &[u8]) -> Sample {
        self.fill(trace, bytes);
        self.measure(trace, bytes)
    }

    /// The touches before the measurement.
    fn fill(&self, trace: &Trace, bytes: &[u8]) {
        let are_right = self.are_right(bytes, &trace.fill) && self.are_right(bytes, &trace.settle);
        assert!(are_right, "a page has other bytes than its chunk");
    }

    fn measure(&self, trace: &Trace, bytes: &[u8]) -> Sample {
        let is_sequential = trace.fill.is_empty();
        let pages = trace.touches.len();
        let (sample, right) =
            at_once((pages, pages * PAGE), &allowed()[..1], vec![&trace.touches[..]], |part| {
                if is_sequential { black_box(sum(bytes)) > 0 } else { self.are_right(bytes, part) }
            });
        assert!(right[0], "a page has other bytes than its chunk");
        sample
    }

    /// Touches pages. True if each has its bytes.
    fn are_right(&self, bytes: &[u8], pages: &[u32]) -> bool {
        pages.iter().all(|&page| bytes[page as usize * PAGE] == self.byte_at(page as usize * PAGE))
    }
}

/// The cases with a file, if there are memory cgroups.
fn from_file(options: &Options) -> Vec<Case> {
    let bytes = options.size(4 << 30);
    let Some(file) = DiskFile::new(bytes).filter(|_| has_cgroups()) else { return Vec::new() };
    let file = Arc::new(file);
    let mut cases = Vec::new();
    // Fewer touches by 16 threads end before the disk is busy.
    let touches = options.size(40_000).max(10_000);
    for (pattern, threads) in FILE_POINTS {
        if pattern == Pattern::HalfWriting && !has_write_back() {
            continue;
        }
        let baselines = baselines(pattern);
        for &(system, way) in regions(pattern).iter().chain(baselines).chain(slow(pattern, threads)) {
            let file = Arc::clone(&file);
            let touches = if (system, way) == UNADVISED { touches / FEW } else { touches };
            let run = move |seed| {
                let memory = (bytes / QUARTER) as u64;
                let task = ReadTask { way, file: file.path(), pattern, touches, threads, seed, memory };
                measure(&task, bytes / PAGE)
            };
            let point = match threads {
                1 => format!("file, {}", pattern.name()),
                _ => format!("file, {}, {threads} threads", pattern.name()),
            };
            let systems: Vec<&str> = baselines.iter().map(|(system, _)| *system).collect();
            cases.push(Case::new(system, run).at(point).by(threads).against(&systems));
        }
    }
    cases
}

/// The regions that suit a pattern.
const fn regions(pattern: Pattern) -> &'static [(&'static str, Way)] {
    match pattern {
        Pattern::Misses => &[POOL_DIRECT, INLINE_DIRECT],
        Pattern::HalfWriting => &[POOL, INLINE],
        Pattern::Sequential => &[POOL, POOL_DIRECT],
        _ => &[POOL, POOL_DIRECT, INLINE_DIRECT],
    }
}

/// The other ways to the bytes that suit a pattern.
const fn baselines(pattern: Pattern) -> &'static [(&'static str, Way)] {
    match pattern {
        Pattern::Random | Pattern::Zipf | Pattern::ScanAndHotSet | Pattern::HalfWriting => {
            &[("mmap, MADV_RANDOM", Way::MmapRandom)]
        }
        Pattern::Misses => &[
            ("prototype ooc2", Way::Prototype),
            ("O_DIRECT reads", Way::DirectReads),
            ("mmap, MADV_RANDOM", Way::MmapRandom),
        ],
        Pattern::Sequential => &[("mmap", Way::Mmap), ("mmap, MADV_SEQUENTIAL", Way::MmapSequential)],
    }
}

/// A way that is no baseline: without advice, random reads of a file read much more than they touch, and take a
/// hundred times as long. So there are few of them.
const fn slow(pattern: Pattern, threads: usize) -> &'static [(&'static str, Way)] {
    match (pattern, threads) {
        (Pattern::Random, 1) => &[UNADVISED],
        _ => &[],
    }
}

/// A file on a disk, without a name: nothing is left of it after the end of this process.
struct DiskFile(File);

impl DiskFile {
    fn new(bytes: usize) -> Option<Self> {
        let folder =
            [PathBuf::from("/var/tmp"), env::temp_dir()].into_iter().find(|folder| folder.is_dir())?;
        let options = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_TMPFILE.bits()).clone();
        let mut file = options.open(folder).ok()?;
        write_pages(&mut file, bytes / PAGE).and_then(|()| file.sync_all()).ok()?;
        Some(Self(file))
    }

    /// Its path, valid in other processes too.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", process::id(), self.0.as_raw_fd()))
    }
}

const PATTERNS: [Pattern; 4] = [Pattern::Random, Pattern::Zipf, Pattern::ScanAndHotSet, Pattern::Sequential];
const FILE_POINTS: [(Pattern, usize); 10] = [
    (Pattern::Random, 1),
    (Pattern::Random, 16),
    (Pattern::Zipf, 1),
    (Pattern::Zipf, 16),
    (Pattern::ScanAndHotSet, 1),
    (Pattern::Sequential, 1),
    (Pattern::Misses, 1),
    (Pattern::Misses, 16),
    (Pattern::HalfWriting, 1),
    (Pattern::HalfWriting, 16),
];
const POOL: (&str, Way) = ("pool, budget", Way::Region);
const POOL_DIRECT: (&str, Way) = ("pool, budget, direct", Way::RegionDirect);
const INLINE: (&str, Way) = ("inline, budget", Way::Inline);
const INLINE_DIRECT: (&str, Way) = ("inline, budget, direct", Way::InlineDirect);
const MOVING: &str = "prototype evict move";
const MOVING_WRITES: &str = "prototype evict move w";
const UNADVISED: (&str, Way) = ("mmap, no advice", Way::Mmap);
/// The slow way has this part of the touches.
const FEW: usize = 200;
const FIFO: &str = "plain handler, FIFO";
const UNLIMITED: &str = "pool, no budget";
const EAGER: &str = "eager copy";
/// Memory holds this part of the bytes.
const QUARTER: usize = 4;
