//! The error type of the library: a kind to match on, and one line that names the thing and the
//! remedy.

mod failure;

pub use failure::Failure;

use std::error::Error as StdError;
use std::fmt;

/// An error of the library. Its `Display` is one line: the thing, the reason, the remedy.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The kind of an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The builder has no chunk.
    NoChunks,
    /// A chunk is empty, reaches past its source's end, or is memory of a region that its server
    /// cannot copy from.
    BadChunk,
    /// The region has more bytes or chunks than a region can have, or than the process may reserve.
    TooLarge,
    /// The kernel lacks userfaultfd, or the process may not use it.
    NoUserfaultfd,
    /// The process has reached a limit: descriptors, memory, mappings, threads.
    Resources,
    /// A file cannot be used as a source.
    File,
    /// A source failed to give bytes.
    Source,
    /// An offset or range lies outside the region.
    OutOfRange,
    /// A byte would have to be copied, and the builder requires zero-copy.
    NotZeroCopy,
    /// The region cannot be served inline, on the thread that touches it.
    NotInline,
    /// Other processes may change a chunk's bytes, and the region gives out `&[u8]`.
    Shared,
    /// A descriptor is not a userfaultfd.
    NotUserfaultfd,
    /// The pool still serves regions, or another region uses the userfaultfd.
    Busy,
    /// An option has a value that does not apply.
    BadOption,
    /// A forked child uses a server that was created before `fork(2)`, whose threads and
    /// descriptors belong to the parent.
    ForkedChild,
}

impl Error {
    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Prefixes the message with the name of the region.
    pub(crate) fn inside(mut self, region: &str) -> Self {
        self.message = format!("region {region}: {}", self.message);
        self
    }

    /// Wraps an error of another layer; the message is `what`, followed by that error's message.
    pub(crate) fn because<E>(kind: ErrorKind, what: impl fmt::Display, source: E) -> Self
    where
        E: StdError + Send + Sync + 'static,
    {
        Self { kind, message: format!("{what}: {source}"), source: Some(Box::new(source)) }
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

impl Error {
    /// The failure of the page that the error is of: its chunk, the offset in the chunk's source,
    /// and the error of that source. `None`: the error is of another sort.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Pool, Region, Source};
    /// # struct Broken;
    /// # impl Source for Broken {
    /// #     fn size(&self) -> u64 { 8192 }
    /// #     fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> { Err(std::io::Error::from_raw_os_error(5)) }
    /// # }
    /// let region = Region::builder().chunk(vec![0; 4096]).chunk(Chunk::source(Broken.into())).build(&Pool::new()?)?;
    /// let error = region.populate(..).unwrap_err();
    /// let failure = error.failure().expect("a source has failed");
    /// assert_eq!((failure.chunk(), failure.source_offset()), (1, 0));
    /// assert_eq!(failure.io_error().raw_os_error(), Some(5));               // EIO
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        let failure = self.source.as_ref()?.downcast_ref::<std::sync::Arc<Failure>>()?;
        Some(failure)
    }

    /// The I/O error of the failed source; `None` for errors of other kinds.
    #[must_use]
    pub fn io_error(&self) -> Option<&std::io::Error> {
        self.failure().map(Failure::io_error)
    }
}
