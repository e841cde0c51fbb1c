//! Prefetch policies, and the policies for failing sources.
//!
//! | file | content |
//! |---|---|
//! | `readahead` | fills pages ahead of a sequential reader |
//! | `stream_table` | the sequential readers of a region |
//! | `fill_rate` | limits the bytes that a background fill fills in a second |
//! | `failure` | the policies for pages whose source fails |
//! | `recording` | records the order of first touches, to fill pages in that order the next time |
//! | `replacement` | which pages leave first when memory is short |
//! | `dense` | fills a block once its faults have cost as much as filling it would |

mod dense;
mod failure;
mod fill_rate;
mod readahead;
mod recording;
mod replacement;
mod stream_table;

pub(crate) use dense::Dense;
pub use failure::OnFailure;
pub use fill_rate::FillRate;
pub(crate) use fill_rate::RateLimit;
pub(crate) use readahead::Prefetch;
pub use readahead::Readahead;
use readahead::Streams;
pub use recording::Recording;
pub(crate) use recording::{Replay, TouchRecorder};
pub use replacement::Replacement;
pub(crate) use replacement::{PageKey, ReplacementPolicy};

use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Page, PageSize, Span};

/// A region's policies.
#[derive(Debug)]
pub(crate) struct Policy {
    streams: Option<Streams>,
    dense: Option<Dense>,
}

/// The handling of blocks of [`HUGE`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// Blocks are filled in staging and moved in.
    Whole,
    /// As `Whole`, for sequential readers only, with at most so many pages ahead of them.
    Streamed(usize),
    /// Blocks are copied page by page.
    Copied,
    /// Blocks are never filled at once. In foreign memory a thread that waits for one page would
    /// wait for the copy of the whole block.
    Never,
}

impl Policy {
    /// The policies of a region of `pages` pages.
    pub(crate) fn new(
        readahead: Readahead,
        pages: usize,
        size: PageSize,
        blocks: Blocks,
    ) -> Result<Self, Errno> {
        let block = HUGE / size.bytes();
        if readahead == Readahead::None {
            return Ok(Self { streams: None, dense: None });
        }
        let (whole, most, is_dense) = match blocks {
            Blocks::Whole => (Some(block), None, true),
            Blocks::Streamed(most) => (Some(block), Some(most), false),
            Blocks::Copied => (None, None, true),
            Blocks::Never => (None, None, false),
        };
        let streams = Streams::new(pages, size, whole).map(|streams| streams.with_most(most));
        let dense = (pages >= block && is_dense).then(|| Dense::new(pages, block)).transpose()?;
        Ok(Self { streams, dense })
    }

    /// Notes the number of pages of a region that grows: it was made for the most that there can be.
    pub(crate) fn set_pages(&self, pages: usize) {
        if let Some(streams) = &self.streams {
            streams.set_pages(pages);
        }
        if let Some(dense) = &self.dense {
            dense.set_pages(pages);
        }
    }

    /// Records a fault for which the caller is about to fill `filled`; returns the pages to
    /// prefetch. `is_present` tells whether another page is filled.
    pub(crate) fn on_fault(&self, filled: Span, is_present: impl FnOnce(Page) -> bool) -> Prefetch {
        self.streams.as_ref().map(|streams| streams.on_fault(filled, is_present)).unwrap_or_default()
    }

    /// Records the cost of filling the page, in nanoseconds; returns its block if that should be
    /// filled.
    pub(crate) fn spent(&self, page: Page, ns: u64) -> Option<Span> {
        self.dense.as_ref()?.spent(page, ns)
    }

    /// Records the cost of filling pages of a block, in nanoseconds.
    pub(crate) fn filled(&self, pages: usize, ns: u64) {
        if let Some(dense) = &self.dense {
            dense.filled(pages, ns);
        }
    }
}
