//! The policies for pages whose source fails.

use crate::retry::Retry;

/// The fate of a page when the source of a chunk fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailure {
    /// The page is poisoned: touching it raises SIGBUS; `read_at` and `populate` return the error.
    #[default]
    Poison,
    /// The source is read again, with pauses; if it still fails, the page is
    /// [poisoned](Self::Poison). The faulting thread waits meanwhile; the worker serves other
    /// faults. A source below another wrapper, such as [`Cached`](crate::source::Cached), is
    /// retried by [`Retrying`](crate::source::Retrying).
    Retry(Retry),
    /// The bytes of this chunk read as zeros, for data that is not essential. Counted by
    /// [`pages_given_up`](crate::Meter::pages_given_up).
    Zeros,
}
