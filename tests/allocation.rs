//! Faults, inline faults and the fork reader allocate nothing: a counting allocator shows it.

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mremap};
use nix::sys::signal::Signal::SIGBUS;
use nix::unistd::gettid;
use pagestitch::source::{FileSource, Pages, WritableFile};
use pagestitch::{Budget, BuildOption, Builder, Chunk, ErrorKind, Inline, Pool, Readahead, Region, Server};
use pagestitch::{SharedRegion, WriteBack};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::memory::word_of;
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test, wait};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::ptr::{NonNull, with_exposed_provenance_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::thread;

const PAGE: usize = 4096;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// The watched thread and the number of its allocations.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static BY_WATCHED: AtomicUsize = AtomicUsize::new(0);
/// The thread that holds the lock of the allocator, or 0: other threads wait.
static HOLDER: AtomicI32 = AtomicI32::new(0);

fn wait_for_lock() {
    while ![0, gettid().as_raw()].contains(&HOLDER.load(Ordering::SeqCst)) {
        thread::yield_now();
    }
}

// SAFETY: each call is passed to the system's allocator. A counter is added.
#[expect(unsafe_code, reason = "GlobalAlloc is an unsafe interface")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        wait_for_lock();
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        if WATCHED.load(Ordering::SeqCst) == gettid().as_raw() {
            BY_WATCHED.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        wait_for_lock();
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_worker_allocates_nothing_for_a_fault() {
    // In a process of its own, where no other test allocates.
    child::run(this_test!(), || {
        let by_default = || serve_all_pages(Region::builder());
        let keeps = || serve_all_pages(Region::builder().keep_sources());
        let releases = || serve_all_pages(Region::builder().release_sources());
        assert!((0..20).any(|_| by_default()), "faults allocate by default");
        assert!((0..20).any(|_| keeps()), "faults allocate");
        assert!((0..20).any(|_| releases()), "faults of sources that are released allocate");
    })
    .expect_pass();
}

/// False if anything was allocated. On a loaded machine that may be for once: for a thread that
/// replaces a worker without a processor, for the first wait of a thread at a lock.
fn serve_all_pages(builder: Builder) -> bool {
    let pool = Pool::builder().workers(2).start().unwrap();
    let region = builder
        .chunk(vec![1u8; 300 * PAGE]) // copied from where it lies
        .chunks((0..300).map(|_| vec![2u8; 1000])) // gathered
        .chunk(Chunk::source(Arc::new(Scripted::new(300 * PAGE as u64)))) // read
        .chunk(Chunk::hole(300 * PAGE as u64)) // zeroed
        .build(&pool)
        .unwrap();
    let bytes = region.as_slice();
    let pages = bytes.len() / PAGE;
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    // Every other page first, so that each worker has taken each path before the rest is watched.
    let sum: usize = (0..pages).step_by(2).map(|page| usize::from(bytes[page * PAGE])).sum();
    assert!(sum > 0);
    let warm = ALLOCATIONS.load(Ordering::SeqCst);
    let sum: usize = (1..pages).step_by(2).map(|page| usize::from(bytes[page * PAGE])).sum();
    assert!(sum > 0);
    // The worker of the last page may still count it.
    wait::until("all pages are counted", || region.metrics().pages_installed() >= pages as u64);
    let after = ALLOCATIONS.load(Ordering::SeqCst);
    println!("{} allocations in the first half, {} in the second", warm - before, after - warm);
    after == warm
}

/// Also when it starts a ring.
#[test]
fn a_worker_with_many_reads_in_flight_allocates_nothing() {
    child::run(this_test!(), || {
        let path = std::env::temp_dir().join(format!("pagestitch-allocation-{}", std::process::id()));
        fs::write(&path, vec![7; 2000 * PAGE]).unwrap();
        let file = FileSource::open(&path).unwrap().direct();
        fs::remove_file(path).unwrap();
        let file = match file {
            Ok(file) => file,
            Err(error) => return println!("SKIPPED {}: {error}", this_test!()),
        };
        let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
        let builder = Region::builder().chunk(file).readahead(Readahead::None);
        let region = builder.build(&pool).unwrap();
        // A worker that starts allocates.
        assert_eq!(region.as_slice()[0], 7);
        WATCHED.store(thread_called("pagestitch/0"), Ordering::SeqCst);
        thread::scope(|scope| {
            for thread in 0..8 {
                let bytes = region.as_slice();
                scope.spawn(move || {
                    (thread..2000).step_by(8).for_each(|page| assert_eq!(bytes[page * PAGE], 7))
                });
            }
        });
        assert_eq!(BY_WATCHED.load(Ordering::SeqCst), 0);
    })
    .expect_pass();
}

/// A signal handler that has interrupted the allocator touches pages, and a collector of garbage may hold
/// its lock.
#[test]
fn a_worker_waits_for_no_allocator_to_free_a_source() {
    child::run(this_test!(), || {
        for builder in [Region::builder(), Region::builder().release_sources()] {
            let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
            let builder = builder.readahead(Readahead::None).chunks((0..64).map(|_| vec![7u8; PAGE]));
            let region = builder.build(&pool).unwrap();
            let bytes = region.as_slice();
            // A worker that starts allocates.
            assert_eq!(bytes[63 * PAGE], 7);
            HOLDER.store(gettid().as_raw(), Ordering::SeqCst);
            let sum: usize = (0..63).map(|page| usize::from(bytes[page * PAGE])).sum();
            HOLDER.store(0, Ordering::SeqCst);
            assert_eq!(sum, 63 * 7);
        }
    })
    .expect_pass();
}

/// A signal handler may interrupt the allocator, so an inline fault must not allocate.
#[test]
fn an_inline_fault_allocates_nothing() {
    child::run(this_test!(), fill_own_pages).expect_pass();
}

fn fill_own_pages() {
    let region = Region::builder()
        .chunk(vec![1u8; 300 * PAGE]) // copied from where it lies
        .chunk(donated(&vec![3u8; 300 * PAGE])) // moved
        .chunks((0..300).map(|_| vec![2u8; 1000])) // gathered
        .chunk(Chunk::hole(300 * PAGE as u64)) // zeroed
        .chunk(Chunk::from(FileSource::open("/proc/self/exe").unwrap()).range(..300 * PAGE as u64)) // read
        .build(Inline)
        .unwrap();
    let start = region.as_ptr().addr().get();
    let pages = region.as_slice().len() / PAGE;
    let touch_all = || (0..pages).map(|page| usize::from(region.as_slice()[page * PAGE])).sum::<usize>();
    // Not the test program's other thread, which may just begin to wait for this one.
    WATCHED.store(gettid().as_raw(), Ordering::SeqCst);
    assert!(touch_all() > 0);
    discard(start, 300 * PAGE);
    assert!(touch_all() > 0);
    assert_eq!(BY_WATCHED.load(Ordering::SeqCst), 0);
    assert!(region.metrics().faults >= 300 + pages as u64);
}

/// Pages leave in the handler of a touch, and come back, from the first touch on.
#[test]
fn an_inline_fault_that_evicts_allocates_nothing() {
    child::run(this_test!(), || {
        for written_back in [false, true] {
            let Some((budget, region)) = bounded(Inline, written_back) else { return };
            WATCHED.store(gettid().as_raw(), Ordering::SeqCst);
            touch_at_random(&region, written_back);
            WATCHED.store(0, Ordering::SeqCst);
            assert_eq!(BY_WATCHED.load(Ordering::SeqCst), 0, "written back: {written_back}");
            expect_evictions(&budget, written_back);
        }
    })
    .expect_pass();
}

#[test]
fn a_worker_that_evicts_allocates_nothing() {
    child::run(this_test!(), || {
        for written_back in [false, true] {
            let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
            let Some((budget, region)) = bounded(&pool, written_back) else { return };
            // A worker that starts allocates, too. No page leaves yet.
            word_of(&region, 0).load(Ordering::Relaxed);
            assert_eq!(budget.evictions(), 0);
            WATCHED.store(thread_called("pagestitch/0"), Ordering::SeqCst);
            touch_at_random(&region, written_back);
            WATCHED.store(0, Ordering::SeqCst);
            assert_eq!(BY_WATCHED.load(Ordering::SeqCst), 0, "written back: {written_back}");
            expect_evictions(&budget, written_back);
        }
    })
    .expect_pass();
}

const BUDGET: u64 = 6 << 20;
/// More than twice the budget.
const PAGES: usize = (15 << 20) / PAGE;

/// A region with a budget, of a file and of memory; with write-back, of a file alone. `None` where pages with
/// written bytes cannot leave.
fn bounded(server: impl Into<Server>, written_back: bool) -> Option<(Budget, SharedRegion)> {
    let budget = Budget::bytes(BUDGET).unwrap();
    let file = |pages: usize| {
        let file = fs::File::from(memfd_create("table", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len((pages * PAGE) as u64).unwrap();
        file
    };
    let builder = Region::builder().budget(&budget);
    let builder = if written_back {
        let file = WritableFile::from_file(file(PAGES), "table").unwrap();
        builder.chunk(Chunk::writable(Arc::new(file))).write_back(WriteBack::ToSource)
    } else {
        builder.chunk(FileSource::try_from(file(PAGES / 2)).unwrap()).chunk(vec![7u8; PAGES / 2 * PAGE])
    };
    match builder.build_shared(server) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            println!("SKIPPED written pages that leave: {error}");
            None
        }
        built => Some((budget, built.unwrap())),
    }
}

/// Touches pages that are absent, present, and in standby; half of the touches write, if `writes` is true.
fn touch_at_random(region: &SharedRegion, writes: bool) {
    for step in 0..4 * PAGES {
        let random = (step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let word = word_of(region, random as usize % PAGES * PAGE);
        if writes && step % 2 == 0 {
            word.fetch_add(1, Ordering::Relaxed);
        } else {
            word.load(Ordering::Relaxed);
        }
    }
}

fn expect_evictions(budget: &Budget, written_back: bool) {
    let metrics = budget.metrics();
    assert!(metrics.evictions > PAGES as u64 && metrics.refaults > 500, "{metrics:?}");
    assert!(metrics.write_backs > 500 || !written_back, "{metrics:?}");
    // Before Linux 6.8, pages leave without standby.
    assert!(metrics.soft_faults > 0 || !written_back, "{metrics:?}");
}

fn donated(bytes: &[u8]) -> Pages {
    let mut pages = Pages::new(bytes.len()).expect("memory");
    pages.copy_from_slice(bytes);
    pages
}

/// `fork(2)` holds the locks of the allocator until the fork reader has read its event, so a fork
/// reader that allocates waits forever.
#[test]
fn the_fork_reader_allocates_nothing() {
    child::run(this_test!(), fork_in_every_way).expect_pass();
}

fn fork_in_every_way() {
    tracing::subscriber::set_global_default(Allocates).unwrap();
    let pool = Pool::builder().workers(2).start().unwrap();
    let builder = Region::builder().chunk(vec![1; 4000 * PAGE]).readahead(Readahead::None).inherit_on_fork();
    let region = match builder.build(&pool) {
        Ok(region) => region,
        Err(error) => {
            assert_eq!(error.option(), Some(BuildOption::InheritOnFork), "{error}");
            return println!("SKIPPED the allocations of the fork reader: {error}");
        }
    };
    WATCHED.store(thread_called("pagestitch/fork"), Ordering::SeqCst);
    let start = region.as_ptr().expose_provenance().get();
    let read_all = || i32::from(region.as_slice()[2000 * PAGE..].iter().any(|&byte| byte != 1));
    let taken: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // A thread faults all the time, because its events come before those of forks.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                discard(start, PAGE);
                assert_eq!(std::hint::black_box(region.as_slice())[0], 1);
            }
        });
        let ends: Vec<_> = (0..30).map(|_| ForkedChild::start(read_all).wait()).collect();
        // Children fork too, possibly before the fork reader has handled them.
        let fork_on = || i32::from(ForkedChild::start(read_all).wait().signal() == Some(SIGBUS as i32));
        let forked_on: Vec<_> = (0..30).map(|_| ForkedChild::start(fork_on).wait()).collect();
        stop.store(true, Ordering::Relaxed);
        // No descriptor is free for a child.
        assert!(ends.iter().all(|end| end.signal() == Some(SIGBUS as i32)), "{ends:?}");
        assert!(forked_on.iter().all(|end| end.code() == Some(1)), "{forked_on:?}");
    });
    drop(taken);
    thread::scope(|scope| {
        scope.spawn(|| region.as_slice()[..1000 * PAGE].iter().map(|&byte| usize::from(byte)).sum::<usize>());
        scope.spawn(|| (1000..1500).for_each(|page| discard(start + page * PAGE, PAGE)));
        scope.spawn(|| (1500..2000).for_each(|page| move_away(start + page * PAGE, PAGE)));
        for _ in 0..20 {
            assert!(ForkedChild::start(read_all).succeeds());
        }
    });
    assert_eq!(BY_WATCHED.load(Ordering::SeqCst), 0);
}

/// Discards pages, as an application may.
#[expect(unsafe_code, reason = "madvise(2) by the application is part of the test")]
fn discard(start: usize, bytes: usize) {
    let start = NonNull::new(with_exposed_provenance_mut(start)).expect("an address");
    // SAFETY: pages of a region, which no thread reads meanwhile.
    unsafe { madvise(start, bytes, MmapAdvise::MADV_DONTNEED) }.expect("madvise");
}

/// Moves pages away from their region.
#[expect(unsafe_code, reason = "mremap(2) by the application is part of the test")]
fn move_away(start: usize, bytes: usize) {
    let length = NonZeroUsize::new(bytes).expect("at least a page");
    // SAFETY: a new mapping, which the pages replace.
    let to =
        unsafe { mmap_anonymous(None, length, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.expect("mmap");
    let start = NonNull::new(with_exposed_provenance_mut(start)).expect("an address");
    let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
    // SAFETY: moves pages of a region, of which no slice is used, to the mapping just made.
    unsafe { mremap(start, bytes, bytes, flags, Some(to)) }.expect("mremap");
}

fn thread_called(name: &str) -> i32 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let mut named = tasks.filter(|task| fs::read_to_string(task.join("comm")).unwrap().trim_end() == name);
    let task = named.next().expect("a thread of that name");
    task.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// A subscriber that allocates for each event.
struct Allocates;

impl tracing::Subscriber for Allocates {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn event(&self, event: &tracing::Event<'_>) {
        std::hint::black_box(format!("{event:?}"));
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
