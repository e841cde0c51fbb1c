//! A huge page to fill in peace, and to move away whole.
//!
//! ```text
//!   staging   |■■■■■■■■■■■■■■■■|  filled: one page fault, no page table     then empty again, for the next block
//!                    │ UFFDIO_MOVE
//!                    ▼
//!   region    |   one 2 MiB entry of the page table   |
//! ```
//!
//! Filling 2 MiB so takes less than half the time of copying 512 small pages in: the kernel takes one fault, one page
//! and one entry instead of 512 of each.

use crate::features::Features;
use crate::mapping::{OwnedMapping, unlock};
use crate::page::{AddressRange, HUGE, PageSize};
use crate::swap;
use crate::uffd::{Outcome, Uffd};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise};
use std::fmt;
use std::fs;
use std::num::NonZeroUsize;
use std::slice;

/// Private memory of [`HUGE`] bytes, aligned to as many: a huge page when it is filled, nothing when it has moved away.
pub struct Staging {
    mapping: OwnedMapping,
    /// Whether some of it may be there.
    used: bool,
}

impl Staging {
    /// Addresses for it; memory is taken when it is written to, and gone when it has moved.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`: `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let bytes = NonZeroUsize::new(HUGE).expect("a huge page has bytes");
        let mut mapping = OwnedMapping::aligned(bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        // A page that a child shares cannot be moved.
        mapping.do_not_fork()?;
        // Where there are no huge pages (EINVAL), it is 512 small ones, which move too.
        let _ = mapping.advise(MmapAdvise::MADV_HUGEPAGE);
        Ok(Self { mapping, used: false })
    }

    /// Its bytes, to be filled: zeros, in a huge page if there is one to be had.
    pub fn fresh(&mut self) -> &mut [u8] {
        if self.used {
            self.clear();
        }
        self.used = true;
        self.bytes_mut()
    }

    /// Makes all of it zeros. What has not moved is in small pages by now, and the next block is to have a huge one: the pages are
    /// given back. Those of a process that has locked its memory since (`mlockall(2)`) cannot be, unless they are unlocked.
    fn clear(&mut self) {
        if self.give_back().is_err() {
            let given = unlock(self.mapping.start(), HUGE).and_then(|()| self.give_back());
            if given.is_err() {
                self.bytes_mut().fill(0);
            }
        }
    }

    fn give_back(&mut self) -> Result<(), Errno> {
        // SAFETY: our own memory without a slice of it: `&mut self`. It reads as zeros afterwards.
        #[expect(unsafe_code, reason = "madvise")]
        unsafe {
            madvise(self.mapping.start(), HUGE, MmapAdvise::MADV_DONTNEED)
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: our own memory, readable and writable, and borrowed mutably.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts_mut(self.mapping.start().as_ptr().cast(), HUGE)
        }
    }

    /// Its bytes as they are: what was written, and zeros where it has moved away.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: our own memory, which only `&mut self` writes to or moves away.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.mapping.start().as_ptr().cast(), HUGE)
        }
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staging").finish_non_exhaustive()
    }
}

impl Uffd {
    /// Moves the staging's pages from `offset` on to the missing pages of `range`, and wakes. Linux 6.8.
    ///
    /// # Panics
    ///
    /// If the staging does not have as many whole pages there.
    #[doc(alias = "UFFDIO_MOVE")]
    pub fn move_staged(&self, range: AddressRange, staging: &mut Staging, offset: usize) -> Outcome {
        let inside = offset.checked_add(range.bytes()).is_some_and(|end| end <= HUGE);
        assert!(inside, "{range:?} from byte {offset} of a huge page");
        let start = staging.mapping.at(offset).addr().get();
        let source = AddressRange::new(start, range.bytes(), PageSize::system()).expect("a page's offset");
        // SAFETY: the staging's own memory, without a slice of it: `&mut`. What moves leaves zeros.
        #[expect(unsafe_code, reason = "the staging is the vouching owner that move_pages asks for")]
        let outcome = unsafe { self.move_pages(range, source) };
        staging.used = outcome != Outcome::Done || range.bytes() != HUGE;
        outcome
    }
}

/// Whether blocks can be filled in staging and moved on this kernel; else why not, and the remedy.
///
/// # Errors
///
/// The reason, for a person.
pub fn available(features: Features) -> Result<(), &'static str> {
    if !features.contains(Features::MOVE) {
        return Err("this kernel cannot move pages (Linux 6.8)");
    }
    if PageSize::system().bytes() != 4096 {
        return Err("huge pages are not 2 MiB here");
    }
    swap::moves_safely()?;
    if thp_is_disabled() {
        return Err(
            "huge pages are off for this process (prctl PR_SET_THP_DISABLE): switch them on, or do without",
        );
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

/// Whether this process has no transparent huge pages, whatever it advises.
fn thp_is_disabled() -> bool {
    // SAFETY: it takes no argument, and touches no memory.
    #[expect(unsafe_code, reason = "prctl")]
    let answer = unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) };
    // 3: but where they are advised (Linux 6.18).
    answer == 1
}
