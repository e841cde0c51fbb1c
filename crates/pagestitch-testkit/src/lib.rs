//! Tools for tests of pagestitch and of code that uses it. No module uses a later one of this
//! table:
//!
//! | module | content |
//! |---|---|
//! | [`wait`] | waiting for a condition without a busy CPU |
//! | [`bytes`] | megabytes of known bytes |
//! | [`scope`] | scoped threads whose test fails instead of hanging |
//! | [`child`] | the body of a test in a process of its own, which may die by a signal or run under a limit |
//! | [`forked`] | children of `fork(2)` |
//! | [`deny`] | denies userfaultfd to a thread, as a container does |
//! | [`memory`] | the calls of an application on served memory |
//! | [`guest`] | memory that another process fills: a VMM that restores a guest from a snapshot |
//! | [`scripted`] | sources that count, fail, panic or hold their reads |
//! | [`conformance`] | checks the contract of a [`Source`](pagestitch::Source) |

pub mod bytes;
pub mod child;
pub mod conformance;
pub mod deny;
pub mod forked;
pub mod guest;
pub mod memory;
pub mod scope;
pub mod scripted;
pub mod wait;
