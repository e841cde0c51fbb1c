//! Scattered memory, one contiguous region, filled on first touch.
//!
//! A program has many pieces of data: heap buffers, files, ranges of an object in a store. It
//! needs one pointer `base` such that `base[i]` is the i-th byte of the pieces laid end to end,
//! and it cannot afford to copy everything first. A [`Region`] reserves one contiguous range of
//! addresses and lays the pieces out on it. A [`Pool`] of threads fills each page when a thread
//! first touches it; Linux's `userfaultfd(2)` reports the touch.
//!
//! ```
//! use pagestitch::{Chunk, Pool, Region};
//! use pagestitch::source::FileSource;
//!
//! let pool = Pool::new()?;
//! let region = Region::builder()
//!     .chunk(vec![1u8; 10_000])                                  // memory: copied from where it lies
//!     .chunk(Chunk::from(FileSource::open("/proc/self/exe")?).range(0..3_000))    // a file: read where it is
//!     .chunk(Chunk::hole(1 << 30))                               // a gigabyte of zeros
//!     .chunk(&b"the end"[..])                                    // memory of the program itself
//!     .build(&pool)?;
//!
//! let bytes: &[u8] = region.as_slice();                          // nothing has been read yet
//! assert_eq!(&bytes[10_001..10_004], b"ELF");                    // now three pages have
//! assert_eq!(&bytes[bytes.len() - 7..], b"the end");
//! # Ok::<(), pagestitch::Error>(())
//! ```
//!
//! # The nouns
//!
//! | noun | meaning |
//! |---|---|
//! | [`Region`] | an owned, contiguous range of addresses, a whole number of pages |
//! | [`SharedRegion`] | a region whose bytes other processes may change: it gives out no `&[u8]` |
//! | [`AdoptedRegion`] | memory that another process has registered and handed over |
//! | [`AnyRegion`] | the part that these three kinds share: counters, population, failures |
//! | [`Chunk`] | a byte range of one source, placed in a region; chunks lie end to end, at any length and offset |
//! | [`Source`] | **what** bytes a range holds |
//! | [`Plan`] | **how** each chunk is installed, with the reason |
//! | [`Server`] | **where** faults are served: on the threads of a [`Pool`], on the faulting thread ([`Inline`]), in the caller's loop ([`Manual`]), or nowhere, because the build fills all pages ([`Eager`]) |
//!
//! A region maps pages of a sealed [memfd](source::Memfd) and takes over donated
//! [pages](source::Pages) without a copy, where a chunk has the same offset within a page in its
//! source and in the region. A [`SharedRegion`] also maps sources that other processes may change:
//! files, unsealed memfds, aliases, physical memory. All other bytes are copied once, page by page.
//!
//! # Promises
//!
//! * **Never zeros for bytes.** Touching a page whose source fails raises SIGBUS;
//!   [`Region::read_at`] and [`populate`](AnyRegion::populate) return the source's error.
//! * **No thread waits on a lost page.** A fill that cannot finish releases its page and wakes the
//!   waiting threads, which fault again.
//! * **Safe is sound.** Unsafe code is confined to `pagestitch-kernel`. Borrowed chunks exist only
//!   inside a [`scope`](scope()).
//! * **No privileges.** Since Linux 5.11 an ordinary user needs no capability.
//!   [`Region::serves_system_calls`] tells whether the kernel itself can touch absent pages.
//!
//! Requires Linux 4.14. Linux 6.6 adds poison markers; before it, each failed page costs a mapping.
//!
//! # Features
//!
//! None is on by default.
//!
//! | feature | content |
//! |---|---|
//! | `metrics` | `Meter::publish`: the numbers of a region for the `metrics` facade |
//! | `userfaultfd` | [`AdoptedMemory`] from and to the `Uffd` of the `userfaultfd` crate, whose build needs libclang |

// One exception, in `serve/inline`: the promise that the fault path may run in a signal handler.
#![deny(unsafe_code)]

#[macro_use]
mod guard;
mod api;
mod error;
mod fault;
mod method;
mod metrics;
#[cfg(all(test, shuttle))]
mod models;
mod policy;
mod retry;
mod serve;
mod signals;
pub mod source;
mod space;

pub use api::{
    AdoptedRegion, AnyRegion, Builder, PrefetchHandle, PrefetchProgress, Region, Scope, ScopedBuilder,
    ScopedRegion, SharedRegion, scope,
};
pub use error::{BuildOption, Error, ErrorKind};
pub use method::{Method, PlanReason};
pub use metrics::{Coverage, Histogram, Latency, Meter, Metrics};
pub use pagestitch_kernel::Support;
pub use pagestitch_kernel::limits::Limit;
pub use pagestitch_kernel::process::Process;
pub use pagestitch_kernel::uffd::OwnMemory;
pub use pagestitch_kernel::{Access, Errno, View};
pub use policy::{OnFailure, Readahead, Recording};
pub use retry::Retry;
pub use serve::{
    BestServer, Eager, Inline, Manual, Placement, Pool, PoolBuilder, PoolMetrics, Report, Server, best_server,
};
pub use source::Source;
pub use space::{AdoptedMemory, Chunk, IntoChunk, OnDiscard, OnUnavailable, Plan, PlanRun};

/// Compiles and runs the example of the package's README with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
