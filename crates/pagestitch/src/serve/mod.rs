//! The servers that answer faults, and how they do it.
//!
//! | file | content |
//! |---|---|
//! | `contract` | the traits between a server and a region |
//! | `served` | a region with the state that its server keeps for it |
//! | `pool` | the public handle: starts and stops the threads |
//! | `placement` | the CPUs on which workers run |
//! | `server_state` | the state that the workers of a server share |
//! | `queue` | the entries of its queues |
//! | `prefetch_queue` | the prefetches that the application has requested |
//! | `start` | the start of a worker |
//! | `watch` | descriptors that an epoll watches |
//! | `end_service` | the end of a region's service |
//! | `worker` | the loop of a worker: read a batch, serve the first fault, queue the rest |
//! | `urgency` | the priority of a worker while many threads wait for the same pages |
//! | `events` | pages that are discarded, unmapped or moved, and forks |
//! | `latency_estimate` | how long the faults of a region take |
//! | `read_turn` | one worker at a time reads the events of foreign memory |
//! | `worker_table` | the workers with their progress; workers that hang are replaced |
//! | `worker_threads` | the join handles of workers |
//! | `bulkhead` | limits the faults of one region that are served at once |
//! | `fetch_semaphore` | limits the fetches of a pool |
//! | `slow_admission` | limits the workers that slow regions occupy together |
//! | `timers` | tasks to do after a pause |
//! | `weak_handle` | the weak handle that a server keeps of a region |
//! | `inline` | a server without threads: the thread that takes a fault serves it |
//! | `in_handler` | the same steps in the signal handler of that thread |
//! | `manual` | the same steps in the caller's own loop |
//! | `eager` | a server without faults: the build fills the region |
//! | `best` | a pool, or `eager` where userfaultfd is missing |
//! | `append` | a further chunk at the end of a region |
//! | `replace` | other bytes for pages of a region |
//! | `populate` | the same steps for pages that no thread has touched |
//! | `retry_failed` | fills pages whose source has failed before |
//! | `abandon` | poisons the absent pages of adopted memory whose region is dropped |
//! | `watchdog` | replaces workers that hang; reports and poisons overdue faults |
//! | `fork` | forked children |
//! | `rate_limit` | limits log lines that another process can cause |

mod abandon;
mod append;
mod best;
mod bulkhead;
mod contract;
mod eager;
mod end_service;
mod events;
mod fetch_semaphore;
pub(crate) mod fork;
mod in_handler;
mod inline;
mod latency_estimate;
mod manual;
mod placement;
mod pool;
mod populate;
mod prefetch_queue;
mod queue;
mod rate_limit;
pub(crate) mod read_turn;
mod replace;
mod retry_failed;
mod served;
mod server_state;
mod shared_uffds;
mod slow_admission;
mod start;
mod timers;
mod urgency;
mod watch;
mod watchdog;
pub(crate) mod weak_handle;
mod worker;
pub(crate) mod worker_table;
mod worker_threads;

pub(crate) use append::append;
pub use best::{BestServer, best_server};
pub(crate) use contract::{Attachment, Demands, FaultServer, INLINE};
pub use eager::Eager;
pub use inline::Inline;
use manual::Group;
pub use manual::Manual;
pub use placement::Placement;
pub use pool::{Pool, PoolBuilder, PoolMetrics, PoolStats};
pub(crate) use populate::fill_rest;
pub(crate) use replace::{DropPages, replace};
pub(crate) use served::{ForkedChildren, Served};

use crate::error::{Error, ErrorKind};
use std::sync::Arc;

/// The server that answers the faults of a region. A function with an `impl Into<Server>` argument
/// accepts any of these:
///
/// | | served by | choose it when |
/// |---|---|---|
/// | `&`[`Pool`] | threads of the pool | in general: any source, readahead, system calls on absent pages |
/// | [`Inline`] | the faulting thread | single touches must be fast, and the bytes lie in memory |
/// | `&`[`Manual`] | the caller's own loop | the program has an event loop, or threads of its own |
/// | [`Eager`] | the build, which fills all pages | the process may not use userfaultfd |
/// | `&`[`BestServer`] | a pool, or [`Eager`] | the program runs with and without userfaultfd |
#[derive(Debug, Clone)]
pub struct Server(Arc<dyn FaultServer>);

impl From<&Pool> for Server {
    fn from(pool: &Pool) -> Self {
        Self(Arc::new(pool.clone()))
    }
}

impl From<Inline> for Server {
    fn from(_: Inline) -> Self {
        Self(Arc::new(Inline))
    }
}

impl From<Eager> for Server {
    fn from(_: Eager) -> Self {
        Self(Arc::new(Eager))
    }
}

impl From<&Manual> for Server {
    fn from(manual: &Manual) -> Self {
        let group: Arc<Group> = Arc::clone(manual.shared_group());
        Self(group)
    }
}

impl Server {
    /// A server that a test has made.
    #[cfg(all(test, not(shuttle)))]
    pub(crate) fn of(server: Arc<dyn FaultServer>) -> Self {
        Self(server)
    }

    pub(crate) fn inner(&self) -> &dyn FaultServer {
        self.0.as_ref()
    }

    /// Starts to serve a region.
    ///
    /// Refuses a server that a forked child has inherited: it has no threads there, and its
    /// descriptors are the parent's, so that no thread would read the region's faults.
    pub(crate) fn start(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
        if !self.0.is_of_this_process() {
            let (name, server) = (&region.name, self.0.noun());
            let what = format!(
                "region {name}: the {server} belongs to the parent process: after fork(2), make a {server} in the child"
            );
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        self.0.attach(region)
    }
}
