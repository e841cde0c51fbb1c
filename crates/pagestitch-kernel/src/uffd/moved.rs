//! Whether a page has moved, where the kernel's answer to the move does not tell.
//!
//! A move that meets a page whose entry changes at the same moment, by swap or compaction, begins again inside the
//! kernel. Since Linux 6.18 (and still in 6.18.44) it then moves the page, but keeps the error of the first attempt
//! (`err` in `move_pages`, `mm/userfaultfd.c`). So it looks at the page once more, finds it there, and answers
//! `EEXIST`, or the progress before this page. A caller that believed this would lose the page.

use crate::page::{AddressRange, PageSize};
use crate::swap;
use nix::libc::{self, c_void};

/// The place of a page, as far as the kernel tells: `/proc/self/pagemap` cannot be opened by a process without
/// descriptors, for example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    /// In memory.
    Present,
    /// Swapped out, or only marked as poisoned.
    Swapped,
    Missing,
    /// Swapped out or missing.
    Unknown,
}

impl There {
    /// Looks at the page at an address. A signal handler may do so.
    #[inline(never)] // a signal handler has a small stack
    pub(crate) fn of(address: usize) -> Self {
        let mut here = 0_u8;
        // SAFETY: the kernel writes one byte for the one page to `here`, and no byte of the page.
        #[expect(unsafe_code, reason = "mincore")]
        let asked =
            unsafe { libc::mincore(address as *mut c_void, PageSize::system().bytes(), &raw mut here) };
        if asked == 0 && here & 1 == 1 { Self::Present } else { swap::entry(address) }
    }
}

/// The number of leading bytes that have moved from `source` to `range`, of which the kernel tells of `told`.
#[cold]
#[inline(never)] // a signal handler has a small stack
pub(super) fn moved(told: usize, range: &AddressRange, source: &AddressRange) -> usize {
    let mut done = told;
    // The caller owns the source: a page that is missing there and present here has moved.
    while done < range.bytes()
        && There::of(source.start() + done) == There::Missing
        && There::of(range.start() + done) == There::Present
    {
        done += PageSize::system().bytes();
    }
    done
}
