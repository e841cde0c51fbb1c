//! Where a region's pages are: in a reservation of ours, or in memory that somebody else has registered.

use crate::region::adopted::Adopted;
use pagestitch_kernel::{AddressRange, Errno, Page, PageSize, Reservation, Span};
use std::sync::Arc;

/// The addresses of a region's pages.
#[derive(Debug)]
pub(crate) enum Place {
    /// One range, of this process, and nobody else's.
    Reserved(Arc<Reservation>),
    /// Ranges of another process's memory, or of this one's.
    Adopted(Adopted),
}

impl Place {
    pub(crate) fn page_size(&self) -> PageSize {
        match self {
            Self::Reserved(reservation) => reservation.page_size(),
            Self::Adopted(adopted) => adopted.page_size(),
        }
    }

    /// All pages.
    pub(crate) fn all(&self) -> Span {
        let pages = match self {
            Self::Reserved(reservation) => reservation.pages(),
            Self::Adopted(adopted) => adopted.pages(),
        };
        Span { first: Page(0), pages }
    }

    /// The addresses of a span that is [contiguous](Self::contiguous).
    pub(crate) fn addresses(&self, span: Span) -> AddressRange {
        match self {
            Self::Reserved(reservation) => reservation.addresses(span),
            Self::Adopted(adopted) => adopted.addresses(span),
        }
    }

    /// As many of a span's first pages as lie at addresses next to each other.
    pub(crate) fn contiguous(&self, span: Span) -> Span {
        match self {
            Self::Reserved(_) => span,
            Self::Adopted(adopted) => adopted.contiguous(span),
        }
    }

    /// The page at an address, if it is one of these.
    pub(crate) fn page_at(&self, address: usize) -> Option<Page> {
        match self {
            Self::Reserved(reservation) => reservation.page_at(address),
            Self::Adopted(adopted) => adopted.page_at(address),
        }
    }

    /// Its pages, and where each run of them begins.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Span, usize)> {
        let reserved = match self {
            Self::Reserved(reservation) => Some((self.all(), reservation.range().start())),
            Self::Adopted(_) => None,
        };
        reserved.into_iter().chain(self.adopted().into_iter().flat_map(Adopted::ranges))
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
        if let Self::Reserved(reservation) = self {
            // Where the question fails, nothing is said.
            let _ = reservation.residency(span, each);
        }
    }

    /// Whether a page is there. Where that cannot be asked it counts as absent.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        match self {
            Self::Reserved(reservation) => reservation.is_resident(page).unwrap_or(false),
            Self::Adopted(_) => false,
        }
    }

    pub(crate) const fn adopted(&self) -> Option<&Adopted> {
        match self {
            Self::Reserved(_) => None,
            Self::Adopted(adopted) => Some(adopted),
        }
    }

    /// Takes a page away for good, where there are no poison marks.
    pub(crate) fn revoke(&self, span: Span) -> Result<(), Errno> {
        match self {
            Self::Reserved(reservation) => reservation.revoke(span),
            Self::Adopted(adopted) => adopted.end_owner(),
        }
    }
}
