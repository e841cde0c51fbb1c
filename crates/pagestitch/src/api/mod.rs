//! The public handles: three kinds of regions, and their builder.
//!
//! | file | content |
//! |---|---|
//! | `builder`, `options` | the description of a region: its options, its chunks, and its end |
//! | `build` | the pipeline before the first fault: check, reserve, register, map, attach |
//! | `on_memfd`, `reserve_on_memfd` | a region whose pages other processes can map |
//! | `growth` | chunks that are appended later |
//! | `replace` | other bytes for pages of a region |
//! | `any` | the part that regions of all kinds share; teardown |
//! | `changes` | the pages that were written, and a file with their bytes |
//! | `write_back` | written pages go to their sources |
//! | `pin` | pages that leave or stay because the application asks for it |
//! | `prefetch` | a prefetch in progress |
//! | `shard` | the shards of a region |
//! | `region` | a region that owns its range |
//! | `shared` | a region whose bytes other processes may change |
//! | `adopted` | memory of another process |
//! | `scope` | regions over borrowed memory |
//! | `userfaultfds` | the userfaultfds of a region, one for each shard |
//! | `nesting` | memory of one region as a chunk of another |

mod adopted;
mod any;
mod build;
mod builder;
mod changes;
mod growth;
mod nesting;
mod on_memfd;
mod options;
mod pin;
mod prefetch;
mod refused;
mod region;
mod replace;
mod reserve_on_memfd;
mod scope;
mod shard;
mod shared;
mod userfaultfds;
mod write_back;

pub use adopted::AdoptedRegion;
pub use any::AnyRegion;
pub use builder::Builder;
pub use changes::Changes;
pub use prefetch::{PrefetchHandle, PrefetchProgress};
pub use region::Region;
pub use scope::{Scope, ScopedBuilder, ScopedRegion, scope};
pub use shard::Shard;
pub use shared::SharedRegion;
pub use write_back::WriteBack;
