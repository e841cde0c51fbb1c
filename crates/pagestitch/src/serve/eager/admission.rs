//! Refuses a region for which there is not enough memory, before any of it is filled.

use super::spans::Spans;
use crate::error::{Error, ErrorKind};
use crate::space::Mapping;
use pagestitch_kernel::Page;
use pagestitch_kernel::Span;
use pagestitch_kernel::limits::Limit;
use pagestitch_kernel::memory_left::MemoryLeft;

/// Refuses a region whose filled pages take more memory than is left.
///
/// The kernel refuses no page for the lack of memory: it ends a process, this one or another.
pub(super) fn check(region: &Mapping, spans: &Spans) -> Result<(), Error> {
    let size = region.page_size();
    let file = size.offsets(Span { first: Page(0), pages: spans.end().0 }).end;
    if let Some(limit) = Limit::of_file_size(file) {
        return Err(refused(region, file, None, limit));
    }
    let needed = spans.pages() as u64 * size.bytes() as u64;
    // To read the files of cgroups takes longer than to fill some pages.
    if needed < CHECKED {
        return Ok(());
    }
    match MemoryLeft::now() {
        Some(left) if needed > left.bytes => Err(refused(region, needed, Some(left.bytes), left.limit)),
        _ => Ok(()),
    }
}

fn refused(region: &Mapping, needed: u64, left: Option<u64>, limit: Limit) -> Error {
    let left = left.map_or_else(String::new, |left| format!(", and {left} are left"));
    let what = format!(
        "region {}: the server Eager fills {needed} bytes at the build{left}: {limit}; a pool, with userfaultfd, \
         fills only the pages that are touched",
        region.name
    );
    Error::new(ErrorKind::LimitReached, what).of_limit(limit)
}

/// A region that fills fewer bytes is not checked.
const CHECKED: u64 = 1 << 20;
