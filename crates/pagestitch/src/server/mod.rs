//! Who answers faults, and how an answer is given.
//!
//! | file | step of a fault's journey |
//! |---|---|
//! | `pool` | the workers and what they share; regions come and go |
//! | `worker` | wake up, read a batch, serve the first fault, hand on the rest |
//! | `fault` | **the journey in one function**: claim, fill, resolve, settle, tell |
//! | `resolve` | tell the kernel, and read its answer |
//! | `populate` | the same steps for pages that nobody has touched |

mod fault;
mod pool;
mod populate;
mod resolve;
mod worker;

pub use pool::{Pool, PoolBuilder, Report};
pub(crate) use populate::populate;
