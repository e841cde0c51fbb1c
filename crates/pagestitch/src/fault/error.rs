//! The two answers of a journey: the reason why pages are not installed, and the reason why the
//! journey ended.

use crate::error::{Failure, FailureReason};
use crate::space::Mapping;
use crate::space::page_table::Unclaimed;
use pagestitch_kernel::{Errno, Outcome, Span};
use std::io;
use std::sync::Arc;

/// The reason why the first page of a claim, or several first pages, are not installed.
pub(crate) enum InstallError {
    /// The memory map is changing: the server must read its events first.
    Changing,
    /// The kernel has no memory for the page. There may be some in a moment.
    NoMemory,
    /// The budget has no room, because written pages cannot go back to their sources.
    NoRoom,
    /// The source of the page has failed.
    Source(Box<Failure>),
    /// The source has failed for this number of pages at once. Some of them may be readable alone.
    Several(usize),
    /// The bytes of the page are gone: they have moved, or their scope has ended.
    Gone,
    /// The kernel refuses the page; its source has given the bytes.
    Refused(Outcome),
}

impl From<Failure> for InstallError {
    fn from(failure: Failure) -> Self {
        Self::Source(Box::new(failure))
    }
}

/// The reason why a journey ended before its last page. The pages that are left are absent again.
#[derive(Debug)]
pub(crate) enum Unfilled {
    /// The first page could not be claimed.
    Unclaimed(Unclaimed),
    /// The memory map is changing. Waiting threads were woken, and fault again.
    Changing,
    /// The fault is queued to be served again. Its thread still sleeps.
    Later,
    /// The first page has failed, and is poisoned.
    Failed(Arc<Failure>),
    /// The first page cannot be filled, and its next touch tries again.
    GivenBack,
}

/// The failure of a span's first page, with an error that does not come from its source.
pub(crate) fn failure_at(region: &Mapping, span: Span, error: io::Error) -> Failure {
    let offsets = region.page_size().offsets(span);
    region.layout.piece_at(offsets.start, offsets.end).failed(error)
}

/// A refusal of the kernel as an error with a cause.
pub(super) fn refusal(outcome: Outcome) -> io::Error {
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
