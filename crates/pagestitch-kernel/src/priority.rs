//! The nice value of a thread, by which the kernel shares the CPU. See `sched(7)`.

use crate::errno::Errno;
use nix::libc;

/// The nice value of the calling thread; 0 if the kernel does not tell.
#[must_use]
pub fn nice() -> i32 {
    // SAFETY: the call takes two integers and touches no memory.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let answer = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) };
    // The bare system call answers 20 - nice, which is no negative number.
    i32::try_from(answer).ok().filter(|&answer| answer > 0).map_or(0, |answer| 20 - answer)
}

/// Sets the nice value of the calling thread.
///
/// # Errors
///
/// `EACCES` or `EPERM` for a lower value than that of the thread, without `CAP_SYS_NICE` and above
/// `RLIMIT_NICE`.
pub fn set_nice(nice: i32) -> Result<(), Errno> {
    // SAFETY: the call takes three integers and touches no memory.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let answer = unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, nice) };
    Errno::result(answer).map(drop)
}

/// Keeps a negative nice value of the calling thread from the threads and processes that it starts: they
/// begin with 0. The flag is that of `SCHED_RESET_ON_FORK`; a thread that has it lowers its own nice
/// value as before. Linux 2.6.32.
///
/// # Errors
///
/// `EINVAL` in a thread of a policy that has no nice value: real time, a deadline, or idle. `ENOSYS` or
/// `EPERM` where a container forbids the call.
pub fn keep_from_children() -> Result<(), Errno> {
    let policy = scheduler()?;
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&(policy & !libc::SCHED_RESET_ON_FORK)) {
        return Err(Errno::EINVAL);
    }
    let none = libc::sched_param { sched_priority: 0 };
    let policy = policy | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the kernel reads a parameter that lives through the call.
    #[expect(unsafe_code, reason = "musl answers ENOSYS instead of the kernel")]
    let answer = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const none) };
    Errno::result(answer).map(drop)
}

/// The scheduling policy of the calling thread, with its flag.
fn scheduler() -> Result<i32, Errno> {
    // SAFETY: the call takes an integer and touches no memory.
    #[expect(unsafe_code, reason = "musl answers ENOSYS instead of the kernel")]
    let answer = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
    Errno::result(answer).map(|policy| policy as i32)
}

#[cfg(all(test, not(miri), not(shuttle)))]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_negative_nice_value_is_kept_from_the_threads_that_a_thread_starts() {
        let started = thread::spawn(|| {
            keep_from_children().unwrap();
            assert!(scheduler().unwrap() & libc::SCHED_RESET_ON_FORK != 0);
            keep_from_children().expect("once more");
            // An ordinary user may not lower it.
            if set_nice(-3).is_err() {
                return 0;
            }
            let child = thread::spawn(nice).join().unwrap();
            assert_eq!(nice(), -3);
            set_nice(0).unwrap();
            child
        });
        assert_eq!(started.join().unwrap(), 0);
    }

    #[test]
    fn a_thread_has_a_nice_value_of_its_own() {
        let before = nice();
        let other = thread::spawn(move || {
            // Every thread may raise its value, by which it yields to others.
            let higher = (before + 3).min(19);
            set_nice(higher).unwrap();
            (nice(), higher)
        });
        let (set, higher) = other.join().unwrap();
        assert_eq!((set, nice()), (higher, before));
    }
}
