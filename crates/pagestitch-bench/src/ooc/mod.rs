//! A reader or writer of a file that is larger than its memory, in a process and a memory cgroup of its own.
//!
//! The benchmark starts itself again for each run, because a cgroup limits a process: the reader's own
//! pages and the page cache that its reads fill count together, for a region as for a plain `mmap`.
//!
//! | file | content |
//! |---|---|
//! | `resident` | the memory of a reader, seen from outside |
//! | `trace` | the order of the touches |
//! | `cgroup` | memory cgroups, of both versions |
//! | `direct` | plain reads around the page cache |
//! | `memory` | writers of memory larger than its budget, in this process |
//! | `writing` | touches half of which write |
//! | `words` | the words of a mapped file, or of a region |

mod cgroup;
mod direct;
pub(crate) mod memory;
mod resident;
mod trace;
mod words;
mod writing;

use crate::case::Sample;
use crate::child;
use crate::measure::{processor_time, timed};
use crate::prototypes::direct::{Block, BoundedFile};
use crate::systems::{HUGE_PAGE, PAGE};
use crate::team::{at_once, in_parts, parts};
use crate::threads::cpus;
use cgroup::Cgroup;
use direct::DirectReads;
use nix::sys::mman::ProtFlags;
use nix::sys::resource::{UsageWho, getrusage};
use pagestitch::source::{FileSource, WritableFile};
use pagestitch::{
    Budget, Chunk, Error, ErrorKind, Inline, Metrics, Pool, Region, Server, SharedRegion, WriteBack,
};
use serde::{Deserialize, Serialize};
use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Stdio, exit};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use words::Advice;
use writing::{Writer, check_and_restore};

pub(crate) use cgroup::has_cgroups;
pub(crate) use trace::{Pattern, Trace};
pub(crate) use words::Words;

/// The way to the bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    /// A region with a budget.
    Region,
    /// A region with a budget, whose pages are read around the page cache where the file system can.
    RegionDirect,
    /// As [`RegionDirect`](Self::RegionDirect), served inline.
    InlineDirect,
    /// As [`Region`](Self::Region), served inline.
    Inline,
    /// Reads of single pages into a buffer, around the page cache: the most that the disk gives.
    DirectReads,
    /// The prototype: the same reads by the threads that touch, into memory with a bound.
    Prototype,
    /// A plain `mmap`, with the kernel's readahead.
    Mmap,
    /// A plain `mmap`, advised of random reads.
    MmapRandom,
    /// A plain `mmap`, advised of sequential reads.
    MmapSequential,
}

/// The task of a reader.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ReadTask {
    pub(crate) way: Way,
    pub(crate) file: PathBuf,
    pub(crate) pattern: Pattern,
    pub(crate) touches: usize,
    pub(crate) threads: usize,
    pub(crate) seed: u64,
    /// The memory of the reader: that of its cgroup.
    pub(crate) memory: u64,
}

/// The figures of a reader.
#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    ns: u64,
    processor_ns: u64,
    /// The share of the touches that read the file, with the pages that are read ahead.
    reads: f64,
    /// The share of the touches that wait for a read of the file.
    waits: f64,
    soft_faults: Option<f64>,
    /// The bytes of the budget, and of a block for each thread, if there is a budget.
    budget: Option<(u64, u64)>,
}

/// The counts of a region with a budget.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    reads: u64,
    /// Faults whose page was neither there nor on the standby list.
    waits: u64,
    soft_faults: u64,
}

/// The shares of touches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shares {
    /// Those that read their source, with the pages that are read ahead.
    pub(crate) reads: f64,
    /// Those that wait for a read.
    pub(crate) waits: f64,
    /// Those that bring a page back from the standby list.
    pub(crate) soft_faults: f64,
}

impl Counts {
    pub(crate) fn of(metrics: &Metrics, budget: &Budget) -> Self {
        let soft_faults = budget.metrics().soft_faults;
        let waits = metrics.faults.saturating_sub(metrics.faults_spurious + soft_faults);
        Self { reads: metrics.pages_installed(), waits, soft_faults }
    }

    pub(crate) fn since(self, before: Self, touches: usize) -> Shares {
        let share = |of: fn(&Self) -> u64| of(&self).saturating_sub(of(&before)) as f64 / touches as f64;
        Shares {
            reads: share(|counts| counts.reads),
            waits: share(|counts| counts.waits),
            soft_faults: share(|counts| counts.soft_faults),
        }
    }
}

/// Runs as a reader and exits, if this process was started as one.
pub(crate) fn run_if_requested() {
    let Ok(task) = env::var(TASK_VARIABLE) else { return };
    child::end_with_the_benchmark();
    let task: ReadTask = serde_json::from_str(&task).expect("a task");
    let figures = serde_json::to_vec(&task.run()).expect("figures");
    io::stdout().write_all(&figures).expect("a parent");
    exit(0);
}

/// Starts a reader in a memory cgroup of its own, with nothing of the file in the page cache, and waits
/// for its end.
pub(crate) fn measure(task: &ReadTask, pages: usize) -> Sample {
    words::forget_cached(&File::open(&task.file).expect("the file"));
    let cgroup = Cgroup::new(task.memory).expect("a memory cgroup");
    let mut command = child::this_program();
    command.env(TASK_VARIABLE, serde_json::to_string(task).expect("a task"));
    command.env(cgroup::VARIABLE, cgroup.folder()).stdout(Stdio::piped());
    let mut reader = command.spawn().expect("a reader");
    let mut pipe = reader.stdout.take().expect("a pipe");
    let resident = resident::most_until(&pipe, reader.id());
    let mut said = Vec::new();
    pipe.read_to_end(&mut said).expect("a reader that speaks");
    assert!(reader.wait().expect("a reader that ends").success(), "the reader has failed: {task:?}");
    let figures: Figures = serde_json::from_slice(&said).expect("figures");
    let hits_at_best = figures
        .budget
        .and_then(|(budget, _)| task.trace(pages).hits_with_perfect_bits(budget as usize / PAGE));
    Sample {
        time: Duration::from_nanos(figures.ns),
        processor: Duration::from_nanos(figures.processor_ns),
        pages: task.pattern.touches(pages, task.touches) as u64,
        bytes: (task.pattern.touches(pages, task.touches) * PAGE) as u64,
        reads: Some(figures.reads),
        soft_faults: figures.soft_faults,
        of_perfect_bits: hits_at_best.map(|hits| (1.0 - figures.waits) / hits),
        resident_bytes: resident.filter(|_| figures.budget.is_some()),
        resident_limit: figures.budget.map(|(budget, blocks)| budget + blocks),
        ..Sample::default()
    }
}

impl ReadTask {
    /// Joins the cgroup, and reads.
    fn run(&self) -> Figures {
        let folder = env::var_os(cgroup::VARIABLE).expect("a cgroup");
        cgroup::join(Path::new(&folder)).expect("a cgroup to join");
        match self.way {
            Way::Region if self.pattern == Pattern::HalfWriting => self.write_region(&pool()),
            Way::Inline if self.pattern == Pattern::HalfWriting => self.write_region(Inline),
            Way::MmapRandom if self.pattern == Pattern::HalfWriting => self.write_mmap(),
            Way::DirectReads => self.read_direct(),
            Way::Region => self.read_region(FileSource::open(&self.file), &pool()),
            Way::RegionDirect => self.read_region(self.direct_file(), &pool()),
            Way::InlineDirect => self.read_region(self.direct_file(), Inline),
            Way::Inline => self.read_region(FileSource::open(&self.file), Inline),
            Way::Prototype => self.read_prototype(),
            Way::Mmap => self.read_mmap(Advice::Normal),
            Way::MmapRandom => self.read_mmap(Advice::Random),
            Way::MmapSequential => self.read_mmap(Advice::Sequential),
        }
    }

    fn trace(&self, pages: usize) -> Trace {
        Trace::new(self.pattern, (pages, self.memory as usize / PAGE), self.touches, self.seed)
    }

    fn direct_file(&self) -> Result<FileSource, Error> {
        let file = FileSource::open(&self.file).and_then(FileSource::direct);
        file.or_else(|_| FileSource::open(&self.file))
    }

    fn read_region(&self, file: Result<FileSource, Error>, server: impl Into<Server>) -> Figures {
        let budget = self.budget();
        let region = Region::builder()
            .chunk(file.expect("the file"))
            .budget(&budget)
            .build_shared(server)
            .expect("a region");
        let trace = self.trace(region.len() / PAGE);
        let words = Words::of(&region);
        warm(&words, &trace.fill);
        warm(&words, &trace.settle);
        self.figures(&region, &budget, || self.touch(&words, &trace))
    }

    fn write_region(&self, server: impl Into<Server>) -> Figures {
        let budget = self.budget();
        let file = WritableFile::open(&self.file).expect("the file");
        let region = Region::builder()
            .chunk(Chunk::writable(Arc::new(file)))
            .budget(&budget)
            .write_back(WriteBack::ToSource)
            .build_shared(server)
            .expect("a region");
        let trace = self.trace(region.len() / PAGE);
        let words = Words::of(&region);
        warm(&words, &trace.fill);
        self.figures(&region, &budget, || self.write(&words, &trace, || region.flush(..).expect("a flush")))
    }

    /// Beside the budget, the cgroup holds the program, and tables: 8 bytes of page tables and as many of the region's
    /// own for each page of the file. With workers, it holds their blocks, and the page cache of streams.
    fn budget(&self) -> Budget {
        const PROGRAM: u64 = 16 << 20;
        let tables = fs::metadata(&self.file).expect("the file").len() / (PAGE / 16) as u64;
        let streams = match self.way {
            Way::Region | Way::RegionDirect => self.memory / 32,
            _ => 0,
        };
        Budget::bytes(self.memory - PROGRAM - tables - streams).expect("a budget")
    }

    /// The figures of touches of a region.
    fn figures(&self, region: &SharedRegion, budget: &Budget, touch: impl FnOnce() -> (u64, u64)) -> Figures {
        let before = Counts::of(&region.metrics(), budget);
        let (ns, processor_ns) = touch();
        let after = Counts::of(&region.metrics(), budget);
        let shares = after.since(before, self.pattern.touches(region.len() / PAGE, self.touches));
        let Shares { reads, waits, soft_faults } = shares;
        let blocks = (cpus() + self.threads.max(WARMERS)) * HUGE_PAGE;
        let budget = Some((budget.limit(), blocks as u64));
        Figures { ns, processor_ns, reads, waits, soft_faults: Some(soft_faults), budget }
    }

    /// Reads pages into a buffer, without a mapping.
    fn read_direct(&self) -> Figures {
        let file = DirectReads::open(&self.file).expect("the file");
        let trace = self.trace(file.pages());
        let (ns, processor_ns) = self.each_part(&trace, |part| file.are_right(part));
        Figures { ns, processor_ns, reads: 1.0, waits: 1.0, soft_faults: None, budget: None }
    }

    /// Reads pages into memory with a bound, without a page table, a policy or a counter.
    fn read_prototype(&self) -> Figures {
        let file = DirectReads::open(&self.file).expect("the file");
        let pages = file.pages();
        let trace = self.trace(pages);
        let most = self.budget().limit() as usize / PAGE;
        let read = |page: usize, block: &mut Block| file.read(page, block).expect("a page of the file");
        let memory = BoundedFile::new(read, pages, most, self.threads);
        memory.serve(|| {
            let words = Words::of_view(memory.view(), pages * PAGE);
            warm(&words, &trace.fill);
            warm(&words, &trace.settle);
            let before = memory.fills();
            let (ns, processor_ns) = self.touch(&words, &trace);
            let reads = (memory.fills() - before) as f64 / trace.touches.len() as f64;
            Figures { ns, processor_ns, reads, waits: reads, soft_faults: None, budget: None }
        })
    }

    fn read_mmap(&self, advice: Advice) -> Figures {
        let words = Words::mapped(&File::open(&self.file).expect("the file"), ProtFlags::PROT_READ);
        let trace = self.trace(words.pages());
        // With the kernel's readahead: it only fills memory.
        warm(&words, &trace.fill);
        words.advise(advice);
        warm(&words, &trace.settle);
        with_major_faults(&trace, || self.touch(&words, &trace))
    }

    fn write_mmap(&self) -> Figures {
        let file = self.open_for_writes();
        let words = Words::mapped(&file, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        let trace = self.trace(words.pages());
        warm(&words, &trace.fill);
        words.advise(Advice::Random);
        with_major_faults(&trace, || self.write(&words, &trace, || words.sync()))
    }

    /// Touches the pages of a trace; returns the time and the processor time in nanoseconds.
    fn touch(&self, words: &Words<'_>, trace: &Trace) -> (u64, u64) {
        let is_right = |&page: &u32| words.are_right(page as usize, self.pattern);
        self.each_part(trace, |part| part.iter().all(is_right))
    }

    /// Calls `read` with each thread's part of a trace; returns the time and the processor time in nanoseconds.
    fn each_part(&self, trace: &Trace, read: impl Fn(&[u32]) -> bool + Sync) -> (u64, u64) {
        let parts: Vec<&[u32]> = parts(&trace.touches, self.threads, 1).collect();
        let before = processor_time();
        let (sample, right) = at_once((0, 0), &[], parts, read);
        assert!(right.into_iter().all(|right| right), "a page has other bytes than the file");
        (sample.time.as_nanos() as u64, (processor_time() - before).as_nanos() as u64)
    }

    /// Touches the pages of a trace, writes to every other one, and has `flush` bring the written pages to the
    /// disk; returns the time of both, and the processor time. Compares the file afterwards.
    fn write(&self, words: &Words<'_>, trace: &Trace, flush: impl FnOnce()) -> (u64, u64) {
        let parts = parts(&trace.touches, self.threads, 1).enumerate().collect();
        let touch = |(thread, part): (usize, &[u32])| {
            let mut writer = Writer::new(thread);
            (writer.touch(words, part), writer)
        };
        let before = processor_time();
        let (sample, ended) = at_once((0, 0), &[], parts, touch);
        let (flushing, ()) = timed(flush);
        let processor = processor_time() - before;
        let (right, writers): (Vec<bool>, Vec<Writer>) = ended.into_iter().unzip();
        assert!(right.into_iter().all(|right| right), "a page has other bytes than were written");
        let is_in_file = check_and_restore(&self.open_for_writes(), &writers).expect("the file");
        assert!(is_in_file, "the file has other bytes than were written");
        (sample.time.as_nanos() as u64 + flushing, processor.as_nanos() as u64)
    }

    fn open_for_writes(&self) -> File {
        File::options().read(true).write(true).open(&self.file).expect("the file")
    }
}

fn pool() -> Pool {
    Pool::new().expect("a pool")
}

/// Fills the memory of a reader.
fn warm(words: &Words<'_>, pages: &[u32]) {
    let parts: Vec<&[u32]> = parts(pages, WARMERS, 1).collect();
    let right = in_parts(parts, |part: &[u32]| {
        part.iter().all(|&page| words.are_right(page as usize, Pattern::Random))
    });
    assert!(right.into_iter().all(|right| right), "a page has other bytes than the file");
}

/// The figures of touches of a mapping.
fn with_major_faults(trace: &Trace, touch: impl FnOnce() -> (u64, u64)) -> Figures {
    let before = major_faults();
    let (ns, processor_ns) = touch();
    let reads = (major_faults() - before) as f64 / trace.touches.len() as f64;
    Figures { ns, processor_ns, reads, waits: reads, soft_faults: None, budget: None }
}

/// True if written pages of a region with a budget can go back to their source on this kernel.
pub(crate) fn has_write_back() -> bool {
    let budget = Budget::bytes(64 << 20).expect("a budget");
    let chunk = Chunk::writable(Arc::new(Mutex::new(vec![0; PAGE])));
    let region = Region::builder().chunk(chunk).budget(&budget).write_back(WriteBack::ToSource);
    match region.build_shared(&Pool::new().expect("a pool")) {
        Err(error) if error.kind() == ErrorKind::Unsupported => false,
        built => built.map(|_| true).expect("a region"),
    }
}

/// The faults of this process that have waited for the disk.
fn major_faults() -> i64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.major_page_faults())
}

/// Writes pages of which each word of page `n` is `n + 1`.
pub(crate) fn write_pages(file: &mut impl Write, pages: usize) -> io::Result<()> {
    let mut block = Vec::with_capacity(BLOCK * PAGE);
    for first in (0..pages).step_by(BLOCK) {
        block.clear();
        for page in first..pages.min(first + BLOCK) {
            (0..PAGE / 8).for_each(|_| block.extend_from_slice(&(page as u64 + 1).to_ne_bytes()));
        }
        file.write_all(&block)?;
    }
    Ok(())
}

const BLOCK: usize = 256;
/// The threads that fill the memory of a reader before the measurement.
const WARMERS: usize = 16;
const TASK_VARIABLE: &str = "PAGESTITCH_BENCH_READER";

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsRawFd;

    /// The file is larger than the budget, so that written pages leave during the run.
    #[test]
    fn writers_of_a_region_and_of_a_mapping_leave_the_bytes_of_the_file() {
        const PAGES: usize = 12 << 10;
        let mut file = File::from(memfd_create("pages", MFdFlags::MFD_CLOEXEC).unwrap());
        write_pages(&mut file, PAGES).unwrap();
        for way in [Way::MmapRandom, Way::Region, Way::Inline] {
            if way != Way::MmapRandom && !has_write_back() {
                continue;
            }
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let (pattern, touches, threads) = (Pattern::HalfWriting, 3000, 3);
            let task = ReadTask { way, file: path, pattern, touches, threads, seed: 1, memory: 40 << 20 };
            let figures = match way {
                Way::Region => task.write_region(&pool()),
                Way::Inline => task.write_region(Inline),
                _ => task.write_mmap(),
            };
            assert!(figures.ns > 0, "{figures:?}");
            let words = Words::mapped(&file, ProtFlags::PROT_READ);
            assert!((0..PAGES).all(|page| words.are_right(page, Pattern::Sequential)));
        }
    }
}
