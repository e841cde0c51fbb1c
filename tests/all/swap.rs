//! Swapped pages are present, although `mincore(2)` calls them absent: their source is not read
//! again, and they keep written bytes.

use crate::bounded_writes::{BUDGET, Disk, bounded, mix, moves_no_pages, word};
use crate::donated::pages_of;
use crate::transient::without_descriptors;
use crate::{PAGE, SetOnDrop, bounded_writes, comes_true, discard, inline_writes, pattern, until};
use nix::libc;
use pagestitch::source::Donated;
use pagestitch::{Budget, Chunk, Pool, Region, Source};
use pagestitch_kernel::swap::is_on;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, Arena, Evictable, Features, Outcome, Page, PageSize, Uffd, View};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, is_filled};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

const BLOCK: usize = 2 << 20;

/// Swap space on a compressed block device in memory, for its lifetime. Needs root.
struct Swap {
    number: String,
    _alone: MutexGuard<'static, ()>,
}

impl Swap {
    fn on() -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").ok()?.trim().to_owned();
        let swap = Self { number, _alone: alone };
        fs::write(format!("/sys/block/zram{}/disksize", swap.number), "256M").ok()?;
        let device = format!("/dev/zram{}", swap.number);
        let done = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        (done(Command::new("mkswap").arg(&device)) && done(Command::new("swapon").arg(&device)))
            .then_some(swap)
    }

    fn or_skip() -> Option<Self> {
        let swap = Self::on();
        if swap.is_none() {
            println!("SKIPPED: no zram device can be added and swapped to here");
        }
        swap
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(format!("/dev/zram{}", self.number)).output();
        let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        // A device manager may hold the device open for a moment.
        let remove = || fs::write("/sys/class/zram-control/hot_remove", &self.number).is_ok();
        comes_true(remove);
    }
}

/// Asks the kernel to swap out the pages of a range.
#[expect(unsafe_code, reason = "madvise(2) by the application is part of the test")]
fn page_out(start: usize, bytes: usize) {
    let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(start);
    // SAFETY: the call changes no byte, and fails where nothing is mapped.
    let _ = unsafe { libc::madvise(address, bytes, libc::MADV_PAGEOUT) };
}

/// The number of swapped pages in a range.
fn swapped(start: usize, bytes: usize) -> usize {
    let mut entries = vec![0; bytes / PAGE * 8];
    fs::File::open("/proc/self/pagemap")
        .unwrap()
        .read_exact_at(&mut entries, (start / PAGE * 8) as u64)
        .unwrap();
    entries.chunks_exact(8).filter(|entry| entry[7] & 1 << 6 != 0).count()
}

fn swap_out(region: *const u8, bytes: usize) {
    // The kernel skips pages that another CPU has just touched.
    until(|| {
        page_out(region.addr(), bytes);
        swapped(region.addr(), bytes) > bytes / PAGE / 2
    });
}

/// A source that fails the second read of a page.
struct Once {
    bytes: Vec<u8>,
    given: Mutex<Vec<bool>>,
}

impl Once {
    fn new(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self { bytes: bytes.to_vec(), given: Mutex::new(vec![false; bytes.len().div_ceil(PAGE)]) })
    }
}

impl Source for Once {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        let pages = start / PAGE..(start + into.len()).div_ceil(PAGE);
        let mut given = self.given.lock().unwrap();
        if given[pages.clone()].iter().any(|given| *given) {
            return Err(io::Error::other("read twice"));
        }
        given[pages].fill(true);
        into.copy_from_slice(&self.bytes[start..start + into.len()]);
        Ok(())
    }
}

#[test]
fn a_swapped_page_is_not_read_again() {
    let Some(_swap) = Swap::or_skip() else { return };
    let bytes = pattern(1, BLOCK + 40 * PAGE);
    let chunk = Chunk::source(Once::new(&bytes));
    let region = Region::builder().chunk(chunk).build(&Pool::new().unwrap()).unwrap();
    region.populate(..).unwrap();
    swap_out(region.as_ptr().as_ptr(), bytes.len());
    region.populate(..).unwrap();
    let mut seen = vec![0; bytes.len()];
    region.read_at(0, &mut seen).unwrap();
    assert!(seen == bytes);
    assert!(region.failures().is_empty());
    assert_eq!(region.close().pages_poisoned, 0);
}

#[test]
fn a_written_and_swapped_page_is_not_filled_again() {
    let Some(_swap) = Swap::or_skip() else { return };
    let bytes = pattern(2, BLOCK + 40 * PAGE);
    let mut region = Region::builder().chunk(bytes.clone()).writable().build(&Pool::new().unwrap()).unwrap();
    let written = pattern(3, bytes.len());
    region.as_mut_slice().unwrap().copy_from_slice(&written);
    let all = (bytes.len() / PAGE) as u64;
    until(|| region.metrics().pages_installed() == all);
    swap_out(region.as_ptr().as_ptr(), bytes.len());
    region.populate(..).unwrap();
    assert!(region.as_slice() == written);
    assert_eq!(region.close().pages_installed(), all, "no page was absent");
}

#[test]
fn swapped_donated_pages_keep_their_bytes() {
    let Some(_swap) = Swap::or_skip() else { return };
    let bytes = pattern(4, BLOCK + 40 * PAGE);
    let pages = pages_of(&bytes);
    // The pages are swapped before they move and after.
    swap_out(pages.as_ptr(), bytes.len());
    let region =
        Region::builder().chunk(Arc::new(Donated::from(pages))).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice()[BLOCK], bytes[BLOCK]);
    region.populate(..).unwrap();
    swap_out(region.as_ptr().as_ptr(), bytes.len());
    region.populate(..).unwrap();
    assert!(region.as_slice() == bytes);
    assert!(region.failures().is_empty());
}

/// Swaps out all private memory of this process.
fn page_out_everything() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    for line in maps.lines().filter(|line| line.contains(" rw-p ") && line.contains(" 00:00 0")) {
        let Some((start, end)) = line.split(' ').next().unwrap().split_once('-') else { continue };
        let address = |digits| usize::from_str_radix(digits, 16).unwrap();
        page_out(address(start), address(end) - address(start));
    }
}

#[test]
fn a_region_under_constant_swapping_shows_its_bytes() {
    let Some(_swap) = Swap::or_skip() else { return };
    let done = AtomicBool::new(false);
    scope(|scope| {
        let pressure = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                page_out_everything();
            }
        });
        let ends = SetOnDrop(&done);
        for round in 0..6 {
            let (memory, donated) = (pattern(round, 2 * BLOCK + 5000), pattern(round + 100, 2 * BLOCK));
            // A source that may be read twice, because a claim is dropped while the map changes.
            let read = Chunk::source(Arc::new(Scripted::new(BLOCK as u64)));
            let builder = Region::builder().chunk(memory.clone()).chunk(pages_of(&donated)).page_aligned();
            let region = builder.chunk(read).writable().build(&Pool::new().unwrap()).unwrap();
            let at = |chunk| region.offset_of(chunk).unwrap() as usize;
            if round % 2 == 0 {
                region.populate(..).unwrap();
            }
            assert!(region.as_slice()[..memory.len()] == memory, "round {round}: memory");
            assert!(region.as_slice()[at(1)..][..donated.len()] == donated, "round {round}: donated");
            region.populate(..).unwrap();
            let read = &region.as_slice()[at(2)..];
            assert!(is_filled(0, read), "round {round}: read");
            assert!(region.failures().is_empty(), "round {round}: {:?}", region.failures());
        }
        drop(ends);
        pressure.join().unwrap();
    });
}

/// The search for discarded pages takes swapped pages for absent ones.
#[test]
fn written_pages_of_a_budget_that_are_swapped_out_go_back_to_their_source() {
    let Some(_swap) = Swap::or_skip() else { return };
    if moves_no_pages() {
        return;
    }
    let (budget, disk) = (Budget::bytes(BUDGET).unwrap(), Disk::of(vec![0; BLOCK]));
    let region = bounded(&budget, Chunk::writable(Arc::clone(&disk)), 1);
    (0..256).for_each(|page| word(&region, page).store(7, Ordering::Relaxed));
    let look_for_discards = || {
        swap_out(region.as_ptr().as_ptr(), 256 * PAGE);
        word(&region, 300).load(Ordering::Relaxed);
        discard(region.as_ptr().expose_provenance().get() + 300 * PAGE, PAGE);
        word(&region, 300).load(Ordering::Relaxed);
    };
    look_for_discards();
    region.flush(..128 * PAGE as u64).unwrap();
    let flushed = (0..128).filter(|page| disk.word(*page) == 7).count();
    look_for_discards();
    region.evict(128 * PAGE as u64..).unwrap();
    let kept = (0..256).filter(|page| word(&region, *page).load(Ordering::Relaxed) == 7).count();
    region.finish().unwrap();
    let finished = (0..256).filter(|page| disk.word(*page) == 7).count();
    assert_eq!((flushed, kept, finished), (128, 256, 256));
}

/// Since Linux 6.18 a move that meets a page on its way to swap may answer that it has moved nothing, when it has.
#[test]
fn a_move_tells_each_page_that_it_has_moved() {
    const PAGES: usize = 1024;
    let Some(_swap) = Swap::or_skip() else { return };
    if moves_no_pages() {
        return;
    }
    let number = NonZeroUsize::new(PAGES).unwrap();
    let (reservation, _view) = View::reserve(number, PageSize::system(), Access::Writable).unwrap();
    let uffd = Uffd::open(Features::NONE).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING).unwrap();
    reservation.use_small_pages();
    let range = reservation.range();
    assert_eq!(uffd.copy(range, &vec![7; PAGES * PAGE]), Outcome::Done);
    // SAFETY: no slice of the bytes is used.
    #[expect(unsafe_code, reason = "a promise of the caller")]
    let from = unsafe { Evictable::new(Arc::clone(&reservation)) };
    let (arena, is_over) = (Arena::new(number).unwrap(), AtomicBool::new(false));
    let is_there = |page: usize| {
        let mut is_there = false;
        reservation.residency(Page(page).span(), |_, here| is_there = here).unwrap();
        is_there
    };
    scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                page_out(range.start(), range.bytes());
                thread::sleep(Duration::from_micros(200));
            }
        });
        let _is_over = SetOnDrop(&is_over);
        for step in 0..100_000_u64 {
            let (page, mut byte) = (mix(step) as usize % PAGES, [0]);
            // The page is in memory, and on its way to swap perhaps.
            reservation.read_at((page * PAGE) as u64, &mut byte).unwrap();
            let out = arena.take_in(&from, Page(page).span(), page);
            assert_eq!(is_there(page), out != Outcome::Done, "step {step}: {out:?}");
            if out != Outcome::Done {
                continue;
            }
            arena.read(page, &mut byte).unwrap();
            let address = reservation.addresses(Page(page).span());
            while arena.give_back(&uffd, address, page) != Outcome::Done {
                assert!(!is_there(page), "step {step}");
            }
        }
    });
    let mut bytes = vec![0; PAGES * PAGE];
    reservation.read_at(0, &mut bytes).unwrap();
    assert!(bytes == vec![7; PAGES * PAGE]);
}

/// The kernel swaps pages out while they are written, leave, go back and come back.
#[test]
fn no_write_of_a_budget_is_lost_beside_swap() {
    let Some(_swap) = Swap::or_skip() else { return };
    let before = pages_swapped_out();
    bounded_writes::no_write_is_lost_while_pages_leave_and_flushes_go_on();
    bounded_writes::no_write_is_lost_while_the_source_fails_now_and_then();
    inline_writes::no_write_is_lost_while_pages_of_an_inline_region_leave_and_flushes_go_on();
    assert!(moves_no_pages() || pages_swapped_out() > before + 1_000, "the kernel swaps nothing out");
}

/// The pages that the kernel has swapped out so far.
fn pages_swapped_out() -> u64 {
    let counts = fs::read_to_string("/proc/vmstat").unwrap();
    counts.lines().find_map(|line| line.strip_prefix("pswpout ")).unwrap().parse().unwrap()
}

/// A process without descriptors must not take swap for off, because moved pages may be lost then.
#[test]
fn swap_is_on_for_a_process_without_descriptors() {
    let body = child::body(this_test!(), |_| {
        assert!(is_on());
        assert!(without_descriptors(is_on));
    });
    let Some(_swap) = Swap::or_skip() else { return };
    body.spawn("").wait().expect_pass();
}
