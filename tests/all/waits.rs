//! Waits for conditions, without a sleep of a guessed length and without spinning.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pagestitch::Manual;
use pagestitch_testkit::wait;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longer than any step of a test takes on a loaded machine: a longer step hangs.
pub(crate) const HANG: Duration = Duration::from_secs(120);

/// Waits until `done` is true. Counters may lag behind the bytes that they count, because a thread
/// runs on as soon as the kernel has its page. The limit ends a hang and orders nothing.
#[track_caller]
pub(crate) fn until(done: impl FnMut() -> bool) {
    assert!(comes_true(done), "the condition is still false after {HANG:?}");
}

/// Waits as [`until`] does, and returns false in place of a panic.
pub(crate) fn comes_true(done: impl FnMut() -> bool) -> bool {
    wait::comes_true(HANG, done)
}

/// Serves as a loop of the application does, whenever the descriptor is readable, until `done` is
/// true.
#[track_caller]
pub(crate) fn serve_until(manual: &mut Manual, budget: usize, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < HANG, "the condition is still false after {HANG:?}");
        if is_readable(manual, PollTimeout::from(5_u8)) {
            manual.serve_ready(budget);
        }
    }
}

/// True if a manual has something to serve within `timeout`.
pub(crate) fn is_readable(manual: &Manual, timeout: PollTimeout) -> bool {
    let mut ready = [PollFd::new(manual.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, timeout).unwrap() == 1
}

/// Ends this process by SIGALRM if it hangs. For children, whose parent waits for their end.
pub(crate) fn end_if_hung() {
    nix::unistd::alarm::set(HANG.as_secs() as u32);
}

/// Sets a flag when it is dropped, also by a panic, so that other threads end.
pub(crate) struct SetOnDrop<'f>(pub(crate) &'f AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
