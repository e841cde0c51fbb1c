//! Another process: held by a descriptor that stays with it, whoever gets its number later.

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A process, by a pidfd: readable (`poll(2)`) when it has ended. See `pidfd_open(2)`. Linux 5.3.
#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
    pid: Pid,
}

impl Process {
    /// The process with this number, now.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none, `ENOSYS` before Linux 5.3.
    pub fn open(pid: Pid) -> Result<Self, Errno> {
        // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = i32::try_from(Errno::result(fd)?).expect("a descriptor is an int");
        // SAFETY: the kernel has just made this descriptor for us.
        #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, pid })
    }

    /// Whoever is at the other end of a UNIX stream socket, as it was when it connected (`SO_PEERCRED`).
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); `ESRCH` if it has ended since.
    pub fn peer(socket: impl AsFd) -> Result<Self, Errno> {
        Self::open(Pid::from_raw(getsockopt(&socket, PeerCredentials)?.pid()))
    }

    /// Its number, as seen from here.
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Ends it with SIGKILL, if it has not ended by itself.
    ///
    /// # Errors
    ///
    /// `EPERM` where it belongs to another user.
    pub fn kill(&self) -> Result<(), Errno> {
        let (fd, info) = (self.fd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: pidfd_send_signal(2) takes a descriptor, which is ours, and may be given no siginfo.
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) };
        match Errno::result(answer) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
    }
}
