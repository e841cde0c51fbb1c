//! The reasons why a handler cannot start or go on.

use std::io;
use std::path::PathBuf;

/// A handler cannot start, or go on. `Display` is a line for a person.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No memory file was named.
    #[error(
        "a snapshot needs at least one memory file: name the base first, then the diffs over it, oldest first"
    )]
    NoFiles,
    /// A memory file, or a recording's path, cannot be used.
    #[error(transparent)]
    Memory(#[from] pagestitch::Error),
    /// A memory file's extents cannot be asked for.
    #[error("cannot read or write the extents of {path}: {source}")]
    Extents {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A diff has no proof of which of its bytes are its own.
    #[error(
        "{0} is a diff, and its holes prove nothing, because a copy may add and fill some: write its extents where Firecracker made \
         it (pagestitch extents), or trust its holes (--assume-holes, Holes::Unchanged)"
    )]
    MissingExtents(PathBuf),
    /// The holes of a diff are not known.
    #[error(
        "the holes of {path} are not known: {why}; write its extents where Firecracker made it (pagestitch extents)"
    )]
    UnknownHoles {
        /// The diff.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// A file of extents is damaged, or another diff's.
    #[error("{0} is no list of extents of this diff, or was cut short: write it anew (pagestitch extents)")]
    BadExtents(PathBuf),
    /// A diff is not as long as its base.
    #[error("{path} has {bytes} bytes and its base {base}: a diff is as long as the memory that it changes")]
    LengthMismatch {
        /// The diff.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The base's length.
        base: u64,
    },
    /// A memory file is not whole pages.
    #[error("{path} has {bytes} bytes, which is not whole pages: it is no memory file, or was cut short")]
    NotPageAligned {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A recording to replay is of other memory.
    #[error(
        "the recording is of {recorded} bytes of memory, and the memory file has {bytes}: record the guest of this snapshot"
    )]
    RecordingMismatch {
        /// The bytes of the recorded memory.
        recorded: u64,
        /// The bytes of the snapshot.
        bytes: u64,
    },
    /// Somebody else listens at the socket's path.
    #[error("{0} is in use: another handler listens there; stop it, or choose another path")]
    InUse(PathBuf),
    /// Something that is no socket is at the socket's path.
    #[error("{0} exists and is no socket: choose another path, or remove it")]
    NotASocket(PathBuf),
    /// The socket cannot be had.
    #[error("cannot listen at {path}: {source}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The handler's own descriptors.
    #[error("the handler cannot go on: {0}")]
    Poll(#[source] io::Error),
}
