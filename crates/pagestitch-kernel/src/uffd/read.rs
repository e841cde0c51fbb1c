//! Reading messages without waiting.
//!
//! `O_NONBLOCK` belongs to the open file description. A process that has sent its userfaultfd still
//! holds that description and can clear the flag at any time. A plain `read(2)` would then wait
//! forever.
//!
//! | the description is | method |
//! |---|---|
//! | of this process alone: opened here, or made here by a fork event | `read(2)`: no other process can clear the flag |
//! | shared, Linux 6.10 | `preadv2(2)` with `RWF_NOWAIT`, which ignores the flag |
//! | shared, before Linux 6.10; or a forked child's, on every kernel: `EOPNOTSUPP` | `poll(2)`, then `read(2)` that a timer's signal ends |

use crate::errno::Errno;
use crate::fork::ForkGeneration;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{
    SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, SigmaskHow, Signal, sigaction,
};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::{gettid, read};
use std::cell::RefCell;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The method by which messages are read from a descriptor.
#[derive(Debug)]
pub(super) enum ReadMethod {
    /// The open file description is this process's alone.
    Own,
    /// Another process holds the description too.
    Shared {
        /// True if the kernel has refused `RWF_NOWAIT` for it.
        bounded: AtomicBool,
    },
}

impl ReadMethod {
    pub(super) const fn shared() -> Self {
        Self::Shared { bounded: AtomicBool::new(false) }
    }

    /// The method for a descriptor that a fork event has made in this process. It has the flags
    /// with which the parent's was *opened*.
    pub(super) fn of_child(fd: impl AsFd) -> Self {
        // Nothing is known to refuse the flag. If something does, the read has a bound.
        if set_nonblocking(fd).is_ok() { Self::Own } else { Self::shared() }
    }

    /// Reads without waiting; 0 if there is no message.
    pub(super) fn read(&self, fd: impl AsFd, into: &mut [u8]) -> Result<usize, Errno> {
        let answer = match self {
            Self::Own => read(fd, into).map_err(Errno::of),
            Self::Shared { bounded } if bounded.load(Ordering::Relaxed) => read_bounded(fd.as_fd(), into),
            Self::Shared { bounded } => match read_nowait(fd.as_fd(), into) {
                Err(Errno::EOPNOTSUPP) => {
                    bounded.store(true, Ordering::Relaxed);
                    read_bounded(fd.as_fd(), into)
                }
                answer => answer,
            },
        };
        match answer {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            answer => answer,
        }
    }
}

pub(super) fn set_nonblocking(fd: impl AsFd) -> Result<(), Errno> {
    let flags =
        OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL).map_err(Errno::of)?) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).map(drop).map_err(Errno::of)
}

fn read_nowait(fd: impl AsFd, into: &mut [u8]) -> Result<usize, Errno> {
    let part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: the kernel writes to `into` only, at most its length, and `into` is borrowed mutably.
    // With an offset of -1 it reads as `readv(2)` does.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let read = unsafe { libc::preadv2(fd.as_fd().as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
    Errno::result(read).map(|bytes| usize::try_from(bytes).expect("an answer is not negative"))
}

/// Waits [`BOUND`] at most, and only if another process clears the flag and takes the message
/// between the calls of this function.
fn read_bounded(fd: impl AsFd, into: &mut [u8]) -> Result<usize, Errno> {
    set_nonblocking(&fd)?;
    let mut readable = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    // POLLERR: the flag has been cleared again.
    if poll(&mut readable, PollTimeout::ZERO).map_err(Errno::of)? == 0
        || readable[0].revents() != Some(PollFlags::POLLIN)
    {
        return Err(Errno::EAGAIN);
    }
    interruptibly(|| read(fd.as_fd(), into).map_err(Errno::of))
}

/// Makes a system call that a signal ends after [`BOUND`], with `EINTR`. The signal repeats until
/// the call has returned, because a signal before the call begins to wait ends nothing.
fn interruptibly<T>(call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    install(&INSTALLED, SIGNAL)?;
    TIMER.with_borrow_mut(|slot| {
        if let Some((_, parents)) = slot.take_if(|(generation, _)| !generation.is_current()) {
            // A forked child inherits no timers. The parent's timer number may be another timer of
            // the child, so the drop must not delete it.
            std::mem::forget(parents);
        }
        let timer = match slot {
            Some((_, timer)) => timer,
            None => &mut slot.insert((ForkGeneration::current(), timer_of_this_thread()?)).1,
        };
        // Workers block all signals except those of their own defects.
        let before = SigSet::from(SIGNAL).thread_swap_mask(SigmaskHow::SIG_UNBLOCK).map_err(Errno::of)?;
        let armed =
            timer.set(Expiration::Interval(BOUND.into()), TimerSetTimeFlags::empty()).map_err(Errno::of);
        let answer = armed.and_then(|()| call());
        // A time of zero disarms the timer. An error is ignored, because the message that was read
        // must not be lost.
        let _ = timer.set(Expiration::OneShot(Duration::ZERO.into()), TimerSetTimeFlags::empty());
        let _ = before.thread_set_mask();
        answer
    })
}

fn timer_of_this_thread() -> Result<Timer, Errno> {
    let to = SigevNotify::SigevThreadId { signal: SIGNAL, thread_id: gettid().as_raw(), si_value: 0 };
    Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(to)).map_err(Errno::of)
}

/// Lets the signal interrupt system calls; installed once a process. `EBUSY` as long as the program
/// uses the signal itself.
fn install(installed: &AtomicBool, signal: Signal) -> Result<(), Errno> {
    if installed.load(Ordering::Relaxed) {
        return Ok(());
    }
    // Looks first, because a signal of the program must not meet our handler.
    match handler_of(signal)? {
        libc::SIG_DFL => {
            let ours = SigHandler::Handler(do_nothing);
            // Without SA_RESTART, because the signal must end the call.
            let ours = SigAction::new(ours, SaFlags::SA_ONSTACK, SigSet::empty());
            // SAFETY: the handler does nothing.
            #[expect(unsafe_code, reason = "installs a signal handler")]
            unsafe { sigaction(signal, &ours) }.map_err(Errno::of)?;
        }
        // Another thread has installed it at this moment.
        handler if handler == do_nothing as *const () as usize => {}
        _ => return Err(Errno::EBUSY),
    }
    installed.store(true, Ordering::Relaxed);
    Ok(())
}

/// The address of the signal's handler, or `SIG_DFL` or `SIG_IGN`.
fn handler_of(signal: Signal) -> Result<usize, Errno> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: the call changes no action, and writes the present one to `action`.
    #[expect(unsafe_code, reason = "sigaction without a new action")]
    Errno::result(unsafe { libc::sigaction(signal as c_int, ptr::null(), action.as_mut_ptr()) })?;
    // SAFETY: the call above has succeeded, so it has written the action.
    #[expect(unsafe_code, reason = "written by the C library")]
    let action = unsafe { action.assume_init() };
    Ok(action.sa_sigaction)
}

static INSTALLED: AtomicBool = AtomicBool::new(false);

extern "C" fn do_nothing(_: c_int) {}

thread_local! {
    /// The timer of this thread, and the fork generation that it belongs to.
    static TIMER: RefCell<Option<(ForkGeneration, Timer)>> = const { RefCell::new(None) };
}

/// A signal that neither the kernel, nor a C library, nor any known program uses: its coprocessor
/// is gone.
const SIGNAL: Signal = Signal::SIGSTKFLT;
/// The longest time that a read may wait.
const BOUND: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{pipe, write};
    use std::time::Instant;

    #[test]
    fn a_blocking_read_is_interrupted() {
        let (from, to) = pipe().unwrap();
        let began = Instant::now();
        let read_or_wait = |into: &mut [u8]| interruptibly(|| read(&from, into).map_err(Errno::of));
        for _ in 0..3 {
            assert_eq!(read_or_wait(&mut [0]), Err(Errno::EINTR));
        }
        assert!(began.elapsed() >= 3 * BOUND);
        write(&to, b"!").unwrap();
        let mut byte = [0];
        assert_eq!((read_or_wait(&mut byte), byte), (Ok(1), *b"!"));
        assert_eq!(read_bounded(&from, &mut byte), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_signal_that_the_program_gives_up_is_taken_at_the_next_read() {
        // No other test has a handler for it.
        let (signal, installed) = (Signal::SIGURG, AtomicBool::new(false));
        let set = |handler| {
            let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
            // SAFETY: the handler ignores the signal, or the default action does.
            #[expect(unsafe_code, reason = "installs a signal handler")]
            unsafe { sigaction(signal, &action) }.unwrap().handler()
        };
        set(SigHandler::SigIgn);
        for _ in 0..2 {
            assert_eq!(install(&installed, signal), Err(Errno::EBUSY));
        }
        assert!(matches!(set(SigHandler::SigDfl), SigHandler::SigIgn), "the program keeps its own");
        for _ in 0..2 {
            assert_eq!(install(&installed, signal), Ok(()));
        }
        // As a thread that looks when another one has installed it.
        assert_eq!(install(&AtomicBool::new(false), signal), Ok(()));
        assert!(matches!(set(SigHandler::SigDfl), SigHandler::Handler(_)));
    }
}
