//! What users hold: regions of three kinds, and how they are built.
//!
//! | file | what |
//! |---|---|
//! | `builder`, `options` | what a region is to be |
//! | `build` | before the first fault: check, reserve, register, map, attach |
//! | `core` | what all kinds of region are; teardown |
//! | `region` | a region that owns its range |
//! | `shared` | a region of which others may change parts |
//! | `adopted` | memory of another process |
//! | `scope` | regions over borrowed memory |
//! | `nesting` | memory of one region as a chunk of another |

mod adopted;
mod build;
mod builder;
mod core;
mod nesting;
mod options;
mod region;
mod scope;
mod shared;

pub use adopted::AdoptedRegion;
pub use builder::Builder;
use core::Core;
pub use region::Region;
pub use scope::{Scope, ScopedBuilder, ScopedRegion, scope};
pub use shared::SharedRegion;
