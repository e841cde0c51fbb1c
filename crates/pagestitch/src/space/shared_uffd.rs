//! A userfaultfd that many small regions of a pool share.
//!
//! ```text
//!   regions   | a | b | c |     | d | e |        side by side, in any order
//!   uffds       0   1   2         0   1          neighbours have different ones
//! ```
//!
//! Neighbours have different userfaultfds because the kernel merges adjacent mappings of one
//! userfaultfd: to fence or unmap one region would then split a mapping, which fails where the process
//! has no mapping left (`vm.max_map_count`).
//!
//! It has no event of discards and forks, because a fill of one region would wait (`EAGAIN`) while
//! another region's event is unread. It has the event of moves, though it makes fills wait too: a move
//! is rare, and without its event unfilled pages that `mremap(2)` moves would read as zeros.
//!
//! It stays open until the end of the pool, so the drop of a region closes nothing: the range is fenced,
//! its waiters are woken, and it is unmapped.

use pagestitch_kernel::Uffd;
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::sync::yield_now;
use std::fmt;
use std::sync::Arc;

/// A userfaultfd of a pool, for many regions.
#[derive(Debug)]
pub(crate) struct SharedUffd {
    pub(crate) uffd: Uffd,
    readers: Readers,
}

impl SharedUffd {
    pub(crate) fn new(uffd: Uffd) -> Self {
        Self { uffd, readers: Readers::default() }
    }

    /// Called before events are read.
    pub(crate) fn reading(&self) -> Reading<'_> {
        self.readers.reading()
    }

    /// True if a fault may be on its way to its region: unread, or read a moment ago. Waits a moment
    /// for the readers.
    pub(crate) fn has_faults_under_way(&self) -> bool {
        self.readers.have_faults_under_way(|| self.uffd.has_unread())
    }
}

/// The threads that read the events of a userfaultfd, or have read some and not yet told all regions.
#[derive(Debug, Default)]
pub(crate) struct Readers(AtomicUsize);

/// A thread that reads events, until the regions of all faults know of them.
pub(crate) struct Reading<'r>(&'r Readers);

impl Readers {
    pub(crate) fn reading(&self) -> Reading<'_> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Reading(self)
    }

    pub(crate) fn have_faults_under_way(&self, has_unread: impl Fn() -> bool) -> bool {
        // In this order: a fault that is read between the two finds its reader counted.
        let is_idle = || !has_unread() && self.0.load(Ordering::SeqCst) == 0;
        (0..LOOKS).all(|_| {
            let is_busy = !is_idle();
            if is_busy {
                yield_now();
            }
            is_busy
        })
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The table of the regions that share userfaultfds.
pub(crate) trait SharedRanges: fmt::Debug + Send + Sync {
    /// Removes the range that begins at an address.
    fn remove(&self, start: usize);
}

/// The place of a region among those that share userfaultfds, until it is dropped. Dropped before the
/// range is unmapped, because another region may have the addresses then.
#[derive(Debug)]
pub(crate) struct SharedPlace {
    pub(super) uffd: Arc<SharedUffd>,
    start: usize,
    ranges: Arc<dyn SharedRanges>,
    generation: ForkGeneration,
}

impl SharedPlace {
    pub(crate) fn new(uffd: Arc<SharedUffd>, start: usize, ranges: Arc<dyn SharedRanges>) -> Self {
        Self { uffd, start, ranges, generation: ForkGeneration::current() }
    }
}

impl Drop for SharedPlace {
    fn drop(&mut self) {
        // The table of a forked child is a copy, whose lock a thread of the parent may hold.
        if self.generation.is_current() {
            self.ranges.remove(self.start);
        }
    }
}

/// How often a drop looks for faults under way before it counts on one.
const LOOKS: usize = if cfg!(shuttle) { 2 } else { 20 };
