//! Descriptors through a UNIX socket (`SCM_RIGHTS`, see `unix(7)`).

use crate::errno::Errno;
use nix::libc;
use std::ffi::c_void;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Received {
    /// The number of bytes that were read.
    pub bytes: usize,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
    /// True if the kernel dropped descriptors, because this process is at its limit on open files.
    pub cut: bool,
}

/// Reads the next message and takes the descriptors that came with it. Waits for one if the socket
/// is blocking. Returns `(0, [])` at the end of a stream.
///
/// # Errors
///
/// The error of `recvmsg(2)`; `InvalidData` if the kernel dropped descriptors, because this process
/// is at its limit on open files. The descriptors that did come are closed then: nix's `recvmsg`
/// leaves them open, so a hostile peer could use up the limit.
///
/// The last close of a descriptor may wait as long as its sender likes (a socket with `SO_LINGER`,
/// a file of FUSE). So may this call, when the kernel closes a dropped descriptor. A thread that
/// must not wait leaves both to another thread.
pub fn receive(socket: impl AsFd, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let Received { bytes, fds, cut } = receive_all(socket, into)?;
    if cut {
        let what = "the kernel dropped descriptors of the message: raise the limit on open files (ulimit -n)";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok((bytes, fds))
}

/// As [`receive`], but also returns the descriptors of a message from which the kernel dropped
/// some.
///
/// # Errors
///
/// The error of `recvmsg(2)`.
pub fn receive_all(socket: impl AsFd, into: &mut [u8]) -> io::Result<Received> {
    let mut control = Control([0; CONTROL]);
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let mut header = header(&raw mut part, (&raw mut control).cast(), CONTROL);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes to `into` and `control` at most their true lengths, and this
    // function borrows both mutably through the call.
    #[expect(unsafe_code, reason = "recvmsg")]
    let answer = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let bytes = usize::try_from(Errno::result(answer)?).expect("recvmsg answers a length");
    let fds = descriptors(&control.0[..header.msg_controllen]);
    Ok(Received { bytes, fds, cut: header.msg_flags & libc::MSG_CTRUNC != 0 })
}

/// Sends at least one byte, and descriptors with it. Returns the number of bytes that were sent.
///
/// # Errors
///
/// The error of `sendmsg(2)`; `EINVAL` for more than 253 descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut control = Control([0; CONTROL]);
    let length = control.write(fds).ok_or(Errno::EINVAL)?;
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let header = header(&raw mut part, (&raw mut control).cast(), length);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `bytes` and `control`, at most to their true lengths, and writes to
    // neither. This function borrows both through the call.
    #[expect(unsafe_code, reason = "sendmsg")]
    let answer = unsafe { libc::sendmsg(fd, &raw const header, libc::MSG_NOSIGNAL) };
    Ok(usize::try_from(Errno::result(answer)?).expect("sendmsg answers a length"))
}

/// A header for one part of data and for control messages.
fn header(part: *mut libc::iovec, control: *mut c_void, length: usize) -> libc::msghdr {
    // SAFETY: a msghdr is integers and pointers, for which all zeros are valid.
    #[expect(unsafe_code, reason = "a C struct with private padding")]
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (part, 1);
    (header.msg_control, header.msg_controllen) = (control, length);
    header
}

/// The descriptors in control messages. Each message is a header of length, level and type, and
/// then padded data.
fn descriptors(mut control: &[u8]) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    while let Some((header, rest)) = control.split_at_checked(HEADER) {
        let word = |at: usize| i32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let length = usize::from_ne_bytes(header[..size_of::<usize>()].try_into().expect("a word"));
        let Some(data) = length.checked_sub(HEADER).and_then(|length| rest.get(..length)) else { break };
        let (level, kind) = (word(size_of::<usize>()), word(size_of::<usize>() + 4));
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let raw =
                data.chunks_exact(4).map(|bytes| RawFd::from_ne_bytes(bytes.try_into().expect("four bytes")));
            fds.extend(raw.map(own));
        }
        control = rest.get(data.len().next_multiple_of(size_of::<usize>())..).unwrap_or_default();
    }
    fds
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for this process, and recvmsg(2) names it
    // once.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

/// Space for control messages, with the alignment that the kernel asks for.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

impl Control {
    /// Writes one message that carries the descriptors. Returns its length with its padding, which
    /// is 0 without descriptors, or `None` if there are too many.
    fn write(&mut self, fds: &[BorrowedFd<'_>]) -> Option<usize> {
        if fds.is_empty() || fds.len() > MOST_FDS {
            return fds.is_empty().then_some(0);
        }
        let (header, data) = self.0.split_at_mut(HEADER);
        let length = HEADER + size_of_val(fds);
        let (word, level, kind) = (size_of::<usize>(), libc::SOL_SOCKET, libc::SCM_RIGHTS);
        header[..word].copy_from_slice(&length.to_ne_bytes());
        header[word..word + 4].copy_from_slice(&level.to_ne_bytes());
        header[word + 4..].copy_from_slice(&kind.to_ne_bytes());
        for (place, fd) in data.chunks_exact_mut(4).zip(fds) {
            place.copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
        }
        Some(length.next_multiple_of(word))
    }
}

/// The most descriptors that one message may carry (`SCM_MAX_FD`).
const MOST_FDS: usize = 253;
/// Space for as many descriptors, and for credentials that the kernel may add.
const CONTROL: usize = HEADER + MOST_FDS * size_of::<RawFd>() + 4 + 64;
const HEADER: usize = size_of::<libc::cmsghdr>();
const _: () = assert!(HEADER == 16 && CONTROL % 8 == 0, "the layout of cmsg(3) on 64-bit Linux");

#[cfg(all(test, not(any(miri, shuttle))))]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn each_number_of_descriptors_arrives_up_to_the_kernels_limit() {
        let (sends, receives) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        for count in [0, 1, 2, 3, MOST_FDS - 1, MOST_FDS] {
            assert_eq!(send(&sends, b"ab", &vec![file.as_fd(); count]).unwrap(), 2);
            let (bytes, fds) = receive(&receives, &mut [0; 2]).unwrap();
            assert_eq!((bytes, fds.len()), (2, count));
        }
        let error = send(&sends, b"ab", &[file.as_fd(); MOST_FDS + 1]).unwrap_err();
        assert_eq!(Errno::of(error), Errno::EINVAL);
    }

    #[test]
    fn a_closed_socket_is_an_error_of_the_sender_and_no_signal() {
        let (sends, receives) = UnixStream::pair().unwrap();
        drop(receives);
        assert_eq!(send(&sends, b"a", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
