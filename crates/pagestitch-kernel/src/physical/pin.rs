//! A pin of pages: it keeps each page in its frame.

use crate::errno::Errno;
use nix::libc::{self, c_long, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// A pin that keeps pages in their frames: buffers registered with an io_uring that has no other
/// use.
#[derive(Debug)]
pub(super) struct Pin {
    _ring: OwnedFd,
}

impl Pin {
    pub(super) fn new(start: NonNull<u8>, bytes: usize) -> Result<Self, Errno> {
        // struct io_uring_params; zeros mean defaults.
        let mut parameters = [0u32; 30];
        // SAFETY: the kernel reads and writes the 120 bytes of `parameters`.
        #[expect(unsafe_code, reason = "io_uring_setup has no wrapper")]
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1 as c_long, parameters.as_mut_ptr()) };
        let ring = Errno::result(ring)?;
        // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns
        // it.
        #[expect(unsafe_code, reason = "takes a raw descriptor")]
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        let buffers: Vec<libc::iovec> = (0..bytes)
            .step_by(BUFFER_MAX)
            .map(|offset| libc::iovec {
                iov_base: start.as_ptr().wrapping_add(offset).cast::<c_void>(),
                iov_len: BUFFER_MAX.min(bytes - offset),
            })
            .collect();
        let (fd, count) = (ring.as_raw_fd(), buffers.len() as c_long);
        let register = REGISTER_BUFFERS;
        // SAFETY: the kernel reads `count` entries of `buffers`. It pins the pages of `start..start
        // + bytes`, and changes none of their bytes.
        #[expect(unsafe_code, reason = "io_uring_register has no wrapper")]
        let answer =
            unsafe { libc::syscall(libc::SYS_io_uring_register, fd, register, buffers.as_ptr(), count) };
        Errno::result(answer)?;
        Ok(Self { _ring: ring })
    }
}

/// `IORING_REGISTER_BUFFERS`.
const REGISTER_BUFFERS: c_long = 0;
/// The largest buffer that can be registered.
const BUFFER_MAX: usize = 1 << 30;
