//! The reasons for which a handler cannot start or go on.

use nix::errno::Errno;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// `1` and `byte` as `1 byte`, `2` and `byte` as `2 bytes`.
pub(crate) fn counted(number: &impl Display, one: &str) -> String {
    let number = number.to_string();
    let plural = if number == "1" { "" } else { "s" };
    format!("{number} {one}{plural}")
}

/// The reason for which a handler cannot start or go on. `Display` is a line for a person.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The snapshot has no memory file.
    #[error(
        "a snapshot needs at least one memory file: name the base first, then the diffs over it, oldest first"
    )]
    NoFiles,
    /// A memory file, or the path of a recording, is unusable.
    #[error(transparent)]
    Memory(#[from] pagestitch::Error),
    /// The extents of a memory file cannot be read or written.
    #[error("cannot read or write the extents of {path}: {source}")]
    Extents {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// A diff has no extents that prove its changed bytes.
    #[error(
        "the diff {0} has no file of extents, and its holes prove nothing, because a copy may add or fill holes: write its extents where Firecracker made \
         it (pagestitch extents), or trust its holes (--assume-holes, Holes::Unchanged)"
    )]
    MissingExtents(PathBuf),
    /// The holes of a diff are unknown.
    #[error(
        "the holes of {path} are unknown, because {reason}: write its extents where Firecracker made it (pagestitch extents)"
    )]
    UnknownHoles {
        /// The diff.
        path: PathBuf,
        /// The reason.
        reason: UnknownHoles,
    },
    /// A file of extents is damaged, or belongs to another diff.
    #[error(
        "{0} is not the list of extents of this diff, or is truncated: write it again (pagestitch extents)"
    )]
    BadExtents(PathBuf),
    /// A diff and its base differ in length.
    #[error(
        "{path} has {} and its base {base}: name a diff of this base, which has the same length",
        counted(.bytes, "byte")
    )]
    LengthMismatch {
        /// The diff.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The length of the base.
        base: u64,
    },
    /// The length of a memory file is not a whole number of pages.
    #[error(
        "{path} has {}, which is not a whole number of pages: name a memory file that is not truncated",
        counted(.bytes, "byte")
    )]
    NotPageAligned {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The recording to replay is of other memory.
    #[error(
        "the recording is of {} of memory, but the memory file has {bytes}: record a guest of this snapshot",
        counted(.recorded, "byte")
    )]
    RecordingMismatch {
        /// The bytes of the recorded memory.
        recorded: u64,
        /// The bytes of the snapshot.
        bytes: u64,
    },
    /// Another handler listens at the path of the socket.
    #[error("{0} is in use: another handler listens there; stop it, or choose another path")]
    InUse(PathBuf),
    /// The path of the socket holds a file that is no socket.
    #[error("{0} exists and is no socket: choose another path, or remove it")]
    NotASocket(PathBuf),
    /// The socket cannot be opened.
    #[error("cannot listen at {path}: {source}{}", remedy_of_listen(source))]
    Listen {
        /// Its path.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The mode or the group of the socket cannot be set.
    #[error("cannot set the mode and group of {path}: {source}: name a group of this user, or run as root")]
    SocketAccess {
        /// Its path.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The handler cannot make its descriptors, or wait for them.
    #[error("the handler cannot make its descriptors, or wait for them: {0}")]
    Poll(#[source] io::Error),
}

/// The reason why the holes of a file are unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownHoles {
    /// It is no regular file.
    #[error("only a regular file has holes")]
    NotRegular,
    /// Its file system has blocks larger than a page.
    #[error("its file system has blocks larger than a page: a hole inside a block is reported as data")]
    LargeBlocks,
    /// Its file system reports no holes at all.
    #[error("its file system does not report holes")]
    NotReported,
    /// It occupies less space than its length, but its file system reports no hole: it compresses,
    /// for example.
    #[error("it occupies less space than its length, but its file system reports no hole")]
    Hidden,
    /// It has no hole.
    #[error("it has no hole: a copy has filled them, or it is a full snapshot (name that as the base)")]
    NoHole,
}

/// The remedy for an error of a socket that is opened.
fn remedy_of_listen(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENAMETOOLONG) => ": the path of a socket has at most 107 bytes",
        Some(Errno::ENOENT) => ": make its folder first",
        Some(Errno::EMFILE) => ": raise the limit on descriptors with ulimit -n",
        _ => "",
    }
}
