//! Answers to faults of foreign memory that need no page from us.

use crate::space::Mapping;
use crate::space::page_table::Wake;
use pagestitch_kernel::Page;

/// Maps a page that the page cache has, after a minor fault on a file mapping of the owner.
pub(crate) fn show(region: &Mapping, page: Page) {
    // If the page is mapped by now, or gone, the waiting thread faults again.
    let range = region.target.addresses(page.span());
    let _ = region.uffd.of(range).continue_pages(range);
    region.wake(page.span());
}

/// Lets a writer through that a write protection of the owner has stopped.
pub(crate) fn release(region: &Mapping, page: Page) {
    let range = region.target.addresses(page.span());
    let _ = region.uffd.of(range).unprotect(range);
    region.wake(page.span());
}
