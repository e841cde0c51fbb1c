//! Reads pages of files that are mapped in place into the page cache, and no others.
//!
//! `populate` maps them, too, so that a page that cannot be read is an error now and no signal later.
//! `prefetch` only begins: a short range, or both ends of a long one.

use crate::api::AnyRegion;
use crate::api::refused::refused;
use crate::error::Error;
use crate::source::{Backing, Shared};
use crate::space::Target;
use pagestitch_kernel::file_readahead;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Reservation, Span};

impl AnyRegion {
    /// Reads the pages of a span that are mapped in place, until `go_on` returns false.
    pub(super) fn read_in_place(&self, span: Span, go_on: &dyn Fn() -> bool) -> Result<(), Error> {
        self.each_file_run(span, |reservation, run, (device, _)| {
            if !go_on() {
                return Ok(());
            }
            let window = file_readahead::window(device);
            self.edges(run, window).into_iter().for_each(|edge| reservation.will_need(edge));
            self.read_run(reservation, run, window < WINDOW_MIN, go_on)
        })
    }

    /// Has the kernel begin to read the edges of files in place, so that touches of a span in its order read
    /// no page outside of it. Edges that the page cache has are passed over, which takes few system calls.
    pub(super) fn begin_to_read_in_place(&self, span: Span) {
        let begun = self.each_file_run(span, |reservation, run, (device, shows_residency)| {
            let is_needed = |edge: &Span| !shows_residency || !has_all(reservation, *edge);
            let edges = self.edges(run, file_readahead::window(device));
            edges.into_iter().filter(is_needed).for_each(|edge| reservation.will_need(edge));
            Ok(())
        });
        debug_assert!(begun.is_ok(), "no run fails");
    }

    /// Calls `each` with the runs of a span that are mapped in place from files, the device of the file, and
    /// whether the kernel tells which of its pages are in memory.
    fn each_file_run(
        &self,
        span: Span,
        mut each: impl FnMut(&Reservation, Span, (u64, bool)) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Target::Owned(reservation) = &self.served.target else { return Ok(()) };
        let mut rest = span;
        while !rest.is_empty() {
            let Some((pages, run)) = self.served.in_place.prefix(rest) else {
                rest = rest.without_prefix(self.served.in_place.next_gap(rest).pages.max(1));
                continue;
            };
            if let Some(file) = file_on_device(self.served.layout.backing_of(run.chunk)) {
                each(reservation, rest.prefix(pages), file)?;
            }
            rest = rest.without_prefix(pages);
        }
        Ok(())
    }

    /// The pages of a run that are read alone: all of a short run, and both ends of a long one, from where the
    /// kernel's readahead would reach outside of the run. They are few, because the kernel gives each page that
    /// is read alone a frame of its own, whose later touches take longer.
    fn edges(&self, run: Span, window: usize) -> [Span; 2] {
        let page = self.served.page_size().bytes();
        if run.pages <= SHORT / page {
            return [run, run.prefix(0)];
        }
        // Twice as much as the window of the device asks for, because that of a descriptor may be twice as long.
        let window = window.max(WINDOW_MIN);
        let first = run.prefix(window.min(BEFORE_MAX) / page);
        let behind = window.saturating_mul(4).min(BEHIND_MAX);
        [first, run.without_prefix(first.pages).suffix(behind / page)]
    }

    /// Reads and maps the pages of a run. `in_pieces`: the kernel's readahead would read few pages at once.
    fn read_run(
        &self,
        reservation: &Reservation,
        run: Span,
        in_pieces: bool,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), Error> {
        let page = self.served.page_size();
        let mut rest = run;
        while !rest.is_empty() && go_on() {
            let block = rest.prefix(HUGE / page.bytes());
            if in_pieces {
                reservation.will_need(block);
            }
            match reservation.populate_read(block) {
                // EINVAL: Linux before 5.14. The touch of a page reads it then.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(errno) => {
                    let mut range = page.offsets(block);
                    range.end = range.end.min(self.len() as u64);
                    return Err(refused(self, "read", &range, errno));
                }
            }
            rest = rest.without_prefix(block.pages);
        }
        Ok(())
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

/// For a file, which may be on a disk: its device, and whether the kernel tells which of its pages are in memory.
fn file_on_device(backing: &Backing) -> Option<(u64, bool)> {
    match backing {
        Backing::Immutable(file) => Some((file.stable().identity().0, file.stable().shows_residency())),
        Backing::Shared(Shared::File(file, _)) => Some((file.identity().0, file.shows_residency())),
        Backing::Mapped(mapped) => mapped.file_on_device(),
        _ => None,
    }
}
