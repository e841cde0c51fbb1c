//! Scattered memory, one contiguous region, filled on first touch.
//!
//! A program has many pieces of memory: heap buffers, files, ranges of an object in a store. It wants one pointer
//! `base`, such that `base[i]` is the i-th byte of the pieces laid end to end, without copying all of it first.
//! A [`Region`] reserves one contiguous range of addresses, lays the pieces out on it, and a [`Pool`] of threads
//! makes each page appear when it is first touched, by way of Linux's `userfaultfd(2)`.
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
//!     .chunk(bytes::Bytes::from_static(b"the end"))
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
//! | noun | what it is |
//! |---|---|
//! | [`Region`] | an owned, contiguous range of addresses, a whole number of pages |
//! | [`SharedRegion`] | the same, of which others may change parts: without slices |
//! | [`AdoptedRegion`] | memory of another process, that it has registered and handed over |
//! | [`Chunk`] | a byte range of one source, placed in a region; chunks lie end to end, at any length and offset |
//! | [`Source`] | **what** bytes a range holds |
//! | [`Plan`] | **how** each chunk is installed, with the reason |
//! | [`Server`] | **who** answers faults: the threads of a [`Pool`], the thread that takes them ([`Inline`]), the caller's loop ([`Manual`]) |
//!
//! Pages of a sealed [memfd](source::Memfd), and [pages](source::Pages) that are given up, are shown as they are where they
//! lie at the same place in a page: no copy. So is what others may change (files, other memfds, aliases, physical memory), in
//! a [`SharedRegion`]. Everything else is copied, once, page by page.
//!
//! # Promises
//!
//! * **Never zeros for bytes.** A page whose source fails is SIGBUS to who touches it, and an error from
//!   [`Region::read_at`] and [`Region::populate`].
//! * **Nobody waits on a lost page.** A fill that cannot be finished gives its page back and wakes who waits.
//! * **Safe is sound.** This crate has no unsafe code; what is unsafe lives in `pagestitch-kernel`. Borrowed chunks
//!   exist only inside a [`scope`](scope()).
//! * **An ordinary user will do.** No capability is needed since Linux 5.11; what is lost then is told by
//!   [`Region::serves_system_calls`].
//!
//! Linux 4.14 or newer; 6.6 or newer for poison marks, without which a failed page costs a mapping.

// One promise is made, in `serve/inline`: that what serves there may run in a signal handler.
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
mod serve;
mod signals;
pub mod source;
mod space;

pub use api::{AdoptedRegion, Builder, Region, Scope, ScopedBuilder, ScopedRegion, SharedRegion, scope};
pub use error::{Error, ErrorKind};
pub use method::Method;
pub use metrics::{Coverage, Histogram, Latency, Meter, Metrics};
pub use pagestitch_kernel::Support;
pub use pagestitch_kernel::process::Process;
pub use pagestitch_kernel::uffd::OwnMemory;
pub use pagestitch_kernel::{Access, View};
pub use policy::{OnFailure, Readahead, Recording, Retry};
pub use serve::{Inline, Manual, Placement, Pool, PoolBuilder, PoolMetrics, Report, Server};
pub use source::Source;
pub use space::{AdoptedMemory, Chunk, OnDiscard, OnUnavailable, Plan, PlanRun};

/// The README's example is compiled and run with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
