//! When to install more than was asked for, and what to do where that fails.
//!
//! | file | says |
//! |---|---|
//! | `readahead` | a sequential reader finds its next pages present |
//! | `failure` | what to do about a page whose source has failed |
//! | `recording` | in which order pages were first touched, to have them there sooner the next time |
//! | `dense` | a block whose faults have cost as much as filling it would is filled |

mod dense;
mod failure;
mod readahead;
mod recording;

pub(crate) use dense::Dense;
pub use failure::{OnFailure, Retry};
pub(crate) use readahead::Prefetch;
pub use readahead::Readahead;
use readahead::Streams;
pub use recording::Recording;
pub(crate) use recording::{Recorder, Replay};

use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Page, PageSize, Span};

/// A region's policies.
#[derive(Debug)]
pub(crate) struct Policy {
    streams: Option<Streams>,
    dense: Option<Dense>,
}

/// What is done with blocks of [`HUGE`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// They are filled in staging, and moved in.
    Whole,
    /// Blocks are copied page by page.
    Copied,
    /// Foreign memory: a thread that waits for one page of a block would wait for a copy of all of it.
    Never,
}

impl Policy {
    /// For a region of that many pages. Whole blocks are filled at once, copied page by page, or not at all.
    pub(crate) fn new(
        readahead: Readahead,
        pages: usize,
        size: PageSize,
        blocks: Blocks,
    ) -> Result<Self, Errno> {
        let block = HUGE / size.bytes();
        Ok(match readahead {
            Readahead::None => Self { streams: None, dense: None },
            Readahead::Adaptive => Self {
                streams: Streams::new(pages, (blocks == Blocks::Whole).then_some(block)),
                dense: (pages >= block && blocks != Blocks::Never)
                    .then(|| Dense::new(pages, block))
                    .transpose()?,
            },
        })
    }

    /// Takes note of a fault on `page`, which the caller is about to fill.
    pub(crate) fn on_fault(&self, page: Page) -> Prefetch {
        self.streams.as_ref().map(|streams| streams.on_fault(page)).unwrap_or_default()
    }

    /// Takes note of what it has cost to fill the page; says whether to fill the block that it is in.
    pub(crate) fn spent(&self, page: Page, ns: u64) -> Option<Span> {
        self.dense.as_ref()?.spent(page, ns)
    }

    /// Takes note of what it has cost to fill so many pages of a block.
    pub(crate) fn filled(&self, pages: usize, ns: u64) {
        if let Some(dense) = &self.dense {
            dense.filled(pages, ns);
        }
    }
}
