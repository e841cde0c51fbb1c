//! Descriptors in flight in a socket: sent, never received, and so open even after their sender has
//! ended.
//!
//! ```text
//!   this process ── its child's userfaultfd ──▶ queue ◀── the child inherited the socket at fork(2)
//!        └─ ends                                  └─ lives on, and with it the userfaultfd
//! ```
//!
//! A page that no userfaultfd fills reads as zeros. A forked child's userfaultfd arrives in its
//! parent, and would close with the parent. In flight in a socket that the child has inherited, it
//! stays open. See `unix(7)`, `SCM_RIGHTS`.
//!
//! No function here allocates, or takes a lock under which another thread allocates, because a
//! thread of this process may wait in `fork(2)` meanwhile and hold the allocator's lock.

use crate::errno::Errno;
use nix::libc::{self, iovec, msghdr};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{fmt, mem, ptr};

/// A queue of descriptors, made before the fork of the processes that it is inherited by.
pub struct FdQueue {
    sends: OwnedFd,
    queue: OwnedFd,
    len: AtomicUsize,
    /// Held while the oldest descriptor moves to the end, because another thread would take out the
    /// next one. The standard library's mutex allocates nothing.
    rotating: Mutex<()>,
}

impl FdQueue {
    /// An empty queue. Children that are forked from now on inherit it, unless they close unknown
    /// descriptors.
    ///
    /// # Errors
    ///
    /// The errno of `socketpair(2)`: a queue takes two descriptors.
    pub fn new() -> Result<Self, Errno> {
        let [sends, queue] = socket_pair()?;
        Ok(Self { sends, queue, len: AtomicUsize::new(0), rotating: Mutex::new(()) })
    }

    /// The number of descriptors in the queue, as this process counts them.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// True if the queue has no descriptor.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a descriptor to the queue, as the newest.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the queue is full, at some hundreds (`net.core.wmem_default`); `ETOOMANYREFS` if
    /// the user has more descriptors in flight than a process may have open (`RLIMIT_NOFILE`).
    pub fn put(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut message = Message::of(fd);
        let mut byte = 0u8;
        let mut part = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let header = message.header(&mut part);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the kernel reads one byte and `message`, at their true lengths; both live through
        // the call.
        #[expect(unsafe_code, reason = "sendmsg")]
        let answer = unsafe { libc::sendmsg(self.sends.as_raw_fd(), &raw const header, flags) };
        Errno::result(answer)?;
        self.len.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes the oldest descriptor, and adds it again as the newest if `keeps` says so; otherwise
    /// closes it. The descriptor is in flight all the while. False if the queue is empty, if this
    /// process has no free descriptor to look at the oldest with, or if the queue has no space to
    /// add it again.
    pub fn rotate(&self, keeps: impl FnOnce(BorrowedFd<'_>) -> bool) -> bool {
        let _rotating = self.rotating.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(oldest) = self.peek() else { return false };
        if keeps(oldest.as_fd()) && self.put(oldest.as_fd()).is_err() {
            return false;
        }
        // Without a buffer for control messages, recv(2) closes the descriptor of the message.
        let (fd, mut byte, flags) = (self.queue.as_raw_fd(), 0u8, libc::MSG_DONTWAIT);
        // SAFETY: the kernel writes to `byte`, which lives through the call, and to no other memory.
        #[expect(unsafe_code, reason = "recv")]
        let answer = unsafe { libc::recv(fd, (&raw mut byte).cast(), 1, flags) };
        let taken = Errno::result(answer).is_ok();
        if taken {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn peek(&self) -> Option<OwnedFd> {
        let mut message = Message::empty();
        let mut byte = 0u8;
        let mut part = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut header = message.header(&mut part);
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the kernel writes to one byte and `message`, at most their true lengths; both
        // live through the call and are borrowed mutably.
        #[expect(unsafe_code, reason = "recvmsg")]
        let answer = unsafe { libc::recvmsg(self.queue.as_raw_fd(), &raw mut header, flags) };
        let came = Errno::result(answer).is_ok() && header.msg_controllen >= Message::LENGTH;
        // SAFETY: the kernel has just made this descriptor for this process: the whole control
        // message came, and it holds one descriptor.
        #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
        came.then(|| unsafe { OwnedFd::from_raw_fd(message.fd) })
    }
}

impl fmt::Debug for FdQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdQueue").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// Two sockets that keep the borders of messages. Neither waits.
fn socket_pair() -> Result<[OwnedFd; 2], Errno> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes to `fds`, which lives through the call, and to no other memory.
    #[expect(unsafe_code, reason = "socketpair")]
    Errno::result(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    // SAFETY: the kernel has just made both descriptors for this process, and nothing else owns
    // them.
    #[expect(unsafe_code, reason = "raw descriptors become owned ones")]
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
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

    /// A header for this message and one byte of data. Both must outlive the use of the header.
    fn header(&mut self, part: &mut iovec) -> msghdr {
        // SAFETY: a msghdr is integers and pointers, for which all zeros are valid.
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
    use std::thread;
    use std::time::{Duration, Instant};

    /// True if the other end of a pipe is closed.
    fn is_closed(end: &OwnedFd) -> bool {
        read(end, &mut [0]) == Ok(0)
    }

    #[test]
    fn a_descriptor_in_the_queue_stays_open_until_it_is_discarded() {
        let queue = FdQueue::new().unwrap();
        let pipes: Vec<_> = (0..20).map(|_| pipe().unwrap()).collect();
        let reads: Vec<_> = pipes
            .into_iter()
            .map(|(read, write)| {
                queue.put(write.as_fd()).unwrap();
                read
            })
            .collect();
        let is_open = |read: &OwnedFd| {
            let flags = nix::fcntl::OFlag::O_NONBLOCK;
            nix::fcntl::fcntl(read, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
            !is_closed(read)
        };
        assert!(reads.iter().all(is_open));
        // Each second descriptor is closed, the others go to the end.
        let mut number = 0;
        for _ in 0..20 {
            assert!(queue.rotate(|_| {
                number += 1;
                number % 2 == 0
            }));
        }
        assert_eq!(reads.iter().map(is_open).collect::<Vec<_>>(), [false, true].repeat(10));
        for _ in 0..30 {
            assert!(queue.rotate(|_| true));
        }
        assert_eq!(reads.iter().filter(|read| is_open(read)).count(), 10);
        drop(queue);
        // The kernel closes what a socket still holds, or a forked child of another test, a moment later.
        let started = Instant::now();
        while reads.iter().any(is_open) {
            assert!(started.elapsed() < Duration::from_secs(60), "a descriptor is still open");
            thread::yield_now();
        }
    }

    #[test]
    fn a_full_queue_refuses_a_descriptor_and_still_rotates() {
        let queue = FdQueue::new().unwrap();
        let (_read, write) = pipe().unwrap();
        let room = (0..100_000).take_while(|_| queue.put(write.as_fd()).is_ok()).count();
        assert!((64..100_000).contains(&room), "{room}");
        assert!(!queue.rotate(|_| true), "the queue has no space for one more");
        assert!(queue.rotate(|_| false) && queue.rotate(|_| true));
    }
}
