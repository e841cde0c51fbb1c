//! Where a region's pages are: in a reservation of ours, or in memory that another owner has
//! registered.
//!
//! ```text
//!   its addresses    |-- 0x7f10.. --|          |-- 0x7f90.. --|     ranges, wherever they are
//!   pages            |  0 .. 1023   |          | 1024 .. 3071 |     counted through
//!   chunks           |  a   |     b            |      c       |     laid end to end over all of them
//! ```
//!
//! Nothing can be mapped in foreign memory, moved there, or asked of its pages: they are copied,
//! and what the kernel says is all that is known. What its owner lets go of is zeros from then on,
//! as it is in any memory: the source has lost it.
//!
//! | file | what |
//! |---|---|
//! | `memory` | what is adopted: a userfaultfd, ranges, an owner |
//! | `foreign` | the same as it is served: where each page is, and which were let go |
//! | `owner` | the owner's choices: discarded pages, bytes that are unavailable |
//! | `discarded` | the pages that were let go, as a set |
//! | `listed` | all that is adopted, so that nothing is twice |

mod discarded;
mod foreign;
mod listed;
mod memory;
mod owner;
#[cfg(feature = "userfaultfd")]
mod userfaultfd_crate;

pub(crate) use foreign::{Busy, Foreign};
pub use memory::AdoptedMemory;
pub use owner::{OnDiscard, OnUnavailable};

use pagestitch_kernel::{AddressRange, Errno, Page, PageSize, Reservation, Span};
use std::sync::Arc;

/// The addresses of a region's pages.
#[derive(Debug)]
pub(crate) enum Target {
    /// One range of this process, reserved for this region alone.
    Owned(Arc<Reservation>),
    /// Ranges of another process's memory, or of this one's.
    Foreign(Foreign),
}

impl Target {
    pub(crate) fn page_size(&self) -> PageSize {
        match self {
            Self::Owned(reservation) => reservation.page_size(),
            Self::Foreign(adopted) => adopted.page_size(),
        }
    }

    /// All pages.
    pub(crate) fn all(&self) -> Span {
        let pages = match self {
            Self::Owned(reservation) => reservation.pages(),
            Self::Foreign(adopted) => adopted.pages(),
        };
        Span { first: Page(0), pages }
    }

    /// The addresses of a span that is [contiguous](Self::contiguous).
    pub(crate) fn addresses(&self, span: Span) -> AddressRange {
        match self {
            Self::Owned(reservation) => reservation.addresses(span),
            Self::Foreign(adopted) => adopted.addresses(span),
        }
    }

    /// As many of a span's first pages as lie at addresses next to each other.
    pub(crate) fn contiguous(&self, span: Span) -> Span {
        match self {
            Self::Owned(_) => span,
            Self::Foreign(adopted) => adopted.contiguous(span),
        }
    }

    /// The page at an address, if it is one of these.
    pub(crate) fn page_at(&self, address: usize) -> Option<Page> {
        match self {
            Self::Owned(reservation) => reservation.page_at(address),
            Self::Foreign(adopted) => adopted.page_at(address),
        }
    }

    /// Its pages, and where each run of them begins.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Span, usize)> {
        let reserved = match self {
            Self::Owned(reservation) => Some((self.all(), reservation.range().start())),
            Self::Foreign(_) => None,
        };
        reserved.into_iter().chain(self.foreign().into_iter().flat_map(Foreign::ranges))
    }

    /// The pages of a range of addresses, which may lie inside or not.
    pub(crate) fn pages_in(&self, start: usize, end: usize) -> impl Iterator<Item = Span> {
        let size = self.page_size();
        self.ranges().filter_map(move |(span, first)| {
            let inside = start.max(first)..end.min(first + size.bytes_of(span));
            (inside.start < inside.end).then(|| {
                let covered = size.covering(&((inside.start - first) as u64..(inside.end - first) as u64));
                Span { first: Page(span.first.0 + covered.first.0), pages: covered.pages }
            })
        })
    }

    /// Calls `each` with every page of a span and whether it is there, where that can be asked.
    pub(crate) fn residency(&self, span: Span, each: impl FnMut(Page, bool)) {
        if let Self::Owned(reservation) = self {
            // Where the question fails, nothing is said.
            let _ = reservation.residency(span, each);
        }
    }

    /// Whether a page is there. Where that cannot be asked it counts as absent.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        match self {
            Self::Owned(reservation) => reservation.is_resident(page).unwrap_or(false),
            Self::Foreign(_) => false,
        }
    }

    pub(crate) const fn foreign(&self) -> Option<&Foreign> {
        match self {
            Self::Owned(_) => None,
            Self::Foreign(adopted) => Some(adopted),
        }
    }

    /// Takes a page away for good, where there are no poison marks.
    pub(crate) fn revoke(&self, span: Span) -> Result<(), Errno> {
        match self {
            Self::Owned(reservation) => reservation.revoke(span),
            Self::Foreign(adopted) => adopted.kill_owner(),
        }
    }
}
