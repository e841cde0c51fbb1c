//! Regions with a budget in rare orders of their threads and calls: no write is lost, and no page stays for
//! ever.

use crate::bounded_writes::{BUDGET, Disk, PAGES, bounded, builder, moves_no_pages, pool, word};
use crate::guests::lacks_poison;
use crate::machine::rounds;
use crate::storm::{self, in_a_storm};
use crate::waits::{comes_true, until};
use crate::{PAGE, discard, handle_user_signal, spawn_asleep};
use nix::libc;
use nix::sys::signal::{Signal, raise};
use pagestitch::source::WritableSource;
use pagestitch::{Budget, Chunk, ErrorKind, Region, SharedRegion, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Discarded pages are missing, also those that a flush reads in place.
#[test]
fn a_flush_of_discarded_padding_ends() {
    if moves_no_pages() {
        return;
    }
    let budget = Budget::bytes(BUDGET).unwrap();
    let chunk = || Chunk::writable(Disk::of(vec![1; PAGE / 2])).align(PAGE as u64);
    let region = builder(&budget, chunk()).chunk(chunk()).build_shared(&pool(1)).unwrap();
    region.write_at(PAGE as u64 - 10, &[7; 20]).unwrap();
    discard(region.as_ptr().expose_provenance().get(), PAGE);
    scope(|scope| {
        scope.spawn(|| region.flush(..).unwrap());
    });
    assert_eq!(word(&region, 0).load(Ordering::Relaxed).to_ne_bytes(), [1; 8]);
}

/// Changes the access of a page.
#[expect(unsafe_code, reason = "a page without access")]
fn protect(region: &SharedRegion, page: usize, access: i32) {
    let address = word(region, page).as_ptr().cast();
    // SAFETY: the page is inside the region, and no thread touches it while it has no access.
    assert_eq!(unsafe { libc::mprotect(address, PAGE, access) }, 0);
}

#[test]
fn a_flush_fails_for_a_page_that_cannot_be_read_and_the_page_stays_dirty() {
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; 4 * PAGE]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    word(&region, 1).store(7, Ordering::SeqCst);
    protect(&region, 1, libc::PROT_NONE);
    let flushed = region.flush(..);
    protect(&region, 1, libc::PROT_READ | libc::PROT_WRITE);
    assert!(flushed.is_err(), "the page is not in its source");
    assert_eq!(budget.metrics().dirty_bytes, PAGE as u64);
    region.flush(..).unwrap();
    assert_eq!(disk.word(1), 7);
}

/// A source that calls the kernel for a page of its region before it takes no bytes. Repaired, it takes them.
struct Meddling {
    disk: Arc<Disk>,
    address: AtomicUsize,
    meddle: fn(*mut libc::c_void),
    has_failed: AtomicBool,
    is_repaired: AtomicBool,
}

impl Source for Meddling {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, into)
    }
}

impl WritableSource for Meddling {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        if self.is_repaired.load(Ordering::SeqCst) {
            return self.disk.write_at(offset, bytes);
        }
        (self.meddle)(std::ptr::with_exposed_provenance_mut(self.address.load(Ordering::SeqCst)));
        self.has_failed.store(true, Ordering::SeqCst);
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }
}

/// Has page 1 leave, which is written, while its source calls the kernel for it and takes no bytes.
fn evict_below(
    meddle: fn(*mut libc::c_void),
    check: impl Fn(&SharedRegion, &Meddling, &Budget) + Send + Sync + 'static,
) {
    let budget = Budget::bytes(BUDGET).unwrap();
    let (disk, address) = (Disk::of(vec![0; 4 * PAGE]), AtomicUsize::new(0));
    let (has_failed, is_repaired) = (AtomicBool::new(false), AtomicBool::new(false));
    let source = Arc::new(Meddling { disk, address, meddle, has_failed, is_repaired });
    let region = bounded(&budget, Chunk::writable(Arc::clone(&source)), 1);
    word(&region, 1).store(7, Ordering::SeqCst);
    source.address.store(word(&region, 1).as_ptr().expose_provenance(), Ordering::SeqCst);
    scope(|scope| {
        // A page whose fill has not ended stays.
        scope.spawn(|| {
            until(|| {
                region.evict(PAGE as u64..2 * PAGE as u64).unwrap();
                source.has_failed.load(Ordering::SeqCst)
            });
        });
    });
    check(&region, &source, &budget);
}

#[test]
fn a_page_that_is_unmapped_while_its_write_fails_has_an_end() {
    #[expect(unsafe_code, reason = "a page that is unmapped")]
    fn unmap(page: *mut libc::c_void) {
        // SAFETY: a page of the region, which no thread touches any more.
        assert_eq!(unsafe { libc::munmap(page, PAGE) }, 0);
    }
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            return;
        }
        evict_below(unmap, |region, _, budget| {
            region.flush(..).unwrap();
            assert_eq!(budget.metrics().dirty_bytes, 0);
        });
    });
    end.expect_pass();
}

#[test]
fn a_page_that_another_mapping_replaces_while_its_write_fails_has_an_end() {
    #[expect(unsafe_code, reason = "a page that is mapped over")]
    fn map_over(page: *mut libc::c_void) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: a page of the region, which no thread touches any more.
        let mapped = unsafe { libc::mmap(page, PAGE, libc::PROT_READ, flags, -1, 0) };
        assert_eq!(mapped, page);
    }
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            return;
        }
        evict_below(map_over, |region, _, budget| {
            region.flush(..).unwrap();
            assert_eq!(budget.metrics().dirty_bytes, 0);
        });
    });
    end.expect_pass();
}

/// The kernel moves no page into a mapping that is locked, from one that is not.
#[test]
fn a_page_that_is_locked_while_its_write_fails_comes_back_with_its_bytes() {
    #[expect(unsafe_code, reason = "a page that is locked as soon as it is there")]
    fn lock(page: *mut libc::c_void) {
        // SAFETY: a lock changes no byte. A process that may not lock passes, too.
        let _ = unsafe { libc::mlock2(page, PAGE, libc::MLOCK_ONFAULT as _) };
    }
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            return;
        }
        evict_below(lock, |region, source, budget| {
            assert_eq!(budget.metrics().dirty_bytes, PAGE as u64);
            assert_eq!(word(region, 1).load(Ordering::SeqCst), 7);
            word(region, 1).store(8, Ordering::SeqCst);
            source.is_repaired.store(true, Ordering::SeqCst);
            region.flush(..).unwrap();
            assert_eq!(source.disk.word(1), 8);
        });
    });
    end.expect_pass();
}

/// A source whose first read raises a signal and fails, as all others except for that of the handler.
struct FailingFirst {
    reads: AtomicUsize,
}

impl Source for FailingFirst {
    fn size(&self) -> u64 {
        PAGE as u64
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        match self.reads.fetch_add(1, Ordering::SeqCst) {
            0 => raise(Signal::SIGUSR1).unwrap(),
            1 => {
                into.fill(7);
                return Ok(());
            }
            _ => {}
        }
        Err(io::ErrorKind::Other.into())
    }
}

#[test]
fn a_page_that_a_signal_handler_gets_counts_also_if_the_read_of_its_thread_fails() {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    #[expect(unsafe_code, reason = "a signal handler reads through a pointer")]
    extern "C" fn handler(_: i32) {
        let word = std::ptr::with_exposed_provenance_mut(ADDRESS.load(Ordering::SeqCst));
        // SAFETY: a word of the region, which is accessed by atomics only.
        unsafe { AtomicU64::from_ptr(word) }.load(Ordering::SeqCst);
    }
    if lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        let budget = Budget::bytes(BUDGET).unwrap();
        let chunk: Arc<dyn Source> = Arc::new(FailingFirst { reads: AtomicUsize::new(0) });
        let region = Region::builder().chunk(chunk).budget(&budget).build_shared(&pool(1)).unwrap();
        ADDRESS.store(word(&region, 0).as_ptr().expose_provenance(), Ordering::SeqCst);
        handle_user_signal(handler);
        scope(|scope| {
            scope.spawn(|| region.populate(..).unwrap_err());
        });
        assert_eq!(budget.resident_bytes(), PAGE as u64);
    });
    end.expect_pass();
}

/// A source that raises a signal in the thread that reads its first page, and holds writes up.
struct Interrupting {
    disk: Arc<Disk>,
    raises: AtomicBool,
    holds: AtomicBool,
    writes: AtomicUsize,
}

impl Source for Interrupting {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if offset == 0 && self.raises.load(Ordering::SeqCst) {
            raise(Signal::SIGUSR1).unwrap();
        }
        self.disk.read_at(offset, into)
    }
}

impl WritableSource for Interrupting {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        until(|| !self.holds.load(Ordering::SeqCst));
        self.disk.write_at(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }
}

/// The page has left, and its bytes are on their way to the source, when the handler touches it.
#[test]
fn a_signal_handler_reads_the_written_bytes_of_a_page_that_its_thread_is_filling() {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    static SEEN: AtomicU64 = AtomicU64::new(u64::MAX);
    #[expect(unsafe_code, reason = "a signal handler reads through a pointer")]
    extern "C" fn handler(_: i32) {
        let word = std::ptr::with_exposed_provenance_mut(ADDRESS.load(Ordering::SeqCst));
        // SAFETY: a word of the region, which is accessed by atomics only.
        SEEN.store(unsafe { AtomicU64::from_ptr(word) }.load(Ordering::SeqCst), Ordering::SeqCst);
    }
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            return;
        }
        let source = Arc::new(Interrupting {
            disk: Disk::of(vec![0; 32 * PAGE]),
            raises: AtomicBool::new(true),
            holds: AtomicBool::new(true),
            writes: AtomicUsize::new(0),
        });
        let budget = Budget::bytes(BUDGET).unwrap();
        let region = bounded(&budget, Chunk::writable(Arc::clone(&source)), 1);
        word(&region, 10).store(77, Ordering::SeqCst);
        ADDRESS.store(word(&region, 10).as_ptr().expose_provenance(), Ordering::SeqCst);
        handle_user_signal(handler);
        scope(|scope| {
            // A page whose fill has not ended stays.
            scope.spawn(|| until(|| region.evict(10 * PAGE as u64..11 * PAGE as u64).unwrap() > 0));
            until(|| source.writes.load(Ordering::SeqCst) > 0);
            scope.spawn(|| {
                region.populate(..20 * PAGE as u64).unwrap();
            });
            until(|| SEEN.load(Ordering::SeqCst) != u64::MAX);
            source.holds.store(false, Ordering::SeqCst);
        });
        assert_eq!(SEEN.load(Ordering::SeqCst), 77);
        assert_eq!(word(&region, 10).load(Ordering::SeqCst), 77);
        region.flush(..).unwrap();
        assert_eq!(source.disk.word(10), 77);
    });
    end.expect_pass();
}

#[test]
fn pages_leave_after_others_were_replaced_many_times() {
    let budget = Budget::bytes(6 << 20).unwrap();
    let region = Region::builder().chunk(vec![7u8; 16 << 20]).budget(&budget);
    let region = region.build_shared(&pool(1)).unwrap();
    let touch = |page: usize| assert_ne!(word(&region, page).load(Ordering::Relaxed), 0);
    for _ in 0..8_000 {
        region.replace(..PAGE as u64, vec![7u8; PAGE]).unwrap();
        touch(0);
    }
    (0..4096).for_each(touch);
    let before = budget.metrics();
    (1..768).for_each(touch);
    let after = budget.metrics();
    let came = after.refaults + after.soft_faults - before.refaults - before.soft_faults;
    assert!(came > 512, "{came} of 767 pages had left");
}

#[test]
fn pins_of_one_page_at_once_are_counted_once() {
    let budget = Budget::bytes(6 << 20).unwrap();
    let region = Region::builder().chunk(vec![7u8; 16 << 20]).budget(&budget).build(&pool(1)).unwrap();
    region.populate(..8 * PAGE as u64).unwrap();
    scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..6_000 {
                    region.pin(..8 * PAGE as u64).unwrap();
                    region.unpin(..8 * PAGE as u64).unwrap();
                }
            });
        }
    });
    region.unpin(..).unwrap();
    region.pin(..3 << 20).unwrap();
    region.pin(..(3 << 20) + 1).unwrap_err();
}

/// A source that gives zeros, and may change.
struct Zeros(u64);

impl Source for Zeros {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }
}

/// The build waits for room for its hashes, because the budget is full of written pages.
#[test]
fn a_region_ends_while_the_build_of_another_one_waits_for_a_write() {
    if moves_no_pages() {
        return;
    }
    let source = Arc::new(Interrupting {
        disk: Disk::of(vec![0; PAGES * PAGE]),
        raises: AtomicBool::new(false),
        holds: AtomicBool::new(true),
        writes: AtomicUsize::new(0),
    });
    let budget = Budget::bytes(BUDGET).unwrap();
    let region = bounded(&budget, Chunk::writable(Arc::clone(&source)), 4);
    let other = bounded(&budget, Chunk::writable(Disk::of(vec![0; PAGE])), 1);
    // Almost the eighth of the budget that hashes may take.
    let hashed = Chunk::source(Arc::new(Zeros((BUDGET / 8 - (64 << 10)) / 16 * PAGE as u64)));
    let (has_ended, is_built) = (AtomicBool::new(false), AtomicBool::new(false));
    let ends = scope(|scope| {
        for first in 0..4 {
            let region = &region;
            scope.spawn(move || {
                (first..PAGES).step_by(4).for_each(|page| word(region, page).store(1, Ordering::Relaxed));
            });
        }
        until(|| budget.resident_bytes() > BUDGET / 16 * 15);
        let (budget, builds, is_built) = (&budget, pool(1), &is_built);
        spawn_asleep(scope, move || {
            let built = Region::builder().chunk(hashed).budget(budget).build(&builds).unwrap();
            is_built.store(true, Ordering::SeqCst);
            built
        });
        assert!(!is_built.load(Ordering::SeqCst));
        scope.spawn(|| {
            drop(other);
            has_ended.store(true, Ordering::SeqCst);
        });
        let ends = comes_true(|| has_ended.load(Ordering::SeqCst));
        source.holds.store(false, Ordering::SeqCst);
        ends
    });
    assert!(ends);
}

/// A signal handler may bring a page back that its thread is about to bring back, too.
#[test]
fn a_page_that_a_signal_handler_brings_back_is_counted_once() {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    #[expect(unsafe_code, reason = "a signal handler reads through a pointer")]
    extern "C" fn handler(_: i32) {
        let word = std::ptr::with_exposed_provenance_mut(ADDRESS.load(Ordering::SeqCst));
        // SAFETY: a word of the region, which is accessed by atomics only.
        unsafe { AtomicU64::from_ptr(word) }.load(Ordering::SeqCst);
        storm::ended();
    }
    let end = child::run(this_test!(), || {
        let budget = Budget::bytes(BUDGET).unwrap();
        let builder = Region::builder().chunk(vec![7u8; PAGE]).budget(&budget);
        let region = builder.build_shared(&pool(1)).unwrap();
        ADDRESS.store(word(&region, 0).as_ptr().expose_provenance(), Ordering::SeqCst);
        handle_user_signal(handler);
        in_a_storm(|| {
            for _ in 0..rounds(5_000) {
                region.evict(..).unwrap();
                region.populate(..).unwrap();
            }
        });
        // The page of a handler is counted by a worker a moment later.
        until(|| {
            region.evict(..).unwrap();
            let metrics = budget.metrics();
            metrics.resident_bytes == metrics.standby_bytes
        });
    });
    end.expect_pass();
}

/// The thread has the claim of the page for a moment, while it lets the page be written.
#[test]
fn a_signal_handler_writes_to_a_page_that_its_thread_writes_to() {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    #[expect(unsafe_code, reason = "a signal handler writes through a pointer")]
    extern "C" fn handler(_: i32) {
        let word = std::ptr::with_exposed_provenance_mut(ADDRESS.load(Ordering::SeqCst));
        // SAFETY: a word of the region, which is accessed by atomics only.
        unsafe { AtomicU64::from_ptr(word) }.fetch_add(1, Ordering::SeqCst);
        storm::ended();
    }
    if moves_no_pages() {
        return;
    }
    let end = child::run(this_test!(), || {
        let budget = Budget::bytes(BUDGET).unwrap();
        let region = bounded(&budget, Chunk::writable(Disk::of(vec![0; PAGE])), 1);
        ADDRESS.store(word(&region, 0).as_ptr().expose_provenance(), Ordering::SeqCst);
        handle_user_signal(handler);
        in_a_storm(|| {
            for _ in 0..rounds(5_000) {
                // The page is protected again.
                region.flush(..).unwrap();
                region.write_at(8, &[7; 8]).unwrap();
            }
        });
        let mut seen = [0; 8];
        region.read_at(8, &mut seen).unwrap();
        assert_eq!(seen, [7; 8]);
    });
    end.expect_pass();
}

/// True if the kernel has a page in memory: of a file in place, in the page cache.
#[expect(unsafe_code, reason = "mincore")]
pub(crate) fn is_in_memory(region: &SharedRegion, page: usize) -> bool {
    let mut here = [0];
    // SAFETY: the page is inside the region, and the kernel writes one byte.
    assert_eq!(unsafe { libc::mincore(word(region, page).as_ptr().cast(), PAGE, here.as_mut_ptr()) }, 0);
    here[0] & 1 == 1
}

/// The page is absent for the region, because the read of its thread fails, and was filled for a signal handler.
#[test]
#[cfg_attr(sanitized, ignore = "mlock(2) of the sanitizers' libraries does nothing")]
fn a_locked_page_of_a_failed_read_leaves_after_its_lock() {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    #[expect(unsafe_code, reason = "a signal handler reads through a pointer")]
    extern "C" fn handler(_: i32) {
        let word = std::ptr::with_exposed_provenance_mut(ADDRESS.load(Ordering::SeqCst));
        // SAFETY: a word of the region, which is accessed by atomics only.
        unsafe { AtomicU64::from_ptr(word) }.load(Ordering::SeqCst);
    }
    #[expect(unsafe_code, reason = "a lock")]
    fn lock(region: &SharedRegion, locks: bool) -> bool {
        let call = if locks { libc::mlock } else { libc::munlock };
        // SAFETY: the page is inside the region, and a lock changes no byte.
        unsafe { call(word(region, 0).as_ptr().cast(), PAGE) == 0 }
    }
    if lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        let (budget, pool) = (Budget::bytes(BUDGET).unwrap(), pool(1));
        let chunk: Arc<dyn Source> = Arc::new(FailingFirst { reads: AtomicUsize::new(0) });
        let region = Region::builder().chunk(chunk).budget(&budget).build_shared(&pool).unwrap();
        let others = Region::builder().chunk(vec![1u8; PAGES * PAGE]).budget(&budget).build(&pool).unwrap();
        ADDRESS.store(word(&region, 0).as_ptr().expose_provenance(), Ordering::SeqCst);
        handle_user_signal(handler);
        scope(|scope| {
            scope.spawn(|| region.populate(..).unwrap_err());
        });
        assert!(is_in_memory(&region, 0));
        let read_others = || others.as_slice().iter().step_by(PAGE).for_each(|byte| assert_eq!(*byte, 1));
        if !lock(&region, true) {
            return;
        }
        (0..8).for_each(|_| read_others());
        assert!(is_in_memory(&region, 0), "it is locked");
        assert!(lock(&region, false));
        let leaves = (0..16).any(|_| {
            read_others();
            !is_in_memory(&region, 0)
        });
        assert!(leaves, "it stays in memory for ever");
    });
    end.expect_pass();
}

/// A source in memory of which the last page fails.
struct FailingLast;

impl Source for FailingLast {
    fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(7);
        let is_last = offset + into.len() as u64 == self.size();
        if is_last { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

#[test]
fn a_read_of_more_than_the_budget_returns_the_error_of_a_page_behind_it() {
    let end = child::run(this_test!(), || {
        let (budget, chunk) = (Budget::bytes(BUDGET).unwrap(), Arc::new(FailingLast) as Arc<dyn Source>);
        let builder = || Region::builder().chunk(Arc::clone(&chunk)).budget(&budget);
        let mut bytes = vec![0; PAGES * PAGE];
        let region = builder().build(&pool(1)).unwrap();
        let error = region.read_at(0, &mut bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SourceFailed, "{error}");
        region.read_at(0, &mut bytes[PAGE..]).unwrap();
        assert!(bytes[PAGE..].iter().all(|byte| *byte == 7));
        let shared = builder().build_shared(&pool(1)).unwrap();
        assert_eq!(shared.read_at(0, &mut bytes).unwrap_err().kind(), ErrorKind::SourceFailed);
    });
    end.expect_pass();
}

/// A page that is being written goes back to its region if its source fails, and meets the claim of a thread that
/// waits for room, and thus for that write.
#[test]
fn a_thread_that_waits_for_room_and_a_page_that_goes_back_do_not_wait_for_each_other() {
    if moves_no_pages() {
        return;
    }
    let (budget, source) = (Budget::bytes(BUDGET).unwrap(), Arc::new(Refusing::default()));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&source)), 1);
    let bytes = |pages: Range<usize>| (pages.start * PAGE) as u64..(pages.end * PAGE) as u64;
    let write = |page: usize| region.write_at(bytes(page..page + 1).start, &[7]);
    let error = (LAST..PAGES).find_map(|page| write(page).err()).unwrap();
    assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
    source.waits.store(true, Ordering::SeqCst);
    scope(|scope| {
        let evictor = scope.spawn(|| {
            // The page stays for a while after each failure.
            while !source.has_begun.load(Ordering::SeqCst) {
                region.evict(bytes(LAST..LAST + 1)).unwrap();
            }
        });
        until(|| source.has_begun.load(Ordering::SeqCst));
        spawn_asleep(scope, || region.populate(bytes(0..LAST + 1)));
        source.waits.store(false, Ordering::SeqCst);
        evictor.join().unwrap();
    });
    source.takes.store(true, Ordering::SeqCst);
    region.retry_failed(..).unwrap();
    region.finish().unwrap();
}

/// The page of which a write waits.
const LAST: usize = 8;

/// A source whose writes fail until it takes them.
#[derive(Default)]
struct Refusing {
    /// A write of the page [`LAST`] waits before it fails.
    waits: AtomicBool,
    has_begun: AtomicBool,
    takes: AtomicBool,
}

impl Source for Refusing {
    fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }
}

impl WritableSource for Refusing {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        if self.takes.load(Ordering::SeqCst) {
            return Ok(bytes.len());
        }
        if offset == (LAST * PAGE) as u64 && self.waits.load(Ordering::SeqCst) {
            self.has_begun.store(true, Ordering::SeqCst);
            until(|| !self.waits.load(Ordering::SeqCst));
        }
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
