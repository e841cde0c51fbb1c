//! Another process: held by a descriptor that stays with it, whoever gets its number later.

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socketpair};
use nix::unistd::{Pid, getpid};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

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

    /// The process that connected to this end of a UNIX stream socket (`SO_PEERPIDFD`, Linux 6.5), whichever process has its
    /// number by now. Before Linux 6.5 the process that has that number (`SO_PEERCRED`) now, which may be another one if the peer
    /// has ended: [`holds`](Self::holds) tells.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has ended since, which Linux 6.16 and later tell by a process that has ended; before Linux 6.5 as
    /// [`open`](Self::open), and `EINVAL` for a peer of another PID namespace.
    pub fn peer(socket: impl AsFd) -> Result<Self, Errno> {
        let pid = Pid::from_raw(getsockopt(&socket, PeerCredentials)?.pid());
        match getsockopt(&socket, PeerPidfd) {
            Ok(fd) => Ok(Self { fd, pid }),
            Err(Errno::ENOPROTOOPT) => Self::open(pid),
            // Linux 6.5 to 6.15 about a peer that was waited for.
            Err(Errno::EINVAL | Errno::ESRCH) => Err(Errno::ESRCH),
            Err(errno) => Err(errno),
        }
    }

    /// Whether [`peer`](Self::peer) is certain on this kernel (Linux 6.5).
    ///
    /// # Errors
    ///
    /// The kernel's errno, as to make a pair of sockets.
    pub fn peers_are_certain() -> Result<bool, Errno> {
        let (flags, none) = (SockFlag::SOCK_CLOEXEC, None);
        let (one, _other) = socketpair(AddressFamily::Unix, SockType::Stream, none, flags)?;
        Ok(!matches!(getsockopt(&one, PeerPidfd), Err(Errno::ENOPROTOOPT)))
    }

    /// Whether this process has a descriptor of the same open file as `file`, as far as `kcmp(2)` tells: proof that it is the process
    /// that sent it, or one that took it from that.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has ended; `EPERM` where this process may not look at it; `ENOSYS` where the kernel lacks `kcmp(2)`.
    pub fn holds(&self, file: impl AsFd) -> Result<bool, Errno> {
        let found = self.find(file.as_fd());
        // Where it has ended, its number may have been another process's all the while.
        if self.has_ended() { Err(Errno::ESRCH) } else { found }
    }

    fn find(&self, ours: BorrowedFd<'_>) -> Result<bool, Errno> {
        let kind = link_of("self", ours.as_raw_fd())?;
        let process = self.pid.to_string();
        let entries = std::fs::read_dir(format!("/proc/{process}/fd")).map_err(|error| errno_of(&error))?;
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let alike = numbers.filter(|&number| link_of(&process, number).as_ref() == Ok(&kind));
        for number in alike.take(MOST_COMPARED) {
            if same_file(self.pid, ours, number)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Its number, as seen from here: 0 where it is in a PID namespace that cannot be seen from here.
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Ends it with SIGKILL, if it has not ended by itself.
    ///
    /// # Errors
    ///
    /// `EPERM` where it belongs to another user, `EINVAL` where it is in a PID namespace that cannot be seen from here.
    pub fn kill(&self) -> Result<(), Errno> {
        self.signal(libc::SIGKILL)
    }

    /// Whether [`kill`](Self::kill) would work.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn can_kill(&self) -> Result<(), Errno> {
        self.signal(0)
    }

    fn signal(&self, signal: i32) -> Result<(), Errno> {
        let (fd, info) = (self.fd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: pidfd_send_signal(2) takes a descriptor, which is ours, and may be given no siginfo.
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) };
        match Errno::result(answer) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

/// What a descriptor of a process is, as `/proc` tells.
fn link_of(process: &str, fd: RawFd) -> Result<PathBuf, Errno> {
    std::fs::read_link(format!("/proc/{process}/fd/{fd}")).map_err(|error| errno_of(&error))
}

/// Whether a descriptor of ours and one of another process are of one open file.
fn same_file(pid: Pid, ours: BorrowedFd<'_>, theirs: RawFd) -> Result<bool, Errno> {
    let (we, fd) = (Pid::this().as_raw(), ours.as_raw_fd());
    // SAFETY: kcmp(2) takes five integers and touches no memory of ours.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, we, pid.as_raw(), KCMP_FILE, fd, theirs) };
    match Errno::result(answer) {
        Ok(order) => Ok(order == 0),
        // Closed meanwhile.
        Err(Errno::EBADF) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Whether two descriptors of this process are of one open file description. False also where the kernel does not say (`kcmp(2)` is
/// not built in, or not allowed), and for a number that is no descriptor's.
#[must_use]
pub fn is_same_file(one: impl AsRawFd, other: impl AsRawFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let here = getpid().as_raw();
    let (one, other) = (one.as_raw_fd(), other.as_raw_fd());
    // SAFETY: kcmp(2) takes numbers, and touches no memory of ours.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let order = unsafe { libc::syscall(libc::SYS_kcmp, here, here, KCMP_FILE, one, other) };
    order == 0
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid.as_raw() {
            0 => f.write_str("a process of another PID namespace"),
            pid => write!(f, "process {pid}"),
        }
    }
}

/// `KCMP_FILE`: whether two descriptors are of one open file.
const KCMP_FILE: i32 = 0;
/// A process may have a million userfaultfds.
const MOST_COMPARED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_socket_is_known_and_can_be_asked_whether_it_has_ended() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Process::peer(&one).unwrap();
        assert_eq!(peer.pid(), Pid::this());
        assert!(!peer.has_ended());
        assert_eq!(peer.can_kill(), Ok(()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::open(Pid::from_raw(child.id().cast_signed())).unwrap();
        child.wait().unwrap();
        assert!(process.has_ended());
    }

    #[test]
    fn a_process_holds_the_files_that_it_has_open_and_no_others() {
        let folder = std::env::temp_dir();
        let (one, two) = (File::open(&folder).unwrap(), File::open(&folder).unwrap());
        let this = Process::open(Pid::this()).unwrap();
        match this.holds(&one) {
            Err(errno) => println!("SKIPPED: kcmp(2) answers {errno}"),
            Ok(holds) => assert!(holds),
        }
        let mut child = std::process::Command::new("sleep").arg("60").stdin(two).spawn().unwrap();
        let other = Process::open(Pid::from_raw(child.id().cast_signed())).unwrap();
        if let Ok(holds) = other.holds(&one) {
            assert!(!holds, "the same directory, opened by itself");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(other.holds(&one), Err(Errno::ESRCH));
    }
}
