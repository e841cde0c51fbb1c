//! The kinds of errors: one for each reaction of a caller.

/// The kind of an [`Error`](crate::Error): what a caller can do about it.
///
/// | the caller | kinds |
/// |---|---|
/// | corrects its call | [`NoChunks`](Self::NoChunks), [`InvalidChunk`](Self::InvalidChunk), [`TooLarge`](Self::TooLarge), [`InvalidOption`](Self::InvalidOption), [`OptionConflict`](Self::OptionConflict), [`OutOfRange`](Self::OutOfRange), [`ReadOnly`](Self::ReadOnly), [`ForkedChild`](Self::ForkedChild) |
/// | chooses another server, source or kind of region | [`UnsuitableServer`](Self::UnsuitableServer), [`NestedRegion`](Self::NestedRegion), [`SharedSource`](Self::SharedSource), [`NotZeroCopy`](Self::NotZeroCopy), [`UnusableFile`](Self::UnusableFile), [`UnusableMemory`](Self::UnusableMemory), [`InvalidRecording`](Self::InvalidRecording), [`NotUserfaultfd`](Self::NotUserfaultfd), [`OwnMemory`](Self::OwnMemory) |
/// | does without the region, or without a feature | [`NoUserfaultfd`](Self::NoUserfaultfd), [`Unsupported`](Self::Unsupported), [`PermissionDenied`](Self::PermissionDenied) |
/// | raises a limit, or frees something | [`LimitReached`](Self::LimitReached), [`OutOfMemory`](Self::OutOfMemory), [`InUse`](Self::InUse) |
/// | retries, now or later | [`SourceFailed`](Self::SourceFailed), [`TimedOut`](Self::TimedOut), [`Io`](Self::Io) |
/// | gives the region up | [`MemoryGone`](Self::MemoryGone), [`ServerStopped`](Self::ServerStopped) |
/// | reports it | [`Kernel`](Self::Kernel) |
///
/// ```
/// use pagestitch::{Chunk, Error, ErrorKind, Pool, Region};
///
/// /// Builds a region, or reads everything at once where the kernel does not serve page faults.
/// fn bytes(pool: &Pool, chunk: Vec<u8>) -> Result<Option<Region>, Error> {
///     let error = match Region::builder().chunk(chunk).build(pool) {
///         Ok(region) => return Ok(Some(region)),
///         Err(error) => error,
///     };
///     match error.kind() {
///         ErrorKind::NoUserfaultfd => Ok(None),                         // the caller reads the file instead
///         ErrorKind::LimitReached => {
///             let limit = error.limit().expect("the kind has one");
///             eprintln!("raise {}: {error}", limit.name().unwrap_or("a limit"));
///             Err(error)
///         }
///         _ => Err(error),                                              // `Display` names the remedy
///     }
/// }
///
/// let pool = Pool::new()?;
/// assert!(bytes(&pool, vec![7; 5000])?.is_some());
///
/// let error = Region::builder().chunk(vec![7; 10]).chunk(Chunk::hole(0)).build(&pool).unwrap_err();
/// assert_eq!((error.kind(), error.chunk()), (ErrorKind::InvalidChunk, Some(1)));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The builder has no chunk: add one, or build no region for an empty list.
    NoChunks,
    /// A chunk is empty, reaches past its source's end, or donates bytes twice: correct the
    /// [chunk](crate::Error::chunk)'s range.
    InvalidChunk,
    /// The region has more bytes or chunks than a region can have: split it.
    TooLarge,
    /// The value of an [option](crate::Error::option) cannot be used: choose another one.
    InvalidOption,
    /// An [option](crate::Error::option) excludes another one, or does not apply to this kind of
    /// region: leave it out.
    OptionConflict,
    /// An offset or range lies outside the region, or a write outside the chunks of a source that is shown in place.
    OutOfRange,
    /// The region is only read: build it [`writable()`](crate::Builder::writable).
    ReadOnly,
    /// A forked child uses a server or region of its parent: create a server in the child.
    ForkedChild,

    /// The server cannot serve such a region: use a [`Pool`](crate::Pool), or leave out the
    /// [option](crate::Error::option), if the error has one.
    UnsuitableServer,
    /// A chunk is memory of another region that its server cannot copy from: give each region a
    /// pool of its own.
    NestedRegion,
    /// Other processes may change a [chunk](crate::Error::chunk)'s bytes, so there is no `&[u8]` of
    /// them: use [`build_shared()`](crate::Builder::build_shared), or seal or copy the source.
    SharedSource,
    /// A byte would have to be copied, and the builder requires zero-copy: align the
    /// [chunk](crate::Error::chunk), or allow the copy.
    NotZeroCopy,
    /// A file is of a sort that does not suit its use: a directory or a pipe, a memfd without
    /// seals, a file that is open for reading only. Use another file, or prepare it as the message
    /// says.
    UnusableFile,
    /// Memory cannot be mapped a second time, or is no physical memory to map: it is private, not
    /// whole pages, or has another owner. Use another source, as the message says.
    UnusableMemory,
    /// The bytes are no recording or are damaged, or the recording is of another region: record
    /// anew.
    InvalidRecording,
    /// A descriptor is not a userfaultfd with registered memory: correct the sender.
    NotUserfaultfd,
    /// A userfaultfd serves memory of this process: make the promise of
    /// [`AdoptedMemory::of_this_process`](crate::AdoptedMemory::of_this_process).
    OwnMemory,

    /// The kernel lacks userfaultfd, or the process may not use it: use [`Eager`](crate::Eager).
    NoUserfaultfd,
    /// The kernel lacks a feature that a call or an [option](crate::Error::option) needs: leave it
    /// out, or update the kernel.
    Unsupported,
    /// The process lacks a right that a call or an [option](crate::Error::option) needs: leave it
    /// out, or grant the right.
    PermissionDenied,

    /// A [limit](crate::Error::limit) of the process or the system is reached: raise it, or free
    /// some of it.
    LimitReached,
    /// The kernel has no memory: free some, then retry.
    OutOfMemory,
    /// Regions still need the thing, or another region has it: drop them first.
    InUse,

    /// The bytes of a page are unavailable, because its source has failed; its
    /// [failure](crate::Error::failure) tells the reason. Call `retry_failed()` when the source
    /// works again.
    SourceFailed,
    /// A fault took longer than its limit: call `retry_failed()` later.
    TimedOut,
    /// The system refuses to open, read or write a file: [`io_error()`](crate::Error::io_error)
    /// and [`path()`](crate::Error::path) tell more.
    Io,

    /// The memory is gone: its owner has ended, or a part was unmapped or moved. Drop the region.
    MemoryGone,
    /// The server has ended: the pool was stopped, the last [`Manual`](crate::Manual) was dropped,
    /// or the parent of a forked child has ended. Build the region again with another server.
    ServerStopped,

    /// The kernel refuses a step for a reason that the library does not know: report it, with
    /// [`raw_os_error()`](crate::Error::raw_os_error).
    Kernel,
}
