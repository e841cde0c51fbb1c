//! Install and settle: pass the bytes of pages to the kernel, and interpret its [`Outcome`].

use crate::error::{Failure, FailureReason};
use crate::fault::fill::{Content, Filled};
use crate::method::Method;
use crate::source::gone;
use crate::space::Mapping;
use crate::space::page_table::{Claim, PageState, Wake};
use crate::space::target::{Busy, Foreign};
use pagestitch_kernel::Features;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::pages::Donated;
use pagestitch_kernel::sync::RwLockReadGuard;
use pagestitch_kernel::{Errno, Outcome, Page, Span};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// The reason why a claim was not settled to its end.
#[derive(Debug)]
pub(crate) enum FillError {
    /// The memory map is changing: the server must read its events first.
    Changing,
    /// The kernel has no memory for the faulting page. The faulting thread still sleeps.
    NoMemory,
    /// The source of the first page has failed `failures` times; the server reads it again after
    /// `pause`. The faulting thread still sleeps.
    Again { pause: Duration, failures: u32 },
    /// The first page has failed and is poisoned.
    Failed(Arc<Failure>),
}

/// The reaction if the kernel has no memory for a page. There may be some in a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    /// Wait and retry, on a caller's thread.
    Wait,
    /// Return [`InstallError::NoMemory`], because a waiting worker would serve no other fault.
    Tell,
    /// Fail the page, because it has been retried often enough.
    Fail,
}

/// The reason why the kernel has not installed the first page of a claim.
#[derive(Debug)]
pub(crate) enum InstallError {
    /// The memory map is changing: the server must read its events first.
    Changing,
    /// The kernel has no memory for it, and [`Short::Tell`] was chosen.
    NoMemory,
    /// The kernel refuses the page; the source has given its bytes.
    Refused(Failure),
}

/// Installs the filled pages at the start of the claim, and settles them.
pub(crate) fn install(
    region: &Mapping,
    claim: &mut Claim<'_>,
    mut filled: Filled<'_>,
    short: Short,
) -> Result<(), InstallError> {
    let mut done = 0;
    let mut pauses = SHORT_OF_MEMORY.into_iter();
    while done < filled.pages {
        let span = claim.span().prefix(filled.pages - done);
        match install_some(region, claim, span, &mut filled.content, done) {
            Ok(pages) => done += pages,
            Err(PutError::Changing) => return Err(InstallError::Changing),
            Err(PutError::NoMemory) if short == Short::Tell => return Err(InstallError::NoMemory),
            Err(PutError::NoMemory) => match pauses.next().filter(|_| short == Short::Wait) {
                Some(pause) => thread::sleep(pause),
                None => return Err(refused(region, span, Errno::ENOMEM.into())),
            },
            Err(PutError::Other(error)) => return Err(refused(region, span, error)),
        }
    }
    Ok(())
}

/// The reason why pages were not installed.
enum PutError {
    Changing,
    /// There may be memory again when the kernel has reclaimed some.
    NoMemory,
    Other(io::Error),
}

/// Installs as many leading pages of a span as the kernel takes at once; returns their number.
fn install_some(
    region: &Mapping,
    claim: &mut Claim<'_>,
    span: Span,
    content: &mut Content<'_>,
    done: usize,
) -> Result<usize, PutError> {
    // Blocks discard events until the pages are settled.
    let _held = held(region, span).map_err(|Changing| PutError::Changing)?;
    let page_bytes = region.page_size().bytes();
    let put = put(region, span, content, done * page_bytes);
    let (outcome, method) = put.ok_or_else(|| PutError::Other(gone()))?;
    let pages = match outcome {
        Outcome::Done => span.pages,
        Outcome::Partial { bytes } => bytes / page_bytes,
        Outcome::AlreadyThere => {
            // In this case the kernel wakes no thread, and the faulting thread may sleep since
            // before the page was installed.
            region.wake(span.prefix(1));
            1
        }
        Outcome::Changing => {
            region.counters.local().retries.add(1);
            return Err(PutError::Changing);
        }
        Outcome::NoMemory => {
            region.counters.local().retries.add(1);
            return Err(PutError::NoMemory);
        }
        refused => {
            if let (Outcome::ProcessGone, Some(adopted)) = (refused, region.target.foreign()) {
                adopted.end();
            }
            return Err(PutError::Other(refusal(refused)));
        }
    };
    claim.settle(pages, PageState::Present);
    if outcome != Outcome::AlreadyThere {
        region.remove_failures(span.prefix(pages));
    }
    tell(region, span.prefix(pages), method);
    Ok(pages)
}

/// The bytes of a page may have changed by a discard: the server must read its events first.
struct Changing;

/// Blocks discard events while it is held. `None` if discards do not change the bytes of pages.
type Held<'r> = Option<RwLockReadGuard<'r, ()>>;

/// Blocks discard events of foreign memory. `Changing` if a page of the span was discarded since
/// its claim, because the filled bytes are outdated.
fn held(region: &Mapping, span: Span) -> Result<Held<'_>, Changing> {
    unless_invalidated(region, span, region.target.foreign().and_then(Foreign::hold))
}

/// As [`held`], for a thread that must not block: `Changing` also if the lock is taken.
fn held_now(region: &Mapping, span: Span) -> Result<Held<'_>, Changing> {
    let held = region.target.foreign().map(Foreign::try_hold).transpose();
    unless_invalidated(region, span, held.map_err(|Busy| Changing)?.flatten())
}

fn unless_invalidated<'r>(region: &Mapping, span: Span, held: Held<'r>) -> Result<Held<'r>, Changing> {
    if held.is_some() && span.iter().any(|page| region.pages.state(page) == PageState::Invalidated) {
        region.counters.local().retries.add(1);
        return Err(Changing);
    }
    Ok(held)
}

/// Installs one page without a lock or an allocation, and settles it. False if the kernel refuses.
pub(crate) fn install_inline(region: &Mapping, claim: &mut Claim<'_>, content: Content<'_>) -> bool {
    let span = claim.span();
    match put_inline(region, span, content) {
        Some((Outcome::Done | Outcome::AlreadyThere, method)) => {
            claim.settle(1, PageState::Present);
            count(region, span, method);
            true
        }
        // The thread faults again after the claim is dropped.
        Some((Outcome::Changing, _)) => true,
        _ => false,
    }
}

/// Installs one page beside the claim of another call, which is interrupted and cannot proceed. The
/// later install of the two gets `AlreadyThere`. Donated pages are refused, because they can move
/// only once.
pub(crate) fn install_beside(region: &Mapping, span: Span, mut content: Content<'_>) -> bool {
    let put = match content {
        Content::Move(..) => None,
        Content::Buffered(_) | Content::StagedMove(_) | Content::Continue => {
            put(region, span, &mut content, 0)
        }
        inline => put_inline(region, span, inline),
    };
    matches!(put, Some((Outcome::Done | Outcome::AlreadyThere | Outcome::Changing, _)))
}

/// As [`put`], for the contents that a signal handler can install, with little use of its stack.
///
/// It does not look for poison markers, because looking up a failure takes a lock. A page that has
/// just faulted has none; a page that is poisoned meanwhile raises its signal when it is touched
/// again.
fn put_inline(region: &Mapping, span: Span, content: Content<'_>) -> Option<(Outcome, Method)> {
    match content {
        Content::Copy(memory, bytes) => Some((copy_inline(region, span, &memory[bytes]), Method::Copy)),
        Content::Gathered(bytes) => Some((copy_inline(region, span, bytes), Method::Gathered)),
        Content::Move(donated, offset) => give(region, span, donated, offset, |_, _| false),
        Content::Zero => Some((region.uffd.zero(region.target.addresses(span)), Method::Zero)),
        Content::Buffered(_) | Content::StagedMove(_) | Content::Continue => None,
    }
}

fn copy_inline(region: &Mapping, span: Span, bytes: &[u8]) -> Outcome {
    region.uffd.copy(region.target.addresses(span), bytes)
}

/// Passes content to the kernel for a span, from the content's byte `done` on. `None` if donated
/// pages are gone.
fn put(region: &Mapping, span: Span, content: &mut Content<'_>, done: usize) -> Option<(Outcome, Method)> {
    let range = region.target.addresses(span);
    let part = done..done + range.bytes();
    Some(match content {
        Content::Copy(memory, bytes) => (region.uffd.copy(range, &memory[bytes.clone()][part]), Method::Copy),
        Content::Buffered(bytes) => (region.uffd.copy(range, &bytes[part]), Method::Buffered),
        Content::Gathered(bytes) => (region.uffd.copy(range, &bytes[part]), Method::Gathered),
        Content::StagedMove(staging) => match region.uffd.move_staged(range, staging, done) {
            // Bytes that have not moved are still in staging, so they can be copied instead.
            Outcome::Busy | Outcome::NoMemory | Outcome::Refused(_) => {
                (region.uffd.copy(range, &staging.bytes()[part]), Method::Buffered)
            }
            Outcome::AlreadyThere if is_marked(region, span) => {
                (region.uffd.copy(range, &staging.bytes()[part]), Method::Buffered)
            }
            outcome => (outcome, Method::StagedMove),
        },
        Content::Move(donated, offset) => {
            return give(region, span, donated, *offset + done as u64, is_marked);
        }
        Content::Continue => (region.uffd.continue_pages(range), Method::Continue),
        Content::Zero => match region.uffd.zero(range) {
            Outcome::AlreadyThere if is_marked(region, span) => (zero_marked(region, span), Method::Zero),
            outcome => (outcome, Method::Zero),
        },
    })
}

/// Moves donated pages in; if the kernel refuses, copies the first one. `None` if they are gone.
/// `marked` tells whether the span's first page has a poison marker.
fn give(
    region: &Mapping,
    span: Span,
    donated: &Donated,
    offset: u64,
    marked: fn(&Mapping, Span) -> bool,
) -> Option<(Outcome, Method)> {
    if region.moves {
        match region.uffd.move_donated(region.target.addresses(span), donated, offset) {
            // The page is pinned, shared with a forked process, was never touched, or is gone.
            Outcome::Busy | Outcome::NotRegistered | Outcome::Refused(_) => {}
            Outcome::AlreadyThere if marked(region, span) => {}
            outcome => return Some((outcome, Method::Move)),
        }
    }
    let range = region.target.addresses(span.prefix(1));
    if donated.has_moved(region.page_size().page_at(offset)) {
        if marked(region, span) {
            return None;
        }
        // The page is in the region and swapped out, or was discarded there. The kernel sets a
        // poison marker only in an empty place, which tells the two apart.
        return match region.uffd.poison(range) {
            outcome @ (Outcome::AlreadyThere | Outcome::Changing) => Some((outcome, Method::Move)),
            _ => None,
        };
    }
    let outcome = match region.uffd.copy_donated(range, donated, offset) {
        Outcome::Done if span.pages > 1 => Outcome::Partial { bytes: range.bytes() },
        outcome => outcome,
    };
    Some((outcome, Method::Copy))
}

/// Replaces the poison marker of a span's first page by zeros.
fn zero_marked(region: &Mapping, span: Span) -> Outcome {
    match region.uffd.copy(region.target.addresses(span.prefix(1)), &ZEROS[..region.page_size().bytes()]) {
        Outcome::Done if span.pages > 1 => Outcome::Partial { bytes: region.page_size().bytes() },
        outcome => outcome,
    }
}

/// Whether a span's first page has a poison marker. For a move and for the zero page the marker
/// counts as a page that is already there; a copy replaces it.
fn is_marked(region: &Mapping, span: Span) -> bool {
    region.failure(span.first).is_some()
}

/// Poisons the claim's first page and keeps the failure.
pub(crate) fn fail(region: &Mapping, claim: &mut Claim<'_>, failure: Failure) -> FillError {
    match held(region, claim.span().prefix(1)) {
        Ok(held) => fail_held(region, claim, failure, &held),
        Err(Changing) => FillError::Changing,
    }
}

/// As [`fail`], for a thread that must not block: [`FillError::Changing`] also if the lock for
/// discard events is taken.
pub(crate) fn fail_now(region: &Mapping, claim: &mut Claim<'_>, failure: Failure) -> FillError {
    match held_now(region, claim.span().prefix(1)) {
        Ok(held) => fail_held(region, claim, failure, &held),
        Err(Changing) => FillError::Changing,
    }
}

fn fail_held(region: &Mapping, claim: &mut Claim<'_>, failure: Failure, _: &Held<'_>) -> FillError {
    let page = claim.span().first;
    let failure = Arc::new(failure);
    if region.owner_has_ended() {
        // No thread can touch the pages of an ended owner, and there may be millions to report.
        return FillError::Failed(failure);
    }
    // The failure is kept first: a thread that finds the page poisoned then finds the reason.
    region.record_failure(page, Arc::clone(&failure));
    if let Some(adopted) = region.target.foreign() {
        adopted.note_unavailable(&region.name);
    }
    if let Err(stopped) = poison(region, page.span()) {
        return stopped;
    }
    claim.settle(1, PageState::Poisoned);
    region.settle_failure(page, &failure);
    count(region, page.span(), Method::Poison);
    log!(warn, region = region.name, page = page.0, %failure, "page poisoned");
    region.report(page, &failure);
    FillError::Failed(failure)
}

/// Turns an install error of the faulting page into the fault's error; poisons the page if the
/// kernel refuses it.
pub(crate) fn given_up(region: &Mapping, claim: &mut Claim<'_>, not: InstallError) -> FillError {
    match not {
        InstallError::Changing => FillError::Changing,
        InstallError::NoMemory => FillError::NoMemory,
        InstallError::Refused(failure) => fail(region, claim, failure),
    }
}

/// Poisons a span: threads that wait there, or touch it later, get SIGBUS. Repeating it is
/// harmless.
pub(crate) fn poison(region: &Mapping, span: Span) -> Result<(), FillError> {
    if region.uffd.features().contains(Features::POISON) {
        match region.uffd.poison(region.target.addresses(span)) {
            Outcome::Changing => return Err(FillError::Changing),
            // Not registered: unmapped, moved, or revoked before. Another mapping may be there by
            // now, which must not change.
            Outcome::Done | Outcome::AlreadyThere | Outcome::NotRegistered => {
                region.wake(span);
                return Ok(());
            }
            // The process has ended, and its waiting threads with it.
            Outcome::ProcessGone if region.target.foreign().is_some() => return Ok(()),
            // No memory for the poison marker: fall through to revoking the page, which needs none.
            _ => {}
        }
    }
    if let Err(errno) = region.target.revoke(span) {
        if errno == Errno::EAGAIN && region.target.foreign().is_some() {
            // Memory without a known owner to kill, such as a forked child's: the waiting thread
            // faults again, when there may be memory for the poison marker.
            return Err(FillError::Changing);
        }
        if errno == Errno::ESRCH && region.target.foreign().is_some() {
            // The owner has ended meanwhile.
            return Ok(());
        }
        // The waiting thread can get neither bytes nor a signal: only zeros or a hang would be
        // left.
        eprintln!("pagestitch: region {}: cannot take a failed page away ({errno}): aborting", region.name);
        std::process::abort();
    }
    region.wake(span);
    Ok(())
}

/// Maps a page that the page cache has, after a minor fault on a file mapping of the owner.
pub(crate) fn show(region: &Mapping, page: Page) {
    // If the page is mapped by now, or gone, the waiting thread faults again.
    let _ = region.uffd.continue_pages(region.target.addresses(page.span()));
    region.wake(page.span());
}

/// Lets a writer through that a write protection of the owner has stopped.
pub(crate) fn release(region: &Mapping, page: Page) {
    let _ = region.uffd.unprotect(region.target.addresses(page.span()));
    region.wake(page.span());
}

/// Fails a page for which the kernel had no memory at each retry.
pub(crate) fn fail_without_memory(region: &Mapping, claim: &mut Claim<'_>) {
    let refused = refused(region, claim.span(), Errno::ENOMEM.into());
    drop(given_up(region, claim, refused));
}

fn refused(region: &Mapping, span: Span, error: io::Error) -> InstallError {
    let offsets = region.page_size().offsets(span);
    InstallError::Refused(region.layout.piece_at(offsets.start, offsets.end).failed(error).of_kernel())
}

/// A refusal of the kernel as an error with a cause.
fn refusal(outcome: Outcome) -> io::Error {
    match outcome {
        Outcome::ProcessGone => {
            FailureReason::OwnerEnded.error("the process that owns the memory has ended")
        }
        Outcome::NotRegistered => {
            let what = "the page is not mapped any more: part of the region was unmapped or moved";
            FailureReason::Unmapped.error(what)
        }
        Outcome::SourceUnreadable => FailureReason::UnreadableMemory.error(
            "the source's memory cannot be read: unmapped, past a truncated file's end, an I/O error of a mapped file, or not filled (EFAULT)",
        ),
        Outcome::Busy => Errno::EBUSY.into(),
        Outcome::Refused(errno) => errno.into(),
        Outcome::Done
        | Outcome::Partial { .. }
        | Outcome::AlreadyThere
        | Outcome::Changing
        | Outcome::NoMemory => {
            unreachable!("{outcome:?} is not a refusal")
        }
    }
}

fn tell(region: &Mapping, span: Span, method: Method) {
    count(region, span, method);
    log!(trace, region = region.name, page = span.first.0, pages = span.pages, %method, "installed");
}

fn count(region: &Mapping, span: Span, method: Method) {
    let counters = region.counters.local();
    let (pages, bytes) = (span.pages as u64, region.page_size().bytes_of(span) as u64);
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
    counter.add(pages);
    if matches!(method, Method::Copy | Method::Buffered | Method::Gathered | Method::StagedMove) {
        counters.bytes_copied.add(bytes);
    }
}

/// The pauses between retries of a page for which the kernel has no memory. After the last one it
/// fails.
pub(crate) const SHORT_OF_MEMORY: [Duration; 3] =
    [Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(100)];
/// A page of zeros, of the largest page size.
static ZEROS: [u8; HUGE] = [0; HUGE];
