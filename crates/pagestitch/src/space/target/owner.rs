//! The two choices of an owner: pages that it discards, and pages whose bytes are unavailable.

/// What becomes of the owner of adopted memory when bytes of it cannot be had: its source fails, or the region is dropped
/// before all of it was filled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnUnavailable {
    /// Whoever touches a page without bytes gets SIGBUS; the others go on. Linux 6.6; before, as [`Kill`](Self::Kill).
    #[default]
    Poison,
    /// The owner is ended with SIGKILL.
    Kill,
}

/// What pages hold that the owner of adopted memory has let go of (`MADV_DONTNEED`, `MADV_REMOVE`) and touches anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnDiscard {
    /// Zeros, as in any memory: a balloon has taken them.
    #[default]
    Zeros,
    /// What their source holds, once more: a cache has dropped them.
    Refill,
}
