//! The promise that a source gives the same bytes at each read.

use super::contract::Source;
use super::{Cached, ImmutableFile, Limited, Retrying};
use std::sync::Arc;

/// A source whose bytes do not change. In a region with a [budget](crate::Builder::budget), a page that
/// comes back is not compared with its first reading. [`Chunk::stable`](crate::Chunk::stable) takes such a
/// source.
///
/// A wrapper of a stable source is stable.
///
/// # Safety
///
/// - As long as the source, a chunk of it or a region with such a chunk lives, each
///   [`read_at`](Source::read_at) that succeeds gives the same bytes for the same offsets, whatever
///   threads and other processes do.
#[expect(unsafe_code, reason = "declares an obligation")]
pub unsafe trait StableSource: Source {}

// SAFETY: the caller of its constructor promises that the file does not change, or fs-verity keeps it.
#[expect(unsafe_code, reason = "a promise that a file has")]
unsafe impl StableSource for ImmutableFile {}

/// Implements [`StableSource`] for types that pass the bytes of another source on.
macro_rules! stable_for {
    ($($outer:ty),*) => {$(
        // SAFETY: it gives the bytes of a stable source, which do not change.
        #[expect(unsafe_code, reason = "a promise that the inner source has made")]
        unsafe impl<S: StableSource + ?Sized> StableSource for $outer {}
    )*};
}

stable_for!(Arc<S>, Box<S>, &S);

/// As above, for wrappers, which are of a size that is known.
macro_rules! stable_for_wrappers {
    ($($outer:ty),*) => {$(
        // SAFETY: it gives the bytes of a stable source, which do not change.
        #[expect(unsafe_code, reason = "a promise that the inner source has made")]
        unsafe impl<S: StableSource> StableSource for $outer {}
    )*};
}

stable_for_wrappers!(Cached<S>, Limited<S>, Retrying<S>);
