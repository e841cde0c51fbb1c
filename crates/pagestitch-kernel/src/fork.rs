//! Whether this is still the process that made a thing: a forked child's destructors must not tear down its parent's.
//!
//! A child of `fork(2)` inherits descriptors that are *shared* (taking a region out of an epoll takes it out of the
//! parent's) and addresses that are *not* (a reservation is `MADV_DONTFORK`, so by now something else may be there).
//!
//! A process is known by its generation: one more than its parent's. The number stands in a page that the kernel wipes in each child
//! (`MADV_WIPEONFORK`), also of a raw `clone(2)`. Process ids would not do: a child in a new PID namespace may have its parent's, and
//! they are reused.

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::num::NonZeroUsize;
use std::process;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// Remembers the process that it was made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkGeneration {
    number: u64,
}

impl ForkGeneration {
    /// This process. Takes no lock and allocates nothing, so that a signal handler may ask.
    #[must_use]
    pub fn current() -> Self {
        Self { number: current_number() }
    }

    /// Whether this is that process. False in a forked child.
    #[must_use]
    pub fn is_current(self) -> bool {
        self == Self::current()
    }

    /// A number that no ancestor of this process has, and is never 0.
    pub(crate) const fn number(self) -> u64 {
        self.number
    }
}

fn current_number() -> u64 {
    let Some(wiped) = wiped_page() else { return NUMBERED | u64::from(process::id()) };
    match wiped.load(Ordering::SeqCst) {
        // The page is new here: in the first process, or in a child.
        0 => {
            let next = LAST.fetch_add(1, Ordering::SeqCst) + 1;
            wiped
                .compare_exchange(0, next, Ordering::SeqCst, Ordering::SeqCst)
                .map_or_else(|won| won, |_| next)
        }
        known => known,
    }
}

/// A word that is 0 in each process at first. `None` where there is none to be had: process ids have to do then.
fn wiped_page() -> Option<&'static AtomicU64> {
    let mut page = PAGE.load(Ordering::SeqCst);
    if page.is_null() {
        let new = map_wiped_page().unwrap_or_else(no_page);
        page = match PAGE.compare_exchange(ptr::null_mut(), new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => new,
            Err(first) => {
                unmap(new);
                first
            }
        };
    }
    if page == no_page() {
        return None;
    }
    // SAFETY: a page that was mapped for this, is never unmapped, and holds only this word.
    #[expect(unsafe_code, reason = "a word of a mapped page")]
    Some(unsafe { &*page })
}

fn map_wiped_page() -> Option<*mut AtomicU64> {
    // Not for Miri, which knows no such advice.
    if cfg!(miri) {
        return None;
    }
    let bytes = NonZeroUsize::new(size_of::<AtomicU64>()).expect("a word has bytes");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping where the kernel chooses replaces nothing.
    #[expect(unsafe_code, reason = "mmap")]
    let page = unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_PRIVATE) }.ok()?;
    // SAFETY: the page that was just mapped, and what a child of fork sees of it. Linux 4.14.
    #[expect(unsafe_code, reason = "madvise")]
    let advised = unsafe { madvise(page, bytes.get(), MmapAdvise::MADV_WIPEONFORK) };
    let page = page.as_ptr().cast();
    if advised.is_err() {
        unmap(page);
    }
    advised.ok().map(|()| page)
}

fn unmap(page: *mut AtomicU64) {
    let Some(start) = NonNull::new(page.cast()).filter(|_| page != no_page()) else { return };
    // SAFETY: a page that was mapped above, and that no other thread has seen.
    #[expect(unsafe_code, reason = "munmap")]
    let _ = unsafe { munmap(start, size_of::<AtomicU64>()) };
}

/// Stands for the page where there is none: the answer stays the same as long as the process lives.
fn no_page() -> *mut AtomicU64 {
    (&raw const LAST).cast_mut()
}

/// The last generation that was given: a child goes on counting where its parent was.
static LAST: AtomicU64 = AtomicU64::new(0);
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
/// Marks a generation that is a process id.
const NUMBERED: u64 = 1 << 63;

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn all_threads_of_a_process_are_of_one_fork_generation() {
        let generations: Vec<_> = (0..8).map(|_| std::thread::spawn(ForkGeneration::current)).collect();
        assert!(generations.into_iter().all(|generation| generation.join().unwrap().is_current()));
        assert!(wiped_page().is_some(), "process ids do where there is no such page");
    }
}
