//! The two choices of an owner: pages that it discards, and pages whose bytes are unavailable.

/// The fate of the owner of adopted memory when bytes of its memory are unavailable: a source
/// fails, or the region is dropped before all of it was filled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnUnavailable {
    /// A thread that touches a page without bytes gets SIGBUS; the others run on. Before Linux 6.6,
    /// the same as [`Kill`](Self::Kill).
    #[default]
    Poison,
    /// The owner is ended with SIGKILL.
    Kill,
}

/// The bytes of pages that the owner of adopted memory has discarded (`MADV_DONTNEED`,
/// `MADV_REMOVE`) and touches again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnDiscard {
    /// Zeros, as in any memory: a balloon has discarded them.
    #[default]
    Zeros,
    /// They are filled from their source again, because their owner only dropped a cache.
    Refill,
}
