//! Serves the memory of [Firecracker](https://firecracker-microvm.github.io) guests that are restored from snapshots.
//!
//! ```text
//!   firecracker ── PUT /snapshot/load {"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}} ──┐
//!        │                                                                                               ▼
//!        │   one message: a JSON array that says where its memory is, and its userfaultfd          Handler
//!        └──────────────────────────────────────────────────────────────────────────────────────▶     │
//!   virtual CPUs touch memory ── faults ──────────────────────────────────────────────────────▶  Pool ◀┘
//!                             ◀── pages: the base snapshot's, or those of the last diff that has them ──
//! ```
//!
//! | file | what |
//! |---|---|
//! | `handshake` | the message, as every version of Firecracker sends it; and everything that is no such message |
//! | `snapshot` | memory files: a base, and diffs over it |
//! | `extents` | which bytes of a diff are its own |
//! | `builder` | describes a handler, and has it listen |
//! | `handler` | takes guests in, sees them end; drains |
//! | `socket` | where it listens: taken over from a handler that ended, left to one that follows |
//! | `client` | a peer that has connected, until it is a guest or refused |
//! | `peer_threads` | threads for what a peer can make wait |
//! | `refusal` | what becomes of the memory of a guest that is refused |
//! | `event` | what it tells |
//! | `guest` | one guest: its memory, as it is served |
//!
//! The promises: a handler that is told to stop [fills](OnStop::Finish) what is missing of each guest first, and lets them go on
//! without it; a page whose bytes cannot be had is an error where it is touched, or the [end](pagestitch::Loss) of that guest, never
//! zeros; a guest that is refused gets that, too, and does not wait for ever; no guest and no stranger at the socket holds up
//! another.
//!
//! # The death of the handler
//!
//! These promises end with the handler's process (SIGKILL, out of memory). What its guests see then depends on the **other
//! descriptors of their userfaultfds**, because the kernel gives up a userfaultfd with its last one:
//!
//! | is there another descriptor? | a touch of a page that is missing |
//! |---|---|
//! | yes, in the VMM (Firecracker keeps its own) or a supervisor | waits, until the VMM is ended, or a supervisor fills or poisons |
//! | no: the VMM has closed its own after the handshake | **reads zeros**, in silence |
//!
//! So it is the duty of the VMM to keep its descriptor open, and of a supervisor to end the guests of a handler that died
//! (Firecracker's documentation asks for the same). A VMM that you write yourself, or that closes its descriptor, needs a supervisor
//! that holds one: it receives the userfaultfd first, keeps a duplicate, and hands it on.
//!
//! # Peers
//!
//! A peer may send anything; `SECURITY.md` says what it can do by that. What it can make wait (the last `close(2)` of a descriptor
//! that it sent, a message that does not end) waits in one of 32 threads, 8 for one user. Where a file of a FUSE daemon that does not
//! answer was sent, the process of the handler cannot end before the daemon does: the kernel closes the file for it. A guest is
//! known by the pidfd of the process that connected (Linux 6.5); before, by holding the userfaultfd that it sent (`kcmp(2)`). A guest
//! in a PID namespace that the handler cannot see is served from Linux 6.5 on, and cannot be ended: it is refused where that was
//! declared for lost bytes.
//!
//! ```no_run
//! use pagestitch_firecracker::{Handler, Snapshot};
//!
//! let memory = Snapshot::open(["base.mem", "monday.diff"])?;      // and monday.diff.extents: see Extents
//! let handler = Handler::builder(memory).bind("/run/vm/uffd.sock")?;
//! let stop = handler.shutdown_handle();                        // for a signal handler, or another thread
//! handler.run(|event| println!("{event}"))?;
//! # drop(stop);
//! # Ok::<(), pagestitch_firecracker::Error>(())
//! ```

#![forbid(unsafe_code)]

mod builder;
mod client;
mod event;
mod extents;
mod guest;
mod handler;
mod handshake;
mod peer_threads;
mod refusal;
mod snapshot;
mod socket;

pub use builder::{Builder, OnStop};
pub use event::Event;
pub use extents::Extents;
pub use handler::{Handler, ShutdownHandle};
pub use handshake::{GuestMapping, GuestMappings, HandshakeError};
pub use snapshot::{Holes, Snapshot};

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
