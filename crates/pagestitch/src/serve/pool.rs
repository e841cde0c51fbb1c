//! The pool: workers, and the regions that they serve.
//!
//! ```text
//!   region A: uffd ─┬──▶ epoll 0 ──▶ worker 0 ──┬─ the rest of a batch ─▶ queue ──┐
//!   region B: uffd ─┼──▶ epoll 1 ──▶ worker 1 ──┘     write(2) ─▶ wake_fd ─┐       │
//!   stop, wake_fd ──┘                  ▲  ▲─────────────────────────────────┘       │
//!                                      └────────────────────────────────────────────┘
//! ```
//!
//! Every worker waits for every region, and the first one to run serves: `read(2)` gives each event
//! to one worker only. Of a region with several shards, each shard has a uffd, and its faults wake one
//! worker: the shard's own, or another one if that is busy. If a source holds a worker up, another
//! worker takes its place at its epoll.

use crate::error::{BuildOption, Error, ErrorKind};
use crate::fault::PrefetchJob;
use crate::guard::AbortOnPanic;
use crate::serve::Served;
use crate::serve::contract::{Attachment, Demands, FaultServer};
use crate::serve::fork::fork_reader::ForkReader;
use crate::serve::placement::{Placement, WorkerCpus};
use crate::serve::served::FetchSemaphore;
use crate::serve::server_state::ServerState;
use crate::serve::watchdog::{Limits, Watchdog};
use crate::serve::worker_table;
use crate::signals::NoSignals;
use crate::space::{DeferredFree, Mapping, Shards, SpareUffds};
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::{Errno, Features, Reservation};
use parking_lot::Mutex;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A handle to threads that serve faults. Clone it freely; one pool serves any number of regions.
///
/// It keeps at most 64 userfaultfds of dropped regions for the next ones, until its own drop: a close
/// of one takes time for each mapping of the process.
///
/// The workers run until the last handle is dropped. Every region holds a handle, so a region is
/// served as long as it exists, even if the program drops its own handles.
///
/// ```
/// use pagestitch::{Pool, Region};
///
/// let pool = Pool::builder().workers(2).name("restore").start()?;
/// let region = Region::builder().chunk(vec![1u8; 100]).build(&pool)?;
/// assert!(pool.clone().stop().is_err());        // a region is still served
/// drop(region);
/// assert_eq!(pool.stop()?.workers, 2);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Clone)]
pub struct Pool {
    handle: Arc<Handle>,
}

impl Pool {
    /// Starts a pool with the default options.
    ///
    /// # Errors
    ///
    /// As [`PoolBuilder::start`].
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let pool = Pool::new()?;                                    // one for the program
    /// let regions: Vec<_> = (0..10).map(|i| Region::builder().chunk(vec![i; 5_000]).build(&pool)).collect::<Result<_, _>>()?;
    /// assert_eq!(regions[7].as_slice()[0], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn new() -> Result<Self, Error> {
        Self::builder().start()
    }

    /// A builder for a pool with other options.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// # use std::time::Duration;
    /// let pool = Pool::builder().workers(8).name("store").warn_after(Duration::from_secs(1)).start()?;
    /// assert_eq!(pool.workers(), 8);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn builder() -> PoolBuilder {
        PoolBuilder {
            workers: None,
            placement: Placement::Auto,
            name: String::from("pagestitch"),
            limits: Limits::default(),
            max_in_flight: None,
            max_workers: worker_table::MOST_BY_DEFAULT,
        }
    }

    /// The number of its workers, without the [replacements](PoolBuilder::max_workers) of workers
    /// that are held up.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// assert_eq!(Pool::builder().workers(3).start()?.workers(), 3);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn workers(&self) -> usize {
        self.handle.state.epolls.len()
    }

    /// The state of its workers at this moment.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// let pool = Pool::builder().workers(3).start()?;
    /// let workers = pool.metrics();
    /// assert_eq!((workers.working, workers.held_up, workers.shortages), (3, 0, 0));       // sources answer
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn metrics(&self) -> PoolMetrics {
        let workers = &self.handle.state.workers;
        PoolMetrics {
            working: workers.working(),
            held_up: workers.held_up.load(Ordering::Relaxed),
            replacements: workers.replacements.load(Ordering::Relaxed),
            shortages: workers.shortages.load(Ordering::Relaxed),
        }
    }

    /// Stops the workers and waits for them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InUse`] names the regions that are still served; drop them first, because a
    /// touch of a region without workers would hang. [`ErrorKind::ForkedChild`] in a forked child,
    /// because the workers are the parent's.
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, Pool, Region};
    /// let pool = Pool::new()?;
    /// let region = Region::builder().chunk(vec![1u8; 100]).build(&pool)?;
    /// assert_eq!(pool.clone().stop().unwrap_err().kind(), ErrorKind::InUse);
    /// drop(region);
    /// println!("{} faults in all", pool.stop()?.faults);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn stop(self) -> Result<PoolStats, Error> {
        if !self.handle.generation.is_current() {
            let what = "the pool belongs to the parent process: after fork(2), the child cannot stop it; drop it, or make a pool in the child";
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        self.handle.state.refuse_regions()?;
        Ok(self.handle.join())
    }
}

impl FaultServer for Pool {
    fn noun(&self) -> &'static str {
        "pool"
    }

    fn number(&self) -> usize {
        Arc::as_ptr(&self.handle).addr()
    }

    fn is_of_this_process(&self) -> bool {
        self.handle.generation.is_current()
    }

    fn shards(&self) -> usize {
        self.handle.state.shards()
    }

    fn threads(&self) -> usize {
        self.workers()
    }

    fn spare_uffds(&self) -> Option<&Arc<SpareUffds>> {
        self.handle.generation.is_current().then_some(&self.handle.state.spare_uffds)
    }

    fn open_shared(&self, wanted: Features) -> Option<Features> {
        let is_here = self.handle.generation.is_current();
        is_here.then(|| self.handle.state.open_shared(wanted)).flatten()
    }

    fn register_shared(&self, reservation: &Reservation) -> Result<Shards, Errno> {
        self.handle.state.shared_uffds.register(reservation)
    }

    // A pool serves every kind of region.
    fn check(&self, _demands: &Demands) -> Result<(), Error> {
        Ok(())
    }

    fn deferred_free(&self) -> Option<&Arc<DeferredFree>> {
        // A child may have been forked while another thread initialised it.
        let is_here = self.handle.generation.is_current();
        is_here.then(|| self.handle.deferred_free.get_or_init(|| Arc::new(DeferredFree::new())))
    }

    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
        if region.children.is_some() {
            self.handle.start_fork_reader()?;
        }
        // A partial start is undone.
        self.handle.state.add(region).inspect_err(|_| {
            self.detach(region);
            self.stop_reading(region);
        })?;
        Ok(Box::new(self.clone()))
    }
}

impl Attachment for Pool {
    fn is_of_this_process(&self) -> bool {
        self.handle.generation.is_current()
    }

    fn cpu_of(&self, region: &Mapping, shard: usize) -> Option<usize> {
        self.handle.state.cpu_of(region, shard)
    }

    fn prefetch(&self, region: &Arc<Served>, job: &Arc<PrefetchJob>) -> Result<(), Error> {
        self.handle.state.start_prefetch(region, job)
    }

    fn detach(&self, region: &Served) {
        self.handle.state.remove(region);
    }

    fn stop_reading(&self, region: &Served) {
        self.handle.state.stop_reading(region);
    }

    fn detach_children(&self, region: &Served) {
        let Some(children) = &region.children else { return };
        children.close().iter().for_each(|child| self.handle.state.detach_child(child));
        // Children that no worker has handled yet.
        self.handle.state.handle_all_deferred();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("workers", &self.workers()).finish_non_exhaustive()
    }
}

/// The options of a pool. Made by [`Pool::builder`].
#[derive(Debug, Clone)]
#[must_use]
pub struct PoolBuilder {
    workers: Option<usize>,
    placement: Placement,
    name: String,
    limits: Limits,
    max_in_flight: Option<usize>,
    max_workers: usize,
}

impl PoolBuilder {
    /// Sets the number of threads that serve faults. Default: given by the
    /// [placement](Self::placement), one for each CPU up to 32.
    ///
    /// Set a number if sources are slow, because each worker waits for one source at a time.
    /// [Replacements](Self::max_workers) start only after a source has taken 10 ms. With a number that is not
    /// one or two for each CPU, or is above eight, workers are not pinned to CPUs by default, and the touches of a
    /// single thread are slower.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// let pool = Pool::builder().workers(16).start()?;            // 16 reads of slow sources at once
    /// assert_eq!(pool.workers(), 16);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = Some(workers);
        self
    }

    /// Sets the highest number of threads, including replacements. Default: 64. At most 4,096;
    /// values below the number of [workers](Self::workers) are raised to it.
    ///
    /// A worker that is in one source for 10 ms is replaced by another thread, so that a source
    /// that hangs holds up no other region. After such a source answers, a worker that is not needed
    /// for a second ends. If all threads are held up, the pool logs an error and counts a
    /// [shortage](PoolMetrics::shortages); faults then wait until a source answers or the
    /// [`fault_timeout`](Self::fault_timeout) is over.
    ///
    /// Where the kernel forbids an `io_uring(7)`, up to 16 threads read
    /// [direct](crate::source::FileSource::direct) files, if all others wait for the disk. Not in a pool
    /// with [`max_in_flight`](Self::max_in_flight).
    ///
    /// So a slow source is read by as many threads at once as there are faults that wait for it. If
    /// that is too many, limit the region
    /// ([`Builder::max_in_flight`](crate::Builder::max_in_flight)).
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// let pool = Pool::builder().workers(2).max_workers(256).start()?;    // up to 254 sources may hang at once
    /// assert_eq!(pool.metrics().working, 2);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn max_workers(mut self, most: usize) -> Self {
        self.max_workers = most;
        self
    }

    /// Sets the CPUs on which the workers run. Default: [`Placement::Auto`].
    ///
    /// ```no_run
    /// # use pagestitch::{Placement, Pool};
    /// let pool = Pool::builder().placement(Placement::Cpus(vec![0])).start()?;    // the readers run on CPU 0
    /// assert_eq!(pool.workers(), 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Sets the name of the threads, which their number follows: `pagestitch/0` by default. The
    /// name is cut so that both fit into 15 bytes, the kernel's limit.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// let pool = Pool::builder().name("restore").start()?;        // in `top -H`: restore/0, restore/1, ...
    /// # drop(pool);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Limits the faults in flight over all regions. Default: unlimited. Values below the number of
    /// workers are raised to it.
    ///
    /// Each worker and each [replacement](Self::max_workers) has one fault in flight; the others are
    /// asynchronous fetches ([`Fetch`](crate::source::Fetch)). At the limit, a fetch waits without a
    /// worker, pages are not fetched ahead, and no worker is replaced. If the workers, with their
    /// replacements, are as many as the limit, a worker waits for its fetch.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// let pool = Pool::builder().workers(4).max_in_flight(64).start()?;   // at most 60 fetches beside 4 workers
    /// # drop(pool);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn max_in_flight(mut self, most: usize) -> Self {
        self.max_in_flight = Some(most);
        self
    }

    /// Logs and counts each fault that takes longer than `age`, once. Default: none.
    ///
    /// The line names the region, the offset, the chunk and its source, the age and the waiting
    /// thread. A fault that waits for a worker counts too. Time in which the process is stopped
    /// (SIGSTOP) does not count.
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// # use std::time::Duration;
    /// let pool = Pool::builder().warn_after(Duration::from_millis(500)).start()?;
    /// # drop(pool);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn warn_after(mut self, age: Duration) -> Self {
        self.limits.overdue = Some(age);
        self
    }

    /// Poisons the page of each fault that takes longer than `age`, so that its waiter gets SIGBUS.
    /// Default: none.
    ///
    /// The worker is not interrupted: if its source answers after all, the page gets its bytes. If
    /// no worker has begun the fault, the page stays poisoned until
    /// [`retry_failed`](crate::AnyRegion::retry_failed). `populate` and `read_at` wait as long as
    /// the source takes. Time counts as for [`warn_after`](Self::warn_after).
    ///
    /// ```
    /// # use pagestitch::Pool;
    /// # use std::time::Duration;
    /// let pool = Pool::builder()
    ///     .warn_after(Duration::from_secs(1))                     // a line in the log
    ///     .fault_timeout(Duration::from_secs(30))                 // SIGBUS for the waiting thread
    ///     .start()?;
    /// # drop(pool);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn fault_timeout(mut self, age: Duration) -> Self {
        self.limits.hard = Some(age);
        self
    }

    /// Starts the workers: all of them or none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidOption`] for no workers, a name with a NUL byte, or a CPU that this
    /// process may not use; [`ErrorKind::LimitReached`] if no thread or descriptor is left.
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, Pool};
    /// let error = Pool::builder().workers(0).start().unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InvalidOption);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn start(self) -> Result<Pool, Error> {
        if self.name.contains('\0') {
            let what = format!(
                "the pool's name {:?} has a NUL byte, which a thread's name cannot have: leave it out",
                self.name
            );
            return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Name));
        }
        let cpus = WorkerCpus::decide(self.workers, &self.placement)?;
        let mut state = ServerState::new(&cpus, self.max_workers, self.name)
            .map_err(|errno| Error::refused("cannot start a pool (descriptors: ulimit -n)", errno))?;
        let fetches = self.max_in_flight.map(|most| most.saturating_sub(cpus.workers));
        state.permits = fetches
            .map(|most| Arc::new(FetchSemaphore::new(most, FETCHES_WAITING, Arc::clone(&state.wake_fd))));
        let _quiet = NoSignals::until_dropped();
        // On an early return, dropping the handle stops the workers that have started.
        let handle = Handle {
            state: Arc::new(state),
            watch: Mutex::default(),
            fork_reader: Mutex::default(),
            deferred_free: OnceLock::new(),
            generation: ForkGeneration::current(),
        };
        for post in 0..cpus.workers {
            ServerState::start_worker(&handle.state, post, None)?;
        }
        let watchdog = Watchdog::new(Arc::clone(&handle.state), self.limits);
        let named = thread::Builder::new().name(String::from("pagestitch/wdog"));
        let watch = named.spawn(move || watchdog.run()).map_err(|error| {
            Error::no_thread("cannot start the watchdog (threads: ulimit -u; addresses: ulimit -v)", error)
        })?;
        *handle.watch.lock() = Some(watch);
        log!(debug, ?cpus, "pool started");
        Ok(Pool { handle: Arc::new(handle) })
    }
}

/// The totals of a pool, which [`Pool::stop`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// The number of workers that were joined.
    pub workers: usize,
    /// The number of faults that they served.
    pub faults: u64,
}

/// The state of the workers of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolMetrics {
    /// The number of workers, including replacements.
    pub working: usize,
    /// Of these, the workers that a source holds up: they have been in it for 10 ms or more.
    pub held_up: usize,
    /// The number of workers started so far in place of a worker that was held up.
    pub replacements: u64,
    /// How often so far a worker was held up and no other could be started in its place: see
    /// [`PoolBuilder::max_workers`].
    pub shortages: u64,
}

/// Shared by all handles to a pool. Its drop joins the workers.
struct Handle {
    state: Arc<ServerState>,
    watch: Mutex<Option<JoinHandle<()>>>,
    fork_reader: Mutex<Option<JoinHandle<()>>>,
    /// Its thread is not joined, because it may be in the destructor of a source.
    deferred_free: OnceLock<Arc<DeferredFree>>,
    generation: ForkGeneration,
}

impl Handle {
    /// Starts the fork reader, unless it runs already.
    fn start_fork_reader(&self) -> Result<(), Error> {
        let mut fork_reader = self.fork_reader.lock();
        if fork_reader.is_some() {
            return Ok(());
        }
        let what = "cannot serve children (descriptors: ulimit -n; threads: ulimit -u; addresses: ulimit -v)";
        let reads = ForkReader::new(&self.state.stop).map_err(|errno| Error::refused(what, errno))?;
        let _ = self.state.fork_reader.set(reads);
        let _quiet = NoSignals::until_dropped();
        let (state, begins) = (Arc::clone(&self.state), Arc::new(Barrier::new(2)));
        let named = thread::Builder::new().name(String::from("pagestitch/fork"));
        let begun = Arc::clone(&begins);
        let started = named.spawn(move || {
            let _abort = AbortOnPanic::armed();
            state.fork_reader.get().expect("set before").run(&state, &begun);
        });
        *fork_reader = Some(started.map_err(|error| Error::no_thread(what, error))?);
        begins.wait();
        Ok(())
    }

    fn join(&self) -> PoolStats {
        // The event stays readable, so every worker sees it.
        self.state.stop.write(1).expect("an eventfd takes a 1");
        // The watchdog and the fork reader start workers, so they end first. A thread does not join
        // itself: this may be one of these threads, if it drops a source that owns the last region
        // of the pool.
        if let Some(watch) = self.watch.lock().take().filter(is_another) {
            watch.join().expect("a panic of the watchdog aborts the process");
        }
        if let Some(fork_reader) = self.fork_reader.lock().take().filter(is_another) {
            fork_reader.join().expect("a panic of the fork reader aborts the process");
        }
        let (threads, before) = self.state.threads.lock().take();
        let faults = threads.into_iter().filter(is_another).map(|thread| thread.join());
        let faults: u64 = faults.map(|served| served.expect("a worker that panics aborts the process")).sum();
        PoolStats { workers: self.state.epolls.len(), faults: before + faults }
    }
}

fn is_another<T>(thread: &JoinHandle<T>) -> bool {
    thread.thread().id() != thread::current().id()
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.generation.is_current() {
            // A forked child has no threads to join, and shares the stop event with the parent.
            return;
        }
        self.deferred_free.get().into_iter().for_each(|frees| frees.end());
        let report = self.join();
        log!(debug, workers = report.workers, faults = report.faults, "pool stopped");
    }
}

/// Faults that can wait for permits before their queue has to grow.
const FETCHES_WAITING: usize = 256;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_pool_takes_no_region() {
        let pool = Pool::builder().workers(3).start().unwrap();
        assert_eq!(pool.clone().stop().unwrap(), PoolStats { workers: 3, faults: 0 });
        let error = crate::Region::builder().chunk(vec![0u8; 1]).build(&pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ServerStopped);
    }

    /// A worker that requests another look at a region while its service ends leaves no watch.
    #[test]
    fn the_end_of_service_leaves_no_watch_behind() {
        let pool = Pool::builder().workers(1).start().unwrap();
        let state = &pool.handle.state;
        let region = crate::Region::builder().chunk(vec![0u8; 1]).report_discards(true).build(&pool).unwrap();
        let served = region.served();
        for _ in 0..3000 {
            let ends = Barrier::new(2);
            thread::scope(|scope| {
                scope.spawn(|| {
                    ends.wait();
                    (0..10).for_each(|_| state.rearm(0, served, 0));
                });
                ends.wait();
                state.remove(served);
            });
            assert!(state.epolls[0].delete(served.uffd.get(0)).is_err(), "a watch is left");
            state.add(served).unwrap();
        }
    }
}
