//! Writable regions with a budget: written pages go back to their sources when they leave, and no write is
//! lost.

use crate::machine::rounds;
use crate::waits::{comes_true, until};
use crate::{PAGE, SetOnDrop, pattern};
use nix::libc::{self, EIO, ENOSPC};
use pagestitch::source::{FailureReason, WritableFile, WritableSource};
use pagestitch::{
    Budget, BuildOption, Chunk, ErrorKind, Pool, Process, Region, SharedRegion, Source, WriteBack,
};
use pagestitch_kernel::Errno;
use pagestitch_testkit::child::{self, ChildTest};
use pagestitch_testkit::deny::deny_copies;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{this_test, wait};
use proptest::prelude::*;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(crate) const BUDGET: u64 = 6 << 20;
/// More than twice the budget.
pub(crate) const PAGES: usize = (15 << 20) / PAGE;

/// A source in memory that fails on demand.
pub(crate) struct Disk {
    bytes: Mutex<Vec<u8>>,
    /// Writes fail with this errno; 0 for none.
    errno: AtomicUsize,
    /// The number of writes that fail before the next one succeeds.
    failures: AtomicUsize,
    /// The first page and the end of those that fail.
    failing: [AtomicUsize; 2],
    /// The most bytes of one write; 0 for no limit.
    most: AtomicUsize,
    syncs: AtomicUsize,
}

impl Disk {
    pub(crate) fn of(bytes: Vec<u8>) -> Arc<Self> {
        let failing = [AtomicUsize::new(0), AtomicUsize::new(usize::MAX)];
        let (errno, failures, most, syncs) = Default::default();
        Arc::new(Self { bytes: Mutex::new(bytes), errno, failures, failing, most, syncs })
    }

    fn fail(&self, errno: i32) {
        self.fail_times(usize::MAX, errno);
    }

    /// Writes to pages from this one on fail.
    pub(crate) fn fail_from(&self, page: usize, errno: i32) {
        self.failing[0].store(page, Ordering::SeqCst);
        self.fail(errno);
    }

    fn fail_times(&self, times: usize, errno: i32) {
        self.failures.store(times, Ordering::SeqCst);
        self.errno.store(errno as usize, Ordering::SeqCst);
    }

    /// True for a write that fails.
    fn fails(&self, pages: Range<usize>) -> bool {
        let [first, end] = [0, 1].map(|at| self.failing[at].load(Ordering::SeqCst));
        let one_less = |failures: usize| failures.checked_sub(1);
        pages.start < end
            && first < pages.end
            && self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok()
    }

    pub(crate) fn word(&self, page: usize) -> u64 {
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
        if errno > 0 && self.fails(page..page + bytes.len().div_ceil(PAGE)) {
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
pub(crate) fn moves_no_pages() -> bool {
    let budget = Budget::bytes(BUDGET).unwrap();
    match builder(&budget, Chunk::writable(Disk::of(vec![1; PAGE]))).build_shared(&pool(1)) {
        Err(error) => {
            assert_eq!((error.kind(), error.option()), (ErrorKind::Unsupported, Some(BuildOption::Budget)));
            true
        }
        Ok(_) => false,
    }
}

pub(crate) fn pool(workers: usize) -> Pool {
    Pool::builder().workers(workers).start().unwrap()
}

pub(crate) fn builder(budget: &Budget, chunk: Chunk) -> pagestitch::Builder {
    Region::builder().chunk(chunk).budget(budget).write_back(WriteBack::ToSource)
}

pub(crate) fn bounded(budget: &Budget, chunk: Chunk, workers: usize) -> SharedRegion {
    builder(budget, chunk).build_shared(&pool(workers)).unwrap()
}

/// The first word of a page.
#[expect(unsafe_code, reason = "threads of an application write through the pointer")]
pub(crate) fn word(region: &SharedRegion, page: usize) -> &AtomicU64 {
    assert!(page * PAGE < region.len());
    let word = region.as_ptr().as_ptr().wrapping_add(page * PAGE).cast::<u64>();
    // SAFETY: the word is inside the region, aligned, and accessed by atomics only.
    unsafe { AtomicU64::from_ptr(word) }
}

/// Has the kernel swap the region out, where swap is on.
#[expect(unsafe_code, reason = "advice for the kernel")]
fn swap_out(region: &SharedRegion) {
    // SAFETY: the advice changes no byte. A kernel or sandbox that refuses it swaps nothing out.
    let _ = unsafe { libc::madvise(region.as_ptr().as_ptr().cast(), region.len(), libc::MADV_PAGEOUT) };
}

pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Several threads write words of their own pages, and verify each page before. Half of the touches write.
pub(crate) fn write_and_verify(region: &SharedRegion, threads: usize, touches: usize) -> Vec<u64> {
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

/// As [`write_and_verify`], beside a thread that flushes and swaps out.
pub(crate) fn write_beside_flushes(region: &SharedRegion, budget: &Budget, threads: usize) -> Vec<u64> {
    let is_over = AtomicBool::new(false);
    scope(|scope| {
        let flusher = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                region.flush(..).unwrap();
                swap_out(region);
                let before = budget.evictions();
                until(|| budget.evictions() > before + 100 || is_over.load(Ordering::Relaxed));
            }
        });
        let _is_over = SetOnDrop(&is_over);
        let shadow = write_and_verify(region, threads, 9_000 / threads);
        is_over.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
        shadow
    })
}

#[test]
pub(crate) fn no_write_is_lost_while_pages_leave_and_flushes_go_on() {
    if moves_no_pages() {
        return;
    }
    for (workers, threads) in [(1, 1), (3, 3)] {
        let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
        let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), workers);
        let shadow = write_beside_flushes(&region, &budget, threads);
        let metrics = budget.metrics();
        assert!(metrics.evictions > 1_000 && metrics.write_backs > 500, "{metrics:?}");
        assert!(metrics.refaults > 500, "{metrics:?}");
        assert_eq!(metrics.write_failures, 0);
        region.finish().unwrap();
        for (page, expected) in shadow.iter().enumerate() {
            assert_eq!(disk.word(page), *expected, "page {page}");
        }
        assert_eq!(budget.metrics().dirty_bytes, 0);
    }
}

/// A frame that a system call has taken can leave its region before the call writes to it.
#[test]
fn no_write_at_is_lost_beside_flushes_and_evictions() {
    no_write_at_is_lost(|| {});
}

/// As where a container's seccomp profile denies them.
#[test]
fn no_write_at_is_lost_without_process_vm_readv() {
    let end = child::run(this_test!(), || no_write_at_is_lost(|| deny_copies(Errno::EPERM)));
    end.expect_pass();
}

/// One thread writes all pages and compares them with the source after each flush, beside a thread that flushes
/// and evicts.
fn no_write_at_is_lost(begin: impl FnOnce()) {
    const PAGES: usize = 4;
    if moves_no_pages() {
        return;
    }
    begin();
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let (region, is_over) = (bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1), AtomicBool::new(false));
    let rounds_begun = AtomicU64::new(0);
    scope(|scope| {
        scope.spawn(|| {
            let mut before = 0;
            while !is_over.load(Ordering::Relaxed) {
                region.flush(..).unwrap();
                // Once a round, because a write gives a page up that leaves again and again.
                let now = rounds_begun.load(Ordering::Relaxed);
                if now != std::mem::replace(&mut before, now) {
                    region.evict(..).unwrap();
                }
            }
        });
        let _is_over = SetOnDrop(&is_over);
        let mut read = vec![0; PAGES * PAGE];
        for round in 1..=rounds(1_500) {
            let bytes = vec![(round % 255) as u8 + 1; PAGES * PAGE];
            rounds_begun.store(round, Ordering::Relaxed);
            region.write_at(0, &bytes).unwrap();
            region.read_at(0, &mut read).unwrap();
            assert!(read == bytes, "round {round}: lost in the region");
            region.flush(..).unwrap();
            assert!(*disk.bytes.lock().unwrap() == bytes, "round {round}: lost in the source");
        }
    });
}

#[test]
pub(crate) fn no_write_is_lost_while_the_source_fails_now_and_then() {
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 2);
    let is_over = AtomicBool::new(false);
    let shadow = scope(|scope| {
        let saboteur = scope.spawn(|| {
            for errno in [EIO, 0, ENOSPC, 0].into_iter().cycle() {
                // Few times, because a fault without room fails after three seconds without a write that succeeds.
                disk.fail_times(4, errno);
                disk.most.store(1_000 * (errno as usize % 2), Ordering::SeqCst);
                let _ = region.flush(..);
                // A source that fails has pauses, in which no page leaves.
                let before = budget.evictions();
                until(|| errno != 0 || budget.evictions() > before + 100 || is_over.load(Ordering::Relaxed));
                if is_over.load(Ordering::Relaxed) {
                    return disk.fail(0);
                }
            }
        });
        let shadow = write_and_verify(&region, 2, 3_000);
        is_over.store(true, Ordering::Relaxed);
        saboteur.join().unwrap();
        shadow
    });
    assert!(budget.metrics().write_failures > 0, "{:?}", budget.metrics());
    region.finish().unwrap();
    for (page, expected) in shadow.iter().enumerate() {
        assert_eq!(disk.word(page), *expected, "page {page}");
    }
}

/// A fault without room looks at the source a few times in three seconds. Writes that succeed between these times
/// count, too.
#[test]
fn a_fault_waits_for_room_as_long_as_writes_succeed_now_and_then() {
    const LOOKS: u64 = 20;
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    // The writes of this page succeed, and make no room.
    region.pin(..PAGE as u64).unwrap();
    disk.fail_from(1, EIO);
    scope(|scope| {
        let write = |page: usize, value: u64| region.write_at((page * PAGE) as u64, &value.to_ne_bytes());
        let writer = scope.spawn(move || (1..PAGES).try_for_each(|page| write(page, page as u64)));
        for look in 1..=LOOKS {
            // The fault counts the time that a look has taken when it ends.
            let before = budget.metrics().stalled;
            until(|| budget.metrics().stalled > before || writer.is_finished());
            write(0, look).unwrap();
            region.flush(..PAGE as u64).unwrap();
        }
        disk.fail(0);
        writer.join().unwrap().unwrap();
    });
    region.finish().unwrap();
    assert!((1..PAGES).all(|page| disk.word(page) == page as u64));
    assert_eq!(disk.word(0), LOOKS);
}

#[test]
fn a_budget_full_of_pages_that_cannot_go_back_has_an_end_and_loses_none() {
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let told = Arc::new(AtomicUsize::new(0));
    let tell = Arc::clone(&told);
    let builder = builder(&budget, Chunk::writable(Arc::clone(&disk))).on_page_failure(move |_, failure| {
        tell.fetch_add(usize::from(failure.reason() == FailureReason::Source), Ordering::SeqCst);
    });
    let region = builder.build_shared(&pool(1)).unwrap();
    disk.fail(EIO);
    let write = |page: usize| region.write_at((page * PAGE) as u64, &(page as u64 + 1).to_ne_bytes());
    let (full, error) = (0..PAGES).find_map(|page| write(page).err().map(|error| (page, error))).unwrap();
    assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
    assert_eq!(error.failure().unwrap().reason(), FailureReason::NoRoom);
    assert!(full > PAGES / 4 && budget.resident_bytes() <= BUDGET, "{full} {:?}", budget.metrics());
    assert!(told.load(Ordering::SeqCst) >= 1, "the failure is told");
    assert_eq!(region.flush(..).unwrap_err().raw_os_error(), Some(EIO));
    for page in 0..full {
        assert_eq!(word(&region, page).load(Ordering::Relaxed), page as u64 + 1);
    }
    disk.fail(0);
    region.flush(..).unwrap();
    region.retry_failed(..).unwrap();
    (full..PAGES).for_each(|page| write(page).unwrap());
    region.finish().unwrap();
    (0..PAGES).for_each(|page| assert_eq!(disk.word(page), page as u64 + 1));
}

#[test]
fn pages_of_a_full_disk_stay_and_others_leave() {
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    disk.failing[0].store(100, Ordering::SeqCst);
    disk.failing[1].store(120, Ordering::SeqCst);
    disk.fail(ENOSPC);
    for page in 0..PAGES {
        word(&region, page).store(page as u64 + 1, Ordering::Relaxed);
    }
    assert_eq!(region.flush(..).unwrap_err().raw_os_error(), Some(ENOSPC));
    (0..PAGES).for_each(|page| {
        let expected = if (100..120).contains(&page) { 0 } else { page as u64 + 1 };
        assert_eq!(disk.word(page), expected, "page {page}");
        assert_eq!(word(&region, page).load(Ordering::Relaxed), page as u64 + 1, "page {page}");
    });
    disk.fail(0);
    region.flush(..).unwrap();
    assert_eq!((disk.word(110), budget.metrics().dirty_bytes), (111, 0));
    assert!(disk.syncs.load(Ordering::SeqCst) >= 2);
}

#[test]
fn written_padding_stays_because_no_source_takes_it() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let chunk = || Chunk::writable(Disk::of(vec![1; PAGES * PAGE / 2 - 100]));
    let region = builder(&budget, chunk().align(PAGE as u64)).chunk(chunk().align(PAGE as u64));
    let region = region.build_shared(&pool(1)).unwrap();
    let padding = (PAGES * PAGE / 2 - 50) as u64;
    region.write_at(padding - 60, &[7; 100]).unwrap();
    for _ in 0..2 {
        (0..PAGES).for_each(|page| {
            let _ = word(&region, page).load(Ordering::Relaxed);
        });
        region.flush(..).unwrap();
    }
    let mut bytes = [0; 102];
    region.read_at(padding - 61, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[1..101] == [7; 100], bytes[101]), (1, true, 0));
}

/// Devices write to pages while these leave: such a page is pinned, and stays.
#[test]
#[expect(unsafe_code, reason = "reads of a file go around the page cache, to the memory of a region")]
fn direct_reads_of_a_file_into_pages_that_leave_lose_no_byte() {
    if moves_no_pages() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let contents = pattern(3, 64 * PAGE);
    fs::write(&path, &contents).unwrap();
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; PAGES * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 2);
    let Some(direct) = direct.ok().filter(|_| region.serves_system_calls()) else { return };
    let read = |page: usize, from: usize| {
        let to = word(&region, page).as_ptr().cast();
        // SAFETY: the page is inside the region, and no reference to its bytes exists.
        unsafe { libc::pread(direct.as_raw_fd(), to, PAGE, (from * PAGE) as i64) }
    };
    // A file system without direct reads refuses them.
    if read(0, 0) != PAGE as isize {
        return;
    }
    let of_file = |from: usize| u64::from_ne_bytes(contents[from * PAGE..][..8].try_into().unwrap());
    let is_over = AtomicBool::new(false);
    let shadow = scope(|scope| {
        let flusher = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                region.flush(..).unwrap();
            }
        });
        let mut shadow = vec![0; PAGES];
        shadow[0] = of_file(0);
        for touch in 0..rounds(4_000) {
            let random = mix(touch) as usize;
            let (page, from) = (random % PAGES, random / PAGES % 64);
            assert_eq!(word(&region, page).load(Ordering::Relaxed), shadow[page], "page {page}");
            if touch % 2 == 0 {
                assert_eq!(read(page, from), PAGE as isize);
                shadow[page] = of_file(from);
            }
        }
        is_over.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
        shadow
    });
    region.finish().unwrap();
    (0..PAGES).for_each(|page| assert_eq!(disk.word(page), shadow[page], "page {page}"));
}

/// The bytes of a page in a round. Each word is that of one page and round.
pub(crate) fn stamped(page: usize, round: u64) -> Vec<u8> {
    let stamp = round << ROUND | (page as u64) << 16;
    let words: Vec<_> = (0..PAGE as u64 / 8).map(|word| (stamp | word).to_ne_bytes()).collect();
    words.as_flattened().to_vec()
}

/// The first bit of the round in a word.
const ROUND: u32 = 48;

/// The round of which a page of a file has all bytes; 0 for zeros.
pub(crate) fn round_of(page: usize, bytes: &[u8]) -> u64 {
    let round = u64::from_ne_bytes(bytes[..8].try_into().unwrap()) >> ROUND;
    let expected = if round == 0 { vec![0; PAGE] } else { stamped(page, round) };
    assert!(bytes == expected, "page {page} has bytes of round {round}, and others");
    round
}

/// True if the first word of a page of a file is that of a second or later round. The others may be on their way.
pub(crate) fn has_second_round(page: usize, file: &File) -> bool {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, (page * PAGE) as u64).unwrap();
    u64::from_ne_bytes(word) >> ROUND > 1
}

/// Kills a child as soon as it has written something. Fails with its output if it has ended before, or hangs.
pub(crate) fn kill_when(mut child: ChildTest, mut has_written: impl FnMut() -> bool) {
    let process = Process::open(child.id()).unwrap();
    let mut is_written = false;
    comes_true(|| {
        is_written = has_written();
        is_written || wait::readable(&process, Duration::ZERO)
    });
    child.kill();
    let end = child.wait();
    assert!(is_written, "the child has not written: {}", end.output());
}

/// The child is killed while pages of a file leave.
#[test]
fn a_kill_while_pages_leave_leaves_old_or_new_bytes_in_each_page_of_the_file() {
    a_kill_leaves_old_or_new_bytes(child::body(this_test!(), |path| {
        let file = WritableFile::open(Path::new(path)).unwrap();
        let budget = Budget::bytes(BUDGET).unwrap();
        let region = bounded(&budget, Chunk::writable(Arc::new(file)), 2);
        for round in 1..=u8::MAX {
            for page in 0..PAGES {
                region.write_at((page * PAGE) as u64, &stamped(page, round.into())).unwrap();
            }
        }
        panic!("the parent kills this process before");
    }));
}

/// Kills children while they write back all pages of a file, round after round.
pub(crate) fn a_kill_leaves_old_or_new_bytes(body: child::Body<'_>) {
    if moves_no_pages() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for kill in 0..rounds(5).min(3) as usize {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len((PAGES * PAGE) as u64).unwrap();
        let read = |page: usize, into: &mut [u8]| file.read_exact_at(into, (page * PAGE) as u64).unwrap();
        // The file changes only by write-backs. A page in use may stay for many rounds.
        let pages = || (kill * PAGES / 8..PAGES).step_by(16);
        kill_when(body.spawn(&path), || pages().any(|page| has_second_round(page, &file)));
        let mut bytes = vec![0; PAGE];
        let rounds = (0..PAGES).map(|page| {
            read(page, &mut bytes);
            round_of(page, &bytes)
        });
        assert!(rounds.max() > Some(1));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u8, usize),
    Read(usize, usize),
    Flush(usize, usize),
    Populate(usize),
    Evict(usize, usize),
}

const SIZE: usize = (10 << 20) + 123;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..SIZE, any::<u8>(), 1usize..3 << 20).prop_map(|(at, byte, len)| Step::Write(at, byte, len)),
        2 => (0..SIZE, 1usize..3 << 20).prop_map(|(at, len)| Step::Read(at, len)),
        1 => (0..SIZE, 1usize..SIZE).prop_map(|(at, len)| Step::Flush(at, len)),
        1 => (0..SIZE).prop_map(Step::Populate),
        1 => (0..SIZE, 1usize..2 << 20).prop_map(|(at, len)| Step::Evict(at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, max_shrink_iters: 64, ..ProptestConfig::default() })]
    #[test]
    fn random_calls_are_those_of_a_vector(steps in prop::collection::vec(step(), 1..14)) {
        if moves_no_pages() {
            return Ok(());
        }
        let mut expected = pattern(9, SIZE);
        let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(expected.clone()));
        let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
        for step in steps {
            match step {
                Step::Write(at, byte, len) => {
                    let bytes = vec![byte; len.min(SIZE - at)];
                    expected[at..at + bytes.len()].copy_from_slice(&bytes);
                    region.write_at(at as u64, &bytes).unwrap();
                }
                Step::Read(at, len) => {
                    let mut bytes = vec![0; len.min(SIZE - at)];
                    region.read_at(at as u64, &mut bytes).unwrap();
                    prop_assert!(bytes == expected[at..at + bytes.len()], "{} bytes at {}", bytes.len(), at);
                }
                Step::Flush(at, len) => {
                    let end = (at + len).min(SIZE);
                    region.flush(at as u64..end as u64).unwrap();
                    prop_assert!(disk.bytes.lock().unwrap()[at..end] == expected[at..end]);
                }
                Step::Populate(at) => region.populate(at as u64..(at + (1 << 20)).min(SIZE) as u64).unwrap(),
                Step::Evict(at, len) => {
                    region.evict(at as u64..(at + len).min(SIZE) as u64).unwrap();
                }
            }
        }
        prop_assert!(budget.resident_bytes() <= BUDGET);
        region.finish().unwrap();
        prop_assert!(*disk.bytes.lock().unwrap() == expected);
    }
}
