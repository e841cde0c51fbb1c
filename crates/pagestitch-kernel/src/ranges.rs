//! Address ranges of this process that need care beyond the life of their mapping: in a forked
//! child, and after the drop.
//!
//! * **Hidden**: a child of `fork(2)` does not inherit the mapping (`MADV_DONTFORK`), so another
//!   mapping of the child could land at an address that an inherited pointer names. A fork handler
//!   maps `PROT_NONE` over the range in the child, so an access there is SIGSEGV. A child of a raw
//!   `clone(2)` runs no fork handler.
//! * **Set aside**: a thread that waits in a range while it is dropped is woken and accesses its
//!   address once more. If the range were unmapped at once, that access could reach another
//!   mapping. The range stays `PROT_NONE` for a second, and a later build or drop unmaps it (at
//!   once if addresses are short). The drop itself unmaps a range in which no thread waits.

use crate::errno::Errno;
use crate::fork_window::ForkWindow;
use crate::page::PageSize;
use nix::libc::{self, c_int, c_void};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munlock, munmap};
use std::cell::UnsafeCell;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, process, thread};

/// The hidden ranges and those set aside.
struct Ranges {
    hidden: BTreeMap<usize, Hidden>,
    /// In the order of their drop.
    aside: VecDeque<Aside>,
    /// True if the C library calls the functions of this file around each fork.
    guarded: bool,
}

struct Hidden {
    end: usize,
    /// The parts that children do inherit, because something is shown there in place. Ascending.
    shown: Vec<Range<usize>>,
    served: Option<ServedRange>,
    /// Children inherit the range, and look into this window before `fork(2)` returns there.
    window: Option<Arc<ForkWindow>>,
}

/// The region in a range, and the servers of its faults.
#[derive(Debug, Clone)]
pub struct ServedRange {
    /// The name of the region.
    pub name: String,
    /// The servers that its faults may wait for, each by a number that the caller chooses.
    pub servers: Vec<usize>,
}

/// An empty range, and the moment since when it is empty.
struct Aside {
    since: Instant,
    range: Range<usize>,
}

/// Keeps other mappings away from a range's addresses in children of `fork(2)`, until [`forget`].
pub(crate) fn hide(range: Range<usize>) {
    let mut ranges = lock();
    ranges.guard_forks(at_forks);
    ranges
        .hidden
        .insert(range.start, Hidden { end: range.end, shown: Vec::new(), served: None, window: None });
}

/// Removes the range that begins at `start`. Its owner is about to unmap it.
pub(crate) fn forget(start: usize) {
    lock().hidden.remove(&start);
}

/// Notes that children inherit a part of the hidden range that begins at `start`.
pub(crate) fn show(start: usize, part: Range<usize>) {
    if let Some(hidden) = lock().hidden.get_mut(&start) {
        let place = hidden.shown.partition_point(|other| other.start < part.start);
        hidden.shown.insert(place, part);
    }
}

/// Notes that children inherit the range that begins at `start`, and wait until no thread is in a window.
pub(crate) fn inherit(start: usize, window: Arc<ForkWindow>) {
    if let Some(hidden) = lock().hidden.get_mut(&start) {
        hidden.window = Some(window);
    }
}

/// Notes the server of the hidden range that begins at `start`.
pub(crate) fn serve(start: usize, served: ServedRange) {
    if let Some(hidden) = lock().hidden.get_mut(&start) {
        hidden.served = Some(served);
    }
}

/// The served ranges that contain any of some addresses, each with the number that came with these
/// addresses.
#[must_use]
pub fn served_in(addresses: impl IntoIterator<Item = (usize, Range<usize>)>) -> Vec<(usize, ServedRange)> {
    let ranges = lock();
    let mut found = Vec::new();
    let Some(all) = ranges.around_hidden() else { return found };
    for (number, addresses) in addresses {
        // There may be millions of buffers, and the allocator's lie outside of all ranges.
        if addresses.end <= all.start || all.end <= addresses.start {
            continue;
        }
        // Ranges do not overlap, so the search downwards ends at the first range that ends before
        // the addresses begin.
        let below = ranges.hidden.range(..addresses.end).rev();
        let meeting = below.take_while(|(_, hidden)| hidden.end > addresses.start);
        found.extend(meeting.filter_map(|(_, hidden)| Some((number, hidden.served.clone()?))));
    }
    found
}

/// Frees the pages of a range now, and its addresses later. The range is an owned mapping without
/// any reference to it.
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

/// Unmaps some of the ranges that were set aside long ago.
pub(crate) fn release_old() {
    let old = lock().take_old(Instant::now(), SOME);
    old.into_iter().for_each(release);
}

/// Unmaps all ranges that were set aside, because addresses are short. Waits a moment if the last
/// of them is that new. False if no range was set aside.
pub(crate) fn release_all() -> bool {
    let mut all: Vec<_> = lock().aside.drain(..).collect();
    let Some(last) = all.iter().map(|aside| aside.since).max() else { return false };
    thread::sleep(MOMENT.saturating_sub(last.elapsed()));
    // The kernel has merged neighbouring ranges into one mapping. To unmap the middle of a mapping
    // takes one more mapping, which `vm.max_map_count` may refuse.
    all.sort_unstable_by_key(|aside| aside.range.start);
    let joined = all.chunk_by(|left, right| left.range.end == right.range.start).map(|neighbours| Aside {
        since: last,
        range: neighbours[0].range.start..neighbours[neighbours.len() - 1].range.end,
    });
    joined.for_each(release);
    true
}

impl Ranges {
    const fn new() -> Self {
        Self { hidden: BTreeMap::new(), aside: VecDeque::new(), guarded: false }
    }

    /// Lets the C library call the functions below around each `fork(2)`. Without memory for that
    /// (`ENOMEM`), the next range tries again; until then its addresses stay free in children of fork, as in
    /// children of clone(2).
    fn guard_forks(&mut self, register: impl FnOnce() -> c_int) {
        // Registered twice, the second call of `before_fork` would wait for the lock of the first one.
        self.guarded = self.guarded || register() == 0;
    }

    /// The addresses from the first hidden range to the end of the last one.
    fn around_hidden(&self) -> Option<Range<usize>> {
        let (first, _) = self.hidden.first_key_value()?;
        let (_, last) = self.hidden.last_key_value()?;
        Some(*first..last.end)
    }

    /// Takes out at most `most` ranges that were set aside long before `now`.
    fn take_old(&mut self, now: Instant, most: usize) -> Vec<Aside> {
        let is_old = |aside: &&Aside| now.saturating_duration_since(aside.since) >= LINGER;
        let old = self.aside.iter().take(most).take_while(is_old).count();
        self.aside.drain(..old).collect()
    }
}

/// Frees the pages of a range and closes it to every access.
fn empty(range: &Range<usize>) {
    let Some(bytes) = NonZeroUsize::new(range.len()) else { return };
    if !close(range) {
        // The kernel has refused another mapping (vm.max_map_count, or the limit on locked memory):
        // frees the pages in place. Each of these calls may fail too; the drop of the region has
        // closed the range before.
        // SAFETY: no reference to the bytes of the range exists, as above.
        #[expect(unsafe_code, reason = "closes an owned mapping")]
        let _ = unsafe { mprotect(at(range.start), bytes.get(), ProtFlags::PROT_NONE) };
        unlock(range);
        // SAFETY: no reference to the bytes that this frees exists, as above.
        #[expect(unsafe_code, reason = "takes the pages of an owned mapping away")]
        let _ = unsafe { madvise(at(range.start), bytes.get(), MmapAdvise::MADV_DONTNEED) };
    } else {
        unlock(range);
    }
}

/// Maps `PROT_NONE` over a range that is about to end, or that a child cannot be served in. False if the
/// kernel refuses.
fn close(range: &Range<usize>) -> bool {
    let Some(bytes) = NonZeroUsize::new(range.len()) else { return true };
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
    // SAFETY: by the contract of `set_aside`, the range is an owned mapping and no reference to its
    // bytes exists; or the process is a child at its first step, and an access through an inherited
    // reference ends it, as the access to a range that children do not inherit.
    #[expect(unsafe_code, reason = "mmap over an owned mapping")]
    let closed =
        unsafe { mmap_anonymous(NonZeroUsize::new(range.start), bytes, ProtFlags::PROT_NONE, flags) };
    closed.is_ok()
}

/// A range that is kept only for its addresses must not count as locked memory.
fn unlock(range: &Range<usize>) {
    // SAFETY: munlock(2) lets the kernel swap pages out, and changes no byte of them.
    #[expect(unsafe_code, reason = "munlock")]
    let _ = unsafe { munlock(at(range.start), range.len()) };
}

fn release(aside: Aside) {
    // SAFETY: the range was set aside, so no reference to its bytes exists.
    #[expect(unsafe_code, reason = "munmap")]
    let answer = unsafe { munmap(at(aside.range.start), aside.range.len()) };
    if answer.is_err() {
        // The range is the middle of a merged mapping and no mapping is left for the other part. A
        // later call tries again.
        lock().aside.push_back(aside);
    }
}

fn at(address: usize) -> NonNull<c_void> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).expect("mappings are not at 0")
}

fn lock() -> MutexGuard<'static, Ranges> {
    RANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers the functions below. 0, or the errno.
fn at_forks() -> c_int {
    // SAFETY: the functions live as long as the process. The one in the child makes system
    // calls only, and reads the ranges under the lock that the parent has taken for it.
    #[expect(unsafe_code, reason = "pthread_atfork")]
    unsafe {
        libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child))
    }
}

/// The lock on the ranges, held from before a fork until after it, in both processes.
struct Held(UnsafeCell<Option<MutexGuard<'static, Ranges>>>);

// SAFETY: only a forking thread accesses the cell, in the handlers below, and it holds the lock
// that is kept in the cell.
#[expect(unsafe_code, reason = "a lock that is kept across a function's end")]
unsafe impl Sync for Held {}

extern "C" fn before_fork() {
    let guard = lock();
    // SAFETY: this thread holds the lock, so no other thread is between its handlers and accesses
    // the cell.
    #[expect(unsafe_code, reason = "keeps the lock across the fork")]
    unsafe {
        *HELD.0.get() = Some(guard);
    }
}

extern "C" fn in_parent() {
    // SAFETY: this thread has held the lock since `before_fork`, so no other thread accesses the
    // cell.
    #[expect(unsafe_code, reason = "takes the lock back")]
    drop(unsafe { &mut *HELD.0.get() }.take());
}

extern "C" fn in_child() {
    // SAFETY: this thread has held the lock since `before_fork`, and it is the only thread of the
    // child.
    #[expect(unsafe_code, reason = "takes the lock back")]
    let guard = unsafe { &mut *HELD.0.get() }.take();
    for (&start, hidden) in guard.iter().flat_map(|ranges| &ranges.hidden) {
        if hidden.window.as_ref().is_none_or(|window| window.wait()) {
            hidden.close(start);
        } else if !close(&(start..hidden.end)) {
            // No userfaultfd is left, so its missing pages would read as zeros.
            let what = b"pagestitch: a forked child cannot close a region whose server has ended: abort\n";
            let _ = nix::unistd::write(io::stderr(), what);
            process::abort();
        }
    }
}

impl Hidden {
    /// Closes the free parts of the range in a child: the gaps between the parts that are shown in
    /// place, with one system call each.
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

/// Maps `PROT_NONE` wherever nothing is mapped in a range. Runs in the child of a process with
/// threads, so it neither allocates nor takes a lock.
fn close_free_parts(range: Range<usize>) {
    if close_if_free(&range) || is_mapped(&range) {
        return;
    }
    // The application, or an alias, has mapped a part of the range.
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
    // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping. Before Linux 4.17 the kernel takes the
    // address as a hint and may map another place, which is harmless.
    #[expect(unsafe_code, reason = "mmap")]
    let mapped =
        unsafe { mmap_anonymous(NonZeroUsize::new(range.start), bytes, ProtFlags::PROT_NONE, flags) };
    // Only EEXIST means that something is mapped there. After any other error, smaller parts would
    // fail too.
    mapped.map_err(Errno::of) != Err(Errno::EEXIST)
}

fn is_mapped(range: &Range<usize>) -> bool {
    // SAFETY: msync(2) with MS_ASYNC only checks that the range is mapped; it starts no write-back
    // and changes no byte.
    #[expect(unsafe_code, reason = "msync")]
    let answer = unsafe { libc::msync(at(range.start).as_ptr(), range.len(), libc::MS_ASYNC) };
    answer == 0
}

static RANGES: Mutex<Ranges> = Mutex::new(Ranges::new());
static HELD: Held = Held(UnsafeCell::new(None));
/// How long a dropped range keeps its addresses: long enough for threads that its drop has woken to
/// run.
const LINGER: Duration = Duration::from_secs(1);
/// How long a dropped range keeps its addresses if addresses are short.
const MOMENT: Duration = Duration::from_millis(10);
/// How many ranges one build or drop unmaps. Larger than the number that it sets aside, so the list
/// shrinks.
const SOME: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_functions_around_a_fork_are_registered_once_and_again_after_a_lack_of_memory() {
        let (mut ranges, mut asked) = (Ranges::new(), 0);
        for answer in [libc::ENOMEM, libc::ENOMEM, 0, 0, 0] {
            ranges.guard_forks(|| {
                asked += 1;
                answer
            });
        }
        assert_eq!((asked, ranges.guarded), (3, true));
    }
}
