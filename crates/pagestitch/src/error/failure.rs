//! The error of a source for one page.

use super::FailureReason;
use crate::guard::Untrusted;
use std::error::Error as StdError;
use std::{fmt, io};

/// The failure of a source to give bytes: the chunk, the source, the offset, and the source's
/// error.
///
/// ```
/// use pagestitch::source::FailureReason;
/// use pagestitch::{Chunk, Pool, Region, Source};
/// # use std::io;
/// # use std::sync::Arc;
/// # struct Disk;
/// # impl Source for Disk {
/// #     fn size(&self) -> u64 {
/// #         8192
/// #     }
/// #     fn read_at(&self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
/// #         Err(io::Error::other("bad sector"))
/// #     }
/// #     fn name(&self) -> String {
/// #         String::from("/dev/sdz")
/// #     }
/// # }
///
/// let region = Region::builder().chunk(Chunk::source(Arc::new(Disk))).build(&Pool::new()?)?;
/// let error = region.populate(4096..).unwrap_err();
/// let failure = error.failure().expect("a source has failed");
/// assert_eq!((failure.chunk(), failure.source_name(), failure.source_offset()), (0, "/dev/sdz", 4096));
/// assert_eq!((failure.reason(), failure.attempts()), (FailureReason::Source, 1));
/// assert_eq!(failure.io_error().kind(), std::io::ErrorKind::Other);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug)]
pub struct Failure {
    pub(crate) chunk: usize,
    pub(crate) source: String,
    pub(crate) offset: u64,
    pub(crate) error: Untrusted<io::Error>,
    pub(crate) reason: FailureReason,
    /// The number of reads of the source.
    pub(crate) attempts: u32,
}

impl Failure {
    /// The first failure of a read.
    pub(crate) fn new(chunk: usize, source: String, offset: u64, error: io::Error) -> Self {
        let reason = FailureReason::of(&error);
        Self { chunk, source, offset, error: Untrusted::new(error), reason, attempts: 1 }
    }

    /// The same failure, of the kernel instead of the source.
    pub(crate) fn of_kernel(self) -> Self {
        let reason = match self.io_error().kind() {
            _ if self.reason != FailureReason::Source => self.reason,
            io::ErrorKind::OutOfMemory => FailureReason::OutOfMemory,
            _ => FailureReason::Kernel,
        };
        Self { reason, ..self }
    }

    /// The failure of one more read of the same bytes.
    pub(crate) fn again(&self, error: io::Error) -> Self {
        let attempts = self.attempts.saturating_add(1);
        Self { attempts, ..Self::new(self.chunk, self.source.clone(), self.offset, error) }
    }

    /// The source's [name](crate::Source::name).
    #[must_use]
    pub fn source_name(&self) -> &str {
        &self.source
    }

    /// The offset in the source, in bytes, at which the failed read started.
    #[must_use]
    pub const fn source_offset(&self) -> u64 {
        self.offset
    }

    /// The number of the chunk, counted from 0 in the order of the builder.
    #[must_use]
    pub const fn chunk(&self) -> usize {
        self.chunk
    }

    /// The number of times that the page was read from the source.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The reason, to branch on.
    #[must_use]
    pub const fn reason(&self) -> FailureReason {
        self.reason
    }

    /// The error of the source, or of the kernel.
    #[must_use]
    pub const fn io_error(&self) -> &io::Error {
        self.error.get()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chunk, source, offset, error, reason: _, attempts } = self;
        write!(f, "chunk {chunk} ({source}), at byte {offset} of its source: {error}")?;
        if *attempts > 1 { write!(f, " (asked {attempts} times)") } else { Ok(()) }
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.get().source()
    }
}
