//! Conversions: each constructor of a source has an error that `?` makes an [`Error`], and an
//! [`Error`] becomes an [`io::Error`].

use super::{Error, ErrorKind, kind_of};
use pagestitch_kernel::Errno;
use pagestitch_kernel::limits::Limit;
use pagestitch_kernel::pages::PagesError;
use pagestitch_kernel::physical::{PhysicalError, Refusal};
use pagestitch_kernel::shared::{AliasError, FileError};
use std::io;

/// Keeps the kind of I/O error, and the error itself inside:
/// [`downcast`](io::Error::downcast) returns it.
///
/// ```
/// use pagestitch::{ErrorKind, Pool, Region};
/// use std::io::{self, Write};
///
/// /// Writes the region without a signal if a source fails.
/// fn send(region: &Region, to: &mut impl Write) -> io::Result<()> {
///     region.populate(..)?;
///     to.write_all(region.as_slice())
/// }
/// # let region = Region::builder().chunk("bytes").build(&Pool::new()?)?;
/// send(&region, &mut io::sink())?;
///
/// let error = io::Error::from(region.populate(6..).unwrap_err());
/// assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
/// assert_eq!(error.downcast::<pagestitch::Error>()?.kind(), ErrorKind::OutOfRange);
/// # Ok::<(), io::Error>(())
/// ```
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let of_number = || error.raw_os_error().map(|errno| Self::from_raw_os_error(errno).kind());
        let of_source = || error.io_error().map(Self::kind);
        let kind = of_number().or_else(of_source).unwrap_or_else(|| io_kind(error.kind()));
        Self::new(kind, error)
    }
}

/// The kind of I/O error for an error that the system has not caused.
const fn io_kind(kind: ErrorKind) -> io::ErrorKind {
    match kind {
        ErrorKind::NoChunks
        | ErrorKind::InvalidChunk
        | ErrorKind::TooLarge
        | ErrorKind::InvalidOption
        | ErrorKind::OptionConflict
        | ErrorKind::OutOfRange
        | ErrorKind::ForkedChild
        | ErrorKind::UnsuitableServer
        | ErrorKind::NestedRegion
        | ErrorKind::SharedSource
        | ErrorKind::NotZeroCopy
        | ErrorKind::UnusableFile
        | ErrorKind::UnusableMemory
        | ErrorKind::NotUserfaultfd
        | ErrorKind::OwnMemory => io::ErrorKind::InvalidInput,
        ErrorKind::InvalidRecording => io::ErrorKind::InvalidData,
        ErrorKind::NoUserfaultfd | ErrorKind::Unsupported => io::ErrorKind::Unsupported,
        ErrorKind::ReadOnly | ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
        ErrorKind::LimitReached => io::ErrorKind::QuotaExceeded,
        ErrorKind::OutOfMemory => io::ErrorKind::OutOfMemory,
        ErrorKind::InUse => io::ErrorKind::ResourceBusy,
        ErrorKind::TimedOut => io::ErrorKind::TimedOut,
        ErrorKind::MemoryGone | ErrorKind::ServerStopped => io::ErrorKind::BrokenPipe,
        ErrorKind::SourceFailed | ErrorKind::Io | ErrorKind::Kernel => io::ErrorKind::Other,
    }
}

/// Of a file or memfd: [`ErrorKind::Io`], [`ErrorKind::LimitReached`], or
/// [`ErrorKind::UnusableFile`] for [`io::ErrorKind::InvalidInput`]. An [`Error`] inside comes out
/// again.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let error = match error.downcast::<Self>() {
            Ok(own) => return own,
            Err(error) => error,
        };
        let errno = error.raw_os_error().map(Errno::from_raw);
        let (kind, limit) = match (errno, error.kind()) {
            (Some(errno @ (Errno::EMFILE | Errno::ENFILE)), _) => kind_of(errno),
            (None, io::ErrorKind::InvalidInput) => (ErrorKind::UnusableFile, None),
            _ => (ErrorKind::Io, None),
        };
        let mut converted = Self::new(kind, error.to_string());
        converted.source = Some(Box::new(error));
        converted.details.limit = limit;
        converted.details.errno = errno.map(Errno::raw);
        converted
    }
}

/// Of [`SharedFile::open`](crate::source::SharedFile::open), with the [path](Error::path).
impl From<FileError> for Error {
    fn from(error: FileError) -> Self {
        Self::io("cannot open", &error.path, error.error)
    }
}

/// Of [`Pages::new`](crate::source::Pages::new).
impl From<PagesError> for Error {
    fn from(error: PagesError) -> Self {
        let kind = match error.errno {
            Errno::EINVAL => (ErrorKind::InvalidOption, None),
            errno => kind_of(errno),
        };
        Self::of_kernel(kind, error.errno, error.to_string())
    }
}

/// Of [`Alias::of`](crate::source::Alias::of): [`ErrorKind::UnusableMemory`], unless the kernel
/// refuses.
impl From<AliasError> for Error {
    fn from(error: AliasError) -> Self {
        match error {
            AliasError::Refused { errno, .. } => Self::of_kernel(kind_of(errno), errno, error.to_string()),
            _ => Self::new(ErrorKind::UnusableMemory, error.to_string()),
        }
    }
}

/// Of [`Physical`](crate::source::Physical): [`ErrorKind::PermissionDenied`] for a missing right,
/// [`ErrorKind::UnusableMemory`] for a range that cannot be mapped.
impl From<PhysicalError> for Error {
    fn from(error: PhysicalError) -> Self {
        let message = error.to_string();
        match error.refusal {
            Refusal::NoPermission(_) | Refusal::NoCapability(_) | Refusal::Lockdown => {
                Self::new(ErrorKind::PermissionDenied, message)
            }
            Refusal::NoNode(_) => Self::new(ErrorKind::Unsupported, message),
            Refusal::Moved(_) => Self::new(ErrorKind::InUse, message),
            Refusal::NoPin(errno) | Refusal::Other(errno) => Self::of_kernel(kind_of(errno), errno, message),
            _ => Self::new(ErrorKind::UnusableMemory, message),
        }
    }
}

impl Error {
    /// A step that the kernel refuses, with a message that names the number already.
    fn of_kernel((kind, limit): (ErrorKind, Option<Limit>), errno: Errno, message: String) -> Self {
        let mut error = Self::new(kind, message);
        error.details.limit = limit;
        error.details.errno = Some(errno.raw());
        error
    }
}
