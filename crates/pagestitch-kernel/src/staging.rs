//! A huge page that is filled apart from a region, and moves there whole.
//!
//! ```text
//!   staging   |■■■■■■■■■■■■■■■■|  filled: one page fault, no page table     then empty again, for the next block
//!                    │ UFFDIO_MOVE
//!                    ▼
//!   region    |   one 2 MiB entry of the page table   |
//! ```
//!
//! To fill 2 MiB in this way takes less than half the time of 512 copies of small pages, because
//! the kernel handles one fault, one page and one entry instead of 512 of each. Where the memory of
//! the machine is fragmented, it takes many times as long, because the kernel moves other pages to
//! make room for a huge one ("direct compaction"). After such a block, staging pauses for some blocks.

use crate::errno::Errno;
use crate::features::Features;
use crate::mapping::{OwnedMapping, unlock};
use crate::page::{AddressRange, HUGE, PageSize};
use crate::swap;
use crate::uffd::{Outcome, Uffd};
use nix::libc;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise};
use nix::time::{ClockId, clock_gettime};
use std::fmt;
use std::fs;
use std::num::NonZeroUsize;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Private memory of [`HUGE`] bytes, aligned to as many: a huge page when it is filled, empty when
/// that has moved away.
pub struct Staging {
    mapping: OwnedMapping,
    /// True if part of it may be present.
    used: bool,
}

/// Decides whether a block is staged, by the cost of the last huge pages.
struct Pace {
    /// The number of costly huge pages in a row.
    costly: AtomicU32,
    /// The number of blocks that are not staged next.
    pause: AtomicU32,
}

impl Staging {
    /// Reserves its addresses. It takes memory when it is written, and none after a move.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`: `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let bytes = NonZeroUsize::new(HUGE).expect("a huge page has bytes");
        let mut mapping = OwnedMapping::aligned(bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        // A page that a child shares cannot move.
        mapping.do_not_fork()?;
        // On a kernel without huge pages the advice fails (EINVAL), and 512 small pages move
        // instead.
        let _ = mapping.advise(MmapAdvise::MADV_HUGEPAGE);
        Ok(Self { mapping, used: false })
    }

    /// Its bytes, all zeros, to be filled. They are in a huge page if the kernel has one.
    pub fn fresh(&mut self) -> &mut [u8] {
        if self.used {
            self.clear();
        }
        self.used = true;
        self.bytes_mut()
    }

    /// As [`fresh`](Self::fresh), with its memory. `None` while huge pages cost more than they save:
    /// fill this block in another way.
    pub fn fresh_if_cheap(&mut self) -> Option<&mut [u8]> {
        if pauses() {
            return None;
        }
        let before = processor_time();
        // The first write takes the memory.
        self.fresh()[0] = 0;
        PACE.record(processor_time().saturating_sub(before));
        Some(self.bytes_mut())
    }

    /// Makes all of it zeros. Pages that have not moved are small by now, so the pages are freed
    /// and the next block can have a huge one. The kernel frees locked pages (`mlockall(2)`) only
    /// after they are unlocked.
    fn clear(&mut self) {
        if self.give_back().is_err() {
            let given = unlock(self.mapping.start(), HUGE).and_then(|()| self.give_back());
            if given.is_err() {
                self.bytes_mut().fill(0);
            }
        }
    }

    fn give_back(&mut self) -> Result<(), Errno> {
        // SAFETY: the mapping is owned, and `&mut self` excludes a slice of its bytes. They read as
        // zeros afterwards.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe {
            madvise(self.mapping.start(), HUGE, MmapAdvise::MADV_DONTNEED).map_err(Errno::of)
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is owned, readable and writable, and `self` is borrowed mutably.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts_mut(self.mapping.start().as_ptr().cast(), HUGE)
        }
    }

    /// Its bytes as they are: the written ones, and zeros where pages have moved away.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is owned, and only functions with `&mut self` write its bytes or move
        // them away.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.mapping.start().as_ptr().cast(), HUGE)
        }
    }
}

impl Pace {
    const fn new() -> Self {
        Self { costly: AtomicU32::new(0), pause: AtomicU32::new(0) }
    }

    /// True if the next block is not staged.
    fn pauses(&self) -> bool {
        let less = |pause: u32| pause.checked_sub(1);
        self.pause.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Records the processor time that a huge page took.
    fn record(&self, cost: Duration) {
        if cost < COSTLY {
            return self.costly.store(0, Ordering::Relaxed);
        }
        // Of two threads at once, one may be lost, which shortens a pause.
        let costly = self.costly.load(Ordering::Relaxed);
        self.pause.store(PAUSE_MIN << costly, Ordering::Relaxed);
        self.costly.store((costly + 1).min(DOUBLINGS), Ordering::Relaxed);
    }
}

/// Of all threads together, because they take pages of the same machine.
static PACE: Pace = Pace::new();

/// True if the next block is not staged, because huge pages cost more than they save. A call is for one
/// block: the pause ends after some.
#[must_use]
pub fn pauses() -> bool {
    PACE.pauses() && !ALWAYS.load(Ordering::Relaxed)
}

/// Stages each block from now on, whatever a huge page costs. For tests and measurements, whose result
/// must not depend on the memory of the machine.
pub fn never_pause() {
    ALWAYS.store(true, Ordering::Relaxed);
}

static ALWAYS: AtomicBool = AtomicBool::new(false);

/// The processor time that this thread has used so far. Wall time would count other threads, too.
fn processor_time() -> Duration {
    // The call cannot fail, because every thread has this clock.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// More than it takes to copy 2 MiB in small pages; a huge page that is free takes a tenth of a
/// millisecond.
const COSTLY: Duration = Duration::from_millis(1);
/// The number of blocks that are not staged after the first costly huge page. It doubles with each
/// further one, up to 512.
const PAUSE_MIN: u32 = 8;
const DOUBLINGS: u32 = 6;

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staging").finish_non_exhaustive()
    }
}

impl Uffd {
    /// Moves pages of the staging, from `offset` on, to the missing pages of `range`, and wakes the
    /// waiting threads. Linux 6.8.
    ///
    /// # Panics
    ///
    /// If the staging does not have as many whole pages at `offset`.
    #[doc(alias = "UFFDIO_MOVE")]
    pub fn move_staged(&self, range: AddressRange, staging: &mut Staging, offset: usize) -> Outcome {
        let inside = offset.checked_add(range.bytes()).is_some_and(|end| end <= HUGE);
        assert!(inside, "{range:?} from byte {offset} of a huge page");
        let start = staging.mapping.at(offset).addr().get();
        let source = AddressRange::new(start, range.bytes(), PageSize::system()).expect("a page's offset");
        // SAFETY: the staging owns the source, and `&mut` excludes a slice of its bytes. Moved
        // pages read as zeros.
        #[expect(unsafe_code, reason = "the staging is the vouching owner that move_pages asks for")]
        let outcome = unsafe { self.move_pages(range, source) };
        staging.used = outcome != Outcome::Done || range.bytes() != HUGE;
        outcome
    }
}

/// Checks that this kernel can fill blocks in staging and move them.
///
/// # Errors
///
/// The reason and the remedy, for a person.
pub fn available(features: Features) -> Result<(), &'static str> {
    if !features.contains(Features::MOVE) {
        return Err("this kernel cannot move pages: use Linux 6.8 or newer");
    }
    if PageSize::system().bytes() != 4096 {
        return Err(
            "a huge page is not 2 MiB, because the base page is not 4 KiB: use a kernel with 4 KiB pages",
        );
    }
    swap::moves_safely()?;
    if thp_is_disabled() {
        return Err("huge pages are off for this process (prctl PR_SET_THP_DISABLE): switch them on");
    }
    let mode = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if mode.contains("[always]") || mode.contains("[madvise]") {
        Ok(())
    } else {
        Err(
            "there are no transparent huge pages: write madvise to /sys/kernel/mm/transparent_hugepage/enabled",
        )
    }
}

/// True if this process has no transparent huge pages even where it advises them.
fn thp_is_disabled() -> bool {
    // SAFETY: the call takes integers and touches no memory.
    #[expect(unsafe_code, reason = "prctl")]
    let answer = unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) };
    // Since Linux 6.18 the answer may be 3: huge pages only where they are advised.
    answer == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_pauses_longer_after_each_costly_page_and_goes_on_after_a_cheap_one() {
        let pace = Pace::new();
        let paused =
            |pace: &Pace| std::iter::repeat_with(|| pace.pauses()).take_while(|pauses| *pauses).count();
        assert_eq!(paused(&pace), 0);
        for pause in [8, 16, 32, 64, 128, 256, 512, 512] {
            pace.record(COSTLY);
            assert_eq!(paused(&pace), pause);
        }
        pace.record(COSTLY / 2);
        assert_eq!(paused(&pace), 0);
        pace.record(COSTLY);
        assert_eq!(paused(&pace), 8);
    }
}
