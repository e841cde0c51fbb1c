//! Descriptors that outlive the process that has them: sent through a socket, and never received.
//!
//! ```text
//!   this process ── its child's userfaultfd ──▶ queue ◀── the child has the socket, too: it was there before fork(2)
//!        └─ ends                                  └─ lives on, and with it the userfaultfd
//! ```
//!
//! A userfaultfd that closes shows zeros. That of a forked child comes to its parent, and would close with it; in flight in a socket
//! that the child has inherited it does not. See `unix(7)`, `SCM_RIGHTS`.
//!
//! Nothing here allocates, or takes a lock under which anything does: the parent waits in `fork(2)` meanwhile, and may hold the
//! allocator.

use nix::errno::Errno;
use nix::libc::{self, iovec, msghdr};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{fmt, mem, ptr};

/// A queue of descriptors, as old as the processes that are to keep them alive.
pub struct FdQueue {
    sends: OwnedFd,
    queue: OwnedFd,
    len: AtomicUsize,
    /// Held while the oldest goes round: another thread would take the next one out. The standard library's, which allocates nothing.
    rotating: Mutex<()>,
}

impl FdQueue {
    /// An empty one. Children that are forked from now on have it, unless they close what they do not know.
    ///
    /// # Errors
    ///
    /// The errno of `socketpair(2)`: two descriptors are needed.
    pub fn new() -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (sends, queue) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok(Self { sends, queue, len: AtomicUsize::new(0), rotating: Mutex::new(()) })
    }

    /// How many there are, as this process counts them.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Keeps one more open, as the newest.
    ///
    /// # Errors
    ///
    /// `EAGAIN` where there are some hundreds (`net.core.wmem_default`), `ETOOMANYREFS` where a user has more in flight than may be open
    /// (`RLIMIT_NOFILE`).
    pub fn put(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut message = Message::of(fd);
        let mut byte = 0u8;
        let mut part = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let header = message.header(&mut part);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `header` points to a byte and to `message`, both of which live through the call, with their true lengths.
        #[expect(unsafe_code, reason = "sendmsg")]
        let answer = unsafe { libc::sendmsg(self.sends.as_raw_fd(), &raw const header, flags) };
        Errno::result(answer)?;
        self.len.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Looks at the oldest: makes it the newest where `keeps` says so, and lets go of it else. It stays in flight all the while. False
    /// where there is none, or no descriptor to look with.
    pub fn rotate(&self, keeps: impl FnOnce(BorrowedFd<'_>) -> bool) -> bool {
        let _rotating = self.rotating.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(oldest) = self.peek() else { return false };
        if keeps(oldest.as_fd()) && self.put(oldest.as_fd()).is_err() {
            return false;
        }
        // Without room for it, the descriptor is closed.
        let taken = recv(self.queue.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT);
        if taken.is_ok() {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
        taken.is_ok()
    }

    fn peek(&self) -> Option<OwnedFd> {
        let mut message = Message::empty();
        let mut byte = 0u8;
        let mut part = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut header = message.header(&mut part);
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: as in `put`.
        #[expect(unsafe_code, reason = "recvmsg")]
        let answer = unsafe { libc::recvmsg(self.queue.as_raw_fd(), &raw mut header, flags) };
        let came = Errno::result(answer).is_ok() && header.msg_controllen >= Message::LENGTH;
        // SAFETY: the kernel has just made this descriptor for us: the message is one of a descriptor, and all of it came.
        #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
        came.then(|| unsafe { OwnedFd::from_raw_fd(message.fd) })
    }
}

impl fmt::Debug for FdQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdQueue").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// A control message with one descriptor.
#[repr(C, align(8))]
struct Message {
    length: usize,
    level: i32,
    kind: i32,
    fd: i32,
    padding: i32,
}

impl Message {
    const LENGTH: usize = size_of::<libc::cmsghdr>() + size_of::<i32>();

    const fn empty() -> Self {
        Self { length: 0, level: 0, kind: 0, fd: -1, padding: 0 }
    }

    fn of(fd: BorrowedFd<'_>) -> Self {
        let (level, kind) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        Self { length: Self::LENGTH, level, kind, fd: fd.as_raw_fd(), padding: 0 }
    }

    /// A header of this and of a part of a byte, all of which have to live as long as it is used.
    fn header(&mut self, part: &mut iovec) -> msghdr {
        // SAFETY: a msghdr is integers and pointers, all of which may be 0.
        #[expect(unsafe_code, reason = "a C struct with private padding")]
        let mut header: msghdr = unsafe { mem::zeroed() };
        (header.msg_iov, header.msg_iovlen) = (part, 1);
        (header.msg_control, header.msg_controllen) = (ptr::from_mut(self).cast(), size_of::<Self>());
        header
    }
}

const _: () =
    assert!(size_of::<libc::cmsghdr>() == 16 && size_of::<Message>() == 24, "cmsg(3) on 64-bit Linux");

#[cfg(all(test, not(any(miri, shuttle))))]
mod tests {
    use super::*;
    use nix::unistd::{pipe, read};

    /// Whether the other end of a pipe is closed.
    fn is_closed(end: &OwnedFd) -> bool {
        read(end, &mut [0]) == Ok(0)
    }

    #[test]
    fn what_is_in_flight_stays_open_until_it_is_let_go() {
        let queue = FdQueue::new().unwrap();
        let pipes: Vec<_> = (0..20).map(|_| pipe().unwrap()).collect();
        let reads: Vec<_> = pipes
            .into_iter()
            .map(|(read, write)| {
                queue.put(write.as_fd()).unwrap();
                read
            })
            .collect();
        let open = |read: &OwnedFd| {
            let flags = nix::fcntl::OFlag::O_NONBLOCK;
            nix::fcntl::fcntl(read, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
            !is_closed(read)
        };
        assert!(reads.iter().all(open));
        // Every other one is let go of, the rest goes round.
        let mut number = 0;
        for _ in 0..20 {
            assert!(queue.rotate(|_| {
                number += 1;
                number % 2 == 0
            }));
        }
        assert_eq!(reads.iter().map(open).collect::<Vec<_>>(), [false, true].repeat(10));
        for _ in 0..30 {
            assert!(queue.rotate(|_| true));
        }
        assert_eq!(reads.iter().filter(|read| open(read)).count(), 10);
        drop(queue);
        assert!(!reads.iter().any(open));
    }

    #[test]
    fn a_full_queue_says_so_and_turns_on() {
        let queue = FdQueue::new().unwrap();
        let (_read, write) = pipe().unwrap();
        let room = (0..100_000).take_while(|_| queue.put(write.as_fd()).is_ok()).count();
        assert!((64..100_000).contains(&room), "{room}");
        assert!(!queue.rotate(|_| true), "there is no room to go round");
        assert!(queue.rotate(|_| false) && queue.rotate(|_| true));
    }
}
