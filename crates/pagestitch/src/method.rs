//! The methods by which a page gets its bytes. Plans, fills and counters name them alike.

mod reason;
mod same_bytes;

pub use reason::PlanReason;
pub use same_bytes::SameBytes;

use std::fmt;

/// The method by which pages are installed. `Display` prints the word that plans and documents use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// Copied on first touch, straight from where the bytes lie. One copy.
    Copy,
    /// Read into a buffer on first touch, then copied. Two copies.
    Buffered,
    /// Gathered in a buffer from several chunks, then copied. Two copies.
    Gathered,
    /// A whole block of 2 MiB: filled in a huge page of staging, which is moved in. One copy.
    StagedMove,
    /// Moved from their owner: no copy. On first touch since Linux 6.8, when the region is built before that.
    Move,
    /// Mapped on first touch, once the memfd has the page: no copy.
    Continue,
    /// The kernel's zero page. No copy.
    Zero,
    /// Mapped in place when the region is built: the source's own pages. No copy, no fault.
    Map,
    /// Mapped in place when the region is built: a second mapping of other memory. No copy, no fault.
    Alias,
    /// Poisoned, because the source has failed: a touch is SIGBUS.
    Poison,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Copy => "copy",
            Self::Buffered => "buffered",
            Self::Gathered => "gathered",
            Self::StagedMove => "staged move",
            Self::Move => "move",
            Self::Continue => "continue",
            Self::Zero => "zero",
            Self::Map => "map",
            Self::Alias => "alias",
            Self::Poison => "poison",
        })
    }
}
