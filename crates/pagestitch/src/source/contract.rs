//! The contract of a source.

use std::any::Any;
use std::io;
use std::sync::Arc;

/// Bytes that can be read at an offset: the trait to implement for a source of your own.
///
/// # Contract
///
/// * **Threads.** Any thread may call the methods: the pool's workers, and the callers of
///   [`populate`](crate::AnyRegion::populate) and [`Region::read_at`](crate::Region::read_at).
///   Several threads may call at once, also for the same offset.
/// * **Calls.** [`read_at`](Self::read_at) is usually called once for each page, or once for
///   several pages that are filled together; [`granularity`](Self::granularity) asks for more. It is called again for a page that is discarded
///   (`MADV_DONTNEED`) and touched anew. The bytes must not depend on how a range is split.
/// * **Blocking.** A call may block. It then occupies its worker, but not the region. A drop of the
///   region waits for calls in progress.
/// * **Failing.** An error becomes the page's error: touching the page raises SIGBUS, and `read_at`
///   and `populate` of the region return the error. A panic counts as an error, also a panic of
///   [`name`](Source::name), of the error's `Display` or of a destructor.
/// * **Hanging.** A call that takes 10 ms or more holds up a worker, which the pool replaces by
///   another one, up to [`max_workers`](crate::PoolBuilder::max_workers).
/// * **Never** touch any region that the same pool serves: the worker would wait for itself.
///
/// `pagestitch-testkit` has a conformance suite for this contract.
///
/// # Example
///
/// ```
/// use std::io;
/// use pagestitch::Source;
///
/// /// The same byte over and over.
/// struct Pattern(u8, u64);
///
/// impl Source for Pattern {
///     fn size(&self) -> u64 {
///         self.1
///     }
///     fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
///         into.fill(self.0);
///         Ok(())
///     }
/// }
/// ```
pub trait Source: Send + Sync {
    /// The length in bytes. Called when a chunk is created; later changes have no effect.
    fn size(&self) -> u64;

    /// Fills all of `into` with the bytes from `offset` on.
    ///
    /// `offset + into.len()` is at most [`size`](Self::size). On entry `into` holds arbitrary
    /// bytes.
    ///
    /// # Errors
    ///
    /// The reason why not *all* of `into` could be filled.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// The name in plans and errors: a path, a key, a kind. Default: `"source"`.
    fn name(&self) -> String {
        String::from("source")
    }

    /// The preferred size of a read, in bytes, for a source that reads more at the cost of a page:
    /// compressed, remote, on a disk. Default: 1, no preference. Called when a chunk of the source is
    /// added to a region.
    ///
    /// It is rounded up to a power of two, and is 2 MiB at most. A fault then reads the whole unit
    /// that holds its page, counted from the source's start, and installs its pages together. Fills
    /// ahead of a fault read several units. Only absent pages with all of their bytes in one chunk
    /// are read this way: other pages split the unit, or end it. If the read of a unit fails, a fault
    /// reads the touched page alone; `populate`, `read_at` and [`Eager`](crate::Eager) read the unit
    /// again, as often as [`OnFailure::Retry`](crate::OnFailure::Retry) of the chunk tells, and then
    /// page by page. A region that [records](crate::Builder::record) reads page by
    /// page, because only a fault tells of a touch. [`Cached`](super::Cached) reads a unit once for
    /// all regions, however their chunks split it.
    fn granularity(&self) -> u64 {
        1
    }

    /// For a wrapper: the wrapped [`Memory`](super::Memory), [`Memfd`](super::Memfd),
    /// [`ImmutableFile`](super::ImmutableFile) or [`Hole`](super::Hole), whose bytes a region maps or
    /// copies without a read. Return `self.inner.direct()` if the wrapper changes no byte. Default:
    /// `None`, so that the source is read.
    fn direct(&self) -> Option<&dyn Any> {
        None
    }
}

/// Implements [`Source`] for pointers to sources.
macro_rules! source_for_pointers {
    ($($pointer:ty),*) => {$(
        /// A pointer to a source is a source, so that wrappers take shared, boxed and unsized ones.
        impl<S: Source + ?Sized> Source for $pointer {
            forward!(self => (**self); size, name, granularity, direct);

            fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
                (**self).read_at(offset, into)
            }
        }
    )*};
}

source_for_pointers!(Arc<S>, Box<S>, &S);
