//! Serves the memory of [Firecracker](https://firecracker-microvm.github.io) guests that are
//! restored from snapshots.
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
//! Each file uses only files below it in this table:
//!
//! | file | content |
//! |---|---|
//! | `builder` | the options of a handler |
//! | `handler` | the thread that accepts guests, notices their end, and drains |
//! | `background` | the ends of background fills |
//! | `socket` | the listening socket: taken over from a dead handler, left to the next one |
//! | `client` | a connected peer before it becomes a guest or is refused |
//! | `peer_threads` | threads for work that a peer can delay |
//! | `refusal` | the memory of a refused guest: poisoned, or its process killed |
//! | `event` | the events that a handler reports |
//! | `guest` | one guest, while its memory is served |
//! | `handshake` | the message, as every version of Firecracker sends it, and all its errors |
//! | `snapshot` | memory files: a base, and diffs over it |
//! | `extents` | the ranges of a diff that hold changed memory |
//! | `shutdown` | the request to shut down |
//! | `error` | the reasons for which a handler cannot start or go on |
//!
//! The promises:
//!
//! * At shutdown the handler [fills](OnStop::Finish) the missing pages of each guest. The guest
//!   then runs without it.
//! * A guest that is filled in the [background](Builder::background) is detached as soon as it has all of
//!   its memory.
//! * A page whose bytes are unavailable is an error where it is touched, or it
//!   [ends](pagestitch::OnUnavailable) the guest. It never reads as zeros.
//! * The same holds for a refused guest: it does not wait forever.
//! * No guest, and no stranger at the socket, delays another guest.
//!
//! # The death of the handler
//!
//! These promises end with the process of the handler (SIGKILL, out of memory). The kernel releases
//! a userfaultfd with its last descriptor, so the guests then depend on the **other descriptors of
//! their userfaultfds**:
//!
//! | other descriptor | a touch of a missing page |
//! |---|---|
//! | open, in the VMM (Firecracker keeps its own) or a supervisor | waits, until the VMM is killed, or a supervisor fills or poisons the page |
//! | none: the VMM closed its own after the handshake | **reads zeros**, in silence |
//!
//! So the VMM must keep its descriptor open, and a supervisor must kill the guests of a dead
//! handler (Firecracker's documentation asks for the same). A VMM that closes its descriptor needs
//! a supervisor that holds one: the supervisor receives the userfaultfd first, keeps a duplicate,
//! and passes it on.
//!
//! # Peers
//!
//! A peer may send anything; `SECURITY.md` lists the consequences. Work that a peer can delay (the
//! last `close(2)` of a descriptor that it sent, an endless message) waits in one of 32 threads, at
//! most 8 for each user. If a peer sends a file of a FUSE daemon that does not answer, the process
//! of the handler cannot end before the daemon does, because the kernel closes the file for it.
//! A child process that the program starts at that moment inherits the descriptor, and its
//! `execve(2)` may wait for the last close too.
//!
//! A guest is identified by the pidfd of the process that connected (Linux 6.5). Before, the
//! handler checks that this process holds the userfaultfd that came (`kcmp(2)`). From Linux 6.5 on
//! the handler also serves a guest in a PID namespace that it cannot see. It cannot kill such a
//! guest, and refuses it if unavailable bytes have to kill it.
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

mod background;
mod builder;
mod client;
mod descriptor_room;
mod error;
mod event;
mod extents;
mod guest;
mod handler;
mod handshake;
mod peer_threads;
mod refusal;
mod shutdown;
mod snapshot;
mod socket;

pub use builder::Builder;
pub use error::{Error, UnknownHoles};
pub use event::Event;
pub use extents::Extents;
pub use guest::OnStop;
pub use handler::Handler;
pub use handshake::{GuestMapping, GuestMappings, HandshakeError};
pub use shutdown::ShutdownHandle;
pub use snapshot::{Holes, Snapshot};
