//! Regions with a budget in rare orders of their threads and calls: no write is lost, and no page stays for
//! ever.

use crate::bounded_writes::{BUDGET, Disk, PAGES, bounded, builder, moves_no_pages, pool, word};
use crate::guests::lacks_poison;
use crate::waits::{comes_true, until};
use crate::{PAGE, discard, handle_user_signal, spawn_asleep};
use nix::libc;
use nix::sys::signal::{Signal, raise};
use pagestitch::source::WritableSource;
use pagestitch::{Budget, Chunk, Region, SharedRegion, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::io;
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

/// A source that unmaps a page of its region, and takes no bytes.
struct Unmapping {
    disk: Arc<Disk>,
    address: AtomicUsize,
}

impl Source for Unmapping {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, into)
    }
}

impl WritableSource for Unmapping {
    #[expect(unsafe_code, reason = "a page that is unmapped")]
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<usize> {
        let page = std::ptr::with_exposed_provenance_mut(self.address.load(Ordering::SeqCst));
        // SAFETY: a page of the region, which no thread touches any more.
        assert_eq!(unsafe { libc::munmap(page, PAGE) }, 0);
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }
}

#[test]
fn a_page_that_is_unmapped_while_its_write_fails_has_an_end() {
    let end = child::run(this_test!(), || {
        if moves_no_pages() {
            return;
        }
        let budget = Budget::bytes(BUDGET).unwrap();
        let source = Arc::new(Unmapping { disk: Disk::of(vec![0; 4 * PAGE]), address: AtomicUsize::new(0) });
        let region = bounded(&budget, Chunk::writable(Arc::clone(&source)), 1);
        word(&region, 1).store(7, Ordering::SeqCst);
        source.address.store(word(&region, 1).as_ptr().expose_provenance(), Ordering::SeqCst);
        scope(|scope| {
            scope.spawn(|| region.evict(PAGE as u64..2 * PAGE as u64).unwrap());
        });
        region.flush(..).unwrap();
        assert_eq!(budget.metrics().dirty_bytes, 0);
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
            scope.spawn(|| region.evict(10 * PAGE as u64..11 * PAGE as u64).unwrap());
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
