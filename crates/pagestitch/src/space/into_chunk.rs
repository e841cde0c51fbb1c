//! The values that a builder takes as a chunk.

use crate::error::Error;
use crate::source::{
    Alias, Donated, FileSource, ImmutableFile, LazyMemfd, Memfd, Memory, Pages, Physical, SharedFile, Source,
};
use crate::space::Chunk;
use bytes::Bytes;
use pagestitch_kernel::memfd::SealedMemfd;
use std::fs::File;
use std::sync::Arc;

/// A value that [`Builder::chunk`](crate::Builder::chunk) takes: a [`Chunk`], bytes in memory, an
/// open file, or a source of the [`source`](crate::source) module. It is sealed: make a [`Chunk`] of
/// a type of your own.
///
/// | the bytes | the chunk |
/// |---|---|
/// | `Vec<u8>`, `String`, `Bytes`, `Box<[u8]>`, `Arc<[u8]>`, `[u8; N]`, a literal | the value itself |
/// | another owner of bytes, such as a memory map or a [`Region`](crate::Region) | [`Memory::new`] |
/// | borrowed bytes | inside a [`scope`](crate::scope()): [`borrow`](crate::ScopedBuilder::borrow) |
/// | a file that does not change | mapped in place: [`ImmutableFile::open`] |
/// | another file | copied: the [`File`], or [`FileSource::open`]; mapped in place: [`SharedFile::open`](crate::source::SharedFile::open) |
/// | your own [`Source`] or [`Fetch`](crate::source::Fetch) | [`Chunk::source`], [`Chunk::fetch`] |
///
/// ```
/// use pagestitch::{Pool, Region};
///
/// let region = Region::builder().chunk("text, ").chunk(*b"array, ").chunk(vec![b'v']).build(&Pool::new()?)?;
/// assert_eq!(region.as_slice(), b"text, array, v");
/// # Ok::<(), pagestitch::Error>(())
/// ```
///
/// Another type does not compile, and the compiler says which function makes a chunk of it:
///
/// ```compile_fail,E0277
/// pagestitch::Region::builder().chunk(vec![1u32, 2, 3]);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a chunk",
    label = "not a chunk of a region",
    note = "a source of your own: `Chunk::source(Arc::new(source))`, or `Chunk::fetch` if it answers later",
    note = "another owner of bytes, such as a memory map: `Memory::new(owner)`",
    note = "a file by its path: `FileSource::open(path)?`, or `ImmutableFile::open` in place if it does not change",
    note = "borrowed bytes: `scope(|scope| scope.region().borrow(&bytes) ...)`"
)]
pub trait IntoChunk: sealed::Sealed {
    /// All bytes of the value, as a chunk.
    ///
    /// ```
    /// use pagestitch::{Chunk, Error, IntoChunk};
    ///
    /// fn tail(value: impl IntoChunk) -> Result<Chunk, Error> {
    ///     Ok(value.into_chunk()?.range(4096..))
    /// }
    /// # tail("")?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Of an open file: the errors of [`FileSource::from_file`]. Other conversions do not fail.
    fn into_chunk(self) -> Result<Chunk, Error>;
}

mod sealed {
    pub trait Sealed {}
}

/// Each type is listed, because an implementation for all `Into<Chunk>` hides the message above.
macro_rules! into_chunk {
    ($($owner:ty $(, const $N:ident)?;)*) => {$(
        impl $(<const $N: usize>)? sealed::Sealed for $owner {}

        impl $(<const $N: usize>)? IntoChunk for $owner {
            #[inline]
            fn into_chunk(self) -> Result<Chunk, Error> {
                Ok(Chunk::from(self))
            }
        }
    )*};
}

into_chunk! {
    Chunk;
    Vec<u8>;
    Box<[u8]>;
    Arc<[u8]>;
    Bytes;
    String;
    &'static str;
    &'static [u8];
    &'static [u8; N], const N;
    [u8; N], const N;
    Memory;
    Memfd;
    SealedMemfd;
    ImmutableFile;
    Pages;
    Donated;
    Arc<Donated>;
    LazyMemfd;
    SharedFile;
    Arc<SharedFile>;
    Alias;
    Arc<Alias>;
    Physical;
    Arc<Physical>;
    FileSource;
    Arc<FileSource>;
    Arc<dyn Source>;
    Box<dyn Source>;
}

impl sealed::Sealed for File {}

impl IntoChunk for File {
    fn into_chunk(self) -> Result<Chunk, Error> {
        Chunk::try_from(self)
    }
}
