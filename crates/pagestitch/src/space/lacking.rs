//! Pages that the kernel lacks although the page table has them as present or poisoned: the application
//! has discarded them.

use super::page_table::PageState;
use super::{Discards, Mapping};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Features, Page, Span};

impl Mapping {
    /// True if the kernel lacks pages of a span. Makes such pages absent in the page table.
    ///
    /// The table can be behind the kernel, also where discards are told: a thread that discards pages
    /// runs on as soon as its event is read, before the table changes.
    pub(crate) fn lacks_any(&self, span: Span) -> bool {
        let mut any = false;
        // If the kernel cannot tell, the table counts.
        self.target.residency(span, |page, here| {
            if !here {
                self.pages.mark_absent(page);
                self.forget_marker(page);
                any = true;
            }
        });
        any
    }

    /// True if the poison marker of a page may have been discarded without a report. Makes such a page
    /// absent, so that its source is read again.
    pub(crate) fn lacks_marker(&self, page: Page) -> bool {
        self.can_lose_markers() && self.lacks_any(page.span())
    }

    /// Makes a poisoned page absent, because its marker is gone.
    fn forget_marker(&self, page: Page) {
        if self.can_lose_markers() {
            self.pages.unpoison(page);
        }
    }

    /// True if the marker of a poisoned page can be discarded without a report. A page that was poisoned
    /// without a marker is covered for good, though the kernel has no page there.
    fn can_lose_markers(&self) -> bool {
        self.discards == Discards::Seen && self.uffd.features().contains(Features::POISON)
    }

    /// Called when a page is found discarded. Where no report comes, the pages around it may be
    /// discarded too: makes them absent, so that they can be filled ahead of their touch.
    #[cold]
    pub(crate) fn note_discard(&self, page: Page) {
        if self.discards == Discards::Seen {
            let pages = HUGE / self.page_size().bytes();
            let first = Page(page.0 / pages * pages);
            self.look_for_discards(Span { first, pages }.prefix(self.target.all().end().0 - first.0));
        }
    }

    /// Makes the present pages of a span absent that were discarded without a report. A page that is
    /// swapped out becomes absent too: it is found present when it is filled.
    pub(crate) fn look_for_discards(&self, span: Span) {
        let is_present = |page| self.pages.state(page) == PageState::Present;
        if self.discards == Discards::Seen && span.iter().any(is_present) {
            self.target.in_memory(span, |page, here| {
                if !here {
                    self.pages.mark_absent(page);
                }
            });
        }
    }
}
