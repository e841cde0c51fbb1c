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
//! A region maps pages of a sealed [memfd](source::Memfd) and of an
//! [immutable file](source::ImmutableFile), and takes over donated [pages](source::Pages), without
//! a copy, where a chunk has the same offset within a page in its source and in the region. A
//! [`SharedRegion`] also maps sources that other processes may change: files, unsealed memfds,
//! aliases, physical memory. All other bytes are copied once, page by page.
//!
//! # Which source?
//!
//! The costs are medians of first touches of a random page of 4 KiB with a default pool, on a busy
//! virtual machine with two CPUs, page cache warm. Their ratios hold elsewhere, too. *In place* means
//! that the source's own pages are mapped.
//!
//! | the bytes are | source | first touch | memory of a touched page |
//! |---|---|---|---|
//! | zeros | [`Chunk::hole`] | 7 µs | none while it is only read |
//! | in your memory | [`Memory`](source::Memory): `Chunk::from(vec)`, `Memory::new(owner)` | 10 µs; 6 µs [`Inline`] | its copy |
//! | in your memory, borrowed | [`scope`](scope()) | the same | its copy |
//! | in large memory that you fill yourself, and do not need there any more | [`Pages`](source::Pages) | 0.2 µs, because huge pages move whole | none: the page moves |
//! | in a sealed memfd, made here or received | [`Memfd`](source::Memfd) | in place: 0.3 µs | none |
//! | in a file that does not change | [`ImmutableFile`](source::ImmutableFile), by a promise or by fs-verity | in place: 0.2 µs | none |
//! | in a file, a block device | [`FileSource`](source::FileSource), or an open `std::fs::File` | 11 µs and the disk; 7 µs [`Inline`] | its copy |
//! | in a file or memfd that others change | [`SharedFile`](source::SharedFile), in a [`SharedRegion`] | in place: 0.2 µs | none |
//! | in a mapping without a descriptor | [`Alias`](source::Alias), in a [`SharedRegion`] | in place | none |
//! | in a device, in reserved memory | [`Physical`](source::Physical), in a [`SharedRegion`] | in place | none |
//! | one copy for many processes, filled on demand | [`LazyMemfd`](source::LazyMemfd), in a [`SharedRegion`] | your filler, once for all | one page for all |
//! | computed, compressed, in a database | your [`Source`], with its [`granularity`](Source::granularity) | your read, and 10 µs | its copy |
//! | behind an async client | `pagestitch_tokio::AsyncSource`, with a limit on requests at once; or your [`Fetch`](source::Fetch) | your request | its copy |
//! | of another process, which hands over its userfaultfd | any of these, copied into that process: [`AdoptedMemory`] | that of the source | its copy, there |
//!
//! A source that is slow, fails at times, or has several readers gets a wrapper:
//! [`Cached`](source::Cached), [`Limited`](source::Limited), [`Retrying`](source::Retrying).
//!
//! # Which server?
//!
//! | the program | server | first touch | threads |
//! |---|---|---|---|
//! | any; one for all regions | [`Pool`] | 10 µs | one worker a CPU, up to 32; more if sources hang |
//! | touches random pages of memory or files | [`Inline`] | 6 µs | none; no readahead, and only bytes in memory, in files or in place |
//! | has a thread for each core, and each touches the region | [`Pool`] with [`Placement::Cpus`]; [`Inline`] for bytes in memory, in files or in place | 10 µs; 6 µs | one worker for each core; none |
//! | has an event loop, or threads, that do **not** touch the region | [`Manual`] | as a pool, and the wait for the loop | none |
//! | runs on tokio | [`Pool`] with async sources, or the task `pagestitch_tokio::serve` | as a pool | none, or a pool's |
//! | may not use userfaultfd: Docker, gVisor | [`Eager`]; [`best_server`] takes it where there is no pool | none: the build fills all pages that are not mapped in place | none |
//!
//! # Costs
//!
//! | | |
//! |---|---|
//! | a region above 256 KiB | a descriptor for each [shard](Builder::shards), which is one on up to eight CPUs; about 5 KiB; 0.1 ms to build and to drop, more with thousands of such regions, because the kernel walks all mappings of the process |
//! | a smaller region | about 5 KiB: those of a pool share a few descriptors |
//! | a chunk | 25 bytes beside its source, 50 ns |
//! | a page | 4 bits, and its entry in the kernel's page table |
//! | a source | an owned one stays in memory as long as a region has it; a vector of a page or more in a read-only region of a pool, or each with [`release_sources`](Builder::release_sources), until the region has all of its bytes; a file takes a descriptor, unless all of it is mapped |
//! | [`Region::read_at`] of resident memory | 2 to 3 µs a call, [`SharedRegion::read_at`] 6 to 7 µs; a slice has no cost |
//!
//! # When not to use it
//!
//! * One file, read as it is: a plain `mmap` does that.
//! * All bytes are read once, in order: a read into a buffer is as quick and simpler.
//! * More written bytes than memory, with no source to take them: a writable region has a [`Budget`]
//!   only with [`write_back`](Builder::write_back).
//! * Bytes that move: pages can be [replaced](Region::replace) and a region [grows](Builder::capacity),
//!   but nothing changes its offset.
//!
//! # Promises
//!
//! * **Never zeros for bytes.** Touching a page whose source fails raises SIGBUS;
//!   [`Region::read_at`] and [`populate`](AnyRegion::populate) return the source's error. The memory
//!   of another process loses this promise if its server is killed: see `SECURITY.md`.
//! * **A lost page stops only its own threads.** A fill that cannot finish releases its page and wakes
//!   the waiting threads, which fault again. A source that hangs holds up the threads at its own pages,
//!   until [`fault_timeout`](PoolBuilder::fault_timeout) ends their wait with SIGBUS.
//! * **Safe is sound.** Unsafe code is in `pagestitch-kernel`; `ci/lint` lists the few other files, with
//!   promises such as that of an [`ImmutableFile`](source::ImmutableFile). Borrowed chunks exist only
//!   inside a [`scope`](scope()).
//! * **No privileges.** Since Linux 5.11 an ordinary user needs no capability.
//!   [`Region::serves_system_calls`] tells whether the kernel itself can touch absent pages.
//!
//! # Requirements
//!
//! Linux 4.14. Linux 6.6 adds poison markers; before it, each failed page costs a mapping. Tests run on
//! x86-64 only; the crate builds for aarch64. The oldest Rust is 1.85; a release that needs a newer
//! one has a new minor version. The build needs no C header and no libclang.
//!
//! # Features
//!
//! None is on by default.
//!
//! | feature | content |
//! |---|---|
//! | `metrics` | `Meter::publish`: the numbers of a region for the `metrics` facade |
//! | `userfaultfd` | [`AdoptedMemory`] from and to the `Uffd` of the `userfaultfd` crate, whose build needs libclang |
//!
//! # Beside this crate
//!
//! | crate | content |
//! |---|---|
//! | [`pagestitch-tokio`](https://docs.rs/pagestitch-tokio) | async sources whose fetches overlap, and faults served by a task |
//! | [`pagestitch-capi`](https://docs.rs/pagestitch-capi) | the library for C and C++ |
//! | [`pagestitch-firecracker`](https://docs.rs/pagestitch-firecracker) | the memory of Firecracker guests that are restored from snapshots |
//! | [`pagestitch-vm-memory`](https://docs.rs/pagestitch-vm-memory) | guest memory of rust-vmm, for VMMs and vhost-user |
//! | [`pagestitch-testkit`](https://docs.rs/pagestitch-testkit) | a conformance suite for sources of your own, scripted sources, tests in child processes |
//! | [`pagestitch-cli`](https://docs.rs/crate/pagestitch-cli) | the command: `probe` lists the abilities of a machine, `bench` measures it, `serve` restores guests |
//! | [`pagestitch-kernel`](https://docs.rs/pagestitch-kernel) | the kernel interfaces, and the unsafe code, except for a few promises |
//!
//! The repository has a guide (`docs/guide.md`: choices, slow regions, memory, containers, SIGBUS,
//! hangs, the way from `mmap`, UMap or a handler of one's own), the design (`ARCHITECTURE.md`), and
//! an example for each idea (`examples/`):
//!
//! | example | idea |
//! |---|---|
//! | `quickstart`, `own_source`, `shared_source` | a first region; a source of your own; one that is slow and shared |
//! | `files_as_one`, `sealed_memfd`, `shared_memfd`, `donate`, `ring_buffer` | no copy: files, memfds, pages that move, the same bytes twice |
//! | `append_log` | a region that grows while threads read it |
//! | `inline`, `embed_epoll`, `embed_thread_pool`, `embed_tokio` | other servers than a pool |
//! | `pinned_threads` | threads that are pinned to CPUs, each on the CPU of its worker |
//! | `weights`, `hand_over` | tensors as slices of their files; a region as the bytes of safetensors and Arrow |
//! | `adopt`, `userfaultfd_crate` | memory of another process, or of the `userfaultfd` crate |
//! | `physical`, `alias_existing_memory` | devices, mappings without a descriptor |
//! | `incremental_snapshot`, `write_back` | the pages that were written since the last snapshot, as a sparse file; or back in their source |
//! | `guest_memory` | the memory of a guest for rust-vmm, with a vhost-user back end |
//! | `prometheus`, `hung_fault` | numbers for a dashboard; a process to debug |

// Four exceptions: the promise that the fault path may run in a signal handler (`serve/in_handler`), the
// promises of the caller that a file or a source does not change (`source/immutable`, `source/stable`), and
// the promise that a page that has left comes back with the same bytes (`reclaim/promise`).
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
mod reclaim;
mod retry;
mod serve;
mod signals;
pub mod source;
mod space;

pub use api::{
    AdoptedRegion, AnyRegion, Builder, Changes, PrefetchHandle, PrefetchProgress, Region, Scope,
    ScopedBuilder, ScopedRegion, Shard, SharedRegion, WriteBack, scope,
};
pub use error::{BuildOption, Error, ErrorKind};
pub use method::{Method, PlanReason, SameBytes};
pub use metrics::{Coverage, Histogram, Latency, Meter, Metrics};
pub use pagestitch_kernel::Support;
pub use pagestitch_kernel::limits::Limit;
pub use pagestitch_kernel::process::Process;
pub use pagestitch_kernel::uffd::OwnMemory;
pub use pagestitch_kernel::{Access, Errno, View};
pub use policy::{FillRate, OnFailure, Readahead, Recording, Replacement};
pub use reclaim::{Budget, BudgetMetrics};
pub use retry::Retry;
pub use serve::{
    BestServer, Eager, Inline, Manual, Placement, Pool, PoolBuilder, PoolMetrics, PoolStats, Server,
    best_server,
};
pub use source::Source;
pub use space::{AdoptedMemory, Chunk, IntoChunk, OnDiscard, OnUnavailable, Plan, PlanRun};

/// Compiles and runs the example of the package's README with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
