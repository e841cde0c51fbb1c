//! The descriptors of a region's children: those that are kept open for them, and those in reserve for the next ones.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use pagestitch_kernel::fd_queue::FdQueue;
use pagestitch_kernel::process::Process;
use pagestitch_kernel::{AddressRange, Errno, Uffd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex as StdMutex, MutexGuard, OnceLock, PoisonError};

/// The descriptors of all children of a region.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// Descriptors for the one child too many, and for children that it forks before it is closed.
    /// Until their events can be read, nothing can be filled in their parents, either. The standard
    /// library's lock, because the fork reader takes it, and waiting for it does not allocate.
    spare: StdMutex<Vec<EventFd>>,
    /// How often there was none, in a row.
    short: AtomicUsize,
    /// The children's userfaultfds, in sockets that the children have, too: they outlive this process. A socket has room for some
    /// hundreds; the next one is there before it is needed, so that a child has inherited it.
    kept: [OnceLock<FdQueue>; KEPT],
    /// This process, as its children ask for it.
    server: Option<Process>,
}

impl Descriptors {
    pub(super) fn new() -> Result<Self, Errno> {
        let spare = (0..SPARE).map(|_| EventFd::new()).collect::<Result<_, _>>()?;
        let kept = [const { OnceLock::new() }; KEPT];
        let _ = kept[0].set(FdQueue::new()?);
        Ok(Self {
            spare: StdMutex::new(spare),
            short: AtomicUsize::new(0),
            kept,
            server: Process::open(std::process::id()).ok(),
        })
    }

    /// Keeps a child's userfaultfd open as long as the child lives, also if this process ends: closed, it would show zeros. False where
    /// there is no room. Allocates nothing. `first`: an address range of the region's.
    pub(crate) fn keep(&self, child: BorrowedFd<'_>, first: AddressRange) -> bool {
        let queues = || self.kept.iter().filter_map(OnceLock::get);
        let put = |queue: &FdQueue| {
            // Two for one that comes: those of children that have ended are found before they are many.
            for _ in 0..2 {
                queue.rotate(|other| !Uffd::has_no_process(other, first));
            }
            // With room left to go round.
            queue.len() < KEPT_IN_ONE && queue.put(child).is_ok()
        };
        // The oldest first: a child that was being forked when the newest was made does not have that.
        let kept = queues().any(put);
        if let Some(next) = self.kept.get(queues().count())
            && queues().last().is_some_and(|newest| newest.len() >= KEPT_IN_ONE / 2)
            // Not with the descriptors that are kept for children.
            && self.spare().len() == SPARE
            && let Ok(queue) = FdQueue::new()
        {
            let _ = next.set(queue);
        }
        kept
    }

    /// In a child: whether the process that serves it has ended.
    pub(crate) fn has_no_server(&self) -> bool {
        let ended = |server: &Process| {
            let mut polled = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ended| ended > 0)
        };
        self.server.as_ref().is_some_and(ended)
    }

    /// Called when no descriptor is left for a child. True if that has been so for so long that
    /// children that have ended will free none.
    pub(crate) fn note_shortage(&self) -> bool {
        self.short.fetch_add(1, Ordering::Relaxed) >= PATIENCE
    }

    /// Makes a descriptor free. False if there is none to be made free.
    pub(crate) fn close_spare(&self) -> bool {
        self.spare().pop().is_some()
    }

    /// Whether there is room for one more child, after this one.
    pub(crate) fn refill_spare(&self) -> bool {
        let mut spare = self.spare();
        // Never beyond: the fork reader allocates nothing.
        while spare.len() < SPARE
            && let Ok(event) = EventFd::new()
        {
            spare.push(event);
        }
        !spare.is_empty()
    }

    /// A child could be told of.
    pub(crate) fn reset_shortage(&self) {
        self.short.store(0, Ordering::Relaxed);
    }

    fn spare(&self) -> MutexGuard<'_, Vec<EventFd>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Userfaultfds of children in one socket: a few less than there is room for.
const KEPT_IN_ONE: usize = 128;
/// Such sockets at most.
const KEPT: usize = 64;
/// Descriptors that are kept for children too many.
const SPARE: usize = 4;
/// How often a descriptor is asked for, a millisecond apart, before a child is given up.
const PATIENCE: usize = 20;
