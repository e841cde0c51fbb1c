//! Another process, held by a pidfd: the descriptor stays with the process, even after the kernel
//! has given its id to another one.

use crate::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// A process, by its pidfd. The descriptor is readable (`poll(2)`) when the process has ended. See
/// `pidfd_open(2)`. Linux 5.3.
#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
    pid: u32,
}

impl Process {
    /// The process that has this id now.
    ///
    /// # Errors
    ///
    /// `ESRCH` if no process has it, `EINVAL` if no process can have it, `ENOSYS` before Linux 5.3.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        // SAFETY: pidfd_open(2) takes two integers and touches no memory.
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as i32, 0) };
        let fd = i32::try_from(Errno::result(fd)?).expect("a descriptor is an int");
        // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns
        // it.
        #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, pid })
    }

    /// The process that connected to this end of a UNIX stream socket (`SO_PEERPIDFD`, Linux 6.5),
    /// even if another process has its id by now. Before Linux 6.5, the process that has the peer's
    /// id (`SO_PEERCRED`) now. That may be another process if the peer has ended;
    /// [`holds`](Self::holds) tells them apart.
    ///
    /// # Errors
    ///
    /// `ESRCH` if the peer has ended (from Linux 6.16 on, the answer is the ended process instead);
    /// before Linux 6.5 as [`open`](Self::open), and `EINVAL` for a peer of another PID namespace.
    pub fn peer(socket: impl AsFd) -> Result<Self, Errno> {
        let [pid, _uid, _gid] = socket_option(socket.as_fd(), libc::SO_PEERCRED)?;
        let pid = pid as u32;
        match peer_pidfd(socket.as_fd()) {
            Ok(fd) => Ok(Self { fd, pid }),
            Err(Errno::ENOPROTOOPT) => Self::open(pid),
            // The answer of Linux 6.5 to 6.15 for a peer that its parent has waited for.
            Err(Errno::EINVAL | Errno::ESRCH) => Err(Errno::ESRCH),
            Err(errno) => Err(errno),
        }
    }

    /// True if [`peer`](Self::peer) is certain on this kernel (Linux 6.5).
    ///
    /// # Errors
    ///
    /// The errno of `socketpair(2)`.
    pub fn peers_are_certain() -> Result<bool, Errno> {
        let (one, _other) = UnixStream::pair().map_err(Errno::of)?;
        Ok(!matches!(peer_pidfd(one.as_fd()), Err(Errno::ENOPROTOOPT)))
    }

    /// True if this process has a descriptor of the same open file as `file`. That proves that it
    /// is the process that sent the descriptor, or that it took the descriptor from the sender.
    /// `kcmp(2)` compares the files.
    ///
    /// # Errors
    ///
    /// `ESRCH` if the process has ended; `EPERM` if the caller may not inspect it; `ENOSYS` if the
    /// kernel lacks `kcmp(2)`.
    pub fn holds(&self, file: impl AsFd) -> Result<bool, Errno> {
        let found = self.find(file.as_fd());
        // If it has ended, the comparison may have been with another process of the same id.
        if self.has_ended() { Err(Errno::ESRCH) } else { found }
    }

    fn find(&self, ours: BorrowedFd<'_>) -> Result<bool, Errno> {
        let kind = link_of("self", ours.as_raw_fd())?;
        let process = self.pid.to_string();
        let entries = std::fs::read_dir(format!("/proc/{process}/fd")).map_err(Errno::of)?;
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let alike = numbers.filter(|&number| link_of(&process, number).as_ref() == Ok(&kind));
        for number in alike.take(MOST_COMPARED) {
            if same_file(self.pid, ours, number)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// True if the process has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// The id of the process in the caller's PID namespace; 0 if the process is not visible there.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Its pidfd.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Ends the process with SIGKILL, if it has not ended by itself.
    ///
    /// # Errors
    ///
    /// `EPERM` if it belongs to another user, `EINVAL` if it is in a PID namespace that the caller
    /// cannot see.
    pub fn kill(&self) -> Result<(), Errno> {
        self.signal(libc::SIGKILL)
    }

    /// Checks that [`kill`](Self::kill) would work.
    ///
    /// # Errors
    ///
    /// As [`kill`](Self::kill).
    pub fn can_kill(&self) -> Result<(), Errno> {
        self.signal(0)
    }

    fn signal(&self, signal: i32) -> Result<(), Errno> {
        let (fd, info) = (self.fd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: pidfd_send_signal(2) takes integers and a null siginfo, and touches no memory.
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) };
        match Errno::result(answer) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

/// A pidfd of the peer of a UNIX stream socket.
fn peer_pidfd(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let [fd] = socket_option(socket, libc::SO_PEERPIDFD)?;
    // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns it.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The value of a socket's option, which is `N` integers.
fn socket_option<const N: usize>(socket: BorrowedFd<'_>, name: i32) -> Result<[i32; N], Errno> {
    let (fd, mut value) = (socket.as_raw_fd(), [0; N]);
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).expect("a few integers");
    let to = (&raw mut value).cast();
    // SAFETY: the kernel writes to `value`, at most its true length, and to `length`; both live
    // through the call.
    #[expect(unsafe_code, reason = "getsockopt")]
    let answer = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, to, &raw mut length) };
    Errno::result(answer)?;
    assert_eq!(length as usize, size_of_val(&value), "the kernel answers as many integers");
    Ok(value)
}

/// The target of a descriptor's link in `/proc`.
fn link_of(process: &str, fd: RawFd) -> Result<PathBuf, Errno> {
    std::fs::read_link(format!("/proc/{process}/fd/{fd}")).map_err(Errno::of)
}

/// True if a descriptor of this process and one of another process are of one open file.
fn same_file(pid: u32, ours: BorrowedFd<'_>, theirs: RawFd) -> Result<bool, Errno> {
    let (we, they, fd) = (this_process(), pid as i32, ours.as_raw_fd());
    // SAFETY: kcmp(2) takes five integers and touches no memory.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, we, they, KCMP_FILE, fd, theirs) };
    match Errno::result(answer) {
        Ok(order) => Ok(order == 0),
        // The other process has closed the descriptor meanwhile.
        Err(Errno::EBADF) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// True if two descriptors of this process are of one open file description. False if the kernel
/// does not compare them (`kcmp(2)` is not built in, or not allowed), or a number is not an open
/// descriptor.
#[must_use]
pub fn is_same_file(one: impl AsRawFd, other: impl AsRawFd) -> bool {
    let us = this_process();
    let (one, other) = (one.as_raw_fd(), other.as_raw_fd());
    // SAFETY: kcmp(2) takes five integers and touches no memory.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let order = unsafe { libc::syscall(libc::SYS_kcmp, us, us, KCMP_FILE, one, other) };
    order == 0
}

fn this_process() -> libc::pid_t {
    std::process::id() as libc::pid_t
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => f.write_str("a process of another PID namespace"),
            pid => write!(f, "process {pid}"),
        }
    }
}

/// `KCMP_FILE`: compares the open files of two descriptors.
const KCMP_FILE: i32 = 0;
/// The most descriptors that one search compares, because a process may have a million
/// userfaultfds.
const MOST_COMPARED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_peer_of_a_socket_is_a_process_that_tells_its_end() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Process::peer(&one).unwrap();
        assert_eq!(peer.pid(), std::process::id());
        assert!(!peer.has_ended());
        assert_eq!(peer.can_kill(), Ok(()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        child.wait().unwrap();
        assert!(process.has_ended());
    }

    #[test]
    fn a_process_holds_its_open_files_and_no_others() {
        let folder = std::env::temp_dir();
        let (one, two) = (File::open(&folder).unwrap(), File::open(&folder).unwrap());
        let this = Process::open(std::process::id()).unwrap();
        match this.holds(&one) {
            Err(errno) => println!("SKIPPED: kcmp(2) answers {errno}"),
            Ok(holds) => assert!(holds),
        }
        let mut child = std::process::Command::new("sleep").arg("60").stdin(two).spawn().unwrap();
        let other = Process::open(child.id()).unwrap();
        if let Ok(holds) = other.holds(&one) {
            assert!(!holds, "the same directory, opened by itself");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(other.holds(&one), Err(Errno::ESRCH));
    }
}
