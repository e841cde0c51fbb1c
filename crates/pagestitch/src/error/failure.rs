//! A source did not give the bytes of a page.

use crate::guard::Untrusted;
use std::error::Error as StdError;
use std::{fmt, io};

/// A source did not give its bytes: which, where, and what it said.
#[derive(Debug)]
pub struct Failure {
    pub(crate) chunk: usize,
    pub(crate) source: String,
    pub(crate) offset: u64,
    pub(crate) error: Untrusted<io::Error>,
    /// How many times it was asked.
    pub(crate) attempts: u32,
}

impl Failure {
    /// Another error of the same bytes.
    pub(crate) fn again(&self, error: io::Error) -> Self {
        let (error, attempts) = (Untrusted::new(error), self.attempts.saturating_add(1));
        Self { chunk: self.chunk, source: self.source.clone(), offset: self.offset, error, attempts }
    }

    /// What the source calls itself.
    #[must_use]
    pub fn source_name(&self) -> &str {
        &self.source
    }

    /// The offset in the source from which on it was asked for bytes.
    #[must_use]
    pub const fn source_offset(&self) -> u64 {
        self.offset
    }

    /// The chunk, counted from 0 in the order in which the region was built.
    #[must_use]
    pub const fn chunk(&self) -> usize {
        self.chunk
    }

    /// How many times the source was asked for the page.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// What the source said.
    #[must_use]
    pub const fn io_error(&self) -> &io::Error {
        self.error.get()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chunk, source, offset, error, attempts } = self;
        write!(f, "chunk {chunk} ({source}), at byte {offset} of its source: {error}")?;
        if *attempts > 1 { write!(f, " (asked {attempts} times)") } else { Ok(()) }
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.get().source()
    }
}
