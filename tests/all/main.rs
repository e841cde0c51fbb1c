//! The guarantees of pagestitch: one named test for each, on the running kernel. A file holds the
//! tests of one area.

mod adopted;
mod application;
mod background;
mod blocks;
mod bounded;
mod bounded_corners;
mod bounded_files;
mod bounded_writes;
mod changes;
mod changes_written_back;
mod children;
mod chunks;
mod conformance;
mod contention;
mod conversions;
mod decompressions;
mod delayed_faults;
mod direct;
mod discards;
mod donated;
mod drop_behind;
mod eager;
mod error_messages;
mod failure;
mod fairness;
mod fault_free;
mod fetches;

mod firecracker;
mod fixed_buffers;
mod growth;
mod growth_in_budget;
mod hand_over;
mod homes;
mod hostile_memory;
mod huge_parts;
mod immutable;
mod inherited;
mod inline;
mod inline_files;
mod inline_writes;
mod journey;
mod lazy;
mod limits;
#[cfg(not(sanitized))] // Sanitizers make mlock(2) and mlockall(2) do nothing.
mod locked;
mod manual;
mod memory;
mod memory_from_outside;
mod metering;
mod mixed;
mod nesting;
mod on_memfd;
mod options;
mod panics;
mod peers;
mod pinned;
mod populate_threads;
mod prefetch;
mod pressure;
mod readahead;
mod reading;
mod reads_at_once;
mod recording;
mod released;
mod replacements;
mod same_bytes;
#[cfg(sanitized)]
mod sanitized;
mod scale;
mod shards;
mod shared;
mod sharing;
mod signals;
mod spare_uffds;
mod splits;
mod swap;
mod teardown;
mod throttle;
mod transient;
mod units;
mod userfaultfd_crate;
mod watchdog;
mod wrappers;
mod write_back;
mod zero_copy;

mod guests;
mod handler;
mod machine;
mod storm;
mod verity;
mod waits;

use guests::{lacks_poison, signal_of_lost_page};
use machine::{HugePages, become_ordinary_user, spawn_asleep};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use pagestitch::source::FailureReason;
use pagestitch_testkit::bytes::pattern;
use std::ptr::NonNull;
use waits::{HANG, SetOnDrop, comes_true, end_if_hung, is_readable, serve_until, until};

/// Checks the number of faults of spawned threads. One more is allowed, because a futex that wakes its thread late
/// ends a wait for a page too (`userfaultfd` in Linux waits once), and the thread faults again.
fn assert_faults(seen: &pagestitch::Metrics, expected: u64) {
    assert!((expected..=expected + 1).contains(&seen.faults), "not {expected} faults: {seen:?}");
}

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

/// Installs a signal handler as an application does. The handler may use atomics, touch memory and
/// call system calls. Returns the action before it.
#[expect(unsafe_code, reason = "a signal handler of the application is part of the test")]
fn handle(signal: Signal, handler: SigHandler, flags: SaFlags) -> SigAction {
    // SAFETY: the handlers of these tests keep to that.
    unsafe { sigaction(signal, &SigAction::new(handler, flags, SigSet::empty())) }.expect("a handler")
}

/// Installs a SIGBUS handler as an application does.
fn handle_bus_errors(handler: extern "C" fn(i32)) {
    handle(Signal::SIGBUS, SigHandler::Handler(handler), SaFlags::empty());
}

/// Installs a SIGUSR1 handler as an application does.
fn handle_user_signal(handler: extern "C" fn(i32)) {
    handle(Signal::SIGUSR1, SigHandler::Handler(handler), SaFlags::SA_RESTART);
}

/// Discards pages, as an application may with `madvise(MADV_DONTNEED)`.
#[expect(unsafe_code, reason = "madvise(2) by the application is part of the test")]
fn discard(start: usize, bytes: usize) {
    let start = NonNull::new(std::ptr::with_exposed_provenance_mut(start)).expect("an address");
    // SAFETY: pages of a region, whose sources give the same bytes again.
    unsafe { nix::sys::mman::madvise(start, bytes, nix::sys::mman::MmapAdvise::MADV_DONTNEED) }
        .expect("madvise");
}

/// Regions whose discards the kernel reports, and regions without reports.
const REPORTS: [bool; 2] = [true, false];

/// Locks the pages of these bytes, as `mlockall(2)` does with all pages.
#[cfg(not(sanitized))]
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

/// The reason for which a page has failed.
fn reason(error: &pagestitch::Error) -> FailureReason {
    error.failure().unwrap_or_else(|| panic!("no page has failed: {error}")).reason()
}

/// True if this process or this kernel lacks what `inherit_on_fork()` needs.
fn cannot_inherit(error: &pagestitch::Error) -> bool {
    use pagestitch::ErrorKind::{PermissionDenied, Unsupported};
    error.option() == Some(pagestitch::BuildOption::InheritOnFork)
        && matches!(error.kind(), PermissionDenied | Unsupported)
}

/// The tests run on x86-64.
const PAGE: usize = 4096;
const SIGABRT: i32 = 6;
const SIGBUS: i32 = 7;
const SIGKILL: i32 = 9;
const SIGSEGV: i32 = 11;
