//! Reads pages of files that are mapped in place into the page cache, and no others.
//!
//! | call | does |
//! |---|---|
//! | `populate` | reads and maps all pages, so that a page that cannot be read is an error now and no signal later |
//! | `prefetch` | has the kernel begin to read a short run, or both **edges** of a long one; workers then read and map all of it |
//!
//! The kernel's readahead of a page reads the pages around it, too. With the edges in memory, it reads none
//! outside of the run.

use crate::source::{Backing, Shared};
use crate::space::{Mapping, Target};
use pagestitch_kernel::file_readahead::FileCache;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Reservation, Span};

impl Mapping {
    /// Reads and maps the pages of files in a span, until `go_on` returns false. The error has the pages that
    /// cannot be read.
    pub(crate) fn populate_files(&self, span: Span, go_on: &dyn Fn() -> bool) -> Result<(), (Span, Errno)> {
        let mut rest = span;
        while let Some(run) = self.next_file_run(rest) {
            rest = rest.without_prefix(run.span.end().0 - rest.first.0);
            if !go_on() {
                return Ok(());
            }
            run.edges().into_iter().for_each(|edge| run.reservation.will_need(edge));
            run.populate(go_on)?;
        }
        Ok(())
    }

    /// Has the kernel begin to read the edges of the files in a span. Edges that the page cache has are passed
    /// over, which takes few system calls. True if some file has a middle, which is not begun.
    pub(crate) fn begin_files(&self, span: Span) -> bool {
        let (mut rest, mut has_middle) = (span, false);
        while let Some(run) = self.next_file_run(rest) {
            rest = rest.without_prefix(run.span.end().0 - rest.first.0);
            has_middle |= !run.is_short();
            let is_needed = |edge: &Span| !run.cache.shows_residency() || !has_all(run.reservation, *edge);
            run.edges().into_iter().filter(is_needed).for_each(|edge| run.reservation.will_need(edge));
        }
        has_middle
    }

    /// Reads and maps the first pages of files in a span, at most so many. Returns the number of leading pages
    /// of the span that are done. If it has no pages of files, these are all.
    pub(crate) fn populate_first_files(&self, span: Span, most: usize) -> usize {
        let Some(run) = self.next_file_run(span) else { return span.pages };
        if run.cache.is_in_memory() {
            // A read would allocate the pages of holes.
            run.reservation.will_need(run.span);
            return run.span.end().0 - span.first.0;
        }
        let first = run.span.prefix(most);
        // A page that cannot be read is the error of its touch.
        let _ = run.read(first);
        first.end().0 - span.first.0
    }

    /// The first run of a span that is mapped in place from one file, which may be on a disk.
    fn next_file_run(&self, span: Span) -> Option<FileRun<'_>> {
        let Target::Owned(reservation) = &self.target else { return None };
        let mut rest = span;
        while !rest.is_empty() {
            let Some((pages, run)) = self.in_place.prefix(rest) else {
                rest = rest.without_prefix(self.in_place.next_gap(rest).pages.max(1));
                continue;
            };
            if let Some(cache) = cache_of(self.layout.backing_of(run.chunk)) {
                return Some(FileRun { reservation, span: rest.prefix(pages), cache });
            }
            rest = rest.without_prefix(pages);
        }
        None
    }
}

/// Pages of one file, one behind the other, that are mapped in place.
struct FileRun<'m> {
    reservation: &'m Reservation,
    span: Span,
    cache: FileCache,
}

impl FileRun<'_> {
    fn is_short(&self) -> bool {
        self.span.pages <= SHORT / self.reservation.page_size().bytes()
    }

    /// The pages that are read alone: all of a short run, and both ends of a long one, from where the
    /// kernel's readahead would reach outside of the run. They are few, because the kernel gives each page that
    /// is read alone a frame of its own, whose later touches take longer.
    fn edges(&self) -> [Span; 2] {
        if self.is_short() {
            return [self.span, self.span.prefix(0)];
        }
        let page = self.reservation.page_size().bytes();
        // Twice as much as the window of the device asks for, because that of a descriptor may be twice as long.
        let window = self.cache.window().max(WINDOW_MIN);
        let first = self.span.prefix(window.min(BEFORE_MAX) / page);
        let behind = window.saturating_mul(4).min(BEHIND_MAX);
        [first, self.span.without_prefix(first.pages).suffix(behind / page)]
    }

    /// Reads and maps the pages. The error has those that cannot be read.
    fn populate(&self, go_on: &dyn Fn() -> bool) -> Result<(), (Span, Errno)> {
        let mut rest = self.span;
        while !rest.is_empty() && go_on() {
            let block = rest.prefix(HUGE / self.reservation.page_size().bytes());
            self.read(block).map_err(|errno| (block, errno))?;
            rest = rest.without_prefix(block.pages);
        }
        Ok(())
    }

    /// Reads and maps some of the pages. Linux 5.14; before, it has the kernel begin to read them.
    fn read(&self, pages: Span) -> Result<(), Errno> {
        if self.cache.window() < WINDOW_MIN {
            // The kernel's readahead would read few pages at once.
            self.reservation.will_need(pages);
        }
        match self.reservation.populate_read(pages) {
            Err(Errno::EINVAL) => {
                self.reservation.will_need(pages);
                Ok(())
            }
            read => read,
        }
    }
}

/// True if the page cache has all pages of a span.
fn has_all(reservation: &Reservation, span: Span) -> bool {
    let mut has = true;
    reservation.in_memory(span, |_, here| has &= here).is_ok() && has
}

/// The bytes of a run that is read alone.
const SHORT: usize = 4 << 20;
/// A shorter window is for random touches. A range that is asked for is read in larger pieces.
const WINDOW_MIN: usize = 128 << 10;
/// The most bytes that are read alone at the ends of a longer run: those of windows of 8 MiB.
const BEFORE_MAX: usize = 4 << 20;
const BEHIND_MAX: usize = 16 << 20;

/// The page cache of a file.
fn cache_of(backing: &Backing) -> Option<FileCache> {
    match backing {
        Backing::Immutable(file) => Some(file.stable().cache()),
        Backing::Shared(Shared::File(file, _)) => Some(file.cache()),
        Backing::Mapped(mapped) => mapped.cache(),
        _ => None,
    }
}
