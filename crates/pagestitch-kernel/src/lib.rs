//! The kernel under pagestitch, made honest. The only crate with unsafe code.
//!
//! | module | what it owns |
//! |---|---|
//! | [`page`] | the only arithmetic on addresses, pages and spans: alignment is a type |
//! | [`uffd`] | the userfaultfd: open, register, and each fill operation, answering with an [`Outcome`] |
//! | [`event`] | what the kernel says happened, decoded eagerly |
//! | [`capabilities`] | what this kernel and this process may do, asked at run time, with reason and remedy |
//! | [`reservation`] | an owned range of addresses behind one bounds check |
//! | [`limits`] | which limit of the process was in the way of a mapping |
//! | [`ranges`] | ranges that children of fork must not reuse, and that linger after their drop |
//! | [`view`] | the one view of a reservation's bytes, and what can be shown in it in place |
//! | [`memfd`] | sealed memfds: bytes that nobody can change and everybody can map |
//! | [`shared`] | files, memfds and mappings that others may change |
//! | [`pages`] | pages of private memory that can be given away |
//! | [`sigbus`] | faults served by the thread that takes them, in a signal handler |
//! | [`staging`] | a huge page to fill in peace, and to move away whole |
//! | [`process`] | another process, by a descriptor that stays with it |
//! | [`fd_passing`] | descriptors through a UNIX socket |
//! | [`fd_queue`] | descriptors that outlive the process that has them |
//! | [`physical`] | physical memory: `/dev/mem`, PCI resources, and this process's own pages through them |
//! | [`striped`] | a value for each of a few threads, in cache lines of its own |
//! | [`revocable`] | borrowed bytes handed to threads that may outlive the borrow, revoked when it ends |
//! | [`atomic_table`] | tables that cost nothing until they are touched |
//! | [`fork`] | whether this is still the process that made a thing |
//! | [`swap`] | which pages are swapped out, and whether such pages can move |
//! | [`sync`] | atomics, locks and an event count: the standard library's, or a model checker's |
//! | [`rcu`] | a value that writers replace and readers never wait for |
//! | [`replace`] | a file that is written, all or nothing |
//! | [`gate`] | a door that can be closed: after [`Gate::close`](gate::Gate::close) nobody is inside |
//!
//! # The safety argument, once
//!
//! A missing page *has no value*: whoever reads it is stopped by the kernel until it has one. Filling it is
//! therefore never a write behind a reader's back, on three conditions, and all are made here:
//!
//! * only a [`Reservation`] is registered (or, through an `unsafe fn`, a range whose owner vouches for it), so
//!   no allocator ever handed those pages out as zeros. A uffd that is registered already ([`Uffd::adopt`]) is one of another
//!   process, which the kernel is asked, or its ranges are promised for ([`uffd::OwnMemory`]);
//! * something else is put into a reservation only while its view is borrowed mutably. What nobody can change (a
//!   [`memfd::SealedMemfd`], [`pages::Donated`] memory) leaves the view stable; whatever others may change does not,
//!   and such a view never becomes a [`StableView`], which is what gives out slices;
//! * nothing in this crate's safe API takes a page that has been filled and fills it with other bytes. Taking
//!   a page away for good ([`Reservation::revoke`], [`Reservation::fence`]) makes a later access a signal,
//!   which ends the program; it does not show it different bytes.
//!
//! Hence [`StableView::as_slice`] is safe, and [`StableView::as_mut_slice`] is safe because there is one view of a
//! reservation and it is borrowed mutably. A view that is not stable is read and written by the kernel
//! ([`View::read_at`], [`View::write_at`]), to whom a race is none.

pub mod atomic_table;
pub mod capabilities;
mod copy;
pub mod event;
pub mod fd_passing;
pub mod fd_queue;
pub mod features;
pub mod fork;
pub mod gate;
mod granule;
pub mod limits;
mod mapping;
pub mod memfd;
pub mod page;
pub mod pages;
pub mod physical;
pub mod process;
pub mod ranges;
pub mod rcu;
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
pub mod view;

pub use capabilities::Support;
pub use event::{Batch, Event, Fault, FaultKind};
pub use features::Features;
pub use nix::errno::Errno;
pub use page::{AddressRange, Page, PageSize, Span};
pub use reservation::{Access, Reservation};
pub use staging::Staging;
pub use uffd::{Outcome, Uffd};
pub use view::{StableView, View};
