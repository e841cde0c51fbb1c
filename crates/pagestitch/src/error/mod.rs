//! The one error of the library: a kind to branch on, and a line that names the thing and the remedy.

mod failure;

pub use failure::Failure;

use std::error::Error as StdError;
use std::fmt;

/// Why something could not be done. Its `Display` is one line for a person: the thing, the reason, the remedy.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What sort of thing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The region would have no chunk.
    NoChunks,
    /// A chunk is empty, or reaches past its source's end.
    BadChunk,
    /// More bytes, or more chunks, than can be laid out or than the process may reserve.
    TooLarge,
    /// This kernel or this process has no userfaultfd.
    NoUserfaultfd,
    /// A limit of the process was met: descriptors, memory, threads.
    Resources,
    /// A file cannot be used as a source.
    File,
    /// A source failed to give its bytes.
    Source,
    /// An offset or range outside the region.
    OutOfRange,
    /// A byte would have to be copied, and the builder was told to refuse that.
    NotZeroCopy,
    /// A chunk cannot be served by the thread that touches it.
    NotInline,
    /// A chunk's bytes may be changed by others, and the region was to give out `&[u8]`.
    Shared,
    /// A descriptor is no userfaultfd.
    NotUserfaultfd,
    /// The pool still serves regions, or another region the userfaultfd.
    Busy,
    /// An option has a value that it cannot have.
    BadOption,
    /// A server that was made before `fork(2)` is used in the child: its threads and descriptors are the parent's.
    ForkedChild,
}

impl Error {
    /// What sort of thing went wrong.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The same, said of a region.
    pub(crate) fn inside(mut self, region: &str) -> Self {
        self.message = format!("region {region}: {}", self.message);
        self
    }

    /// An error of another layer, in a sentence of its own that ends in that error's.
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
        // The message already ends in the source's own: go on with what is behind it, so that a reporter
        // that prints the chain does not say everything twice.
        self.source.as_ref().and_then(|source| source.source())
    }
}

impl Error {
    /// The failure of the page that the error is of: its chunk, the offset in the chunk's source, and the error of that
    /// source. `None`: the error is of another sort.
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

    /// The I/O error of the source that failed, if that is what happened.
    #[must_use]
    pub fn io_error(&self) -> Option<&std::io::Error> {
        self.failure().map(Failure::io_error)
    }
}
