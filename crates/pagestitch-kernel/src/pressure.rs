//! Memory pressure, as the kernel reports it: pressure stall information (`Documentation/accounting/psi.rst`).
//!
//! A trigger is a threshold that is written to a file, and the file is ready (`POLLPRI`) once in each
//! window in which tasks have waited longer for memory. An ordinary user may write one since Linux 6.4, with
//! windows of two seconds.

use crate::memory_left::own_cgroup;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A trigger for memory pressure.
#[derive(Debug)]
pub struct PressureTrigger(File);

/// The end of a wait for memory pressure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// Tasks have waited for memory.
    Stalled,
    /// The time is over without a report.
    Quiet,
    /// The other descriptor was readable; its bytes are read.
    Woken,
    /// The kernel reports nothing any more: the cgroup is gone.
    Ended,
}

impl PressureTrigger {
    /// A trigger for the cgroup of this process (`memory.pressure` of version 2), or for the machine
    /// (`/proc/pressure/memory`) if that cgroup takes none.
    ///
    /// # Errors
    ///
    /// The answer of the last file: `ENOENT` or `EOPNOTSUPP` from a kernel without pressure stall information
    /// (`CONFIG_PSI`, `psi=1`), `EACCES`, `EPERM` or `EROFS` where this process may write no trigger.
    pub fn open() -> io::Result<Self> {
        let cgroup = own_cgroup(Path::new("/")).map(|folder| folder.join("memory.pressure"));
        let files = cgroup.into_iter().chain([PathBuf::from("/proc/pressure/memory")]);
        let mut refused = io::ErrorKind::NotFound.into();
        for file in files {
            match Self::at(&file) {
                Ok(trigger) => return Ok(trigger),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    fn at(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        let mut file = options.read(true).write(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
        // In one call, with the byte that ends it.
        match file.write(THRESHOLD)? {
            written if written == THRESHOLD.len() => Ok(Self(file)),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Waits until the kernel reports pressure, `stop` (an eventfd) is readable, or the time is over.
    #[must_use]
    pub fn wait(&self, stop: BorrowedFd<'_>, limit: Option<Duration>) -> Pressure {
        wait(self.0.as_fd(), stop, limit)
    }
}

fn wait(trigger: BorrowedFd<'_>, stop: BorrowedFd<'_>, limit: Option<Duration>) -> Pressure {
    let limit = limit.map_or(PollTimeout::NONE, |limit| limit.try_into().unwrap_or(PollTimeout::MAX));
    let mut fds = [PollFd::new(trigger, PollFlags::POLLPRI), PollFd::new(stop, PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, limit) {
            Ok(0) => return Pressure::Quiet,
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(_) => return Pressure::Ended,
        }
    }
    let [trigger, woken] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
    if woken.contains(PollFlags::POLLIN) {
        let _ = read(stop, &mut [0; 8]);
        return Pressure::Woken;
    }
    // A descriptor that the process has closed meanwhile would be ready for ever.
    if trigger == PollFlags::POLLPRI { Pressure::Stalled } else { Pressure::Ended }
}

/// 100 ms in which a task waits for memory, in a window of 2 s.
const THRESHOLD: &[u8] = b"some 100000 2000000\0";

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc;
    use nix::sys::eventfd::EventFd;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    /// Two ends of a connection. Urgent bytes make an end ready as a trigger is.
    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn a_wait_ends_with_a_report_a_wake_or_its_time() {
        let (trigger, kernel) = connected();
        let stop = EventFd::new().unwrap();
        let short = Some(Duration::from_millis(1));
        let waited = |limit| wait(trigger.as_fd(), stop.as_fd(), limit);
        assert_eq!(waited(short), Pressure::Quiet);
        stop.write(1).unwrap();
        assert_eq!(
            (waited(None), waited(short)),
            (Pressure::Woken, Pressure::Quiet),
            "one wake ends one wait"
        );
        let byte = [0_u8];
        // SAFETY: a byte that lives during the call.
        #[expect(unsafe_code, reason = "nix sends no urgent byte without another feature")]
        let sent = unsafe { libc::send(kernel.as_raw_fd(), byte.as_ptr().cast(), 1, libc::MSG_OOB) };
        assert_eq!(sent, 1);
        assert_eq!(waited(None), Pressure::Stalled);
    }

    #[test]
    fn a_file_that_takes_no_trigger_is_an_error() {
        assert_eq!(
            PressureTrigger::at(Path::new("/proc/none")).unwrap_err().raw_os_error(),
            Some(libc::ENOENT)
        );
        assert!(PressureTrigger::at(Path::new("/proc/self/status")).is_err());
    }

    #[test]
    fn this_kernel_takes_a_trigger_or_tells_why_not() {
        match PressureTrigger::open() {
            Ok(trigger) => {
                let stop = EventFd::new().unwrap();
                stop.write(1).unwrap();
                assert_eq!(trigger.wait(stop.as_fd(), None), Pressure::Woken);
            }
            Err(error) => println!("SKIPPED this_kernel_takes_a_trigger: {error}"),
        }
    }
}
