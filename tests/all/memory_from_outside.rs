//! The memory of a process whose regions have a budget, as another process sees it.

use crate::bounded_writes::moves_no_pages;
use crate::{PAGE, until};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pagestitch::source::WritableFile;
use pagestitch::{Budget, Chunk, Inline, Pool, Readahead, Region, Server, WriteBack};
use pagestitch_testkit::child;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::this_test;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const BUDGET: usize = 32 << 20;
/// Three times the budget.
const PAGES: usize = (96 << 20) / PAGE;
const THREADS: usize = 4;
/// What does not count: tables, the buffers and the stacks of threads, what the allocator keeps, and pages that are
/// gone and that the kernel counts still (before Linux 6.2, up to 64 for each thread). Less than the standby list of the
/// budget, which counts.
const BESIDE: usize = 3 << 20;
/// The buffers of the threads that write pages back: two workers, and those that flush.
const WRITTEN: usize = (2 + THREADS) * (256 << 10);

/// The private memory of a process, in bytes.
fn private_memory(process: u32) -> Option<usize> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10)
}

/// Starts `test` again. There, `prepare` takes all memory but that of the region, and returns the work. Returns the
/// most memory that the work takes, as this process samples it.
fn most_memory<W: FnOnce()>(test: &str, prepare: impl FnOnce() -> W) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let process = child::spawn(test, path.to_str().unwrap(), |path| {
        let mut parent = UnixStream::connect(path).unwrap();
        let work = prepare();
        parent.write_all(b"!").unwrap();
        parent.read_exact(&mut [0]).unwrap();
        work();
        parent.write_all(b"!").unwrap();
        // Until the parent has looked once more.
        let _ = parent.read(&mut [0]);
    });
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0]).unwrap();
    let before = private_memory(process.id()).unwrap();
    stream.write_all(b"!").unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut most = 0;
    until(|| {
        most = private_memory(process.id()).unwrap_or_default().max(most);
        thread::sleep(Duration::from_millis(10));
        // The end of the child, too.
        stream.read(&mut [0]).is_ok()
    });
    drop(stream);
    process.wait().expect_pass();
    most.saturating_sub(before)
}

/// Page numbers, each page as often as any other one.
fn pages(seed: usize) -> impl Iterator<Item = usize> {
    (0..20_000 / THREADS).map(move |step| (step * 7919 + seed * 104_729) * 31 % PAGES)
}

/// Pages that begin with their numbers. All of them are in memory.
fn numbered(pages: usize) -> Vec<u8> {
    let mut bytes = vec![1; pages * PAGE];
    (0..pages).for_each(|page| bytes[page * PAGE] = page as u8);
    bytes
}

fn by_threads(work: impl Fn(usize) + Sync) {
    scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|seed| {
                scope.spawn({
                    let work = &work;
                    move || work(seed)
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

fn readers(server: Server) -> impl FnOnce() {
    let bytes = numbered(PAGES);
    move || {
        let budget = Budget::bytes(BUDGET as u64).unwrap();
        let region =
            Region::builder().chunk(bytes).budget(&budget).readahead(Readahead::None).build(server).unwrap();
        by_threads(|seed| {
            pages(seed).for_each(|page| assert_eq!(region.as_slice()[page * PAGE], page as u8))
        });
        assert!(budget.evictions() > 1_000 && budget.overruns() == 0, "{:?}", budget.metrics());
    }
}

fn writers(server: Server) -> impl FnOnce() {
    let file = File::from(memfd_create("table", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len((PAGES * PAGE) as u64).unwrap();
    let table = Arc::new(WritableFile::from_file(file, "table").unwrap());
    move || {
        let budget = Budget::bytes(BUDGET as u64).unwrap();
        let builder = Region::builder().chunk(Chunk::writable(table)).budget(&budget);
        let region = builder.write_back(WriteBack::ToSource).build_shared(server).unwrap();
        by_threads(|seed| {
            pages(seed).for_each(|page| region.write_at((page * PAGE + 8 * seed) as u64, &[7; 8]).unwrap());
            region.flush(..).unwrap();
        });
        assert!(budget.metrics().write_backs > 1_000 && budget.overruns() == 0, "{:?}", budget.metrics());
    }
}

fn pool() -> Server {
    // Without replacements of workers that a slow machine holds up, which have buffers, too.
    (&Pool::builder().workers(2).max_workers(2).start().unwrap()).into()
}

#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer takes memory for each access")]
fn readers_of_a_pool_take_no_more_than_the_budget() {
    let most = most_memory(this_test!(), || readers(pool()));
    assert!(most <= BUDGET + BESIDE, "{most} bytes");
    assert!(most > BUDGET / 2, "{most} bytes: this test sees no memory");
}

#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer takes memory for each access")]
fn signal_handlers_take_no_more_than_the_budget() {
    let most = most_memory(this_test!(), || readers(Inline.into()));
    assert!(most <= BUDGET + BESIDE, "{most} bytes");
}

#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer takes memory for each access")]
fn writers_take_no_more_than_the_budget() {
    if moves_no_pages() {
        return println!("SKIPPED {}: no written page leaves", this_test!());
    }
    let most = most_memory(this_test!(), || writers(pool()));
    assert!(most <= BUDGET + BESIDE + WRITTEN, "{most} bytes");
}

#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer takes memory for each access")]
fn writers_inline_take_no_more_than_the_budget() {
    if moves_no_pages() {
        return println!("SKIPPED {}: no written page leaves", this_test!());
    }
    let most = most_memory(this_test!(), || writers(Inline.into()));
    assert!(most <= BUDGET + BESIDE + WRITTEN, "{most} bytes");
}

/// Whole blocks are ahead of sequential readers in a larger budget. Each worker, and each reader, may have one more.
#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer takes memory for each access")]
fn sequential_readers_take_no_more_than_the_budget_and_a_block_each() {
    const BUDGET: usize = 64 << 20;
    const BYTES: usize = 192 << 20;
    let most = most_memory(this_test!(), || {
        let bytes = numbered(BYTES / PAGE);
        move || {
            let budget = Budget::bytes(BUDGET as u64).unwrap();
            let region = Region::builder().chunk(bytes).budget(&budget).build(pool()).unwrap();
            by_threads(|part| {
                let part = part * BYTES / THREADS..(part + 1) * BYTES / THREADS;
                for at in part.step_by(PAGE) {
                    assert_eq!(region.as_slice()[at], (at / PAGE) as u8);
                }
            });
            assert!(budget.evictions() > 1_000 && budget.overruns() == 0, "{:?}", budget.metrics());
        }
    });
    let blocks = (2 + THREADS) * pagestitch_kernel::page::HUGE;
    assert!(most <= BUDGET + BESIDE + blocks, "{most} bytes");
}
