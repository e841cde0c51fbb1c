//! The promises, each a named test on the running kernel. One file for each family of promises.

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
mod foreign;
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

use std::fs;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Touches a byte as an application with a raw pointer does, past every borrow.
#[expect(unsafe_code, reason = "what an application may do wrong is part of what is tested")]
fn touch(address: usize) -> u8 {
    // SAFETY: an address of a region; what the access does is for the test to find out.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

/// Writes a byte as a defect of an application does.
#[expect(unsafe_code, reason = "what an application may do wrong is part of what is tested")]
fn stray_write(address: usize) {
    // SAFETY: an address of a region; what the access does is for the test to find out.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(0) }
}

/// Installs an application's handler of SIGBUS, which must do no more than to use atomics.
#[expect(unsafe_code, reason = "an application's signal handler is part of what is tested")]
fn handle_bus_errors(handler: extern "C" fn(i32)) {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handlers of these tests add to an atomic.
    unsafe { sigaction(Signal::SIGBUS, &action) }.expect("a handler");
}

/// Lets pages go, as an application may with `madvise(MADV_DONTNEED)`.
#[expect(unsafe_code, reason = "madvise by an application is part of what is tested")]
fn let_go(start: usize, bytes: usize) {
    let start = NonNull::new(std::ptr::with_exposed_provenance_mut(start)).expect("an address");
    // SAFETY: pages of a region whose sources give the same bytes again.
    unsafe { nix::sys::mman::madvise(start, bytes, nix::sys::mman::MmapAdvise::MADV_DONTNEED) }
        .expect("madvise");
}

/// Locks the pages that bytes lie in, as `mlockall(2)` does with all of them.
#[expect(unsafe_code, reason = "mlock by an application is part of what is tested")]
fn lock_pages(bytes: &[u8]) {
    let start = NonNull::from(bytes).cast();
    // SAFETY: whether pages may be swapped out changes none of their bytes.
    unsafe { nix::sys::mman::mlock(start, bytes.len()) }.expect("mlock");
}

/// That guests in this process may be filled.
#[expect(unsafe_code, reason = "makes a promise")]
const fn own_memory() -> pagestitch::OwnMemory {
    // SAFETY: the memory of a guest is a mapping of its own, from which nothing is ever borrowed.
    unsafe { pagestitch::OwnMemory::promise() }
}

/// What the owner of adopted memory gets for bytes that cannot be had: SIGBUS where it touches them or, where there are no poison
/// marks (before Linux 6.6), SIGKILL.
fn signal_of_loss() -> i32 {
    let features = pagestitch_kernel::uffd::handshake_probe().expect("a userfaultfd");
    if features.contains(pagestitch_kernel::Features::POISON) { SIGBUS } else { SIGKILL }
}

const SIGKILL: i32 = 9;
const SIGBUS: i32 = 7;

/// Huge pages of hugetlbfs, reserved as long as it lives. Needs root.
struct HugePages {
    before: String,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";

    /// Reserves them, if that can be; one test at a time has them.
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

/// Where there are no poison marks (before Linux 6.6), memory that is left ends its owner: here that is this process.
fn lacks_marks(test: &str) -> bool {
    let lacks = !pagestitch_kernel::Support::current().has(pagestitch_kernel::Features::POISON);
    if lacks {
        println!("SKIPPED {test}: this kernel has no poison marks (Linux 6.6)");
    }
    lacks
}

/// Waits until `done`, without a sleep of a guessed length. Numbers may lag behind the bytes that they count: a
/// thread runs on as soon as the kernel has its page.
fn until(mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(60), "what was waited for has not come about");
        thread::yield_now();
    }
}

/// Bytes without a zero among them, different for each seed: zeros for bytes, and bytes of another page, are seen.
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
