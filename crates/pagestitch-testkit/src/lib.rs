//! For testing what is built on pagestitch, and pagestitch itself.
//!
//! | module | what for |
//! |---|---|
//! | [`conformance`] | the contract of [`Source`](pagestitch::Source), checked: run it on yours |
//! | [`scripted`] | sources that count, fail, panic or wait when told to |
//! | [`deny`] | take userfaultfd away, as a container does |
//! | [`guest`] | memory that another process fills: a VMM restoring a guest from a snapshot |
//! | [`memory`] | what an application may do to memory that others serve |
//! | [`forked`] | children of `fork(2)` |
//! | [`child`] | a test's body in a process of its own, to see it die by a signal or under a limit |

pub mod child;
pub mod conformance;
pub mod deny;
pub mod forked;
pub mod guest;
pub mod memory;
pub mod scripted;
