//! The pages that a move has moved, beyond those that the kernel tells.
//!
//! A move that meets a page whose entry changes at the same moment, by swap or compaction, begins again inside the
//! kernel. Since Linux 6.18 (and still in 6.18.44) it then moves the page, but keeps the error of the first attempt
//! (`err` in `move_pages`, `mm/userfaultfd.c`). So it looks at the page once more, finds it there, and answers
//! `EEXIST`, or the progress before this page. A caller that believed this would have lost the page.

use crate::page::{AddressRange, PageSize};
use crate::swap;
use crate::uffd::{Outcome, Uffd};
use nix::libc::{self, c_void};

impl Uffd {
    /// The outcome of a move from `source` to `range`, whose answer may tell too little.
    #[inline(never)] // a signal handler has a small stack
    pub(super) fn moved(&self, told: Outcome, range: &AddressRange, source: &AddressRange) -> Outcome {
        match told {
            Outcome::AlreadyThere => self.moved_beyond(0, told, range, source),
            Outcome::Partial { bytes } => self.moved_beyond(bytes, told, range, source),
            _ => told,
        }
    }

    /// As [`moved`](Self::moved), for an answer that tells of `before` bytes. Wakes the threads that wait for the
    /// other pages.
    #[cold]
    #[inline(never)]
    fn moved_beyond(
        &self,
        before: usize,
        told: Outcome,
        range: &AddressRange,
        source: &AddressRange,
    ) -> Outcome {
        let page = PageSize::system().bytes();
        let mut done = before;
        // The caller owns the source: a page that is missing there and present here has moved.
        while done < range.bytes() && !is_there(source.start() + done) && is_there(range.start() + done) {
            done += page;
        }
        if done == before {
            return told;
        }
        let _ = self.wake(range.part(before, (done - before) / page));
        if done < range.bytes() { Outcome::Partial { bytes: done } } else { Outcome::Done }
    }
}

/// True if the page at an address is in memory or swapped out.
#[inline(never)]
fn is_there(page: usize) -> bool {
    let mut here = 0_u8;
    // SAFETY: the kernel writes one byte for the one page to `here`, and no byte of the page.
    #[expect(unsafe_code, reason = "mincore")]
    let asked = unsafe { libc::mincore(page as *mut c_void, PageSize::system().bytes(), &raw mut here) };
    asked == 0 && here & 1 == 1 || swap::has_entry(page)
}
