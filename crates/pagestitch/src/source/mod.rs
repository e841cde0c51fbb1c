//! What bytes a range holds. A source knows nothing of pages, faults or userfaultfd.
//!
//! | source | bytes | how a page gets them |
//! |---|---|---|
//! | [`Memory`] | at a stable address, owned or lent | copied straight from where they lie |
//! | [`Memfd`] | in a sealed memfd | in place; copied straight where pages do not agree |
//! | [`Pages`] | given up by their owner | moved; copied where pages do not agree |
//! | [`SharedFile`] | in a regular file or an unsealed memfd | in place, and changing; else read |
//! | [`Alias`] | in a shared mapping without a descriptor | in place, and changing; else copied |
//! | [`Physical`] | in `/dev/mem`, or a PCI resource | in place, and changing; else copied |
//! | [`LazyMemfd`] | in a memfd that is filled later | in place, when it has them |
//! | [`FileSource`] | in a file, read at an offset | read into staging, then copied |
//! | [`Hole`] | zeros | the kernel's zero page |
//! | your own [`Fetch`] | that come later, from your own thread | fetched while workers serve other faults, then copied |
//! | your own [`Source`] | wherever you get them | read into staging, then copied |

mod backing;
mod contract;
mod donated;
mod fetch;
mod file;
mod hole;
mod lazy;
mod memfd;
mod memory;
mod shared;

pub use crate::error::Failure;
pub(crate) use backing::{Backing, Identity};
pub use contract::Source;
pub(crate) use donated::gone;
pub(crate) use fetch::{Complete, Fetched};
pub use fetch::{Fetch, Reply};
pub use file::FileSource;
pub use hole::Hole;
pub use lazy::{FillMemfd, LazyMemfd};
pub use memfd::Memfd;
pub use memory::Memory;
pub(crate) use memory::MemoryBytes;
pub use pagestitch_kernel::memfd::UnsealedMemfd;
pub use pagestitch_kernel::pages::{Donated, Pages};
pub use pagestitch_kernel::physical::{Caching, Physical, PhysicalError};
pub use pagestitch_kernel::shared::{Alias, AliasError, SharedFile};
pub(crate) use shared::Shared;
