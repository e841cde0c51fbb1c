//! Append: a further chunk at the end of a region, while other threads read the region.
//!
//! The last page may have bytes of the chunks before and of the new one. So its state is claimed
//! meanwhile, in whatever state it is:
//!
//! ```text
//!   absent    the next touch gathers it from the longer layout; not from standby, where it is outdated
//!   present   the first bytes of the new chunk are written in place, behind the old length
//!   poisoned  it stays poisoned, because it cannot be read without its failed chunk
//! ```
//!
//! No slice shows bytes behind the length, so the write changes no byte that a reader has.

use crate::error::{Error, ErrorKind};
use crate::fault::callers::{self, FillingCaller};
use crate::fault::fill::asked;
use crate::serve::contract::Attachment;
use crate::signals::NoSignals;
use crate::space::page_table::{Claim, PageState};
use crate::space::{Chunk, Growth, Mapping, Reveal};
use pagestitch_kernel::Page;
use std::ops::Range;
use std::sync::Arc;

/// Appends a chunk; returns its place. After an error the region is as before.
pub(crate) fn append(
    region: &Mapping,
    growth: &Growth,
    server: &dyn Attachment,
    chunk: &Chunk,
    reveal: Reveal<'_>,
) -> Result<Range<u64>, Error> {
    let _alone = growth.lock();
    let place = region.place(growth, chunk)?;
    server.check_chunk(region, chunk)?;
    let shared = shared_page(region, region.layout.total());
    let mut first = Vec::new();
    let Some((page, bytes)) = shared else {
        region.lay(chunk, &place)?;
        show(region, reveal, &first, place.end);
        return Ok(place);
    };
    // Otherwise padding ends the page, which keeps its bytes.
    let joins = place.start < bytes.end;
    if joins {
        check_hash(region, page, chunk)?;
    }
    let bytes = bytes.start..bytes.end.min(place.end);
    let filling = FillingCaller::new(region, page.span());
    let mut last = loop {
        let last = claim(region, server, page)?;
        // The source is read without a claim, because it may take any time.
        if last.state != PageState::Present || !first.is_empty() {
            break last;
        }
        last.give_back();
        first = read_first(region, chunk, &place, &bytes)?;
    };
    let state = last.state;
    let laid = region.lay(chunk, &place);
    if laid.is_ok() {
        if joins && state == PageState::Absent {
            region.residence.iter().for_each(|residence| residence.discarded(page.span()));
        }
        let first = if state == PageState::Present { &first[..] } else { &[] };
        show(region, reveal, first, place.end);
    }
    // Wakes the threads that have touched the page meanwhile.
    last.claim.settle(1, state);
    drop(last);
    drop(filling);
    laid.map(|()| place)
}

/// The page that has bytes before and behind `end`, with the offsets behind it.
fn shared_page(region: &Mapping, end: u64) -> Option<(Page, Range<u64>)> {
    let size = region.page_size();
    let page = size.page_at(end);
    let offsets = size.offsets(page.span());
    (offsets.start < end).then_some((page, end..offsets.end))
}

/// Refuses a chunk that would change a page of whose bytes a hash is kept.
fn check_hash(region: &Mapping, page: Page, chunk: &Chunk) -> Result<(), Error> {
    if !region.residence.as_ref().is_some_and(|residence| residence.hashes(page)) {
        return Ok(());
    }
    let (number, name) = (region.layout.next_number(), chunk.backing().source().name());
    let what = format!(
        "region {}: chunk {number} ({name}) begins in a page of a source that may change, of which a hash is kept: give it \
         align({}), or use build_shared()",
        region.name,
        region.page_size().bytes()
    );
    Err(Error::new(ErrorKind::InvalidChunk, what).of_chunk(number))
}

/// Makes the bytes before `end` visible, the `first` ones of the chunk in place.
fn show(region: &Mapping, reveal: Reveal<'_>, first: &[u8], end: u64) {
    let shown = reveal(first, end as usize);
    debug_assert!(shown.is_ok(), "a region that grows is mapped for writing: {shown:?}");
    region.publish();
}

/// The last page, while a chunk joins it.
struct LastPage<'r> {
    claim: Claim<'r>,
    /// The state of the page before the claim.
    state: PageState,
    /// A signal handler that touched the page would fill it without the chunk, because its thread has the claim.
    /// Dropped after the claim.
    _quiet: NoSignals,
}

impl LastPage<'_> {
    fn give_back(mut self) {
        self.claim.settle(1, self.state);
    }
}

/// Claims a page. Waits for the thread that is filling it.
fn claim<'r>(region: &'r Mapping, server: &dyn Attachment, page: Page) -> Result<LastPage<'r>, Error> {
    loop {
        let state = region.pages.state(page);
        if state.is_claimed() {
            wait(region, page)?;
            continue;
        }
        let quiet = NoSignals::until_dropped();
        if let Ok(claim) = region.pages.claim_from(page, state, region) {
            let waits_for_itself = server.may_be_caller() && state == PageState::Present;
            let is_gone = waits_for_itself && is_discarded(region, page);
            let state = if is_gone { PageState::Absent } else { state };
            return Ok(LastPage { claim, state, _quiet: quiet });
        }
    }
}

/// True if the kernel lacks a page that was filled. No thread may serve the write to it.
fn is_discarded(region: &Mapping, page: Page) -> bool {
    let mut is_here = true;
    region.target.residency(page.span(), |_, here| is_here = here);
    !is_here
}

fn wait(region: &Mapping, page: Page) -> Result<(), Error> {
    let thread = callers::this_thread();
    // The announcement of this thread is there, so a second one tells of a fill below this call.
    if callers::fillings(thread, region, page) > 1 {
        let what = format!(
            "region {}: append() below a fill of its last page by the same thread would wait for itself: let the fill return first",
            region.name
        );
        return Err(Error::new(ErrorKind::InUse, what));
    }
    region.pages.wait_while_filling(page);
    Ok(())
}

/// Reads the bytes of padding and a chunk in a range of offsets.
fn read_first(
    region: &Mapping,
    chunk: &Chunk,
    place: &Range<u64>,
    bytes: &Range<u64>,
) -> Result<Vec<u8>, Error> {
    let mut first = vec![0; (bytes.end - bytes.start) as usize];
    let padding = (place.start.min(bytes.end) - bytes.start) as usize;
    let into = &mut first[padding..];
    if !into.is_empty() {
        let piece = region.first_piece(chunk, into.len() as u64);
        let read = asked(|| piece.backing.source().read_at(piece.offset, into));
        read.map_err(|error| Error::of_failure(&region.name, Arc::new(piece.failed(error))))?;
    }
    Ok(first)
}
