//! Replace: pages of a region get other bytes, while other threads touch them.
//!
//! ```text
//!   claim     all pages of the range, in whatever state: faults on them wait from now on
//!   drop      the kernel's pages, and those that wait in standby
//!   replace   the numbers of their bytes in the layout
//!   settle    as absent: the next touch fills the page with its new bytes
//! ```
//!
//! A page is missing between its old and its new bytes, so a reader sees either, and none of a mixture.
//! No event is taken for a discard of the application: where the kernel reports the dropped pages, they
//! are claimed, and absent afterwards.

use crate::error::{BuildOption, Bytes, Error, ErrorKind};
use crate::fault::callers;
use crate::serve::contract::Attachment;
use crate::signals::NoSignals;
use crate::source::Backing;
use crate::space::page_table::{Claim, PageState};
use crate::space::{Chunk, Discards, Mapping};
use pagestitch_kernel::{Errno, Features, Span};
use std::ops::Range;

/// Drops pages of the region's view.
pub(crate) type DropPages<'d> = &'d mut dyn FnMut(Span) -> Result<(), Errno>;

/// Gives whole pages the bytes of a chunk, or zeros. After an error the region has its bytes as before.
pub(crate) fn replace(
    region: &Mapping,
    server: &dyn Attachment,
    range: &Range<u64>,
    chunk: Option<&Chunk>,
    drop_pages: DropPages<'_>,
) -> Result<(), Error> {
    let span = whole_pages(region, range)?;
    if span.is_empty() {
        return Ok(());
    }
    check_region(region, server, span)?;
    chunk.map_or(Ok(()), |chunk| check_chunk(region, server, range, chunk))?;
    let _alone = region.growth.as_ref().map(|growth| growth.lock());
    let no_table =
        |errno| Error::refused(format_args!("region {}: cannot replace bytes", region.name), errno);
    let replacing =
        region.layout.replacing(region.page_size(), region.target.all().pages).map_err(no_table)?;
    if !replacing.has_number() {
        let what = format!("region {}: bytes were replaced 2^32 times: build the region anew", region.name);
        return Err(Error::new(ErrorKind::LimitReached, what));
    }
    region.note_replacement(chunk);
    // A signal handler that touches a claimed page would wait for its own thread.
    let quiet = NoSignals::until_dropped();
    let mut claim = claim_all(region, span);
    // The pages that are dropped before a locked one are filled again, which a released source cannot.
    let may_drop = if region.releases_sources() { region.target.check_unlocked(span) } else { Ok(()) };
    let dropped = may_drop.and_then(|()| drop_pages(span));
    if dropped.is_ok() {
        if let Some(residence) = &region.residence {
            residence.discarded(span);
        }
        replacing.set(span, range, chunk);
        region.forget_failures(span);
    }
    claim.settle(span.pages, PageState::Absent);
    drop(quiet);
    dropped.map_err(|errno| refusal(region, range, errno))
}

/// The error of a kernel that does not drop the pages of a range.
fn refusal(region: &Mapping, range: &Range<u64>, errno: Errno) -> Error {
    let why = match errno {
        Errno::EINVAL => "because the kernel keeps their pages: unlock them (munlock(2))",
        Errno::EOPNOTSUPP => {
            "because Linux before 5.4 does not tell whether pages are locked: add keep_sources()"
        }
        _ => "because the kernel does not drop their pages",
    };
    let Range { start, end } = range;
    Error::refused(
        format_args!("region {}: bytes {start}..{end} cannot be replaced, {why}", region.name),
        errno,
    )
}

/// The pages of a range that begins and ends between pages. The region's end ends its last page.
fn whole_pages(region: &Mapping, range: &Range<u64>) -> Result<Span, Error> {
    let (size, len) = (region.page_size(), region.len());
    let page = size.bytes() as u64;
    let is_whole =
        range.start % page == 0 && (range.end % page == 0 || range.end == len && region.growth.is_none());
    if is_whole {
        return Ok(size.covering(range));
    }
    let what = format!(
        "region {}: bytes {}..{} are not whole pages of {page} bytes, and the rest of a page would be filled again: begin and end at a multiple of the page size",
        region.name, range.start, range.end
    );
    Err(Error::new(ErrorKind::OutOfRange, what))
}

/// Refuses regions and pages whose bytes cannot be replaced.
fn check_region(region: &Mapping, server: &dyn Attachment, span: Span) -> Result<(), Error> {
    let refused = |kind, why: &str| Err(Error::new(kind, format!("region {}: {why}", region.name)));
    if region.uffd.is_stand_in() {
        return refused(
            ErrorKind::UnsuitableServer,
            "its pages never fault, because they are shown in place or were filled by the build: bytes can be replaced in a region of a pool that copies them",
        );
    }
    if region.target.is_on_memfd() {
        return refused(
            ErrorKind::OptionConflict,
            "other processes map its pages, which stay in its memfd: leave out on_memfd()",
        );
    }
    if region.shows_any(span) {
        return refused(
            ErrorKind::OptionConflict,
            "pages of the range are shown in place or were donated: only pages that are copied can get other bytes",
        );
    }
    if region.records_writes() {
        return refused(
            ErrorKind::OptionConflict,
            "its record of writes belongs to the bytes of the build: leave out track_changes() and write_back()",
        );
    }
    if region.discards == Discards::Told && server.may_be_caller() {
        let what = format!(
            "region {}: the kernel would make the caller wait until a thread of the Manual reads that pages are dropped: build it with report_discards(false)",
            region.name
        );
        return Err(Error::new(ErrorKind::OptionConflict, what).of_option(BuildOption::ReportDiscards));
    }
    if !region.uffd.features().contains(Features::POISON) && region.failed_pages(span).next().is_some() {
        return refused(
            ErrorKind::Unsupported,
            "a page of the range was taken away for good, because Linux before 6.6 has no poison markers: build the region anew",
        );
    }
    if callers::fills_any(callers::this_thread(), region) {
        return refused(
            ErrorKind::InUse,
            "the same thread fills pages of it further up, and would wait for itself: let the fill return first",
        );
    }
    Ok(())
}

/// Refuses chunks whose bytes cannot take the place of others.
fn check_chunk(
    region: &Mapping,
    server: &dyn Attachment,
    range: &Range<u64>,
    chunk: &Chunk,
) -> Result<(), Error> {
    let (number, name) = (region.layout.number_at(range.start), chunk.backing().source().name());
    let refused = |why: String| {
        let what = format!("region {}: the replacement ({name}) {why}", region.name);
        Err(Error::new(ErrorKind::InvalidChunk, what).of_chunk(number))
    };
    let (bytes, room) = (chunk.bytes(), range.end - range.start);
    if bytes != room {
        return refused(format!("has {}, and the range has {room}: give both the same length", Bytes(bytes)));
    }
    if matches!(chunk.backing(), Backing::Donated(_)) || chunk.is_filled_later() {
        return refused(String::from(
            "has pages that move in or are mapped by the build: use a source that is copied",
        ));
    }
    if chunk.has_policy() {
        return refused(String::from(
            "has the failure policy of the chunk that it replaces: leave out on_failure()",
        ));
    }
    if region.residence.is_some() && !chunk.backing().is_stable() {
        return refused(String::from(
            "may have other bytes after its page has left: use bytes that cannot change",
        ));
    }
    // The buffers of a signal handler are made for the files of the build.
    if !server.serves_system_calls() && chunk.backing().file().is_some() {
        return refused(String::from(
            "is a file, which only the build of an inline region takes: read it into memory first",
        ));
    }
    region.layout.check_at(range.start, chunk).map_err(|error| error.inside(&region.name))?;
    server.check_chunk(region, chunk)
}

/// Claims all pages of a span in their present states. Waits for the threads that are filling some.
fn claim_all(region: &Mapping, span: Span) -> Claim<'_> {
    let (pages, mut claimed) = (&region.pages, 0);
    while claimed < span.pages {
        let rest = span.without_prefix(claimed);
        let claim = match pages.state(rest.first) {
            PageState::Absent => pages.claim_run(rest, region),
            PageState::Present => pages.claim_present(rest, region),
            PageState::Poisoned => pages.claim_from(rest.first, PageState::Poisoned, region),
            PageState::Filling | PageState::Contended | PageState::Invalidated => {
                pages.wait_while_filling(rest.first);
                continue;
            }
        };
        claimed += claim.map_or(0, |claim| claim.keep().pages);
    }
    pages.resume(span, region)
}
