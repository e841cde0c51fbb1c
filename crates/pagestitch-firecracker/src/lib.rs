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
pub use error::Error;
pub use event::Event;
pub use extents::Extents;
pub use guest::OnStop;
pub use handler::Handler;
pub use handshake::{GuestMapping, GuestMappings, HandshakeError};
pub use shutdown::ShutdownHandle;
pub use snapshot::{Holes, Snapshot};
