//! Whether this is still the process that made a thing: a forked child's destructors must not tear down its parent's.
//!
//! A child of `fork(2)` inherits descriptors that are *shared* (taking a region out of an epoll takes it out of the
//! parent's) and addresses that are *not* (a reservation is `MADV_DONTFORK`, so by now something else may be there).

use std::process;

/// Remembers the process that it was made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maker {
    process: u32,
}

impl Maker {
    /// This process.
    #[must_use]
    pub fn current() -> Self {
        Self { process: process::id() }
    }

    /// Whether this is that process. False in a forked child.
    #[must_use]
    pub fn is_current(self) -> bool {
        self == Self::current()
    }
}
