//! Reads pages of files that are mapped in place into the page cache, and no others.
//!
//! `populate` maps them, too, so that a page that cannot be read is an error now and no signal later.
//! `prefetch` only begins, at both ends of its range.

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
            self.edges(run, device).into_iter().for_each(|edge| reservation.will_need(edge));
            self.read_run(reservation, run, go_on)
        })
    }

    /// Has the kernel begin to read the edges of files in place, so that touches of a span in its order read
    /// no page outside of it. Edges that the page cache has are passed over, which takes few system calls.
    pub(super) fn begin_to_read_in_place(&self, span: Span) {
        let begun = self.each_file_run(span, |reservation, run, (device, shows_residency)| {
            let is_needed = |edge: &Span| !shows_residency || !has_all(reservation, *edge);
            self.edges(run, device)
                .into_iter()
                .filter(is_needed)
                .for_each(|edge| reservation.will_need(edge));
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

    /// The pages of a run that are read alone, because a touch has the kernel read pages around it: half a window
    /// of its readahead before the first page, and up to two windows behind the last one. The kernel gives each
    /// of these pages a frame of its own, so that they are as few as possible.
    fn edges(&self, run: Span, device: u64) -> [Span; 2] {
        let window = file_readahead::window(device).div_ceil(self.served.page_size().bytes());
        let first = run.prefix(window.div_ceil(2));
        [first, run.without_prefix(first.pages).suffix(2 * window)]
    }

    fn read_run(&self, reservation: &Reservation, run: Span, go_on: &dyn Fn() -> bool) -> Result<(), Error> {
        let page = self.served.page_size();
        let mut rest = run;
        while !rest.is_empty() && go_on() {
            let block = rest.prefix(HUGE / page.bytes());
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

/// For a file, which may be on a disk: its device, and whether the kernel tells which of its pages are in memory.
fn file_on_device(backing: &Backing) -> Option<(u64, bool)> {
    match backing {
        Backing::Immutable(file) => Some((file.stable().identity().0, file.stable().shows_residency())),
        Backing::Shared(Shared::File(file, _)) => Some((file.identity().0, file.shows_residency())),
        Backing::Mapped(mapped) => mapped.file_on_device(),
        _ => None,
    }
}
