//! A region's children: the same bytes in processes that were forked from the one that built it.
//!
//! ```text
//!   fork(2) ── waits until a worker has read ──▶ Event::Fork { the child's own uffd }
//!                                                      │
//!        the same layout, addresses and sources ──▶ a Served of its own: adopted memory, all absent
//! ```
//!
//! What was there at the fork is the child's, too, as of any memory. What was not is a fault of the child's, and filled from the
//! sources in the parent: a page of its own. A child that forks is a parent likewise; all of them are one family, which ends with
//! the region: what a child has not touched by then is bad.
//!
//! If this process ends first, the children's uffds would close with it, and show zeros. So they are in flight in a socket that the
//! children have inherited, too: what a child has not touched waits for ever then.

pub(crate) mod strays;
pub(super) mod usher;

use crate::policy::{Blocks, Policy, Readahead};
use crate::serve::Served;
use crate::space::Target;
use crate::space::mapped::Shown;
use crate::space::target::Foreign;
use crate::space::{Manner, Mapping, Tables};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::unistd::Pid;
use pagestitch_kernel::fd_queue::FdQueue;
use pagestitch_kernel::process::Process;
use pagestitch_kernel::{AddressRange, Batch, Errno, Outcome, Page, Uffd};
use parking_lot::Mutex;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

/// All children of a region, and theirs.
#[derive(Debug)]
pub(crate) struct Family {
    members: Mutex<Members>,
    /// Descriptors for the one child too many, and children that it forks before it is seen to. Until these can be told of, nothing
    /// can be filled in their parents, either. The standard library's lock, as the usher takes it, and waiting for it does not allocate.
    spare: StdMutex<Vec<EventFd>>,
    /// How often there was none, in a row.
    short: AtomicUsize,
    /// The children's userfaultfds, in sockets that the children have, too: they outlive this process. A socket has room for some
    /// hundreds; the next one is there before it is needed, so that a child has inherited it.
    kept: [OnceLock<FdQueue>; KEPT],
    /// This process, as its children ask for it.
    server: Option<Process>,
}

#[derive(Debug, Default)]
struct Members {
    served: Vec<Arc<Served>>,
    /// The region is being dropped.
    closed: bool,
}

impl Family {
    pub(crate) fn new() -> Result<Self, Errno> {
        let spare = (0..SPARE).map(|_| EventFd::new()).collect::<Result<_, _>>()?;
        let kept = [const { OnceLock::new() }; KEPT];
        let _ = kept[0].set(FdQueue::new()?);
        Ok(Self {
            members: Mutex::default(),
            spare: StdMutex::new(spare),
            short: AtomicUsize::new(0),
            kept,
            server: Process::open(Pid::this()).ok(),
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

    /// There is no descriptor left for a child. True if that has been so for so long that those of children who have ended are not to
    /// be had.
    pub(crate) fn is_short(&self) -> bool {
        self.short.fetch_add(1, Ordering::Relaxed) >= PATIENCE
    }

    /// Makes a descriptor free. False if there is none to be made free.
    pub(crate) fn make_room(&self) -> bool {
        self.spare().pop().is_some()
    }

    /// Whether there is room for one more child, after this one.
    pub(crate) fn has_room(&self) -> bool {
        let mut spare = self.spare();
        // Never beyond: the usher allocates nothing.
        while spare.len() < SPARE
            && let Ok(event) = EventFd::new()
        {
            spare.push(event);
        }
        !spare.is_empty()
    }

    /// A child could be told of.
    pub(crate) fn had_room(&self) {
        self.short.store(0, Ordering::Relaxed);
    }

    fn spare(&self) -> MutexGuard<'_, Vec<EventFd>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a child in. False if the region is being dropped: nobody would serve it.
    pub(crate) fn take_in(&self, child: &Arc<Served>) -> bool {
        let mut members = self.members.lock();
        if !members.closed {
            members.served.push(Arc::clone(child));
        }
        !members.closed
    }

    /// Those whose processes have ended, or do not have the region any more.
    pub(crate) fn take_dead(&self) -> Vec<Arc<Served>> {
        let mut members = self.members.lock();
        let (dead, alive) = members.served.drain(..).partition(|child| is_dead(child));
        members.served = alive;
        dead
    }

    /// Takes no more in; says who there is.
    pub(crate) fn close(&self) -> Vec<Arc<Served>> {
        let mut members = self.members.lock();
        members.closed = true;
        std::mem::take(&mut members.served)
    }
}

impl Served {
    /// The same region in a child, that `uffd` tells of.
    pub(crate) fn child(&self, uffd: Uffd) -> Result<Self, (Uffd, Errno)> {
        match self.prepare_child() {
            Ok((tables, policy, adopted)) => {
                let manner = Manner { reporter: self.reporter.clone(), ..Manner::default() };
                let mapping = Mapping::new(
                    format!("{} in a child", self.name),
                    (Arc::clone(&self.layout), Shown::default()),
                    (false, Err("the kernel moves pages only inside a process")),
                    (policy, manner, tables),
                    (Target::Foreign(adopted), uffd),
                    self.family.is_none(),
                );
                let limit = self.limit.as_ref().map(|(most, _)| *most);
                Ok(Self::new(mapping, limit, self.family.clone()))
            }
            Err(errno) => Err((uffd, errno)),
        }
    }

    /// What may be refused.
    fn prepare_child(&self) -> Result<(Tables, Policy, Foreign), Errno> {
        let (pages, size) = (self.target.all().pages, self.page_size());
        let tables = Tables::new(pages, &Manner::default())?;
        let policy = Policy::new(Readahead::None, pages, size, Blocks::Never)?;
        Ok((tables, policy, Foreign::inherited(size, self.target.ranges().collect())?))
    }
}

/// Nobody forks with the region any more when this returns: closing its uffd would show zeros to a child that is just being made.
/// For a region of ours, before its teardown begins: this thread may wait for the allocator in it, and whoever forks holds that until
/// the usher has read of it. For a child's, at its end: it has nothing to do with our allocator.
pub(crate) fn refuse_births(region: &Served) {
    if region.family.is_none() {
        return;
    }
    match &region.target {
        Target::Owned(reservation) => {
            let _ = reservation.do_not_fork();
        }
        // What is refused was unmapped, or its owner has ended.
        Target::Foreign(_) => region.target.ranges().for_each(|(span, _)| {
            let _ = region.uffd.unregister(region.target.addresses(span));
        }),
    }
    // As long as a fork is under way, the kernel fills nothing.
    while region.uffd.continue_pages(first_page(region)) == Outcome::Changing {
        if region.target.foreign().is_some() {
            region.read_events(&mut Batch::with_capacity(BATCH), &mut |news| region.hear(news));
        }
        thread::yield_now();
    }
}

/// Whether the process that a child's memory belonged to has ended, or does something else by now.
fn is_dead(child: &Served) -> bool {
    // To show what a page cache has is refused for memory without one, where there is somebody to refuse it to.
    child.uffd.continue_pages(first_page(child)) == Outcome::ProcessGone
}

pub(crate) fn first_page(region: &Served) -> AddressRange {
    region.target.addresses(Page(0).span())
}

/// Userfaultfds of children in one socket: a few less than there is room for.
const KEPT_IN_ONE: usize = 128;
/// Such sockets at most.
const KEPT: usize = 64;
/// Descriptors that are kept for children too many.
const SPARE: usize = 4;
/// How often a descriptor is asked for, a millisecond apart, before a child is given up.
const PATIENCE: usize = 20;
/// Events read at once.
const BATCH: usize = 64;
