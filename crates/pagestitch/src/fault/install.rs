//! Resolve and settle: tell the kernel what a page is, and read its answer. The one place where an [`Outcome`]
//! is interpreted.

use crate::error::Failure;
use crate::fault::fill::{Content, Filled};
use crate::method::Method;
use crate::source::gone;
use crate::space::Mapping;
use crate::space::page_table::{Claim, State, Wake};
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

/// Why a claim was not settled to its end.
#[derive(Debug)]
pub(crate) enum FillError {
    /// The memory map is changing: events have to be read first.
    Changing,
    /// The kernel has no memory for the page that was asked for. Whoever waits for it sleeps on.
    NoMemory,
    /// The source of its first page has failed, so often by now, and is asked again after a pause. Whoever waits for it sleeps on.
    Again { pause: Duration, failures: u32 },
    /// Its first page has failed, and was poisoned.
    Failed(Arc<Failure>),
}

/// What to do where the kernel has no memory for a page, though there may be some in a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    /// Waits: in a thread of the caller's.
    Wait,
    /// Says so: a worker that waits is missing elsewhere.
    Tell,
    /// It has been waited for.
    Fail,
}

/// Why the kernel has not installed the first page of a claim.
#[derive(Debug)]
pub(crate) enum InstallError {
    /// The memory map is changing: events have to be read first.
    Changing,
    /// There is no memory for it, and it was not waited for.
    NoMemory,
    /// It will not, and that is not the source's fault.
    Refused(Failure),
}

/// Installs what was filled in the first pages of the claim, and settles them.
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

/// Why pages were not installed.
enum PutError {
    Changing,
    /// There may be some again, when others have been reclaimed.
    NoMemory,
    Other(io::Error),
}

/// Installs as many of a span as the kernel takes at once; says how many.
fn install_some(
    region: &Mapping,
    claim: &mut Claim<'_>,
    span: Span,
    content: &mut Content<'_>,
    done: usize,
) -> Result<usize, PutError> {
    // Until it is settled, nothing that its owner lets go of is taken note of.
    let _held = held(region, span).map_err(|Changing| PutError::Changing)?;
    let page_bytes = region.page_size().bytes();
    let put = put(region, span, content, done * page_bytes);
    let (outcome, method) = put.ok_or_else(|| PutError::Other(gone()))?;
    let pages = match outcome {
        Outcome::Done => span.pages,
        Outcome::Partial { bytes } => bytes / page_bytes,
        Outcome::AlreadyThere => {
            // The kernel wakes nobody then, and the waiter may have come before the page.
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
    claim.settle(pages, State::Present);
    if outcome != Outcome::AlreadyThere {
        region.forget_failures(span.prefix(pages));
    }
    tell(region, span.prefix(pages), method);
    Ok(pages)
}

/// What a page holds is not known any more: events have to be read first.
struct Changing;

/// While it is held, what pages hold stays as it is. None where it stays so anyway.
type Held<'r> = Option<RwLockReadGuard<'r, ()>>;

/// Keeps what a span holds as it is, where others may change that. `Changing` if it was let go since it was claimed: what was
/// filled is not what it holds.
fn held(region: &Mapping, span: Span) -> Result<Held<'_>, Changing> {
    unless_invalidated(region, span, region.target.foreign().and_then(Foreign::hold))
}

/// As [`held`], for a thread that must not wait.
fn held_now(region: &Mapping, span: Span) -> Result<Held<'_>, Changing> {
    let held = region.target.foreign().map(Foreign::try_hold).transpose();
    unless_invalidated(region, span, held.map_err(|Busy| Changing)?.flatten())
}

fn unless_invalidated<'r>(region: &Mapping, span: Span, held: Held<'r>) -> Result<Held<'r>, Changing> {
    if held.is_some() && span.iter().any(|page| region.pages.state(page) == State::Invalidated) {
        region.counters.local().retries.add(1);
        return Err(Changing);
    }
    Ok(held)
}

/// Installs one page without a lock or an allocation, and settles it. False if it cannot be had.
pub(crate) fn install_inline(region: &Mapping, claim: &mut Claim<'_>, content: Content<'_>) -> bool {
    let span = claim.span();
    match put_inline(region, span, content) {
        Some((Outcome::Done | Outcome::AlreadyThere, method)) => {
            claim.settle(1, State::Present);
            count(region, span, method);
            true
        }
        // The thread touches it again, and the claim that is dropped lets it.
        Some((Outcome::Changing, _)) => true,
        _ => false,
    }
}

/// Installs one page that another call claims, and that waits for this one. Whichever comes second is told that it is there. Donated
/// pages are not for two.
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

/// [`put`], of what can be had in a signal handler, with little of its stack. A page that has just been missing has no mark; one that
/// gets it meanwhile is a signal when it is touched again. To look for its failure would take a lock.
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

/// Has the kernel put content at a span, from the content's byte `done` on. `None` where donated pages are gone.
fn put(region: &Mapping, span: Span, content: &mut Content<'_>, done: usize) -> Option<(Outcome, Method)> {
    let range = region.target.addresses(span);
    let part = done..done + range.bytes();
    Some(match content {
        Content::Copy(memory, bytes) => (region.uffd.copy(range, &memory[bytes.clone()][part]), Method::Copy),
        Content::Buffered(bytes) => (region.uffd.copy(range, &bytes[part]), Method::Buffered),
        Content::Gathered(bytes) => (region.uffd.copy(range, &bytes[part]), Method::Gathered),
        Content::StagedMove(staging) => match region.uffd.move_staged(range, staging, done) {
            // It can always be copied instead: what has not moved is still there.
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

/// Moves donated pages in; where the kernel will not, copies the first one. `None` where they are gone. `marked`: whether the span's first
/// page has the mark of a bad one.
fn give(
    region: &Mapping,
    span: Span,
    donated: &Donated,
    offset: u64,
    marked: fn(&Mapping, Span) -> bool,
) -> Option<(Outcome, Method)> {
    if region.moves {
        match region.uffd.move_donated(region.target.addresses(span), donated, offset) {
            // Pinned, or shared with a forked process; or a page that was never touched, or is gone.
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
        // It is in the region, swapped out, or it was let go there: only where nothing is can a mark be set.
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

/// Makes a span's first page zeros, which has the mark of a bad one.
fn zero_marked(region: &Mapping, span: Span) -> Outcome {
    match region.uffd.copy(region.target.addresses(span.prefix(1)), &ZEROS[..region.page_size().bytes()]) {
        Outcome::Done if span.pages > 1 => Outcome::Partial { bytes: region.page_size().bytes() },
        outcome => outcome,
    }
}

/// Whether a span's first page has the mark of a bad one. To a move, and to what makes zeros, that counts as a page; a copy
/// replaces it.
fn is_marked(region: &Mapping, span: Span) -> bool {
    region.failure(span.first).is_some()
}

/// Poisons the claim's first page and keeps the reason. Never zeros for bytes.
pub(crate) fn fail(region: &Mapping, claim: &mut Claim<'_>, failure: Failure) -> FillError {
    match held(region, claim.span().prefix(1)) {
        Ok(held) => fail_held(region, claim, failure, &held),
        Err(Changing) => FillError::Changing,
    }
}

/// As [`fail`], for a thread that must not wait: [`FillError::Changing`] also while another thread keeps events from being read.
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
        // A page that nothing can touch is not lost, and there may be millions.
        return FillError::Failed(failure);
    }
    // Kept first: who finds the page poisoned finds the reason.
    region.keep_failure(page, Arc::clone(&failure));
    if let Some(adopted) = region.target.foreign() {
        adopted.lose(&region.name);
    }
    if let Err(stopped) = poison(region, page.span()) {
        return stopped;
    }
    claim.settle(1, State::Poisoned);
    region.settle_failure(page, &failure);
    count(region, page.span(), Method::Poison);
    log!(warn, region = region.name, page = page.0, %failure, "page poisoned");
    region.report(page, &failure);
    FillError::Failed(failure)
}

/// What becomes of a page that the kernel has not installed, and that was asked for.
pub(crate) fn given_up(region: &Mapping, claim: &mut Claim<'_>, not: InstallError) -> FillError {
    match not {
        InstallError::Changing => FillError::Changing,
        InstallError::NoMemory => FillError::NoMemory,
        InstallError::Refused(failure) => fail(region, claim, failure),
    }
}

/// Makes a span bad: who waits there, or touches it later, gets SIGBUS. Doing it twice does no harm.
pub(crate) fn poison(region: &Mapping, span: Span) -> Result<(), FillError> {
    if region.uffd.features().contains(Features::POISON) {
        match region.uffd.poison(region.target.addresses(span)) {
            Outcome::Changing => return Err(FillError::Changing),
            // Not registered: unmapped, moved, or taken away before. Something else may be there by now, and is left alone.
            Outcome::Done | Outcome::AlreadyThere | Outcome::NotRegistered => {
                region.wake(span);
                return Ok(());
            }
            // Nobody is there any more to be told.
            Outcome::ProcessGone if region.target.foreign().is_some() => return Ok(()),
            // No memory for the mark: fall through to what needs none.
            _ => {}
        }
    }
    if let Err(errno) = region.target.revoke(span) {
        if errno == Errno::EAGAIN && region.target.foreign().is_some() {
            // A child, and nobody to be ended: the waiter tries again, when there may be memory for the mark.
            return Err(FillError::Changing);
        }
        if errno == Errno::ESRCH && region.target.foreign().is_some() {
            // The owner has ended meanwhile.
            return Ok(());
        }
        // The waiter can neither be given bytes nor a signal: what is left is zeros or a hang.
        eprintln!("pagestitch: region {}: cannot take a failed page away ({errno}): aborting", region.name);
        std::process::abort();
    }
    region.wake(span);
    Ok(())
}

/// Shows a page that a file of its owner's has in its page cache.
pub(crate) fn show(region: &Mapping, page: Page) {
    // Where it is there by now, or gone, the waiter tries again.
    let _ = region.uffd.continue_pages(region.target.addresses(page.span()));
    region.wake(page.span());
}

/// Lets a writer through that somebody else's protection has stopped.
pub(crate) fn release(region: &Mapping, page: Page) {
    let _ = region.uffd.unprotect(region.target.addresses(page.span()));
    region.wake(page.span());
}

/// Has a page fail for which there was no memory each time that it was asked for.
pub(crate) fn fail_without_memory(region: &Mapping, claim: &mut Claim<'_>) {
    let refused = refused(region, claim.span(), Errno::ENOMEM.into());
    drop(given_up(region, claim, refused));
}

fn refused(region: &Mapping, span: Span, error: io::Error) -> InstallError {
    let offsets = region.page_size().offsets(span);
    InstallError::Refused(region.layout.piece_at(offsets.start, offsets.end).failed(error))
}

/// A refusal of the kernel, as an error for people.
fn refusal(outcome: Outcome) -> io::Error {
    match outcome {
        Outcome::ProcessGone => {
            io::Error::new(io::ErrorKind::BrokenPipe, "the process that owns the memory has ended")
        }
        Outcome::NotRegistered => {
            io::Error::other("the page is not mapped any more: somebody unmapped or moved part of the region")
        }
        Outcome::SourceUnreadable => io::Error::other(
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

/// How long to wait for memory, each time there is none, before that is the page's error.
pub(crate) const SHORT_OF_MEMORY: [Duration; 3] =
    [Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(100)];
/// A page of them, of the largest kind.
static ZEROS: [u8; HUGE] = [0; HUGE];
