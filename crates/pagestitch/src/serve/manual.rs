//! Manual: a server without threads. The caller's own loop waits for a descriptor, and then serves.

use crate::error::{BuildOption, Error, ErrorKind};
use crate::fault::PageReads;
use crate::fault::PrefetchJob;
use crate::serve::Served;
use crate::serve::contract::{Attachment, Demands, FaultServer};
use crate::serve::placement::WorkerCpus;
use crate::serve::server_state::ServerState;
use crate::serve::worker::Worker;
use crate::space::Mapping;
use crate::space::SpareUffds;
use pagestitch_kernel::Errno;
use pagestitch_kernel::fork::ForkGeneration;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fmt, ptr};

/// A server that works when the caller calls it: for a program with an event loop, or with threads
/// of its own.
///
/// Its descriptor is readable when there is work: watch it with `poll(2)`, `epoll(7)`, or a
/// runtime, and then call [`serve_ready`](Self::serve_ready). The thread that serves must not touch
/// the regions, because it would wait for itself.
///
/// Drop the regions before their server. Dropping the last `Manual` of a group closes the regions
/// that it still serves: a thread that touches them from then on, or waits in them, gets SIGSEGV.
/// It neither hangs nor reads zeros. No region can be built with that group any more.
///
/// ```
/// use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
/// use pagestitch::{Manual, Region};
/// use std::os::fd::AsFd;
///
/// let mut manual = Manual::new()?;
/// let region = Region::builder().chunk(vec![7u8; 100_000]).build(&manual)?;
/// std::thread::scope(|scope| {
///     let reader = scope.spawn(|| region.as_slice().iter().all(|&byte| byte == 7));
///     while !reader.is_finished() {                          // the caller's loop
///         let mut ready = [PollFd::new(manual.as_fd(), PollFlags::POLLIN)];
///         poll(&mut ready, PollTimeout::from(10u8)).expect("poll");
///         manual.serve_ready(64);
///     }
///     assert!(reader.join().unwrap());
/// });
/// # Ok::<(), pagestitch::Error>(())
/// ```
pub struct Manual {
    worker: Worker,
    group: Arc<Group>,
    member: usize,
}

/// The state that all members of a group share. The last member that is dropped closes the regions
/// that are still served.
#[derive(Debug)]
pub(crate) struct Group {
    state: Arc<ServerState>,
    taken: AtomicUsize,
    generation: ForkGeneration,
}

impl FaultServer for Group {
    fn noun(&self) -> &'static str {
        "Manual"
    }

    fn number(&self) -> usize {
        ptr::from_ref(self).addr()
    }

    fn is_of_this_process(&self) -> bool {
        self.generation.is_current()
    }

    fn spare_uffds(&self) -> Option<&Arc<SpareUffds>> {
        self.generation.is_current().then_some(&self.state.spare_uffds)
    }

    fn check(&self, demands: &Demands) -> Result<(), Error> {
        if demands.children {
            let what = "a manual serves no forked children, because its loop may wait for the allocator while fork(2) holds it: use a pool";
            return Err(Error::new(ErrorKind::UnsuitableServer, what).of_option(BuildOption::InheritOnFork));
        }
        Ok(())
    }

    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
        let attachment = Attached { state: Arc::clone(&self.state), generation: self.generation };
        // A partial start is undone.
        self.state.add(region).inspect_err(|_| attachment.detach(region))?;
        Ok(Box::new(attachment))
    }
}

/// A region's tie to a group. It keeps the shared state alive; the application decides whether a
/// member is left.
#[derive(Debug)]
struct Attached {
    state: Arc<ServerState>,
    generation: ForkGeneration,
}

impl Attachment for Attached {
    fn is_of_this_process(&self) -> bool {
        self.generation.is_current()
    }

    fn may_be_caller(&self) -> bool {
        true
    }

    fn check_running(&self, region: &Mapping) -> Result<(), Error> {
        self.state.check_running(&region.name)
    }

    fn prefetch(&self, region: &Arc<Served>, job: &Arc<PrefetchJob>) -> Result<(), Error> {
        self.state.start_prefetch(region, job)
    }

    fn detach(&self, region: &Served) {
        self.state.remove(region);
    }
}

impl Manual {
    /// A server for one thread.
    ///
    /// # Errors
    ///
    /// As [`group`](Self::group).
    ///
    /// ```
    /// # use pagestitch::{Manual, Region};
    /// let manual = Manual::new()?;
    /// let region = Region::builder().chunk(vec![7u8; 10_000]).build(&manual)?;
    /// region.populate(..)?;                                       // needs no loop
    /// assert_eq!(region.as_slice()[9_999], 7);
    /// # drop(region);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn new() -> Result<Self, Error> {
        let mut one = Self::group(1)?;
        Ok(one.pop().expect("one was asked for"))
    }

    /// A server for several threads: one `Manual` for each. A region that is built with one of them
    /// is served by all.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidOption`] for 0 threads; [`ErrorKind::LimitReached`] or
    /// [`ErrorKind::OutOfMemory`] if the kernel refuses descriptors or memory.
    ///
    /// ```
    /// # use pagestitch::{Manual, Region};
    /// let one_for_each_thread = Manual::group(4)?;
    /// let region = Region::builder().chunk(vec![7u8; 10_000]).build(&one_for_each_thread[0])?;     // served by all four
    /// # drop(region);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn group(threads: usize) -> Result<Vec<Self>, Error> {
        if threads == 0 {
            let what = "no thread would serve: ask for 1 or more";
            return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Workers));
        }
        let refused = |errno: Errno| Error::refused("cannot serve faults (descriptors: ulimit -n)", errno);
        let state = Arc::new(
            ServerState::new(&WorkerCpus::anywhere(threads), threads, String::new()).map_err(refused)?,
        );
        // No watchdog adds a member when sources hang. So the last free member also serves slow
        // regions that occupy no member yet.
        state.workers.last_resort.store(true, Ordering::Relaxed);
        let group = Group {
            state: Arc::clone(&state),
            taken: AtomicUsize::new(0),
            generation: ForkGeneration::current(),
        };
        let group = Arc::new(group);
        let take = |member: usize| {
            let slot = state.workers.add(member).expect("there is a slot for each");
            let worker = Worker::new(Arc::clone(&state), member, None, slot, PageReads::none());
            let worker = worker.map_err(refused)?;
            group.taken.fetch_add(1, Ordering::SeqCst);
            Ok(Self { worker, group: Arc::clone(&group), member })
        };
        (0..threads).map(take).collect()
    }

    /// Serves the pending faults and fills ahead, without waiting for more faults. Returns the
    /// number of served faults.
    ///
    /// Stops when no work is left, or after `budget` faults. It exceeds the budget only while more than
    /// 1,024 faults wait, which it then serves as it reads them. While work is left, the descriptor stays
    /// readable. A slow source holds up the caller. In a forked child it serves nothing and returns 0,
    /// because the regions and their faults are the parent's.
    ///
    /// ```
    /// # use pagestitch::{Manual, Region};
    /// let mut manual = Manual::new()?;
    /// let region = Region::builder().chunk(vec![7u8; 10_000]).build(&manual)?;
    /// std::thread::scope(|scope| {
    ///     let reader = scope.spawn(|| region.as_slice()[5_000]);
    ///     while !reader.is_finished() {
    ///         manual.serve_ready(64);                             // in place of this busy loop: wait for its descriptor
    ///     }
    ///     assert_eq!(reader.join().unwrap(), 7);
    /// });
    /// # drop(region);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn serve_ready(&mut self, budget: usize) -> usize {
        if !self.group.is_of_this_process() {
            return 0;
        }
        self.worker.serve_ready(budget as u64) as usize
    }

    pub(super) fn shared_group(&self) -> &Arc<Group> {
        &self.group
    }
}

impl AsFd for Manual {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.group.state.epolls()[self.member].0.as_fd()
    }
}

/// For event loops that take raw descriptors.
impl AsRawFd for Manual {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl fmt::Debug for Manual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manual").field("member", &self.member).finish_non_exhaustive()
    }
}

impl Drop for Manual {
    fn drop(&mut self) {
        // Regions hold the shared state too, but they serve nothing: the number of members decides.
        let last = self.group.taken.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.group.generation.is_current() {
            self.group
                .state
                .close()
                .iter()
                .filter_map(|handle| handle.enter())
                .for_each(|region| close(&region));
        }
    }
}

/// Closes a region that no member serves any more: a thread that waits in it, or touches it, gets a
/// signal.
fn close(region: &Arc<Served>) {
    region.end_service();
    region.end_prefetches();
    log!(warn, region = region.name, "closed: its last Manual was dropped; drop regions before their server");
}
