//! Reads of files that a signal handler may make.
//!
//! The C library's `pread(2)` is a point at which a thread is cancelled, and sanitizers replace it by
//! a function that takes locks. The bare system call is neither. See `signal-safety(7)`.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Fills all of `into` with the file's bytes from `offset` on. False if the read fails, or if the file
/// ends before. `errno` keeps its value.
///
/// ```
/// use pagestitch_kernel::file_read::fill_from;
/// use std::fs::File;
/// use std::os::fd::AsFd;
///
/// let (program, mut magic) = (File::open("/proc/self/exe")?, [0; 3]);
/// assert!(fill_from(program.as_fd(), 1, &mut magic));
/// assert_eq!(&magic, b"ELF");
/// assert!(!fill_from(program.as_fd(), program.metadata()?.len() - 1, &mut magic));
/// # Ok::<(), std::io::Error>(())
/// ```
#[must_use]
pub fn fill_from(file: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> bool {
    let errno = Errno::last_raw();
    let mut done = 0;
    while done < into.len() {
        match read(file, offset + done as u64, &mut into[done..]) {
            Ok(0) => break,
            Ok(bytes) => done += bytes,
            Err(Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    Errno::set_raw(errno);
    done == into.len()
}

fn read(file: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> Result<usize, Errno> {
    let (file, bytes) = (file.as_raw_fd(), into.len());
    // SAFETY: the kernel writes at most `bytes` bytes to `into`, which is borrowed mutably.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let read = unsafe { libc::syscall(libc::SYS_pread64, file, into.as_mut_ptr(), bytes, offset) };
    Errno::result(read).map(|read| read as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsFd;

    #[test]
    fn a_failed_read_keeps_errno() {
        let unreadable = OpenOptions::new().write(true).open("/dev/null").unwrap();
        let folder = File::open("/").unwrap();
        for file in [unreadable, folder] {
            Errno::set_raw(77);
            assert!(!fill_from(file.as_fd(), 0, &mut [0; 10]));
            assert_eq!(Errno::last_raw(), 77);
        }
    }
}
