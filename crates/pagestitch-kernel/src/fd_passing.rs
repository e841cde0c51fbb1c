//! Descriptors through a UNIX socket (`SCM_RIGHTS`, see `unix(7)`).

use crate::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{self, IoSlice};
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
    // SAFETY: a msghdr is integers and pointers, for which all zeros are valid.
    #[expect(unsafe_code, reason = "a C struct with private padding")]
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
    (header.msg_control, header.msg_controllen) = ((&raw mut control).cast(), CONTROL);
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
/// The error of `sendmsg(2)`.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    let parts = [IoSlice::new(bytes)];
    Ok(sendmsg::<()>(socket.as_fd().as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?)
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
            let raw = data.as_chunks().0.iter().map(|&bytes| RawFd::from_ne_bytes(bytes));
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

/// Space for as many descriptors as one message may carry (`SCM_MAX_FD`), and for credentials that
/// the kernel may add.
const CONTROL: usize = HEADER + 253 * size_of::<RawFd>() + 4 + 64;
const HEADER: usize = size_of::<libc::cmsghdr>();
const _: () = assert!(HEADER == 16 && CONTROL.is_multiple_of(8), "the layout of cmsg(3) on 64-bit Linux");
