//! The descriptors for a region's children: the userfaultfds that are kept open for them, and a
//! reserve for further children.

use nix::sys::eventfd::EventFd;
use pagestitch_kernel::fd_queue::FdQueue;
use pagestitch_kernel::fork_window::ForkWindow;
use pagestitch_kernel::process::Process;
use pagestitch_kernel::{AddressRange, Batch, Errno, PageSize, Uffd};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, OnceLock, PoisonError};

/// The descriptors of all children of a region.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// The reserve. When no descriptor is left, one of these is closed, so that the event of one
    /// more child can be read, and those of its own children. Until then the kernel fills no page
    /// of their parents.
    ///
    /// The lock is the standard library's, because the fork reader takes it, and waiting for that
    /// lock does not allocate.
    spare: StdMutex<Vec<EventFd>>,
    /// How often in a row no descriptor was left.
    short: AtomicUsize,
    /// The children's userfaultfds, in sockets that the children inherit, so that the userfaultfds
    /// outlive this process. A socket holds some hundreds. The next socket is created before it is
    /// needed, so that each child has inherited the socket that holds its userfaultfd.
    kept: [OnceLock<FdQueue>; KEPT],
    /// A child waits in it until its userfaultfd is kept. It has a pidfd of this process; where the kernel
    /// or a container has none, a child cannot tell that its server has ended.
    window: Arc<ForkWindow>,
}

impl Descriptors {
    pub(super) fn new() -> Result<Self, Errno> {
        let spare = (0..SPARE).map(|_| EventFd::new()).collect::<Result<_, _>>().map_err(Errno::of)?;
        let kept = [const { OnceLock::new() }; KEPT];
        let _ = kept[0].set(FdQueue::new()?);
        let server = match Process::open(std::process::id()) {
            Err(errno) if errno.is_transient() => return Err(errno),
            opened => opened.ok().map(Process::into_fd),
        };
        let window = Arc::new(ForkWindow::new(server)?);
        Ok(Self { spare: StdMutex::new(spare), short: AtomicUsize::new(0), kept, window })
    }

    /// The window that the children of the region wait in.
    pub(crate) const fn window(&self) -> &Arc<ForkWindow> {
        &self.window
    }

    /// Reads events of the region or of a child, and [keeps](Self::keep) the userfaultfds of new children,
    /// before these children run. `first` is an address range of the region.
    pub(crate) fn read(
        &self,
        batch: &mut Batch,
        (uffd, page): (&Uffd, PageSize),
        first: AddressRange,
    ) -> Result<(), Errno> {
        let _inside = self.window.enter();
        let read = batch.read(uffd, page);
        batch.keep_children(|child| self.keep(child, first));
        read
    }

    /// Keeps a child's userfaultfd open as long as the child lives, even if this process ends,
    /// because closing it would show zeros to the child. False if no socket has room. Allocates
    /// nothing. `first` is an address range of the region.
    fn keep(&self, child: BorrowedFd<'_>, first: AddressRange) -> bool {
        let queues = || self.kept.iter().filter_map(OnceLock::get);
        let put = |queue: &FdQueue| {
            // Checks two kept ones for each new one, so that ended children are found in time.
            for _ in 0..2 {
                queue.rotate(|other| !Uffd::has_no_process(other, first));
            }
            // Rotating needs a free entry.
            queue.len() < KEPT_IN_ONE && queue.put(child).is_ok()
        };
        // The oldest first, because a child that forked while the newest was made lacks the newest.
        let kept = queues().any(put);
        if queues().last().is_some_and(|newest| newest.len() >= KEPT_IN_ONE / 2) {
            self.add_queue(queues().count());
        }
        kept
    }

    /// Adds the queue of this number, if it is not one too many. The reserve must be full, because
    /// the queue takes descriptors.
    fn add_queue(&self, number: usize) {
        let Some(next) = self.kept.get(number).filter(|_| self.spare().len() == SPARE) else { return };
        if let Ok(queue) = FdQueue::new() {
            let _ = next.set(queue);
        }
    }

    /// In a child: true if the process that serves it has ended.
    pub(crate) fn has_no_server(&self) -> bool {
        self.window.server_has_ended()
    }

    /// Called when no descriptor is left for a child. True if the shortage has lasted so long that
    /// no ended child will free one.
    pub(crate) fn note_shortage(&self) -> bool {
        self.short.fetch_add(1, Ordering::Relaxed) >= PATIENCE
    }

    /// Closes a descriptor of the reserve. False if the reserve is empty.
    pub(crate) fn close_spare(&self) -> bool {
        self.spare().pop().is_some()
    }

    /// Refills the reserve as far as possible. False if it is empty.
    pub(crate) fn refill_spare(&self) -> bool {
        let mut spare = self.spare();
        // Never beyond its capacity, because the fork reader allocates nothing.
        while spare.len() < SPARE {
            let Ok(event) = EventFd::new() else { break };
            spare.push(event);
        }
        !spare.is_empty()
    }

    /// Called when the event of a child was read.
    pub(crate) fn reset_shortage(&self) {
        self.short.store(0, Ordering::Relaxed);
    }

    fn spare(&self) -> MutexGuard<'_, Vec<EventFd>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The userfaultfds of children in one socket: fewer than it can hold.
const KEPT_IN_ONE: usize = 128;
/// The most sockets.
const KEPT: usize = 64;
/// The size of the reserve.
const SPARE: usize = 4;
/// How often the reader looks for a descriptor, a millisecond apart, before it gives a child up.
const PATIENCE: usize = 20;
