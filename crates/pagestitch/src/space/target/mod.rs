//! The addresses of a region's pages: a reservation of this process, or memory that another owner
//! has registered.
//!
//! ```text
//!   addresses        |-- 0x7f10.. --|          |-- 0x7f90.. --|     ranges, with gaps between them
//!   pages            |  0 .. 1023   |          | 1024 .. 3071 |     numbered without gaps
//!   chunks           |  a   |     b            |      c       |     end to end over all pages
//! ```
//!
//! In foreign memory, pages can only be copied: this process can neither map nor move pages there,
//! nor ask whether a page is present. A page that the owner discards reads as zeros from then on,
//! as in any memory, and is not filled from its source again.
//!
//! | file | content |
//! |---|---|
//! | `adopted_memory` | the public description of adopted memory: a userfaultfd, ranges, an owner |
//! | `foreign` | foreign memory as it is served: addresses, discarded pages, locks |
//! | `owner` | the owner's choices: discarded pages, bytes that are unavailable |
//! | `discarded` | the set of discarded pages |
//! | `listed` | the userfaultfds that are served, so that none is served twice |

mod adopted_memory;
mod discarded;
mod foreign;
mod listed;
mod owner;
#[cfg(feature = "userfaultfd")]
mod userfaultfd_crate;

pub use adopted_memory::AdoptedMemory;
pub(crate) use foreign::{Busy, Foreign};
pub(crate) use listed::ListedUffd;
pub use owner::{OnDiscard, OnUnavailable};

use pagestitch_kernel::{AddressRange, Errno, Page, PageSize, Reservation, Span};
use std::sync::Arc;

/// The addresses of a region's pages.
#[derive(Debug)]
pub(crate) enum Target {
    /// One range of this process, reserved for this region alone.
    Owned(Arc<Reservation>),
    /// Ranges that another owner has registered, in another process or in this one.
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

    /// True if its pages are those of a memfd, which other processes may write and discard.
    pub(crate) fn is_on_memfd(&self) -> bool {
        matches!(self, Self::Owned(reservation) if reservation.is_on_memfd())
    }

    /// An error if pages of a span are locked, so that they cannot be dropped.
    pub(crate) fn check_unlocked(&self, span: Span) -> Result<(), Errno> {
        match self {
            Self::Owned(reservation) => reservation.check_unlocked(span),
            Self::Foreign(_) => Ok(()),
        }
    }

    /// The addresses of a span that is [contiguous](Self::contiguous).
    pub(crate) fn addresses(&self, span: Span) -> AddressRange {
        match self {
            Self::Owned(reservation) => reservation.addresses(span),
            Self::Foreign(adopted) => adopted.addresses(span),
        }
    }

    /// The leading pages of a span, which has one at least, whose addresses are adjacent.
    pub(crate) fn contiguous(&self, span: Span) -> Span {
        match self {
            Self::Owned(_) => span,
            Self::Foreign(adopted) => adopted.contiguous(span),
        }
    }

    /// The page at an address, if the address is in the target.
    pub(crate) fn page_at(&self, address: usize) -> Option<Page> {
        match self {
            Self::Owned(reservation) => reservation.page_at(address),
            Self::Foreign(adopted) => adopted.page_at(address),
        }
    }

    /// Its runs of adjacent pages, with their start addresses.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Span, usize)> {
        let reserved = match self {
            Self::Owned(reservation) => Some((self.all(), reservation.range().start())),
            Self::Foreign(_) => None,
        };
        reserved.into_iter().chain(self.foreign().into_iter().flat_map(Foreign::ranges))
    }

    /// The pages of the target that a range of addresses overlaps.
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

    /// Calls `each` with every page of a span and true if it is present. Calls nothing if the
    /// kernel does not tell.
    pub(crate) fn residency(&self, span: Span, each: impl FnMut(Page, bool)) {
        if let Self::Owned(reservation) = self {
            // After an error, `each` was not called for the rest.
            let _ = reservation.residency(span, each);
        }
    }

    /// As [`residency`](Self::residency), in one system call for a block. A swapped page counts as
    /// absent.
    pub(crate) fn in_memory(&self, span: Span, each: impl FnMut(Page, bool)) {
        if let Self::Owned(reservation) = self {
            let _ = reservation.in_memory(span, each);
        }
    }

    /// True if a page is present. False if the kernel does not tell.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        match self {
            Self::Owned(reservation) => reservation.is_resident(page).unwrap_or(false),
            Self::Foreign(_) => false,
        }
    }

    /// True if the kernel has a page, in memory or in swap: it reads a byte. In a region that is served inline, the
    /// read of a page that is missing fails. Async-signal-safe.
    pub(crate) fn can_be_read(&self, page: Page) -> bool {
        match self {
            Self::Owned(reservation) => {
                let offset = reservation.page_size().offset_of(page);
                reservation.read_at(offset, &mut [0]).is_ok()
            }
            Self::Foreign(_) => false,
        }
    }

    pub(crate) const fn foreign(&self) -> Option<&Foreign> {
        match self {
            Self::Owned(_) => None,
            Self::Foreign(adopted) => Some(adopted),
        }
    }

    /// Makes pages inaccessible for good. Used if the kernel has no poison markers. In foreign
    /// memory this kills the owner.
    pub(crate) fn revoke(&self, span: Span) -> Result<(), Errno> {
        match self {
            Self::Owned(reservation) => reservation.revoke(span),
            Self::Foreign(adopted) => adopted.kill_owner(),
        }
    }
}
