//! The fork generation of a process. A thing that remembers it can tell in its destructor that a
//! forked child has inherited it, and leaves the parent's state alone then.
//!
//! A child of `fork(2)` inherits descriptors that are *shared*: a region that the child removes
//! from an epoll disappears from the parent's. It does not inherit reservations (`MADV_DONTFORK`):
//! another mapping of the child may be at their addresses.
//!
//! The generation of a process is one more than its parent's. The number is in a page that the
//! kernel wipes in each child (`MADV_WIPEONFORK`), also in a child of a raw `clone(2)`. A process
//! id is no substitute: a child in a new PID namespace may have the id of its parent, and ids are
//! reused.

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::num::NonZeroUsize;
use std::process;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The fork generation of the process in which this was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkGeneration {
    number: u64,
}

impl ForkGeneration {
    /// The generation of this process. Takes no lock and allocates nothing, so a signal handler may
    /// call it.
    #[must_use]
    pub fn current() -> Self {
        Self { number: current_number() }
    }

    /// True in the process that made this, false in its forked children.
    #[must_use]
    pub fn is_current(self) -> bool {
        self == Self::current()
    }

    /// A number that differs from that of each ancestor of this process, and is never 0.
    pub(crate) const fn number(self) -> u64 {
        self.number
    }
}

fn current_number() -> u64 {
    let Some(wiped) = wiped_page() else { return NUMBERED | u64::from(process::id()) };
    match wiped.load(Ordering::SeqCst) {
        // The page is empty in the first process and in each child that has not asked yet.
        0 => {
            let next = LAST.fetch_add(1, Ordering::SeqCst) + 1;
            wiped
                .compare_exchange(0, next, Ordering::SeqCst, Ordering::SeqCst)
                .map_or_else(|won| won, |_| next)
        }
        known => known,
    }
}

/// A word that is 0 at first in each process. `None` where the kernel cannot wipe a page: process
/// ids replace generations there.
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
    // SAFETY: the page was mapped for this word alone and is never unmapped, so the reference stays
    // valid.
    #[expect(unsafe_code, reason = "a word of a mapped page")]
    Some(unsafe { &*page })
}

fn map_wiped_page() -> Option<*mut AtomicU64> {
    // Miri does not know this advice.
    if cfg!(miri) {
        return None;
    }
    let bytes = NonZeroUsize::new(size_of::<AtomicU64>()).expect("a word has bytes");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses the address of a new mapping, which replaces no other.
    #[expect(unsafe_code, reason = "mmap")]
    let page = unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_PRIVATE) }.ok()?;
    // SAFETY: the advice is about the page mapped above. Children of fork see zeros in it. Linux
    // 4.14.
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
    // SAFETY: the page was mapped above, and no other thread has its address.
    #[expect(unsafe_code, reason = "munmap")]
    let _ = unsafe { munmap(start, size_of::<AtomicU64>()) };
}

/// A pointer that means "there is no such page". The answer stays the same as long as the process
/// lives, also after a refusal that would not last (`ENOMEM`), because a page that comes later would begin
/// another generation: the process would take itself for a child of its own.
fn no_page() -> *mut AtomicU64 {
    (&raw const LAST).cast_mut()
}

/// The last generation that was given. A child counts on from its parent's.
static LAST: AtomicU64 = AtomicU64::new(0);
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
/// The bit of a generation that is a process id.
const NUMBERED: u64 = 1 << 63;

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn all_threads_of_a_process_are_of_one_fork_generation() {
        let generations: Vec<_> = (0..8).map(|_| std::thread::spawn(ForkGeneration::current)).collect();
        assert!(generations.into_iter().all(|generation| generation.join().unwrap().is_current()));
        assert!(wiped_page().is_some(), "a generation is a process id only without such a page");
    }
}
