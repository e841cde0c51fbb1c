//! Waiting for a condition without a busy CPU.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

/// Waits until a descriptor is readable: a pidfd after the end of its process, a listening socket after a
/// connection. Returns false after the time limit.
///
/// # Panics
///
/// If the kernel refuses to wait.
pub fn readable(fd: impl AsFd, limit: Duration) -> bool {
    let started = Instant::now();
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if started.elapsed() >= limit => return false,
            Ok(0) | Err(Errno::EINTR) => {}
            ready => return ready.expect("poll(2) of one descriptor") > 0,
        }
    }
}

/// Waits until `done` returns true. Sleeps between its calls, because on a machine with few CPUs a spinning
/// test delays the very threads that it waits for.
///
/// Use this only if no event tells of the condition.
///
/// # Panics
///
/// If the condition `what` does not hold within a minute.
#[track_caller]
pub fn until(what: &str, done: impl FnMut() -> bool) {
    assert!(comes_true(TIME_LIMIT, done), "not within {TIME_LIMIT:?}: {what}");
}

/// Waits as [`until`] does, and returns false after the time limit.
pub fn comes_true(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let (started, mut pause) = (Instant::now(), SHORTEST);
    while !done() {
        if started.elapsed() > limit {
            return false;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST);
    }
    true
}

/// The first pause: about as long as a fault takes.
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(2);
const TIME_LIMIT: Duration = Duration::from_secs(60);
