//! When to install more than was asked for.

mod readahead;

pub use readahead::Readahead;
pub(crate) use readahead::Streams;
