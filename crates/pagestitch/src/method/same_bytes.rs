//! The grounds on which a page that has left comes back with the same bytes.

use std::fmt;

/// The grounds on which pages of a region with a [budget](crate::Builder::budget) come back with the same
/// bytes. `Display` prints the words of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SameBytes {
    /// The bytes of the source cannot change, or it is a [`StableSource`](crate::source::StableSource).
    Stable,
    /// A hash of each page is kept, and other bytes are an error of the page.
    Hashed,
    /// None: the bytes may differ. The region gives out no slice.
    Unchecked,
}

impl fmt::Display for SameBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stable => "pages that leave come back with the same bytes, because the source does not change",
            Self::Hashed => "pages that leave come back with the same bytes, or as an error, because their hashes are kept",
            Self::Unchecked => "pages that leave may come back with other bytes, if the source changes",
        })
    }
}
