//! Zeros that take no storage.

use super::Source;
use std::any::Any;
use std::io;

/// Zeros. A page that lies entirely in a hole is the kernel's zero page.
///
/// ```
/// use pagestitch::{Chunk, Pool, Region};
///
/// let region = Region::builder().chunk(Chunk::hole(1 << 30)).build(&Pool::new()?)?;
/// assert_eq!(region.as_slice()[1 << 29], 0);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hole;

impl Source for Hole {
    /// Unlimited: the chunk's range tells the number.
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("hole")
    }

    fn direct(&self) -> Option<&dyn Any> {
        Some(self)
    }
}
