//! A short sleep that a signal handler may take.
//!
//! The C library may cancel a thread in its `nanosleep(2)`, which a thread inside of a handler does not survive. It
//! does not in a bare system call. See `pthreads(7)`.

use nix::errno::Errno;
use nix::libc;
use std::ptr;
use std::time::Duration;

/// Sleeps for a part of a second, or until a signal is handled. `errno` keeps its value.
///
/// ```
/// use pagestitch_kernel::nap::nap;
/// use std::time::Duration;
///
/// nap(Duration::from_micros(20));
/// ```
pub fn nap(length: Duration) {
    let errno = Errno::last_raw();
    let length = libc::timespec {
        tv_sec: length.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: length.subsec_nanos().into(),
    };
    // SAFETY: the kernel reads `length`, and writes nothing without a place for the rest of the time.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let _ =
        unsafe { libc::syscall(libc::SYS_nanosleep, &raw const length, ptr::null_mut::<libc::timespec>()) };
    Errno::set_raw(errno);
}
