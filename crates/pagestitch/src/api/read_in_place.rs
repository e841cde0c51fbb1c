//! Populates pages of files that are mapped in place: reads them into the page cache, and no
//! others, and maps them, so that a page that cannot be read is an error now and no signal later.

use crate::api::AnyRegion;
use crate::api::refused::refused;
use crate::error::Error;
use crate::source::{Backing, Shared};
use crate::space::Target;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Errno, Reservation, Span};

impl AnyRegion {
    /// Reads the pages of a span that are mapped in place, until `go_on` returns false.
    pub(super) fn read_in_place(&self, span: Span, go_on: &dyn Fn() -> bool) -> Result<(), Error> {
        let Target::Owned(reservation) = &self.served.target else { return Ok(()) };
        let mut rest = span;
        while !rest.is_empty() {
            let Some((pages, run)) = self.served.in_place.prefix(rest) else {
                rest = rest.without_prefix(self.served.in_place.next_gap(rest).pages.max(1));
                continue;
            };
            if is_file(self.served.layout.backing_of(run.chunk)) {
                self.read_run(reservation, rest.prefix(pages), go_on)?;
            }
            rest = rest.without_prefix(pages);
        }
        Ok(())
    }

    fn read_run(&self, reservation: &Reservation, run: Span, go_on: &dyn Fn() -> bool) -> Result<(), Error> {
        let page = self.served.page_size();
        let edges = [run.prefix(BEFORE / page.bytes()), run.suffix(BEHIND / page.bytes())];
        edges.into_iter().for_each(|edge| reservation.will_need(edge));
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

fn is_file(backing: &Backing) -> bool {
    match backing {
        Backing::Immutable(_) | Backing::Shared(Shared::File(..)) => true,
        Backing::Mapped(mapped) => mapped.is_file(),
        _ => false,
    }
}

/// The bytes at the start of a run that are read alone, because the kernel's readahead around the first
/// page would read bytes before it: half of its window. The window is 128 KiB by default, and 8 MiB on some
/// systems.
const BEFORE: usize = 4 << 20;
/// The bytes at the end of a run that are read alone, because the kernel's readahead would read bytes behind
/// it: up to two windows.
const BEHIND: usize = 16 << 20;
