//! The policies for pages whose source fails.

use crate::retry::Retry;

/// The fate of a page when the source of a chunk fails.
///
/// ```
/// use pagestitch::{Chunk, OnFailure, Retry};
///
/// let remote = Chunk::hole(4096).on_failure(OnFailure::Retry(Retry::times(5)));
/// let optional = Chunk::hole(4096).on_failure(OnFailure::Zeros);
/// # let _ = (remote, optional);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailure {
    /// The page is poisoned: touching it raises SIGBUS; `read_at` and `populate` return the error.
    /// With [`Eager`](crate::Eager), this is so only if a chunk asks for it; else the build fails.
    #[default]
    Poison,
    /// The source is read again, with pauses; if it still fails, the page is
    /// [poisoned](Self::Poison). The faulting thread waits meanwhile; the worker serves other
    /// faults. A source below another wrapper, such as [`Cached`](crate::source::Cached), is
    /// retried by [`Retrying`](crate::source::Retrying).
    Retry(Retry),
    /// The bytes of this chunk read as zeros, for data that is not essential. Counted by
    /// [`pages_zeroed_on_failure`](crate::Meter::pages_zeroed_on_failure).
    Zeros,
}
