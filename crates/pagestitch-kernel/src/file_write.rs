//! Writes to files that a signal handler may make.
//!
//! Bare system calls, for the reasons in [`file_read`](crate::file_read).

use nix::errno::Errno;
use nix::libc;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// False for a regular file that is shorter, as after `truncate(2)`: a write would let it grow again. `errno` keeps its
/// value.
///
/// ```
/// use pagestitch_kernel::file_write::has_bytes;
/// use std::fs::File;
/// use std::os::fd::AsFd;
///
/// let program = File::open("/proc/self/exe")?;
/// let bytes = program.metadata()?.len();
/// assert!(has_bytes(program.as_fd(), bytes) && !has_bytes(program.as_fd(), bytes + 1));
/// # Ok::<(), std::io::Error>(())
/// ```
#[must_use]
pub fn has_bytes(file: BorrowedFd<'_>, bytes: u64) -> bool {
    let errno = Errno::last_raw();
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel writes a `stat` to `stat`, and reads an empty path.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let answer = unsafe {
        libc::syscall(
            libc::SYS_newfstatat,
            file.as_raw_fd(),
            c"".as_ptr(),
            stat.as_mut_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    if answer != 0 {
        Errno::set_raw(errno);
        return false;
    }
    // SAFETY: the kernel has filled it, because the call succeeded.
    #[expect(unsafe_code, reason = "memory that the kernel fills")]
    let stat = unsafe { stat.assume_init_ref() };
    stat.st_mode & libc::S_IFMT != libc::S_IFREG || stat.st_size as u64 >= bytes
}

/// Writes the bytes at a range of addresses to a file or a block device, from `offset` on. False if a write
/// fails, or if the kernel cannot read the memory. `errno` keeps its value.
pub(crate) fn write_from(file: BorrowedFd<'_>, offset: u64, from: Range<usize>) -> bool {
    let (errno, mut done) = (Errno::last_raw(), 0);
    while done < from.len() {
        // SAFETY: the kernel reads the memory, and answers EFAULT where there is none.
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        let written = unsafe {
            libc::syscall(
                libc::SYS_pwrite64,
                file.as_raw_fd(),
                from.start + done,
                from.len() - done,
                offset + done as u64,
            )
        };
        match usize::try_from(written) {
            Ok(bytes) if bytes > 0 => done += bytes,
            // Not an `Errno`, whose match over all of them takes half a KiB of a small stack in a debug build.
            Err(_) if Errno::last_raw() == libc::EINTR => {}
            _ => break,
        }
    }
    Errno::set_raw(errno);
    done == from.len()
}
