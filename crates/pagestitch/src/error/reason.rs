//! The reasons for which a page has no bytes.

use super::ErrorKind;
use std::error::Error as StdError;
use std::{fmt, io};

/// The reason for which a page has no bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureReason {
    /// The source returned an error: [`Failure::io_error`](crate::source::Failure::io_error).
    Source,
    /// The source panicked.
    Panicked,
    /// A [`Fetch`](crate::source::Fetch) dropped its [`Reply`](crate::source::Reply) without an
    /// answer.
    NoReply,
    /// A [`Fetch`](crate::source::Fetch) answered with more or fewer bytes than were requested.
    WrongLength,
    /// The fault took longer than [`fault_timeout`](crate::PoolBuilder::fault_timeout), or the owner
    /// of adopted memory changes it without end.
    TimedOut,
    /// A file is shorter than at the build of the region.
    Truncated,
    /// The file system has no space for the page of a file that is mapped in place.
    NoSpace,
    /// A [`LazyMemfd`](crate::source::LazyMemfd) may have huge pages, which cannot be filled page by
    /// page.
    HugePages,
    /// The scope of borrowed memory has ended.
    ScopeEnded,
    /// A donated page has moved into a region, and was discarded there.
    Discarded,
    /// The source was [released](crate::Builder::release_sources) when the region had all of its
    /// bytes, and the page was discarded since. Remedy: [`keep_sources`](crate::Builder::keep_sources).
    Released,
    /// The source gave other bytes than at the first reading of the page, which had left the region
    /// because of its [budget](crate::Budget). A slice must not change.
    Changed,
    /// The memory of the source cannot be read: it is unmapped, lies past the end of a truncated
    /// file, or has an error of its own.
    UnreadableMemory,
    /// The page of the region is unmapped or was moved.
    Unmapped,
    /// The process that owns the memory has ended.
    OwnerEnded,
    /// The kernel has no memory for the page.
    OutOfMemory,
    /// The [budget](crate::Budget) is full of written pages that their sources do not take back.
    NoRoom,
    /// The thread is filling the page already: a signal handler or a source has touched the region.
    Nested,
    /// The page was taken away for good: before Linux 6.6 a failed page cannot be filled again.
    Irrecoverable,
    /// The kernel refused the page for another reason.
    Kernel,
}

impl FailureReason {
    /// The kind of an error with this reason.
    pub(crate) const fn kind(self) -> ErrorKind {
        match self {
            Self::TimedOut => ErrorKind::TimedOut,
            Self::Unmapped | Self::OwnerEnded => ErrorKind::MemoryGone,
            Self::OutOfMemory => ErrorKind::OutOfMemory,
            Self::NoRoom => ErrorKind::LimitReached,
            Self::Irrecoverable => ErrorKind::Unsupported,
            Self::Kernel => ErrorKind::Kernel,
            _ => ErrorKind::SourceFailed,
        }
    }

    /// An I/O error with this reason, which [`of`](Self::of) finds again.
    pub(crate) fn error(self, message: impl Into<String>) -> io::Error {
        let kind = match self {
            Self::TimedOut => io::ErrorKind::TimedOut,
            Self::Truncated => io::ErrorKind::UnexpectedEof,
            Self::NoSpace => io::ErrorKind::StorageFull,
            Self::HugePages => io::ErrorKind::InvalidInput,
            Self::OwnerEnded => io::ErrorKind::BrokenPipe,
            Self::OutOfMemory => io::ErrorKind::OutOfMemory,
            Self::Nested => io::ErrorKind::Deadlock,
            Self::Irrecoverable => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, Reasoned { reason: self, message: message.into() })
    }

    /// Another error with the reason and the kind of `error`, for another reader.
    pub(crate) fn copy(error: &io::Error, message: String) -> io::Error {
        match Self::of(error) {
            Self::Source => io::Error::new(error.kind(), message),
            reason => reason.error(message),
        }
    }

    /// The reason of an error. An error that the library has not made is of the source.
    pub(crate) fn of(error: &io::Error) -> Self {
        let reasoned = error.get_ref().and_then(|inner| inner.downcast_ref::<Reasoned>());
        reasoned.map_or(Self::Source, |reasoned| reasoned.reason)
    }
}

/// The reason of a failure, inside the I/O error that goes from a source to the page.
#[derive(Debug)]
struct Reasoned {
    reason: FailureReason,
    message: String,
}

impl fmt::Display for Reasoned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Reasoned {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_an_io_error_is_found_again() {
        let made = FailureReason::NoReply.error("no answer");
        assert_eq!(
            (FailureReason::of(&made), made.to_string().as_str()),
            (FailureReason::NoReply, "no answer")
        );
        assert_eq!(FailureReason::of(&io::Error::other("theirs")), FailureReason::Source);
    }
}
