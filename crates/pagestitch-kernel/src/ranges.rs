//! The address ranges of this process that need care after their mapping: in a forked child, and after the drop.
//!
//! * **Hidden**: a child of `fork(2)` does not have the mapping (`MADV_DONTFORK`), so its addresses are free there, and another mapping
//!   of the child's could land at an address that an inherited pointer names. A fork handler maps `PROT_NONE` over them in the
//!   child: a touch is SIGSEGV. A child of a raw `clone(2)` has no such handlers.
//! * **Set aside**: a thread that waits in a range when it is dropped runs on afterwards, and touches the address once more. Were it
//!   unmapped at once, another mapping could be there by then. It stays `PROT_NONE` for a second, and is unmapped by a later
//!   build or drop; at once where addresses are short. A range in which no thread waits is unmapped by its drop.

use crate::page::PageSize;
use nix::errno::Errno;
use nix::libc::{self, c_void};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munlock, munmap};
use std::cell::UnsafeCell;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What is known of the process's ranges.
struct Ranges {
    hidden: BTreeMap<usize, Hidden>,
    /// Oldest first.
    aside: VecDeque<Aside>,
}

struct Hidden {
    end: usize,
    /// Parts that children have all the same, ascending: what is shown in place there.
    shown: Vec<Range<usize>>,
    served: Option<ServedRange>,
}

/// A range whose faults are served, and by what.
#[derive(Debug, Clone)]
pub struct ServedRange {
    /// What the region is called.
    pub name: String,
    /// Servers that its faults may wait for, each by a number of the caller's choice.
    pub servers: Vec<usize>,
}

/// A range that nothing is in any more, from a moment on.
struct Aside {
    since: Instant,
    range: Range<usize>,
}

/// Keeps a range's addresses from other mappings in children of `fork(2)`, until [`forget`].
pub(crate) fn hide(range: Range<usize>) {
    guard_forks();
    lock().hidden.insert(range.start, Hidden { end: range.end, shown: Vec::new(), served: None });
}

/// The range that begins at `start` is about to be unmapped.
pub(crate) fn forget(start: usize) {
    lock().hidden.remove(&start);
}

/// Notes that children have a part of the hidden range that begins at `start`.
pub(crate) fn show(start: usize, part: Range<usize>) {
    if let Some(hidden) = lock().hidden.get_mut(&start) {
        let place = hidden.shown.partition_point(|other| other.start < part.start);
        hidden.shown.insert(place, part);
    }
}

/// Notes what serves the hidden range that begins at `start`.
pub(crate) fn serve(start: usize, served: ServedRange) {
    if let Some(hidden) = lock().hidden.get_mut(&start) {
        hidden.served = Some(served);
    }
}

/// The served ranges that any of some addresses lie in, each with the number that comes with these.
#[must_use]
pub fn served_in(addresses: impl IntoIterator<Item = (usize, Range<usize>)>) -> Vec<(usize, ServedRange)> {
    let ranges = lock();
    let mut found = Vec::new();
    for (number, addresses) in addresses {
        // Ranges do not overlap: the first that ends before the addresses begin is the last to look at.
        let below = ranges.hidden.range(..addresses.end).rev();
        let meeting = below.take_while(|(_, hidden)| hidden.end > addresses.start);
        found.extend(meeting.filter_map(|(_, hidden)| Some((number, hidden.served.clone()?))));
    }
    found
}

/// Gives a range's pages back, and its addresses later. The range is an owned mapping that nothing refers to.
pub(crate) fn set_aside(range: Range<usize>) {
    empty(&range);
    let now = Instant::now();
    let old = {
        let mut ranges = lock();
        ranges.aside.push_back(Aside { since: now, range });
        ranges.take_old(now, SOME)
    };
    old.into_iter().for_each(release);
}

/// Unmaps some of what has been set aside for long enough.
pub(crate) fn release_old() {
    let old = lock().take_old(Instant::now(), SOME);
    old.into_iter().for_each(release);
}

/// Unmaps all that was set aside, as addresses are short: after a moment, if it was only just. False if there is nothing.
pub(crate) fn release_all() -> bool {
    let mut all: Vec<_> = lock().aside.drain(..).collect();
    let Some(last) = all.iter().map(|aside| aside.since).max() else { return false };
    thread::sleep(MOMENT.saturating_sub(last.elapsed()));
    // Neighbours are one mapping by now: to unmap the middle of one takes one more mapping, of which there may be none left.
    all.sort_unstable_by_key(|aside| aside.range.start);
    let joined = all.chunk_by(|left, right| left.range.end == right.range.start).map(|neighbours| Aside {
        since: last,
        range: neighbours[0].range.start..neighbours[neighbours.len() - 1].range.end,
    });
    joined.for_each(release);
    true
}

impl Ranges {
    /// At most `most` that were set aside long before `now`.
    fn take_old(&mut self, now: Instant, most: usize) -> Vec<Aside> {
        let is_old = |aside: &&Aside| now.saturating_duration_since(aside.since) >= LINGER;
        let old = self.aside.iter().take(most).take_while(is_old).count();
        self.aside.drain(..old).collect()
    }
}

/// Takes what is mapped in a range away, and closes it.
fn empty(range: &Range<usize>) {
    let Some(bytes) = NonZeroUsize::new(range.len()) else { return };
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
    // SAFETY: an owned mapping that nothing refers to any more, by the contract of `set_aside`.
    #[expect(unsafe_code, reason = "mmap over an owned mapping")]
    let replaced =
        unsafe { mmap_anonymous(NonZeroUsize::new(range.start), bytes, ProtFlags::PROT_NONE, flags) };
    if replaced.is_err() {
        // No mapping is left (vm.max_map_count), or no memory that may be locked: the same in place. Each of these may be refused;
        // the range is closed already, when its region was dropped.
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "closes an owned mapping")]
        let _ = unsafe { mprotect(at(range.start), bytes.get(), ProtFlags::PROT_NONE) };
        unlock(range);
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "takes the pages of an owned mapping away")]
        let _ = unsafe { madvise(at(range.start), bytes.get(), MmapAdvise::MADV_DONTNEED) };
    } else {
        unlock(range);
    }
}

/// What is only kept for its addresses does not count as locked.
fn unlock(range: &Range<usize>) {
    // SAFETY: whether pages may be swapped out changes none of their bytes.
    #[expect(unsafe_code, reason = "munlock")]
    let _ = unsafe { munlock(at(range.start), range.len()) };
}

fn release(aside: Aside) {
    // SAFETY: set aside: nothing refers to it.
    #[expect(unsafe_code, reason = "munmap")]
    let answer = unsafe { munmap(at(aside.range.start), aside.range.len()) };
    if answer.is_err() {
        // The middle of what has grown together, and no mapping is left for the other part: later.
        lock().aside.push_back(aside);
    }
}

fn at(address: usize) -> NonNull<c_void> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).expect("mappings are not at 0")
}

fn lock() -> MutexGuard<'static, Ranges> {
    RANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the C library call the functions below around each `fork(2)`.
fn guard_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: functions that live as long as the process. The child's makes system calls only, and reads what is locked for it.
        #[expect(unsafe_code, reason = "pthread_atfork")]
        let answer = unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) };
        // ENOMEM: children of fork have the addresses free, as those of clone(2) do.
        debug_assert_eq!(answer, 0, "pthread_atfork");
    });
}

/// The lock, from before a fork until after it, in both processes.
struct Held(UnsafeCell<Option<MutexGuard<'static, Ranges>>>);

// SAFETY: only the thread that forks touches it, between the handlers below, and the lock in it lets one thread do so at a time.
#[expect(unsafe_code, reason = "a lock that is kept across a function's end")]
unsafe impl Sync for Held {}

extern "C" fn before_fork() {
    let guard = lock();
    // SAFETY: the lock is held by this thread: no other is between its handlers.
    #[expect(unsafe_code, reason = "keeps the lock across the fork")]
    unsafe {
        *HELD.0.get() = Some(guard);
    }
}

extern "C" fn in_parent() {
    // SAFETY: this thread holds the lock, since `before_fork`.
    #[expect(unsafe_code, reason = "takes the lock back")]
    drop(unsafe { &mut *HELD.0.get() }.take());
}

extern "C" fn in_child() {
    // SAFETY: this thread holds the lock, since `before_fork`; there is no other thread here.
    #[expect(unsafe_code, reason = "takes the lock back")]
    let guard = unsafe { &mut *HELD.0.get() }.take();
    for (&start, hidden) in guard.iter().flat_map(|ranges| &ranges.hidden) {
        hidden.close(start);
    }
}

impl Hidden {
    /// Closes what is free of the range in a child: the gaps between what is shown in place, a system call each.
    fn close(&self, start: usize) {
        if close_if_free(&(start..self.end)) || is_mapped(&(start..self.end)) {
            return;
        }
        let mut from = start;
        for part in &self.shown {
            if from < part.start {
                close_free_parts(from..part.start);
            }
            from = from.max(part.end);
        }
        if from < self.end {
            close_free_parts(from..self.end);
        }
    }
}

/// Maps `PROT_NONE` wherever nothing is mapped in a range. Runs in a child of a process with threads: no allocation, no lock.
fn close_free_parts(range: Range<usize>) {
    if close_if_free(&range) || is_mapped(&range) {
        return;
    }
    // The application, or an alias, has something in a part of it.
    let page = PageSize::system().bytes();
    let middle = range.start + (range.len() / 2).next_multiple_of(page);
    if middle < range.end {
        close_free_parts(range.start..middle);
        close_free_parts(middle..range.end);
    }
}

fn close_if_free(range: &Range<usize>) -> bool {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED_NOREPLACE;
    let Some(bytes) = NonZeroUsize::new(range.len()) else { return true };
    // SAFETY: replaces nothing. Before Linux 4.17 the address is a hint, and the mapping may be elsewhere, where it harms nothing.
    #[expect(unsafe_code, reason = "mmap")]
    let mapped =
        unsafe { mmap_anonymous(NonZeroUsize::new(range.start), bytes, ProtFlags::PROT_NONE, flags) };
    // What is refused for another reason than that something is there is not asked for again in parts.
    mapped != Err(Errno::EEXIST)
}

fn is_mapped(range: &Range<usize>) -> bool {
    // SAFETY: begins no write-back with this flag; asks only whether all of it is mapped.
    #[expect(unsafe_code, reason = "msync")]
    let answer = unsafe { libc::msync(at(range.start).as_ptr(), range.len(), libc::MS_ASYNC) };
    answer == 0
}

static RANGES: Mutex<Ranges> = Mutex::new(Ranges { hidden: BTreeMap::new(), aside: VecDeque::new() });
static HELD: Held = Held(UnsafeCell::new(None));
/// How long a range keeps its addresses after its drop: for threads that were woken then, and have not run yet.
const LINGER: Duration = Duration::from_secs(1);
/// How long it keeps them where addresses are short.
const MOMENT: Duration = Duration::from_millis(10);
/// How many are unmapped by one build or drop: more than it sets aside.
const SOME: usize = 8;
