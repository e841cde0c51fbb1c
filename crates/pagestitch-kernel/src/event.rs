//! What the kernel says happened, decoded eagerly and put in the order in which it must be acted on.
//!
//! A [`Batch`] is read in one `read(2)` and sorted once: first everything that changes the map (a remove overtakes
//! the faults before it: filling a page that is being let go would put old bytes in a freed page), then the
//! faults, one per page, by address. It is read again and again without allocating.

use crate::page::PageSize;
use crate::uffd::{Uffd, errno_of};
use nix::errno::Errno;
use std::fmt;

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
    messages: userfaultfd::EventBuffer,
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
        Self { messages: userfaultfd::EventBuffer::new(capacity), events, faults, read: 0, capacity }
    }

    /// Reads what is there, without waiting. Nothing to read gives an empty batch.
    ///
    /// # Errors
    ///
    /// The errno of `read(2)`; `EIO` if the kernel sent an event that this version does not know.
    pub fn read(&mut self, uffd: &Uffd, page: PageSize) -> Result<(), Errno> {
        self.events.clear();
        self.faults.clear();
        self.read = 0;
        let messages = uffd.events().read_events(&mut self.messages).map_err(|error| errno_of(&error))?;
        let mut unknown = Ok(());
        for message in messages {
            self.read += 1;
            match message {
                Ok(message) => decode(message, uffd, page, &mut self.events, &mut self.faults),
                // Decode the others all the same: they hold descriptors and waiting threads.
                Err(error) => unknown = Err(errno_of(&error)),
            }
        }
        order(&mut self.faults);
        unknown
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

fn decode(
    message: userfaultfd::Event,
    uffd: &Uffd,
    page: PageSize,
    events: &mut Vec<Event>,
    faults: &mut Vec<Fault>,
) {
    match message {
        userfaultfd::Event::Pagefault { kind, rw, addr, thread_id } => faults.push(Fault {
            address: addr.addr() & !(page.bytes() - 1),
            kind: match kind {
                userfaultfd::FaultKind::Missing => FaultKind::Missing,
                userfaultfd::FaultKind::Minor => FaultKind::Minor,
                userfaultfd::FaultKind::WriteProtected => FaultKind::WriteProtect,
            },
            write: rw == userfaultfd::ReadWrite::Write,
            thread: thread_id.as_raw(),
        }),
        userfaultfd::Event::Remove { start, end } => {
            events.push(Event::Remove { start: start.addr(), end: end.addr() });
        }
        userfaultfd::Event::Unmap { start, end } => {
            events.push(Event::Unmap { start: start.addr(), end: end.addr() });
        }
        userfaultfd::Event::Remap { from, to, len } => {
            events.push(Event::Remap { from: from.addr(), to: to.addr(), bytes: len });
        }
        userfaultfd::Event::Fork { uffd: child } => {
            events.push(Event::Fork { child: Uffd::of_child(child, uffd) })
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(address: usize, kind: FaultKind, write: bool) -> Fault {
        Fault { address, kind, write, thread: 1 }
    }

    #[test]
    fn faults_are_one_a_page_by_address_and_remember_a_write() {
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
