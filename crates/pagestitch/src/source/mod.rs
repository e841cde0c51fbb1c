//! Sources of bytes. A source knows nothing of pages, faults or userfaultfd.
//!
//! Bytes are *aligned* if they have the same offset within a page in the source and in the region.
//!
//! | source | bytes | how a page gets them |
//! |---|---|---|
//! | [`Memory`] | at a stable address, owned or borrowed | copied from that address |
//! | [`Memfd`] | in a sealed memfd | mapped in place if aligned; else copied |
//! | [`ImmutableFile`] | in a file that does not change | mapped in place if aligned; else read |
//! | [`Pages`] | donated by their owner | moved if aligned; else copied |
//! | [`SharedFile`] | in a regular file that changes, or an unsealed memfd | mapped in place, and changing; else read |
//! | [`Alias`] | in a shared mapping without a descriptor | mapped in place, and changing; else copied |
//! | [`Physical`] | in `/dev/mem`, or a PCI resource | mapped in place, and changing; else copied |
//! | [`LazyMemfd`] | in a memfd that is filled later | mapped in place after the memfd is filled |
//! | [`FileSource`] | in a file, read at an offset | read into a buffer, then copied |
//! | [`WritableFile`], your own [`WritableSource`] | as a file or source that is read, and takes written pages back | read into a buffer, then copied |
//! | [`Hole`] | zeros | the kernel's zero page |
//! | your own [`Fetch`] | delivered later by your own thread | fetched while workers serve other faults, then copied |
//! | your own [`Source`] | read on demand | read into a buffer, then copied |
//!
//! The quick way to a file is [`ImmutableFile`]: it copies nothing, and gives a `&[u8]`. A
//! [`FileSource`] copies each page, because its file may change; it costs about 30 times as much.
//!
//! A wrapper is a source around a source, and wrappers can be stacked:
//! `Cached::new(Retrying::new(Limited::new(remote, 8), Retry::times(5)), 64 << 20)`. A wrapper of a
//! [`Fetch`] is a [`Fetch`]. A wrapper of [`Memory`], a [`Memfd`] or a [`Hole`] changes nothing,
//! because a region reads none of these. No wrapper starts a thread, and no wrapper holds a lock
//! while its source reads.
//!
//! | wrapper | reads of the wrapped source |
//! |---|---|
//! | [`Retrying`] | repeated after a failure, with pauses |
//! | [`Limited`] | so many at once; the others wait in order |
//! | [`Cached`] | in blocks, each once for all regions, as long as it is kept |
//!
//! # Errors
//!
//! A source that cannot be made is an [`Error`](crate::Error), or an error that `?` turns into one:
//!
//! ```
//! use pagestitch::source::{FileSource, Pages, SharedFile, UnsealedMemfd};
//! use pagestitch::{Access, Chunk, Error, ErrorKind};
//!
//! fn chunks(path: &str, bytes: usize) -> Result<[Chunk; 4], Error> {
//!     Ok([
//!         FileSource::open(path)?.into(),
//!         SharedFile::open(path, Access::ReadOnly)?.into(),
//!         UnsealedMemfd::create("zeros", bytes as u64)?.seal()?.into(),
//!         Pages::new(bytes)?.into(),
//!     ])
//! }
//! assert!(chunks("/proc/self/exe", 4096).is_ok());
//! let error = chunks("/missing", 4096).unwrap_err();
//! assert_eq!((error.kind(), error.raw_os_error()), (ErrorKind::Io, Some(2)));          // ENOENT
//! ```

#[macro_use]
mod forward;

mod backing;
mod block_cache;
mod cached;
mod contract;
mod donated;
mod fetch;
mod file;
mod hole;
mod immutable;
mod lazy;
mod limited;
mod memfd;
mod memory;
mod retrying;
mod shared;
mod stable;
mod writable;

pub use crate::error::{Failure, FailureReason};
pub(crate) use backing::{Backing, Identity};
pub use cached::Cached;
pub use contract::Source;
pub(crate) use donated::gone;
pub(crate) use fetch::{Complete, Fetched};
pub use fetch::{Fetch, Reply};
pub use file::FileSource;
pub use hole::Hole;
pub use immutable::ImmutableFile;
pub(crate) use lazy::refuse_huge_pages;
pub use lazy::{FillMemfd, LazyMemfd};
pub use limited::Limited;
pub use memfd::Memfd;
pub use memory::Memory;
pub(crate) use memory::{MemoryBytes, Releasables, Released, released};
pub use pagestitch_kernel::memfd::UnsealedMemfd;
pub use pagestitch_kernel::pages::{Donated, Pages, PagesError};
pub use pagestitch_kernel::physical::{Caching, Physical, PhysicalError};
pub use pagestitch_kernel::shared::{Alias, AliasError, FileError, SharedFile};
pub use retrying::Retrying;
pub(crate) use shared::Shared;
pub use stable::StableSource;
pub use writable::{WritableFile, WritableSource};
pub(crate) use writable::{ask_writer, write_all};
