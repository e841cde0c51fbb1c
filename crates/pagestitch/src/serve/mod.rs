//! Who answers faults, and how an answer is given.
//!
//! | file | what |
//! |---|---|
//! | `served` | a region as its server has it |
//! | `pool` | the workers and what they share; regions come and go |
//! | `placement` | where workers run |
//! | `worker` | wake up, read a batch, serve the first fault, hand on the rest |
//! | `events` | pages that are let go, unmapped or moved, and forks |
//! | `pace` | how long faults take, and whose turn it is to read them |
//! | `crew` | which workers get on, and which are to be replaced |
//! | `threads` | the threads of workers, and how they start |
//! | `berths` | how many workers one region may hold up |
//! | `slow` | how many workers slow regions may hold up together |
//! | `later` | what is done in a moment, instead of waiting for it |
//! | `door` | what a server keeps of a region |
//! | `inline` | the same steps in the thread that takes the fault |
//! | `manual` | the same steps when the caller's own loop says so |
//! | `populate` | the same steps for pages that nobody has touched |
//! | `retry_failed` | asks again for pages whose source has failed |
//! | `leave` | what becomes of adopted memory when its region is dropped |
//! | `watchdog` | tells of faults that take too long, and gives them up |
//! | `fork` | forked children |
//! | `seldom` | log lines that something else can cause |

mod berths;
mod crew;
mod door;
mod events;
pub(crate) mod fork;
mod inline;
mod later;
mod leave;
mod manual;
pub(crate) mod pace;
mod placement;
mod pool;
mod populate;
mod retry_failed;
mod seldom;
mod served;
mod slow;
mod threads;
mod watchdog;
mod worker;

pub(crate) use door::Door;
pub use manual::Manual;
use manual::Seats;
pub use placement::Placement;
pub use pool::{Pool, PoolBuilder, PoolMetrics, Report};
pub(crate) use populate::{fill_rest, populate};
pub(crate) use retry_failed::retry_failed;
pub(crate) use served::Served;

use crate::error::{Error, ErrorKind};
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::sigbus::Registration;
use parking_lot::Mutex;
use std::sync::Arc;

/// Who answers the faults of a region. Where one is asked for, any of these will do:
///
/// | | who | choose it when |
/// |---|---|---|
/// | `&`[`Pool`] | threads of their own | in general: any source, readahead, system calls on absent pages |
/// | [`Inline`] | the thread that takes the fault | single touches have to be quick, and bytes lie in memory |
/// | `&`[`Manual`] | the caller's own loop | the program has an event loop, or threads of its own |
#[derive(Debug, Clone)]
pub struct Server {
    pub(crate) who: Who,
}

#[derive(Debug, Clone)]
pub(crate) enum Who {
    Pool(Pool),
    Inline,
    Manual(Arc<Seats>),
}

/// The thread that touches a page fills it itself, in a SIGBUS handler, which takes about half the time: nobody is
/// woken. Linux 4.14.
///
/// * **Sources**: those at a stable address ([`Memory`](crate::source::Memory), sealed memfds, donated pages, holes) and
///   those that are mapped; others are refused when the region is built
///   ([`ErrorKind::NotInline`]).
/// * **System calls** that touch an absent page get `EFAULT`: [`populate`](crate::Region::populate) first.
/// * **Readahead**: none. A fault fills its page; `populate` what will be read anyway.
/// * **SIGBUS handlers** of the application, installed before the first such region, are called for what is not ours, with the mask that
///   they ask for. One that is installed later, as by a runtime that is loaded later (Go, a JVM, a sanitizer), has to pass on what is
///   not its own, with `SA_SIGINFO`, and without unblocking signals: faults of regions come to it first, and what it does with
///   them is what happens. Load such a runtime before the first region. A thread that blocks SIGBUS cannot touch absent pages.
/// * **Stack**: the handler runs on the alternate stack of a thread that has one (`sigaltstack(2)`), and takes less than 4 KiB of it
///   beside what the kernel puts there; where the handler before it was installed without `SA_ONSTACK`, on the thread's own.
/// * **Signal handlers** of the application may touch a region. All signals wait while a page is filled; a handler that interrupts
///   `populate` or `read_at` gets pages that its thread is filling, too, but for donated ones, which are SIGBUS then.
/// * A page that cannot be had is SIGBUS, as ever. So is a page that the handler itself touches: the memory of a source must not be
///   a region that is served inline. A line on standard error tells of that.
///
/// ```
/// use pagestitch::{Inline, Region};
///
/// let region = Region::builder().chunk(vec![7u8; 100_000]).build(Inline)?;
/// assert_eq!(region.as_slice()[50_000], 7);
/// assert_eq!(region.metrics().pages_copied, 1);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Inline;

impl From<&Pool> for Server {
    fn from(pool: &Pool) -> Self {
        Self { who: Who::Pool(pool.clone()) }
    }
}

impl From<Inline> for Server {
    fn from(_: Inline) -> Self {
        Self { who: Who::Inline }
    }
}

impl From<&Manual> for Server {
    fn from(manual: &Manual) -> Self {
        Self { who: Who::Manual(Arc::clone(manual.seats())) }
    }
}

impl Server {
    /// The number of all threads that fill their own pages.
    pub(crate) const INLINE: usize = 0;

    /// A number that no other server has.
    pub(crate) fn number(&self) -> usize {
        match &self.who {
            Who::Pool(pool) => pool.number(),
            Who::Manual(seats) => Arc::as_ptr(seats).addr(),
            Who::Inline => Self::INLINE,
        }
    }

    /// Starts to serve a region.
    pub(crate) fn attach(self, region: &Arc<Served>) -> Result<Attached, Error> {
        self.refuse_inherited(&region.name)?;
        let attached = match self.who {
            Who::Pool(pool) => Attached::Pool(pool),
            Who::Manual(seats) => Attached::Manual(seats),
            Who::Inline => {
                let registration = inline::attach(region)?;
                return Ok(Attached::Inline(Mutex::new(Some(registration)), ForkGeneration::current()));
            }
        };
        let added = match &attached {
            Attached::Pool(pool) => pool.add(region),
            Attached::Manual(seats) => seats.add(region),
            Attached::Inline(..) => Ok(()),
        };
        // A partial start is undone.
        added.inspect_err(|_| {
            attached.detach(region);
            attached.retire(region);
        })?;
        Ok(attached)
    }
}

impl Server {
    /// A server that a forked child inherits has no threads there, and its descriptors are the parent's: a region that was added to
    /// them would have its faults unread for ever.
    fn refuse_inherited(&self, region: &str) -> Result<(), Error> {
        let (inherited, server) = match &self.who {
            Who::Pool(pool) => (!pool.is_of_this_process(), "pool"),
            Who::Manual(seats) => (!seats.is_of_this_process(), "Manual"),
            Who::Inline => (false, ""),
        };
        if inherited {
            let what = format!(
                "region {region}: the {server} belongs to the parent process: after fork(2), make a {server} in the child"
            );
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        Ok(())
    }
}

/// A region's tie to its server.
#[derive(Debug)]
pub(crate) enum Attached {
    /// Keeps the workers running as long as there is a region to serve.
    Pool(Pool),
    Manual(Arc<Seats>),
    Inline(Mutex<Option<Registration>>, ForkGeneration),
}

impl Attached {
    /// False in a forked child, which has neither the region nor the threads.
    pub(crate) fn is_of_this_process(&self) -> bool {
        match self {
            Self::Pool(pool) => pool.is_of_this_process(),
            Self::Manual(seats) => seats.is_of_this_process(),
            Self::Inline(_, generation) => generation.is_current(),
        }
    }

    /// No fault of the region is taken up any more.
    pub(crate) fn detach(&self, region: &Arc<Served>) {
        match self {
            Self::Pool(pool) => pool.remove(region),
            Self::Manual(seats) => seats.remove(region),
            Self::Inline(registration, _) => drop(registration.lock().take()),
        }
    }

    /// Serves a child no more.
    fn leave(&self, child: &Served) {
        match self {
            Self::Pool(pool) => pool.leave(child),
            // Only a pool serves children.
            Self::Manual(_) | Self::Inline(..) => {}
        }
    }

    /// The last of a region whose children were served.
    pub(crate) fn retire(&self, region: &Served) {
        if let Self::Pool(pool) = self {
            pool.retire(region);
        }
    }

    /// Serves none of a region's children any more.
    pub(crate) fn leave_family(&self, region: &Served) {
        let Some(family) = &region.family else { return };
        family.close().iter().for_each(|child| self.leave(child));
        if let Self::Pool(pool) = self {
            pool.follow_all();
        }
    }

    pub(crate) const fn is_inline(&self) -> bool {
        matches!(self, Self::Inline(..))
    }
}
