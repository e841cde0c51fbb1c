//! Install and settle: pass the bytes of pages to the kernel, and interpret its [`Outcome`].

use crate::error::FailureReason;
use crate::fault::error::{InstallError, failure_at};
use crate::fault::fill::{Content, Filled};
use crate::fault::held::held;
use crate::method::Method;
use crate::metrics::FaultPart;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState, Wake};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::pages::Donated;
use pagestitch_kernel::uffd::Arrival;
use pagestitch_kernel::{Features, Outcome, Page, Span, Staging};

/// The restrictions of a thread that installs pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// None. The latency of the region counts the install.
    Timed,
    /// The latency of the region does not count the install.
    Untimed,
    /// The thread takes no lock, allocates nothing and logs nothing.
    InSignalHandler,
}

impl Mode {
    pub(super) const fn is_quiet(self) -> bool {
        matches!(self, Self::InSignalHandler)
    }
}

/// Installs the filled pages at the start of the claim, settles and records them; returns their
/// number.
pub(super) fn install(
    region: &Mapping,
    claim: &mut Claim<'_>,
    filled: &mut Filled<'_>,
    mode: Mode,
) -> Result<usize, InstallError> {
    match mode.is_quiet() {
        // A signal handler fills one page, and has a small stack.
        true => install_some(region, claim, claim.span().prefix(1), &mut filled.content, 0, true),
        false => install_all(region, claim, filled, mode),
    }
}

fn install_all(
    region: &Mapping,
    claim: &mut Claim<'_>,
    filled: &mut Filled<'_>,
    mode: Mode,
) -> Result<usize, InstallError> {
    let began = if mode == Mode::Timed { region.counters.clock() } else { None };
    let (mut done, mut error) = (0, None);
    while done < filled.pages && error.is_none() {
        let span = region.in_one_shard(claim.span().prefix(filled.pages - done));
        let span = region.arriving_alike(span);
        match install_some(region, claim, span, &mut filled.content, done, false) {
            Ok(pages) => done += pages,
            Err(refused) => error = Some(refused),
        }
    }
    region.counters.record_time(FaultPart::Resolve, began);
    error.map_or(Ok(done), Err)
}

/// Installs as many leading pages of a span as the kernel takes at once; returns their number.
/// `quiet`: without a lock, an allocation or a log.
fn install_some(
    region: &Mapping,
    claim: &mut Claim<'_>,
    span: Span,
    content: &mut Content<'_>,
    done: usize,
    quiet: bool,
) -> Result<usize, InstallError> {
    let page_bytes = region.page_size().bytes();
    // Blocks discard events until the pages are settled.
    let Ok(_held) = held(region, span) else { return Err(InstallError::Changing) };
    let residence = region.residence.as_ref().filter(|_| takes_memory(region, content));
    let span = match residence {
        Some(_) => with_room(region, span, content, done * page_bytes, quiet)?,
        None => span,
    };
    let put = put(region, span, content, done * page_bytes, quiet);
    let pages = match put {
        Some((Outcome::Done, _)) => span.pages,
        Some((Outcome::Partial { bytes }, _)) => bytes / page_bytes,
        Some((Outcome::AlreadyThere, _)) => 1,
        _ => 0,
    };
    if let Some(residence) = residence {
        let is_block = matches!(put, Some((Outcome::Done, Method::StagedMove)));
        residence.installed(span, pages, is_block && pages * page_bytes == HUGE);
    }
    let Some((outcome, method)) = put else { return Err(InstallError::Gone) };
    if pages == 0 {
        return Err(refused(region, outcome));
    }
    settle(region, claim, span.prefix(pages), (outcome, method), quiet);
    Ok(pages)
}

/// The leading pages of a span that have the bytes of their first reading, with room for them in the budget
/// of the region.
#[inline(never)]
fn with_room(
    region: &Mapping,
    span: Span,
    content: &Content<'_>,
    done: usize,
    quiet: bool,
) -> Result<Span, InstallError> {
    let span = unchanged(region, span, content, done)?;
    match &region.residence {
        Some(residence) if !residence.make_room(span.pages, quiet) => Err(InstallError::NoRoom),
        _ => Ok(span),
    }
}

/// False for zeros, which are a page of the kernel unless their first write is told, and for pages of a
/// memfd, which are page cache.
pub(super) fn takes_memory(region: &Mapping, content: &Content<'_>) -> bool {
    match content {
        Content::Zero => region.written_back().is_some(),
        Content::Continue => false,
        _ => true,
    }
}

/// The leading pages of a span that have the bytes of their first reading. In a region with a budget, the
/// source of a page that comes back may have changed, and a slice shows the page perhaps.
#[inline(never)]
pub(super) fn unchanged(
    region: &Mapping,
    span: Span,
    content: &Content<'_>,
    done: usize,
) -> Result<Span, InstallError> {
    let Some(residence) = &region.residence else { return Ok(span) };
    let bytes = match content {
        Content::Buffered(bytes) | Content::Gathered(bytes) => bytes,
        Content::StagedMove(staging) => staging.bytes(),
        // Bytes of stable sources.
        Content::Copy(..) | Content::Move(..) | Content::Continue | Content::Zero | Content::Released => {
            return Ok(span);
        }
    };
    match residence.unchanged(span, &bytes[done..][..region.page_size().bytes_of(span)]) {
        0 => Err(changed(region, span.first)),
        pages => Ok(span.prefix(pages)),
    }
}

#[cold]
fn changed(region: &Mapping, page: Page) -> InstallError {
    region.counters.local().source_errors.add(1);
    let error = FailureReason::Changed.error(
        "the source changed: its bytes differ from the first reading of this page, and a slice must not change: leave the source as it is, or use build_shared()",
    );
    let mut pieces = region.layout.pieces(region.page_size().offsets(page.span()));
    match pieces.find(|piece| !piece.backing.is_stable()) {
        Some(piece) => piece.failed(error).into(),
        None => failure_at(region, page.span(), error).into(),
    }
}

/// Settles and records pages that the kernel has.
///
/// This function and others here are not part of their callers, because a signal handler has a small
/// stack.
#[inline(never)]
fn settle(
    region: &Mapping,
    claim: &mut Claim<'_>,
    span: Span,
    (outcome, method): (Outcome, Method),
    quiet: bool,
) {
    claim.settle(span.pages, PageState::Present);
    count(region, span, method);
    // No thread waits for a page that a signal handler fills.
    if quiet {
        return;
    }
    if outcome == Outcome::AlreadyThere {
        // In this case the kernel wakes no thread, and the faulting thread may sleep since before
        // the page was installed.
        region.wake(span);
    } else {
        region.remove_failures(span);
    }
    log!(trace, region = region.name, page = span.first.0, pages = span.pages, %method, "installed");
}

/// The kernel has installed nothing.
#[cold]
fn refused(region: &Mapping, outcome: Outcome) -> InstallError {
    let error = match outcome {
        Outcome::Changing => InstallError::Changing,
        Outcome::NoMemory => InstallError::NoMemory,
        refused => {
            if let (Outcome::ProcessGone, Some(adopted)) = (refused, region.target.foreign()) {
                adopted.end();
            }
            return InstallError::Refused(refused);
        }
    };
    region.counters.local().retries.add(1);
    error
}

/// Passes content to the kernel for a span, from the content's byte `done` on. `None` if the pages
/// were in the region, and are gone.
///
/// A quiet thread does not look for poison markers, because looking up a failure takes a lock. A
/// page that has just faulted has none; a page that is poisoned meanwhile raises its signal when it
/// is touched again.
pub(super) fn put(region: &Mapping, span: Span, content: &mut Content<'_>, done: usize, quiet: bool) -> Put {
    match content {
        Content::Copy(memory, bytes) => copy(region, span, memory, bytes.start + done, Method::Copy),
        Content::Buffered(bytes) => copy(region, span, bytes, done, Method::Buffered),
        Content::Gathered(bytes) => copy(region, span, bytes, done, Method::Gathered),
        Content::StagedMove(staging) => put_staged(region, span, staging, done),
        Content::Move(donated, offset) => give(region, span, donated, *offset + done as u64, quiet),
        Content::Continue => continue_pages(region, span),
        Content::Zero => zero(region, span, quiet),
        Content::Released => find_in_region(region, span, Method::Copy),
    }
}

type Put = Option<(Outcome, Method)>;

/// Copies the pages of a span from the byte `from` on. In few steps, because a signal handler has a small
/// stack.
#[inline]
fn copy(region: &Mapping, span: Span, bytes: &[u8], from: usize, method: Method) -> Put {
    let range = region.target.addresses(span);
    let (bytes, uffd) = (&bytes[from..from + range.bytes()], region.uffd.of(range));
    let outcome = match region.arrives_protected(span.first) {
        true => uffd.copy_protected(range, bytes),
        false => uffd.copy(range, bytes),
    };
    Some((outcome, method))
}

/// If writes are recorded, pages arrive write-protected, so that the kernel tells their first write.
#[inline]
fn arrival(region: &Mapping, span: Span) -> Arrival {
    if region.arrives_protected(span.first) { Arrival::Protected } else { Arrival::Writable }
}

fn continue_pages(region: &Mapping, span: Span) -> Put {
    let range = region.target.addresses(span);
    Some((region.uffd.of(range).continue_pages(range), Method::Continue))
}

/// Moves staged pages in; if the kernel refuses, copies them.
fn put_staged(region: &Mapping, span: Span, staging: &mut Staging, done: usize) -> Put {
    let range = region.target.addresses(span);
    match region.uffd.of(range).move_staged(range, staging, done) {
        // Bytes that have not moved are still in staging.
        Outcome::Busy | Outcome::NoMemory | Outcome::Refused(_) => {}
        Outcome::AlreadyThere if is_marked(region, span) => {}
        outcome => return Some((outcome, Method::StagedMove)),
    }
    copy(region, span, staging.bytes(), done, Method::Buffered)
}

fn zero(region: &Mapping, span: Span, quiet: bool) -> Put {
    if region.records_writes() {
        return copy_zeros(region, span);
    }
    let range = region.target.addresses(span);
    let outcome = match region.uffd.of(range).zero(range) {
        Outcome::AlreadyThere if !quiet && is_marked(region, span) => zero_marked(region, span),
        outcome => outcome,
    };
    Some((outcome, Method::Zero))
}

/// Copies zeros, because the kernel's zero page arrives without write protection.
fn copy_zeros(region: &Mapping, span: Span) -> Put {
    let page = region.page_size().bytes();
    let part = span.prefix(ZEROS.len() / page);
    let (outcome, _) = copy(region, part, &ZEROS, 0, Method::Zero)?;
    let outcome = match outcome {
        Outcome::Done if part.pages < span.pages => Outcome::Partial { bytes: part.pages * page },
        outcome => outcome,
    };
    Some((outcome, Method::Zero))
}

/// Moves donated pages in; if the kernel refuses, copies the first one. `None` if they are gone.
fn give(region: &Mapping, span: Span, donated: &Donated, offset: u64, quiet: bool) -> Put {
    if region.moves {
        let range = region.target.addresses(span);
        match region.uffd.of(range).move_donated(range, donated, offset) {
            // The page is pinned, shared with a forked process, was never touched, or is gone.
            Outcome::Busy | Outcome::NotRegistered | Outcome::Refused(_) => {}
            Outcome::AlreadyThere if !quiet && is_marked(region, span) => {}
            outcome => return Some((outcome, Method::Move)),
        }
    }
    match donated.has_moved(region.page_size().page_at(offset)) {
        true if quiet => None,
        true => find_in_region(region, span, Method::Move),
        false => copy_donated(region, span, donated, offset),
    }
}

/// The answer for a page that has moved into the region before, or whose source is released: it was
/// swapped out when it was looked for, or was discarded. Not called in a signal handler, because a
/// poison marker that it sets would have no failure.
#[cold]
#[inline(never)]
fn find_in_region(region: &Mapping, span: Span, method: Method) -> Put {
    if is_marked(region, span) {
        return None;
    }
    if !region.uffd.features().contains(Features::POISON) {
        let mut is_here = false;
        region.target.residency(span.prefix(1), |_, here| is_here = here);
        return is_here.then_some((Outcome::AlreadyThere, method));
    }
    // The kernel sets a poison marker only in an empty place, which tells the two apart.
    let range = region.target.addresses(span.prefix(1));
    match region.uffd.of(range).poison(range) {
        outcome @ (Outcome::AlreadyThere | Outcome::Changing) => Some((outcome, method)),
        _ => None,
    }
}

fn copy_donated(region: &Mapping, span: Span, donated: &Donated, offset: u64) -> Put {
    let range = region.target.addresses(span.prefix(1));
    let outcome = match region.uffd.of(range).copy_donated(range, donated, offset, arrival(region, span)) {
        Outcome::Done if span.pages > 1 => Outcome::Partial { bytes: range.bytes() },
        outcome => outcome,
    };
    Some((outcome, Method::Copy))
}

/// Replaces the poison marker of a span's first page by zeros.
fn zero_marked(region: &Mapping, span: Span) -> Outcome {
    let range = region.target.addresses(span.prefix(1));
    match region.uffd.of(range).copy(range, &ZEROS[..region.page_size().bytes()]) {
        Outcome::Done if span.pages > 1 => Outcome::Partial { bytes: region.page_size().bytes() },
        outcome => outcome,
    }
}

/// Whether a span's first page has a poison marker. For a move and for the zero page the marker
/// counts as a page that is already there; a copy replaces it.
fn is_marked(region: &Mapping, span: Span) -> bool {
    region.failure(span.first).is_some()
}

pub(crate) fn count(region: &Mapping, span: Span, method: Method) {
    let counters = region.counters.local();
    let counter = match method {
        Method::Copy => &counters.pages_copied,
        Method::Buffered => &counters.pages_buffered,
        Method::Gathered => &counters.pages_gathered,
        Method::StagedMove => &counters.pages_staged,
        Method::Move => &counters.pages_moved,
        Method::Continue => &counters.pages_continued,
        Method::Zero => &counters.pages_zeroed,
        Method::Map | Method::Alias => &counters.pages_in_place,
        Method::Poison => &counters.pages_poisoned,
    };
    counter.add(span.pages as u64);
}

/// A page of zeros, of the largest page size.
static ZEROS: [u8; HUGE] = [0; HUGE];
