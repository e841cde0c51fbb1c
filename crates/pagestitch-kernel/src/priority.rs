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

#[cfg(all(test, not(miri), not(shuttle)))]
mod tests {
    use super::*;
    use std::thread;

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
