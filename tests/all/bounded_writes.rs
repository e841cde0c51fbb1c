//! Writable regions with a budget: written pages go back to their sources when they leave, and no write is
//! lost.

use crate::PAGE;
use pagestitch::source::WritableSource;
use pagestitch::{Budget, BuildOption, Chunk, ErrorKind, Pool, Region, SharedRegion, Source, WriteBack};
use pagestitch_testkit::scope::scope;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const BUDGET: u64 = 6 << 20;
/// More than twice the budget.
const PAGES: usize = (15 << 20) / PAGE;

/// A source in memory that fails on demand.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    /// Writes fail with this errno; 0 for none.
    errno: AtomicUsize,
    /// The first page and the end of those that fail.
    failing: [AtomicUsize; 2],
    /// The most bytes of one write; 0 for no limit.
    most: AtomicUsize,
    syncs: AtomicUsize,
}

impl Disk {
    fn of(bytes: Vec<u8>) -> Arc<Self> {
        let failing = [AtomicUsize::new(0), AtomicUsize::new(usize::MAX)];
        let (errno, most, syncs) = Default::default();
        Arc::new(Self { bytes: Mutex::new(bytes), errno, failing, most, syncs })
    }

    fn word(&self, page: usize) -> u64 {
        let bytes = self.bytes.lock().unwrap();
        u64::from_ne_bytes(bytes[page * PAGE..][..8].try_into().unwrap())
    }
}

impl Source for Disk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
}

impl WritableSource for Disk {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let page = offset as usize / PAGE;
        let errno = self.errno.load(Ordering::SeqCst);
        let [first, end] = [0, 1].map(|at| self.failing[at].load(Ordering::SeqCst));
        if errno > 0 && page < end && first < page + bytes.len().div_ceil(PAGE) {
            return Err(io::Error::from_raw_os_error(errno as i32));
        }
        let most = match self.most.load(Ordering::SeqCst) {
            0 => bytes.len(),
            most => bytes.len().min(most),
        };
        let mut all = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        all[offset as usize..][..most].copy_from_slice(&bytes[..most]);
        Ok(most)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// True on a kernel where written pages cannot leave, which the build tells.
fn moves_no_pages() -> bool {
    let budget = Budget::bytes(BUDGET).unwrap();
    match builder(&budget, Chunk::writable(Disk::of(vec![1; PAGE]))).build_shared(&pool(1)) {
        Err(error) => {
            assert_eq!((error.kind(), error.option()), (ErrorKind::Unsupported, Some(BuildOption::Budget)));
            let text = error.to_string();
            assert!(text.contains("Linux 6.8") || text.contains("swapoff"), "{text}");
            true
        }
        Ok(_) => false,
    }
}

fn pool(workers: usize) -> Pool {
    Pool::builder().workers(workers).start().unwrap()
}

fn builder(budget: &Budget, chunk: Chunk) -> pagestitch::Builder {
    Region::builder().chunk(chunk).budget(budget).write_back(WriteBack::ToSource)
}

fn bounded(budget: &Budget, chunk: Chunk, workers: usize) -> SharedRegion {
    builder(budget, chunk).build_shared(&pool(workers)).unwrap()
}

/// The first word of a page.
#[expect(unsafe_code, reason = "threads of an application write through the pointer")]
fn word(region: &SharedRegion, page: usize) -> &AtomicU64 {
    assert!(page * PAGE < region.len());
    let word = region.as_ptr().as_ptr().wrapping_add(page * PAGE).cast::<u64>();
    // SAFETY: the word is inside the region, aligned, and accessed by atomics only.
    unsafe { AtomicU64::from_ptr(word) }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Several threads write words of their own pages, and verify each page before. Half of the touches write.
fn write_and_verify(region: &SharedRegion, threads: usize, touches: usize) -> Vec<u64> {
    let mine = PAGES / threads;
    let shadows = scope(|scope| {
        let write = |thread: usize| {
            let mut shadow = vec![0; mine];
            for touch in 0..touches {
                let random = mix((thread * touches + touch) as u64 + 1);
                let own = random as usize % mine;
                let word = word(region, own * threads + thread);
                assert_eq!(word.load(Ordering::Relaxed), shadow[own], "thread {thread}, page {own}");
                if touch % 2 == 0 {
                    shadow[own] = random;
                    word.store(random, Ordering::Relaxed);
                }
            }
            shadow
        };
        let writers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || write(thread))).collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
    });
    (0..mine * threads).map(|page| shadows[page % threads][page / threads]).collect()
}

#[test]
fn no_write_is_lost_while_pages_leave_and_flushes_go_on() {
    if moves_no_pages() {
        return;
    }
    for (workers, threads) in [(1, 1), (3, 3)] {
        let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
        let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), workers);
        let is_over = AtomicBool::new(false);
        let shadow = scope(|scope| {
            let flusher = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    region.flush(..).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
            });
            let shadow = write_and_verify(&region, threads, 9_000 / threads);
            is_over.store(true, Ordering::Relaxed);
            flusher.join().unwrap();
            shadow
        });
        let metrics = budget.metrics();
        assert!(metrics.evictions > 1_000 && metrics.write_backs > 500, "{metrics:?}");
        assert!(metrics.refaults > 500, "{metrics:?}");
        assert_eq!(metrics.write_failures, 0);
        region.finish().unwrap();
        for (page, expected) in shadow.iter().enumerate() {
            assert_eq!(disk.word(page), *expected, "page {page}");
        }
        assert_eq!((budget.metrics().dirty_bytes, budget.overruns()), (0, 0));
    }
}
