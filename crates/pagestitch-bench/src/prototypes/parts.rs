//! Memory in parts of equal length, each registered with a userfaultfd of its own.

use super::bus::Fills;
use crate::hot::{Hot, first_word};
use crate::systems::{HUGE_PAGE, PAGE};
use crate::team::part_length;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, Features, Outcome, Page, PageSize, Reservation, StableView, Uffd, View};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

/// Memory in parts.
#[derive(Debug)]
pub(super) struct Parts {
    parts: Vec<Part>,
    /// The first address of each part, ascending, with its number.
    starts: Vec<(usize, usize)>,
    /// The pages of each part but the last.
    pages_each: usize,
    hot: Arc<Hot>,
}

/// A part of the memory.
#[derive(Debug)]
struct Part {
    uffd: Uffd,
    reservation: Arc<Reservation>,
    view: StableView,
}

/// A page of a part.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageOf {
    part: usize,
    page: Page,
}

impl Parts {
    /// Memory in at most `shards` parts of whole huge pages.
    pub(super) fn new(hot: &Arc<Hot>, pages: usize, shards: usize, features: Features) -> Self {
        let pages_each = part_length(pages, shards, HUGE_PAGE / PAGE);
        let lengths = (0..pages).step_by(pages_each).map(|first| pages_each.min(pages - first));
        let parts: Vec<Part> = lengths.map(|pages| Part::new(pages, features)).collect();
        let start = |(number, part): (usize, &Part)| (part.reservation.range().start(), number);
        let mut starts: Vec<(usize, usize)> = parts.iter().enumerate().map(start).collect();
        starts.sort_unstable();
        Self { parts, starts, pages_each, hot: Arc::clone(hot) }
    }

    pub(super) const fn count(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn uffd(&self, part: usize) -> &Uffd {
        &self.parts[part].uffd
    }

    /// The first word of a page.
    pub(super) fn word(&self, page: usize) -> u64 {
        let PageOf { part, page } = self.locate(page);
        first_word(&self.parts[part].view.as_slice()[page.0 * PAGE..])
    }

    /// Fills a page of the memory.
    pub(super) fn fill_page(&self, page: usize) {
        self.fill(self.locate(page));
    }

    const fn locate(&self, page: usize) -> PageOf {
        PageOf { part: page / self.pages_each, page: Page(page % self.pages_each) }
    }

    /// The page at an address, if it is in this memory.
    pub(super) fn find(&self, address: usize) -> Option<PageOf> {
        let after = self.starts.partition_point(|(start, _)| *start <= address);
        let (_, part) = *self.starts.get(after.checked_sub(1)?)?;
        Some(PageOf { part, page: self.parts[part].reservation.page_at(address)? })
    }

    /// Fills a page, or wakes its waiters if it is filled already.
    pub(super) fn fill(&self, PageOf { part, page }: PageOf) {
        let Part { uffd, reservation, .. } = &self.parts[part];
        let range = reservation.addresses(page.span());
        loop {
            match uffd.copy(range, self.hot.page(page.0)) {
                Outcome::Done => return,
                Outcome::AlreadyThere => return uffd.wake(range).expect("a wake of a registered page"),
                Outcome::Changing => {}
                outcome => panic!("the kernel does not copy a page: {outcome:?}"),
            }
        }
    }

    /// Checks all bytes.
    pub(super) fn check(&self) {
        self.parts.iter().for_each(|part| self.hot.check(part.view.as_slice()));
    }
}

impl Fills for Parts {
    fn addresses(&self) -> Range<usize> {
        let start = self.starts.first().map_or(0, |(start, _)| *start);
        let end = self.parts.iter().map(|part| part.reservation.range().end()).max();
        start..end.unwrap_or(0)
    }

    fn fill_at(&self, address: usize) -> bool {
        self.find(address).inspect(|&page| self.fill(page)).is_some()
    }
}

impl Part {
    fn new(pages: usize, features: Features) -> Self {
        let page = PageSize::new(PAGE).expect("a power of two");
        let pages = NonZeroUsize::new(pages).expect("some pages");
        let (reservation, view) = View::reserve(pages, page, Access::ReadOnly).expect("addresses");
        let uffd = Uffd::open(features).expect("a userfaultfd");
        uffd.register(&reservation, RegisterMode::MISSING).expect("registering");
        Self { uffd, reservation, view: view.into_stable().expect("the view has no mapped pages") }
    }
}
