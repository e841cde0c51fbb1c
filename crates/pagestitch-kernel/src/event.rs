//! The kernel's messages, decoded eagerly and put in the order in which a reader must handle them.
//!
//! A [`Batch`] is read in one `read(2)` and sorted once. First come the changes of the map: a
//! remove overtakes the faults before it, because a fill of a page that is being discarded would
//! put old bytes in it. Then come the faults by address, one for each page. A batch is reused
//! without allocating.

use crate::errno::Errno;
use crate::page::PageSize;
use crate::uffd::Uffd;
use crate::uffd::message::{MESSAGE, Message, PAGEFAULT_FLAG_MINOR, PAGEFAULT_FLAG_WP, PAGEFAULT_FLAG_WRITE};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A thread that is stopped at a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The address of the page's first byte.
    pub address: usize,
    /// The reason why the thread is stopped.
    pub kind: FaultKind,
    /// True if the access is a write.
    pub write: bool,
    /// The thread's id, if the uffd was opened with `THREAD_ID`; 0 otherwise.
    pub thread: i32,
}

/// The reason why a thread is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// The page is missing.
    Missing,
    /// The page is in the file's page cache, but not mapped.
    Minor,
    /// The page is write-protected.
    WriteProtect,
}

/// The access of a thread that is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// A read of an absent page.
    Read,
    /// A write to an absent page; or an access that may be one.
    Write,
    /// A write to a page that is write-protected.
    Denied,
}

impl From<Fault> for Touch {
    fn from(fault: Fault) -> Self {
        match (fault.kind, fault.write) {
            (FaultKind::WriteProtect, _) => Self::Denied,
            (_, true) => Self::Write,
            (_, false) => Self::Read,
        }
    }
}

/// A change of the memory map. The thread that makes it waits until the event is read.
#[derive(Debug)]
pub enum Event {
    /// `MADV_DONTNEED` or `MADV_REMOVE` on `start..end`.
    Remove {
        /// First address.
        start: usize,
        /// First address after it.
        end: usize,
    },
    /// `munmap`, or another mapping over `start..end`.
    Unmap {
        /// First address.
        start: usize,
        /// First address after it.
        end: usize,
    },
    /// `mremap`.
    Remap {
        /// Old first address.
        from: usize,
        /// New first address.
        to: usize,
        /// Old length in bytes.
        bytes: usize,
    },
    /// `fork`: the child's memory has a uffd of its own.
    Fork {
        /// The child's uffd.
        child: Uffd,
        /// True if the reader has [kept](Batch::keep_children) the uffd open for the child.
        kept: bool,
    },
}

/// The events of one read, sorted. A batch holds a fixed number; the kernel keeps the rest for the
/// next read.
pub struct Batch {
    messages: Box<[u8]>,
    events: Vec<Event>,
    faults: Vec<Fault>,
    /// The number of messages of the last read, at most `capacity`.
    read: usize,
    capacity: usize,
}

impl Batch {
    /// A batch of at most `capacity` events.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let (events, faults) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        let messages = vec![0; capacity * MESSAGE].into_boxed_slice();
        Self { messages, events, faults, read: 0, capacity }
    }

    /// Reads the present messages without waiting. Without a message, the batch is empty.
    ///
    /// # Errors
    ///
    /// The errno of `read(2)`; `EIO` for an event that this version does not know.
    pub fn read(&mut self, uffd: &Uffd, page: PageSize) -> Result<(), Errno> {
        self.clear();
        let bytes = uffd.read(&mut self.messages)?;
        let mut unknown = Ok(());
        for message in self.messages[..bytes].chunks_exact(MESSAGE) {
            let message = message.try_into().expect("the size of a message");
            self.read += 1;
            // Decodes the other messages all the same, because they hold descriptors and waiting
            // threads.
            if let Err(errno) = decode(message, uffd, page, &mut self.events, &mut self.faults) {
                unknown = Err(errno);
            }
        }
        order(&mut self.faults);
        unknown
    }

    /// The number of messages that were read. Several threads may wait for one page.
    #[must_use]
    pub const fn messages(&self) -> usize {
        self.read
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.events.clear();
        self.faults.clear();
        self.read = 0;
    }

    /// True if the batch has no space left: the kernel may have more messages.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.read == self.capacity
    }

    /// True if the last read found no message.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.read == 0
    }

    /// Calls `keep` with the uffd of each forked child, and notes the answer in its event.
    pub fn keep_children(&mut self, mut keep: impl FnMut(BorrowedFd<'_>) -> bool) {
        for event in &mut self.events {
            if let Event::Fork { child, kept } = event {
                *kept = keep(child.as_fd());
            }
        }
    }

    /// The changes of the map, which the reader handles before the faults.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// The faults, one for each page and kind, by address.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("events", &self.events).field("faults", &self.faults).finish()
    }
}

/// Puts a message where it belongs.
fn decode(
    message: &[u8; MESSAGE],
    uffd: &Uffd,
    page: PageSize,
    events: &mut Vec<Event>,
    faults: &mut Vec<Fault>,
) -> Result<(), Errno> {
    match Message::decode(message).ok_or(Errno::EIO)? {
        Message::Pagefault { flags, address, thread } => faults.push(Fault {
            address: address & !(page.bytes() - 1),
            kind: kind_of(flags),
            write: flags & PAGEFAULT_FLAG_WRITE != 0,
            thread,
        }),
        Message::Remove { start, end } => events.push(Event::Remove { start, end }),
        Message::Unmap { start, end } => events.push(Event::Unmap { start, end }),
        Message::Remap { from, to, bytes } => events.push(Event::Remap { from, to, bytes }),
        Message::Fork { child } => {
            events.push(Event::Fork { child: Uffd::of_child(own(child), uffd), kept: false });
        }
    }
    Ok(())
}

const fn kind_of(flags: u64) -> FaultKind {
    if flags & PAGEFAULT_FLAG_MINOR != 0 {
        FaultKind::Minor
    } else if flags & PAGEFAULT_FLAG_WP != 0 {
        FaultKind::WriteProtect
    } else {
        FaultKind::Missing
    }
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the `read(2)` of the event has just made this descriptor in this process, and nothing
    // else owns it.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

/// Keeps one fault for each page and kind, by address. The fault is a write if one of them was.
fn order(faults: &mut Vec<Fault>) {
    faults.sort_unstable_by_key(|fault| (fault.address, fault.kind));
    faults.dedup_by(|later, kept| {
        let same = (later.address, later.kind) == (kept.address, kept.kind);
        if same {
            kept.write |= later.write;
        }
        same
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(address: usize, kind: FaultKind, write: bool) -> Fault {
        Fault { address, kind, write, thread: 1 }
    }

    #[test]
    fn faults_of_a_batch_are_one_a_page_by_address_and_remember_a_write() {
        use FaultKind::{Missing, WriteProtect};
        let mut faults = vec![
            fault(0x3000, Missing, false),
            fault(0x1000, Missing, false),
            fault(0x3000, Missing, true),
            fault(0x1000, WriteProtect, true),
        ];
        order(&mut faults);
        let seen: Vec<_> = faults.iter().map(|f| (f.address, f.kind, f.write)).collect();
        assert_eq!(seen, [(0x1000, Missing, false), (0x1000, WriteProtect, true), (0x3000, Missing, true)]);
    }
}
