//! Who answers faults, and how an answer is given.
//!
//! | file | step of a fault's journey |
//! |---|---|
//! | `pool` | the workers and what they share; regions come and go |
//! | `placement` | where workers run |
//! | `worker` | wake up, read a batch, serve the first fault, hand on the rest |
//! | `fault` | **the journey in one function**: claim, fill, resolve, settle, tell |
//! | `resolve` | tell the kernel, and read its answer |
//! | `inline` | the same steps in the thread that takes the fault |
//! | `heal` | asks again for pages whose source has failed |
//! | `populate` | the same steps for pages that nobody has touched |

mod fault;
mod heal;
mod inline;
mod placement;
mod pool;
mod populate;
mod resolve;
mod worker;

pub(crate) use heal::heal;
pub use placement::Placement;
pub use pool::{Pool, PoolBuilder, Report};
pub(crate) use populate::populate;

use crate::error::Error;
use crate::region::Served;
use pagestitch_kernel::fork::Maker;
use pagestitch_kernel::sigbus::Registration;
use parking_lot::Mutex;
use std::sync::Arc;

/// Who answers the faults of a region.
///
/// | | choose it when |
/// |---|---|
/// | a [`Pool`] | in general: any source, readahead, system calls on absent pages |
/// | [`Inline`](Self::Inline) | single touches have to be quick, and bytes lie in memory |
///
/// `&pool` is one where a server is asked for.
#[derive(Debug, Clone)]
pub enum Server {
    /// Threads of their own.
    Pool(Pool),
    /// The thread that touches a page fills it itself, in a SIGBUS handler, which takes about half the time: nobody is
    /// woken. Linux 4.14.
    ///
    /// * **Sources**: those at a stable address ([`Memory`](crate::source::Memory), sealed memfds, donated pages, holes) and
    ///   those that are mapped; others are refused when the region is built
    ///   ([`ErrorKind::NotInline`](crate::ErrorKind::NotInline)).
    /// * **System calls** that touch an absent page get `EFAULT`: [`populate`](crate::Region::populate) first.
    /// * **Readahead**: none. A fault fills its page; `populate` what will be read anyway.
    /// * **Signals**: a SIGBUS handler of the application's, installed before the first such region, is called for what is not
    ///   ours; one installed later has to pass on what is not its own. A thread that blocks SIGBUS cannot touch
    ///   absent pages.
    /// * A page that cannot be had is SIGBUS, as ever.
    ///
    /// ```
    /// use pagestitch::{Region, Server};
    ///
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).build(Server::Inline)?;
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// assert_eq!(region.metrics().pages_copied, 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    Inline,
}

impl From<&Pool> for Server {
    fn from(pool: &Pool) -> Self {
        Self::Pool(pool.clone())
    }
}

impl Server {
    /// Starts to serve a region.
    pub(crate) fn attach(self, region: &Arc<Served>) -> Result<Attached, Error> {
        Ok(match self {
            Self::Pool(pool) => {
                let attached = Attached::Pool(pool.clone());
                // A partial start is undone.
                pool.add(region).inspect_err(|_| attached.detach(region))?;
                attached
            }
            Self::Inline => Attached::Inline(Mutex::new(Some(inline::attach(region)?)), Maker::current()),
        })
    }
}

/// A region's tie to its server.
#[derive(Debug)]
pub(crate) enum Attached {
    /// Keeps the workers running as long as there is a region to serve.
    Pool(Pool),
    Inline(Mutex<Option<Registration>>, Maker),
}

impl Attached {
    /// False in a forked child, which has neither the region nor the threads.
    pub(crate) fn is_of_this_process(&self) -> bool {
        match self {
            Self::Pool(pool) => pool.is_of_this_process(),
            Self::Inline(_, maker) => maker.is_current(),
        }
    }

    /// No fault of the region is taken up any more.
    pub(crate) fn detach(&self, region: &Arc<Served>) {
        match self {
            Self::Pool(pool) => pool.remove(region),
            Self::Inline(registration, _) => drop(registration.lock().take()),
        }
    }

    pub(crate) const fn is_inline(&self) -> bool {
        matches!(self, Self::Inline(..))
    }
}
