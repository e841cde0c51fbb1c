//! What the kernel says happened, decoded eagerly and put in the order in which it must be acted on.
//!
//! A [`Batch`] is read in one `read(2)` and sorted once: first everything that changes the map (a remove overtakes
//! the faults before it: filling a page that is being let go would put old bytes in a freed page), then the
//! faults, one per page, by address. It is read again and again without allocating.

use crate::page::PageSize;
use crate::uffd::Uffd;
use nix::errno::Errno;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A thread stopped at a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The address of the page's first byte.
    pub address: usize,
    /// Why it stopped.
    pub kind: FaultKind,
    /// Whether it was writing.
    pub write: bool,
    /// The thread's id, where the uffd was opened with `THREAD_ID`; 0 otherwise.
    pub thread: i32,
}

/// Why a thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// There is no page.
    Missing,
    /// The page is in the file's page cache, but not mapped.
    Minor,
    /// The page is write-protected.
    WriteProtect,
}

/// Something that changed the memory map. Who did it waits until the event has been read.
#[derive(Debug)]
pub enum Event {
    /// `MADV_DONTNEED` or `MADV_REMOVE` on `start..end`.
    Remove {
        /// First address.
        start: usize,
        /// First address after it.
        end: usize,
    },
    /// `munmap`, or something mapped over `start..end`.
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
    },
}

/// The events of one read, sorted. Holds a fixed number; the rest stays in the kernel for the next read.
pub struct Batch {
    messages: Box<[u8]>,
    events: Vec<Event>,
    faults: Vec<Fault>,
    /// How many messages the last read took, of at most `capacity`.
    read: usize,
    capacity: usize,
}

impl Batch {
    /// Room for `capacity` events a read.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let (events, faults) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        let messages = vec![0; capacity * MESSAGE].into_boxed_slice();
        Self { messages, events, faults, read: 0, capacity }
    }

    /// Reads what is there, without waiting. Nothing to read gives an empty batch.
    ///
    /// # Errors
    ///
    /// The errno of `read(2)`; `EIO` if the kernel sent an event that this version does not know.
    pub fn read(&mut self, uffd: &Uffd, page: PageSize) -> Result<(), Errno> {
        self.clear();
        let bytes = uffd.read(&mut self.messages)?;
        let (messages, _) = self.messages[..bytes].as_chunks();
        let mut unknown = Ok(());
        for message in messages {
            self.read += 1;
            // Decode the others all the same: they hold descriptors and waiting threads.
            if let Err(errno) = decode(message, uffd, page, &mut self.events, &mut self.faults) {
                unknown = Err(errno);
            }
        }
        order(&mut self.faults);
        unknown
    }

    /// Forgets what was read.
    pub fn clear(&mut self) {
        self.events.clear();
        self.faults.clear();
        self.read = 0;
    }

    /// Whether it has no room left: there may be more to read.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.read == self.capacity
    }

    /// What changed the map, to be acted on before the faults.
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

/// Takes a `uffd_msg` apart: an event's number, 7 bytes of padding, and three words whose meaning depends on the event.
fn decode(
    message: &[u8; MESSAGE],
    uffd: &Uffd,
    page: PageSize,
    events: &mut Vec<Event>,
    faults: &mut Vec<Fault>,
) -> Result<(), Errno> {
    let word = |index: usize| u64::from_ne_bytes(message.as_chunks().0[1 + index]);
    let number = |index: usize| word(index) as usize;
    match message[0] {
        PAGEFAULT => faults.push(Fault {
            address: number(1) & !(page.bytes() - 1),
            kind: kind_of(word(0)),
            write: word(0) & FLAG_WRITE != 0,
            // The first half of its word, whichever byte order.
            thread: i32::from_ne_bytes(*message[24..].first_chunk().expect("32 bytes")),
        }),
        REMOVE => events.push(Event::Remove { start: number(0), end: number(1) }),
        UNMAP => events.push(Event::Unmap { start: number(0), end: number(1) }),
        REMAP => events.push(Event::Remap { from: number(0), to: number(1), bytes: number(2) }),
        FORK => {
            let child = own(RawFd::from_ne_bytes(*message[8..].first_chunk().expect("32 bytes")));
            events.push(Event::Fork { child: Uffd::of_child(child, uffd) });
        }
        _ => return Err(Errno::EIO),
    }
    Ok(())
}

const fn kind_of(flags: u64) -> FaultKind {
    if flags & FLAG_MINOR != 0 {
        FaultKind::Minor
    } else if flags & FLAG_WP != 0 {
        FaultKind::WriteProtect
    } else {
        FaultKind::Missing
    }
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: `read(2)` of the event has just made this descriptor in this process.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

/// One fault for each page and kind, by address; a write among them makes it a write.
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

/// The bytes of a message: `struct uffd_msg`.
pub(crate) const MESSAGE: usize = 32;
const PAGEFAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;
const FLAG_WRITE: u64 = 1 << 0;
const FLAG_WP: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;

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
