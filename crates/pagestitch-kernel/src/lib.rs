//! Type-safe wrappers of the kernel interfaces under pagestitch: the crate with the unsafe code.
//!
//! The modules in the order of their layers: each module uses only modules of the layers above it
//! in this table.
//!
//! | layer | module | subject |
//! |---|---|---|
//! | 0 | `errno` | the error numbers of the kernel |
//! | 1 | [`page`] | the only arithmetic on addresses, pages and spans: alignment is a type |
//! | | [`access`] | the accesses that a mapping allows |
//! | | [`features`] | the features of a userfaultfd, as `UFFDIO_API` numbers them |
//! | | [`limits`] | the limit of the process that a mapping or a descriptor has met |
//! | | [`fork`] | the generation of a process, by which a thing can tell that a forked child has inherited it |
//! | | [`fork_window`] | the moment after a fork in which only the server has the child's userfaultfd |
//! | | [`sync`] | atomics, locks and an event count: the standard library's, or a model checker's |
//! | | [`process`] | another process, by a descriptor that stays with it |
//! | | [`fd_passing`] | descriptors through a UNIX socket |
//! | | [`fd_queue`] | descriptors in a socket, which outlive the process that has sent them |
//! | | [`cache`] | a hint to the processor that values are needed soon |
//! | | [`file_read`], [`file_write`] | reads and writes of files that a signal handler may make |
//! | | [`nap`] | a short sleep that a signal handler may take |
//! | | [`direct_read`] | reads of files around the page cache |
//! | | [`priority`] | the nice value of a thread |
//! | | [`replace`] | a file that is written as a whole, or stays as it was |
//! | 2 | [`gate`] | a gate that closes: after [`Gate::close`](gate::Gate::close) no guard of it is left |
//! | | [`append_vec`] | a vector that grows at its end while other threads read it |
//! | | [`versions`] | a value that later versions replace, while the earlier ones can still be read |
//! | | [`releasable`] | a value that threads read until it is released, without a lock |
//! | | [`striped`] | a value for each of a few threads, in cache lines of its own |
//! | | [`ranges`] | ranges that children of fork must not reuse, and that linger after their drop |
//! | | [`page_scan`] | which pages were written since the last scan, and which are present |
//! | | [`memory_left`] | the memory that the machine and the cgroups of the process have left |
//! | | [`swap`] | which pages are swapped out, and whether such pages can move |
//! | | `vma_name` | the name of a mapping in `/proc/PID/maps` |
//! | | `populate` | a defect of `MADV_POPULATE_READ` in older kernels |
//! | | `granule` | the page size of a file's mappings |
//! | 3 | `mapping` | an owned mapping: unmapped when it is dropped |
//! | | [`rcu`] | a value that a writer replaces while readers look at it, without a lock |
//! | | [`revocable`] | borrowed bytes for threads that may outlive the borrow, revoked when it ends |
//! | | `copy` | copies of bytes that may change meanwhile |
//! | 4 | [`reservation`] | an owned range of addresses behind one bounds check |
//! | | [`mapped_buffer`] | a buffer outside of the memory of the allocator |
//! | | [`atomic_table`] | tables that cost memory only where they are touched |
//! | | [`memfd`] | sealed memfds: bytes that no process can change and each can map |
//! | | [`sigbus`] | faults served in a signal handler, by the thread that takes them |
//! | | [`read_ring`] | reads of pages from files, many at once by one thread |
//! | 5 | [`pages`] | pages of private memory that move into a region |
//! | | [`shared`] | files, memfds and mappings that other processes may change |
//! | | [`physical`] | physical memory: `/dev/mem`, PCI resources, and this process's own pages through them |
//! | 6 | [`immutable`] | files whose bytes do not change, by a promise or by fs-verity |
//! | | [`uffd`] | the userfaultfd: open, register, and each fill operation, which answers with an [`Outcome`] |
//! | 7 | [`event`] | the kernel's messages, decoded eagerly |
//! | | [`view`] | the one view of a reservation's bytes, and the sources that it shows in place |
//! | | [`staging`] | a huge page that is filled apart, and moves into a region whole |
//! | | [`arena`] | pages that leave a region: they move to an arena, or are dropped |
//! | 8 | [`capabilities`] | the abilities of this kernel and process, probed at run time, with reason and remedy |
//!
//! # The safety argument, once
//!
//! A missing page *has no value*: the kernel stops each reader of it until it has one. Filling it
//! is therefore never a write behind a reader's back, on three conditions, and this crate sees to
//! all of them:
//!
//! * The memory that a userfaultfd fills was never given out as zeros. [`Uffd::register`] takes a
//!   [`Reservation`], whose pages no allocator has handed out; for any other range,
//!   [`Uffd::register_range`] is `unsafe`, and its caller vouches for the range. A userfaultfd that
//!   is registered already ([`Uffd::adopt`]) fills memory of another process, which the kernel
//!   confirms, or its caller promises the same of its ranges ([`uffd::OwnMemory`]).
//! * Other pages are mapped into a reservation only while its view is borrowed mutably. Bytes that
//!   cannot change (a [`memfd::SealedMemfd`], an [`immutable::StableFile`], [`pages::Donated`]
//!   memory) leave the view stable.
//!   Bytes that other processes may change do not: such a view never becomes a [`StableView`], the
//!   type that gives out slices. Nor does a view on a memfd ([`View::reserve_on`]), whose missing pages
//!   are zeros for other mappings of the memfd.
//! * No function of this crate's safe API gives a filled page other bytes. [`Reservation::revoke`]
//!   and [`Reservation::fence`] take a page away for good: a later access is a signal, which ends
//!   the program; it does not read other bytes. An [`arena::Evictable`] reservation loses pages that
//!   are filled again: its caller promises the same bytes, or has no view that gives out slices. Bytes
//!   from a source that may change are the same if they have the hash of their first reading, taken in
//!   a buffer that no other thread writes to, and from which the page is then filled.
//!   [`View::reveal`] writes bytes that are hidden: no slice shows them before.
//!
//! Hence [`StableView::as_slice`] is safe. [`StableView::as_mut_slice`] is safe because a
//! reservation has one view, which is borrowed mutably. A view that is not stable is read and
//! written by the kernel ([`View::read_at`], [`View::write_at`]), for which a concurrent change is
//! no data race.

pub mod access;
pub mod append_vec;
pub mod arena;
pub mod atomic_table;
pub mod cache;
pub mod capabilities;
mod copy;
pub mod direct_read;
mod errno;
pub mod event;
pub mod fd_passing;
pub mod fd_queue;
pub mod features;
pub mod file_read;
pub mod file_readahead;
pub mod file_write;
pub mod fork;
pub mod fork_window;
pub mod gate;
mod granule;
mod guarded_ref;
pub mod immutable;
mod inode;
pub mod limits;
pub mod mapped_buffer;
mod mapping;
pub mod memfd;
pub mod memory_left;
pub mod nap;
pub mod page;
pub mod page_scan;
pub mod pages;
pub mod physical;
mod populate;
pub mod pressure;
pub mod priority;
pub mod process;
pub mod ranges;
pub mod rcu;
pub mod read_ring;
pub mod releasable;
pub mod replace;
pub mod reservation;
pub mod revocable;
pub mod shared;
pub mod sigbus;
pub mod staging;
pub mod striped;
pub mod swap;
pub mod sync;
pub mod uffd;
pub mod versions;
pub mod view;
mod vma_name;

pub use crate::errno::Errno;
pub use access::Access;
pub use arena::{Arena, Evictable};
pub use capabilities::Support;
pub use event::{Batch, Event, Fault, FaultKind};
pub use features::Features;
pub use page::{AddressRange, Page, PageSize, Span};
pub use reservation::Reservation;
pub use staging::Staging;
pub use uffd::{Outcome, Uffd};
pub use view::{StableView, View};
