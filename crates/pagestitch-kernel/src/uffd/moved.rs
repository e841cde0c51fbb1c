//! Whether a page has moved, where the kernel's answer to the move does not tell.
//!
//! A move that meets a page whose entry changes at the same moment, by swap or compaction, begins again inside the
//! kernel. Since Linux 6.18 (and still in 6.18.44) it then moves the page, but keeps the error of the first attempt
//! (`err` in `move_pages`, `mm/userfaultfd.c`). So it looks at the page once more, finds it there, and answers
//! `EEXIST`, or the progress before this page. A caller that believed this would lose the page.

use crate::page::{AddressRange, PageSize};
use crate::swap::There;

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
