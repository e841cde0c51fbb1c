//! The error type of the library: a kind to match on, details to act on, and one line that names the
//! thing and the remedy.

mod bytes;
mod convert;
mod failure;
mod kind;
mod option;
mod reason;

pub(crate) use bytes::Bytes;
pub use failure::Failure;
pub use kind::ErrorKind;
pub use option::BuildOption;
pub use reason::FailureReason;

use crate::method::PlanReason;
use pagestitch_kernel::Errno;
use pagestitch_kernel::limits::{Limit, ReserveError};
use pagestitch_kernel::uffd::OpenError;
use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

/// An error of the library. Its `Display` is one line: the thing, the reason, the remedy.
///
/// Branch on its [kind](Self::kind), and read the details from the other methods: the text may
/// change. `Debug`, which Rust prints for an error of `main`, shows the kind, the line, and the details
/// that the error has.
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    details: Box<Details>,
}

/// The things that an error is about.
#[derive(Default)]
struct Details {
    option: Option<BuildOption>,
    chunk: Option<usize>,
    limit: Option<Limit>,
    path: Option<PathBuf>,
    plan_reason: Option<PlanReason>,
    errno: Option<i32>,
    failure: Option<Arc<Failure>>,
}

/// Creation.
impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None, details: Box::default() }
    }

    /// Wraps an error of another layer; the message is `what`, followed by that error's message.
    pub(crate) fn because<E>(kind: ErrorKind, what: impl fmt::Display, source: E) -> Self
    where
        E: StdError + Send + Sync + 'static,
    {
        let message = format!("{what}: {source}");
        Self { source: Some(Box::new(source)), ..Self::new(kind, message) }
    }

    /// The kernel refuses a step; the kind follows from its answer.
    pub(crate) fn refused(what: impl fmt::Display, errno: Errno) -> Self {
        let (kind, limit) = kind_of(errno);
        let mut error = Self::because(kind, what, errno);
        error.details.limit = limit;
        error.details.errno = Some(errno.raw());
        error
    }

    /// A thread does not start.
    pub(crate) fn no_thread(what: impl fmt::Display, source: io::Error) -> Self {
        let errno = source.raw_os_error();
        let mut error = Self::because(ErrorKind::LimitReached, what, source);
        error.details.limit = Some(Limit::of_threads());
        error.details.errno = errno;
        error
    }

    /// The system refuses to open, read or write a file.
    pub(crate) fn io(what: &str, path: &Path, source: io::Error) -> Self {
        Self::of_descriptor(format_args!("{what} {}", path.display()), source).at_path(path)
    }

    /// As [`io`](Self::io), for a file without a path. An error without a number, and that of a
    /// folder, is of a file that does not suit its use.
    pub(crate) fn of_descriptor(what: impl fmt::Display, source: io::Error) -> Self {
        let errno = source.raw_os_error();
        let (kind, limit) = match errno.map(Errno::from_raw) {
            Some(errno @ (Errno::EMFILE | Errno::ENFILE)) => kind_of(errno),
            Some(_) if source.kind() != io::ErrorKind::IsADirectory => (ErrorKind::Io, None),
            _ => (ErrorKind::UnusableFile, None),
        };
        let mut error = Self::because(kind, what, source);
        if let Some(limit @ Limit::Descriptors(_)) = &limit {
            error.message += &format!("; {limit}");
        }
        error.details.limit = limit;
        error.details.errno = errno;
        error
    }

    /// A range of addresses cannot be reserved.
    pub(crate) fn unreserved(region: &str, source: ReserveError) -> Self {
        let kind = match source.limit {
            Limit::Other => ErrorKind::TooLarge,
            _ => ErrorKind::LimitReached,
        };
        let mut error = Self::because(kind, format_args!("region {region}"), source);
        error.details.limit = (kind == ErrorKind::LimitReached).then_some(source.limit);
        error.details.errno = Some(source.errno.raw());
        error
    }

    /// No userfaultfd can be opened.
    pub(crate) fn no_userfaultfd(source: &OpenError) -> Self {
        let (kind, limit) = source.transient().map_or((ErrorKind::NoUserfaultfd, None), kind_of);
        let mut error = Self::new(kind, source.to_string());
        error.details.limit = limit;
        error.details.errno = Some(source.errno().raw());
        error
    }

    /// A page of a region has failed.
    pub(crate) fn of_failure(region: &str, failure: Arc<Failure>) -> Self {
        let (kind, reason) = (failure.reason().kind(), Arc::clone(&failure));
        let error = Self::because(kind, format_args!("region {region}"), reason);
        error.with_failure(failure)
    }

    pub(crate) fn with_failure(mut self, failure: Arc<Failure>) -> Self {
        self.details.chunk = Some(failure.chunk());
        self.details.errno = failure.io_error().raw_os_error();
        self.details.failure = Some(failure);
        self
    }

    pub(crate) fn of_option(mut self, option: BuildOption) -> Self {
        self.details.option = Some(option);
        self
    }

    pub(crate) fn of_chunk(mut self, number: usize) -> Self {
        self.details.chunk = Some(number);
        self
    }

    pub(crate) fn of_limit(mut self, limit: Limit) -> Self {
        self.details.limit = Some(limit);
        self
    }

    pub(crate) fn of_plan(mut self, reason: PlanReason) -> Self {
        self.details.plan_reason = Some(reason);
        self
    }

    pub(crate) fn at_path(mut self, path: &Path) -> Self {
        self.details.path = Some(path.to_owned());
        self
    }

    /// Prefixes the message with the number of the chunk that cannot be made.
    pub(crate) fn inside_chunk(mut self, number: usize) -> Self {
        self.message = format!("chunk {number}: {}", self.message);
        self.of_chunk(number)
    }

    /// Prefixes the message with the name of the region.
    pub(crate) fn inside(mut self, region: &str) -> Self {
        self.message = format!("region {region}: {}", self.message);
        self
    }
}

/// The kind of a step that the kernel refuses, and the limit that it has reached.
fn kind_of(errno: Errno) -> (ErrorKind, Option<Limit>) {
    match errno {
        Errno::EMFILE => (ErrorKind::LimitReached, Some(Limit::of_descriptors())),
        Errno::ENFILE | Errno::ENOSPC => (ErrorKind::LimitReached, Some(Limit::Other)),
        Errno::ENOMEM | Errno::EAGAIN => match Limit::met(0, errno) {
            Limit::Other => (ErrorKind::OutOfMemory, None),
            limit => (ErrorKind::LimitReached, Some(limit)),
        },
        Errno::EPERM | Errno::EACCES => (ErrorKind::PermissionDenied, None),
        Errno::ENOSYS | Errno::EOPNOTSUPP => (ErrorKind::Unsupported, None),
        _ => (ErrorKind::Kernel, None),
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Details { option, chunk, limit, path, plan_reason, errno, failure } = &*self.details;
        let mut shown = f.debug_struct("Error");
        // The line contains that of the source.
        shown.field("kind", &self.kind).field("message", &self.message);
        let details: [(&str, Option<&dyn fmt::Debug>); 7] = [
            ("option", option.as_ref().map(|option| option as _)),
            ("chunk", chunk.as_ref().map(|chunk| chunk as _)),
            ("limit", limit.as_ref().map(|limit| limit as _)),
            ("path", path.as_ref().map(|path| path as _)),
            ("plan_reason", plan_reason.as_ref().map(|reason| reason as _)),
            ("errno", errno.as_ref().map(|errno| errno as _)),
            ("failure", failure.as_ref().map(|failure| failure as _)),
        ];
        for (name, detail) in details {
            if let Some(detail) = detail {
                shown.field(name, detail);
            }
        }
        shown.finish()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // The message already ends in the source's message. Continue with the source's own source,
        // so that a reporter that prints the chain repeats nothing.
        self.source.as_ref().and_then(|source| source.source())
    }
}

/// Details.
impl Error {
    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The option that has an unusable value, does not apply, or excludes another one.
    ///
    /// ```
    /// use pagestitch::{BuildOption, ErrorKind, Inline, Region};
    ///
    /// let builder = Region::builder().chunk(vec![7u8; 5000]).record_latency();
    /// let error = builder.build(Inline).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::UnsuitableServer);
    /// assert_eq!(error.option(), Some(BuildOption::RecordLatency));
    /// ```
    #[must_use]
    pub fn option(&self) -> Option<BuildOption> {
        self.details.option
    }

    /// The number of the chunk that the error is about, counted from 0 in the order of the builder.
    #[must_use]
    pub fn chunk(&self) -> Option<usize> {
        self.details.chunk
    }

    /// The limit that is reached: for [`ErrorKind::LimitReached`]. For [`ErrorKind::InvalidOption`], the limit
    /// of the machine or the process that the value exceeds.
    #[must_use]
    pub fn limit(&self) -> Option<Limit> {
        self.details.limit
    }

    /// The reason why a chunk cannot be mapped: for [`ErrorKind::NotZeroCopy`].
    ///
    /// ```
    /// # use pagestitch::{ErrorKind, PlanReason, Pool, Region};
    /// let in_memory = Region::builder().chunk(vec![7u8; 10_000]).require_zero_copy();
    /// let error = in_memory.build(&Pool::new()?).unwrap_err();
    /// assert_eq!((error.kind(), error.chunk()), (ErrorKind::NotZeroCopy, Some(0)));
    /// assert_eq!(error.plan_reason(), Some(PlanReason::Memory));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn plan_reason(&self) -> Option<PlanReason> {
        self.details.plan_reason
    }

    /// The path of the file that the error is about.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.details.path.as_deref()
    }

    /// The error number of the kernel (`errno`), where it has refused a step.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.details.errno
    }

    /// The failure of the page that the error is of: its chunk, the offset in the chunk's source,
    /// the reason, and the error of that source. `None`: the error is of another sort.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Pool, Region, Source};
    /// use pagestitch::source::FailureReason;
    /// # struct Broken;
    /// # impl Source for Broken {
    /// #     fn size(&self) -> u64 { 8192 }
    /// #     fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> { Err(std::io::Error::from_raw_os_error(5)) }
    /// # }
    /// let region = Region::builder().chunk(vec![0; 4096]).chunk(Chunk::source(Broken.into())).build(&Pool::new()?)?;
    /// let error = region.populate(..).unwrap_err();
    /// let failure = error.failure().expect("a source has failed");
    /// assert_eq!((failure.chunk(), failure.source_offset()), (1, 0));
    /// assert_eq!(failure.reason(), FailureReason::Source);
    /// assert_eq!(failure.io_error().raw_os_error(), Some(5));               // EIO
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.details.failure.as_deref()
    }

    /// The I/O error of the failed source or file; `None` for errors of other sorts.
    #[must_use]
    pub fn io_error(&self) -> Option<&io::Error> {
        let own = || self.source.as_ref()?.downcast_ref();
        self.failure().map(Failure::io_error).or_else(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_the_details_that_an_error_has() {
        let plain = Error::new(ErrorKind::InvalidRecording, "the line");
        assert_eq!(format!("{plain:?}"), "Error { kind: InvalidRecording, message: \"the line\" }");
        let source = io::Error::from_raw_os_error(2);
        let shown = format!("{:?}", Error::io("cannot open", Path::new("a"), source));
        assert!(shown.ends_with(", path: \"a\", errno: 2 }"), "{shown}");
    }
}
