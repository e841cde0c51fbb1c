//! The guarantees of pagestitch: one named test for each, on the running kernel. A file holds the
//! tests of one area.

mod adopted;
mod application;
mod blocks;
mod children;
mod conformance;
mod contention;
mod donated;
mod failure;
mod fairness;
mod firecracker;
mod hostile_memory;
mod huge_parts;
mod inherited;
mod inline;
mod journey;
mod lazy;
mod limits;
mod locked;
mod manual;
mod memory;
mod metering;
mod mixed;
mod nesting;
mod panics;
mod peers;
mod readahead;
mod reading;
mod recording;
mod scale;
mod shared;
mod signals;
mod splits;
mod swap;
mod teardown;
mod watchdog;
mod zero_copy;

mod handler;
mod waits;

use std::fs;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};
use waits::{HANG, SetOnDrop, comes_true, is_readable, serve_until, until};

/// Reads a byte through a raw pointer, past every borrow, as an application may.
#[expect(unsafe_code, reason = "a defect of the application is part of the test")]
fn touch(address: usize) -> u8 {
    // SAFETY: an address of a region. The test decides whether the access is a byte or a signal.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

/// Writes a byte through a raw pointer, as a defect of an application does.
#[expect(unsafe_code, reason = "a defect of the application is part of the test")]
fn stray_write(address: usize) {
    // SAFETY: an address of a region. The test decides whether the access is a byte or a signal.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(0) }
}

/// Installs a SIGBUS handler as an application does. The handler may only use atomics.
#[expect(unsafe_code, reason = "a signal handler of the application is part of the test")]
fn handle_bus_errors(handler: extern "C" fn(i32)) {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handlers of these tests add to an atomic.
    unsafe { sigaction(Signal::SIGBUS, &action) }.expect("a handler");
}

/// Discards pages, as an application may with `madvise(MADV_DONTNEED)`.
#[expect(unsafe_code, reason = "madvise(2) by the application is part of the test")]
fn discard(start: usize, bytes: usize) {
    let start = NonNull::new(std::ptr::with_exposed_provenance_mut(start)).expect("an address");
    // SAFETY: pages of a region, whose sources give the same bytes again.
    unsafe { nix::sys::mman::madvise(start, bytes, nix::sys::mman::MmapAdvise::MADV_DONTNEED) }
        .expect("madvise");
}

/// Locks the pages of these bytes, as `mlockall(2)` does with all pages.
#[expect(unsafe_code, reason = "mlock(2) by the application is part of the test")]
fn lock_pages(bytes: &[u8]) {
    let start = NonNull::from(bytes).cast();
    // SAFETY: a lock changes no byte.
    unsafe { nix::sys::mman::mlock(start, bytes.len()) }.expect("mlock");
}

/// The promise that lets a region fill guest memory of this process.
#[expect(unsafe_code, reason = "the promise about own memory is unsafe")]
const fn own_memory() -> pagestitch::OwnMemory {
    // SAFETY: the memory of a guest is a mapping of its own, from which nothing is ever borrowed.
    unsafe { pagestitch::OwnMemory::promise() }
}

/// The signal that the owner of adopted memory gets for an unavailable page: SIGBUS at the touch
/// or, before Linux 6.6, which has no poison markers, SIGKILL.
fn signal_of_loss() -> i32 {
    let features = pagestitch_kernel::uffd::handshake_probe().expect("a userfaultfd");
    if features.contains(pagestitch_kernel::Features::POISON) { SIGBUS } else { SIGKILL }
}

const SIGKILL: i32 = 9;
const SIGBUS: i32 = 7;

/// Reserves huge pages of hugetlbfs for its lifetime. Needs root.
struct HugePages {
    before: String,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";

    /// Reserves `pages` huge pages, or returns `None` without the right to. One test at a time
    /// holds a reservation.
    fn reserve(pages: usize) -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(Self::PATH).ok()?;
        fs::write(Self::PATH, pages.to_string()).ok()?;
        let reserved = Self { before, _alone: alone };
        let there: usize = fs::read_to_string(Self::PATH).ok()?.trim().parse().ok()?;
        (there >= pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, &self.before);
    }
}

/// True, with a line that says so, where the kernel has no poison markers (before Linux 6.6): a
/// drop of adopted memory then kills its owner, and here the owner is the test process.
fn lacks_marks(test: &str) -> bool {
    let lacks = !pagestitch_kernel::Support::current().has(pagestitch_kernel::Features::POISON);
    if lacks {
        println!("SKIPPED {test}: this kernel has no poison marks (Linux 6.6)");
    }
    lacks
}

/// Bytes that are never zero and differ for each seed, so that a test sees zeros, and bytes of
/// another page, as wrong.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8 | 1
    };
    (0..len).map(|_| next()).collect()
}
