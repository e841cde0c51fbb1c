//! Reads of single pages from files, many at once, by one thread (`io_uring(7)`, Linux 6.1).
//!
//! ```text
//!   begin(file, offset) ─► queued ─► wait() ─► the disk ─► next(): slot and bytes
//!                                      └── also ends when another descriptor is readable
//! ```
//!
//! A thread that waits for each read keeps one read of the disk busy. With a ring it has as many in flight
//! as there are slots, and one system call sends several and waits for the first.

use crate::direct_read::DirectFile;
use crate::errno::Errno;
use crate::mapping::OwnedMapping;
use crate::page::PageSize;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use nix::libc;
use nix::sys::mman::ProtFlags;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io, slice, thread};

/// The memory of a [`ReadRing`]: a page for each read. A page that is never read into takes no memory.
#[derive(Debug)]
pub struct ReadBuffers(OwnedMapping);

impl ReadBuffers {
    /// Reserves the addresses.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`: `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let bytes = NonZeroUsize::new(READS * page()).expect("pages have bytes");
        OwnedMapping::new(bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map(Self)
    }
}

/// Reads of single pages that are in flight at once. Only the thread that has started the ring can use it.
///
/// ```no_run
/// use pagestitch_kernel::direct_read::DirectFile;
/// use pagestitch_kernel::read_ring::{Next, ReadBuffers, ReadRing};
/// use std::fs::File;
/// use std::os::fd::AsFd;
///
/// let file = File::open("/proc/self/exe")?;
/// let direct = DirectFile::reopen(&file)?;
/// let (other, _writer) = std::io::pipe()?;
/// let mut ring = ReadRing::start(ReadBuffers::new()?)?;
/// let slot = ring.begin(&direct, 0).expect("a free slot");
/// ring.wait(other.as_fd(), None)?;
/// while let Some(next) = ring.next() {
///     match next {
///         Next::Read(of, bytes) => assert_eq!((of, &bytes?[..4]), (slot, &b"\x7fELF"[..])),
///         Next::Readable => println!("the pipe"),
///     }
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct ReadRing {
    ring: IoUring,
    /// Given back when no read is in flight.
    buffers: ManuallyDrop<ReadBuffers>,
    /// By slot: the file of a read in flight.
    files: [Option<Arc<File>>; READS],
    in_flight: usize,
    /// Whether the kernel tells when the other descriptor is readable.
    is_watching: bool,
}

/// The answer of the kernel to a ring.
#[derive(Debug)]
pub enum Next<'r> {
    /// The read of a slot has ended. Its bytes are fewer than a page, if the file ends there.
    Read(usize, Result<&'r [u8], Errno>),
    /// The other descriptor is readable, or was a moment ago.
    Readable,
}

impl ReadRing {
    /// Starts a ring, which only the calling thread can use.
    ///
    /// # Errors
    ///
    /// `EINVAL` or `ENOSYS` before Linux 6.1; `EPERM` or `EACCES` if a filter of system calls or
    /// `kernel.io_uring_disabled` forbids it; `ENOMEM`, `EMFILE`, `ENFILE`.
    pub fn start(buffers: ReadBuffers) -> Result<Self, Errno> {
        let (ring, files) = (ring().map_err(|error| errno_of(&error))?, [const { None }; READS]);
        Ok(Self { ring, buffers: ManuallyDrop::new(buffers), files, in_flight: 0, is_watching: false })
    }

    /// The number of reads that were begun, and whose end was not told.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues the read of a page, from an aligned offset on; the next [`wait`](Self::wait) sends it. Returns its slot;
    /// `None` if all slots are taken, or if the disk cannot read the page at once.
    pub fn begin(&mut self, file: &DirectFile, offset: u64) -> Option<usize> {
        let slot = self.files.iter().position(Option::is_none)?;
        if !file.is_aligned(offset, self.bytes(slot, page())) {
            return None;
        }
        let start = self.buffers.0.at(slot * page()).as_ptr().cast();
        let read =
            opcode::Read::new(Fd(file.file().as_raw_fd()), start, page() as u32).offset(offset).build();
        // SAFETY: the kernel writes to the page of a free slot. No function gives its bytes out until the read has
        // ended, and neither the page nor the file is given back before.
        #[expect(unsafe_code, reason = "an entry of an io_uring")]
        let pushed = unsafe { self.push(&read.user_data(slot as u64)) };
        pushed.then(|| {
            self.files[slot] = Some(Arc::clone(file.file()));
            self.in_flight += 1;
            slot
        })
    }

    /// Sends the queued reads, and waits until a read has ended, `other` is readable or the time is over; `None`
    /// waits without end. May return before, as after a signal.
    ///
    /// `other` is the same descriptor in each call.
    ///
    /// # Errors
    ///
    /// `EAGAIN` without memory for the reads, which stay queued. Other errors are a filter of system calls that
    /// forbids now what it allowed at the start.
    pub fn wait(&mut self, other: BorrowedFd<'_>, most: Option<Duration>) -> Result<(), Errno> {
        if !self.is_watching {
            let poll = opcode::PollAdd::new(Fd(other.as_raw_fd()), libc::POLLIN as u32).build();
            // SAFETY: the kernel writes to no memory for a poll.
            #[expect(unsafe_code, reason = "an entry of an io_uring")]
            let pushed = unsafe { self.push(&poll.user_data(OTHER)) };
            self.is_watching = pushed;
        }
        self.enter(most)
    }

    /// Sends the queued reads.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn send(&mut self) -> Result<(), Errno> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        told(self.ring.submit())
    }

    /// Sends the queued reads, and waits until a read has ended.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_for_reads(&mut self) -> Result<(), Errno> {
        self.enter(None)
    }

    /// The next answer of the kernel. The bytes of a read are valid until the next call.
    #[expect(clippy::should_implement_trait, reason = "an answer borrows the ring")]
    pub fn next(&mut self) -> Option<Next<'_>> {
        let entry = self.ring.completion().next()?;
        if entry.user_data() == OTHER {
            self.is_watching = false;
            return Some(Next::Readable);
        }
        let slot = entry.user_data() as usize;
        self.files[slot] = None;
        self.in_flight -= 1;
        let read = match usize::try_from(entry.result()) {
            Ok(bytes) => Ok(self.bytes(slot, bytes)),
            Err(_) => Err(Errno::from_raw(-entry.result())),
        };
        Some(Next::Read(slot, read))
    }

    /// True if there was room in the queue, which has an entry for each slot and one more.
    ///
    /// # Safety
    ///
    /// The memory that the kernel writes for the entry stays mapped, and no code reads it, until `next` has
    /// told of its end.
    #[expect(unsafe_code, reason = "an entry of an io_uring")]
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: as the caller promises.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn enter(&self, most: Option<Duration>) -> Result<(), Errno> {
        let time = most.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(time) = &time {
            args = args.timespec(time);
        }
        told(self.ring.submitter().submit_with_args(1, &args))
    }

    /// The first bytes of the page of a slot.
    fn bytes(&self, slot: usize, bytes: usize) -> &[u8] {
        assert!(bytes <= page() && self.files[slot].is_none(), "the kernel writes to the page");
        // SAFETY: the page is owned and readable, and the kernel does not write to it. A function that lets it
        // takes `&mut self`.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.buffers.0.at(slot * page()).as_ptr().cast(), bytes)
        }
    }
}

/// Waits for the reads in flight, because the kernel writes to the memory until then. Where that is not possible,
/// the memory is not given back.
impl Drop for ReadRing {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            match self.wait_for_reads() {
                Ok(()) => {}
                Err(Errno::EAGAIN) => thread::yield_now(),
                Err(_) => return,
            }
            while self.next().is_some() {}
        }
        // SAFETY: the kernel writes to the memory no more, and no code uses the field after its owner's drop.
        #[expect(unsafe_code, reason = "memory that is not always given back")]
        unsafe {
            ManuallyDrop::drop(&mut self.buffers);
        }
    }
}

impl fmt::Debug for ReadRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadRing").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

/// A ring that runs the kernel's part of each read when its one thread waits, so that a completed read interrupts no
/// other system call of that thread. The function uses the ring once, because a filter may allow `io_uring_setup`
/// and forbid `io_uring_enter`.
fn ring() -> io::Result<IoUring> {
    let entries = (READS + 1).next_power_of_two() as u32;
    let mut ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries)?;
    // SAFETY: the kernel writes to no memory for an entry that does nothing.
    #[expect(unsafe_code, reason = "an entry of an io_uring")]
    let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
    pushed.expect("an empty queue has room");
    ring.submit_and_wait(1)?;
    // None if a signal came first.
    let answer = ring.completion().next().map(|entry| entry.result());
    match answer {
        Some(0..) => Ok(ring),
        Some(number) => Err(io::Error::from_raw_os_error(-number)),
        None => Err(io::Error::from_raw_os_error(libc::EINTR)),
    }
}

/// The end of a call that may have sent nothing: the next one does.
fn told(answer: io::Result<usize>) -> Result<(), Errno> {
    match answer.map_err(|error| errno_of(&error)) {
        Err(errno) if !matches!(errno.raw(), libc::ETIME | libc::EINTR | libc::EBUSY) => Err(errno),
        _ => Ok(()),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn page() -> usize {
    PageSize::system().bytes()
}

/// The most reads in flight: a disk has no use for more from one thread.
pub const READS: usize = 64;
/// The number of the entry for the other descriptor.
const OTHER: u64 = u64::MAX;

#[cfg(test)]
#[cfg(not(miri))] // Miri has no io_uring
mod tests {
    use super::*;
    use std::fs;
    use std::io::{PipeReader, PipeWriter, Write, pipe};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    /// A ring, a file of `pages` pages, each full of its number, and another descriptor. `None` where the kernel or the
    /// file system cannot.
    fn ring_and_file(pages: usize) -> Option<(ReadRing, File, DirectFile, (PipeReader, PipeWriter))> {
        let ring = ReadRing::start(ReadBuffers::new().unwrap()).ok()?;
        let path = std::env::temp_dir().join(format!("pagestitch-ring-{}-{pages}", std::process::id()));
        fs::write(&path, (0..pages * page()).map(|at| (at / page()) as u8).collect::<Vec<u8>>()).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        fs::remove_file(path).unwrap();
        let direct = DirectFile::reopen(&file).ok()?;
        Some((ring, file, direct, pipe().unwrap()))
    }

    #[test]
    fn as_many_reads_as_slots_are_in_flight_at_once_and_each_has_its_page() {
        let Some((mut ring, _, direct, (other, _writer))) = ring_and_file(100) else { return };
        let mut begun = [None; READS];
        let mut next = 0;
        for _ in 0..3 {
            for _ in 0..READS {
                let number = (next * 37) % 100;
                let slot = ring.begin(&direct, (number * page()) as u64).unwrap();
                assert_eq!(begun[slot].replace(number), None);
                next += 1;
            }
            assert_eq!((ring.begin(&direct, 0), ring.in_flight()), (None, READS));
            while ring.in_flight() > 0 {
                ring.wait(other.as_fd(), None).unwrap();
                while let Some(answer) = ring.next() {
                    let Next::Read(slot, bytes) = answer else { panic!("{answer:?}") };
                    let number = begun[slot].take().unwrap() as u8;
                    assert!(bytes.unwrap() == vec![number; page()]);
                }
            }
        }
    }

    #[test]
    fn a_wait_ends_when_the_other_descriptor_is_readable_and_when_its_time_is_over() {
        let Some((mut ring, _, _, (mut other, mut writer))) = ring_and_file(1) else { return };
        ring.wait(other.as_fd(), Some(Duration::ZERO)).unwrap();
        assert!(ring.next().is_none());
        for _ in 0..3 {
            writer.write_all(&[1]).unwrap();
            ring.wait(other.as_fd(), None).unwrap();
            assert!(matches!(ring.next(), Some(Next::Readable)) && ring.next().is_none());
            io::Read::read_exact(&mut other, &mut [0]).unwrap();
        }
    }

    #[test]
    fn a_read_past_the_end_of_a_file_has_fewer_bytes_and_one_inside_a_block_is_not_begun() {
        let Some((mut ring, file, direct, _)) = ring_and_file(2) else { return };
        file.set_len(page() as u64 + 100).unwrap();
        file.write_all_at(&[7; 100], page() as u64).unwrap();
        assert_eq!(ring.begin(&direct, 1), None);
        for (offset, expected) in [(page(), 100), (2 * page(), 0)] {
            ring.begin(&direct, offset as u64).unwrap();
            ring.wait_for_reads().unwrap();
            let Some(Next::Read(_, Ok(bytes))) = ring.next() else { panic!("a read that ends early") };
            assert!(bytes == vec![7; expected]);
        }
    }

    #[test]
    fn a_ring_with_reads_in_flight_can_be_dropped() {
        let Some((mut ring, _, direct, _)) = ring_and_file(READS) else { return };
        for number in 0..READS {
            ring.begin(&direct, (number * page()) as u64).unwrap();
        }
    }
}
