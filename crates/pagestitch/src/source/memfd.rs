//! Bytes in a sealed memfd: mapped in place where source and region are aligned, copied from its
//! memory elsewhere.

use super::Source;
use crate::error::Error;
#[cfg(doc)]
use crate::error::ErrorKind;
use pagestitch_kernel::memfd::SealedMemfd;
use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

/// A sealed memfd, whose bytes no process can change. Convert an
/// [`UnsealedMemfd`](super::UnsealedMemfd), or [receive](Self::from_fd) a descriptor.
///
/// If a chunk starts at the same offset within a page in the memfd and in the region, the region
/// maps the memfd's own pages: no copy, no fault. Cloning shares the memfd.
///
/// ```
/// use std::os::unix::fs::FileExt;
/// use pagestitch::source::{Memfd, UnsealedMemfd};
/// use pagestitch::{Chunk, Pool, Region};
///
/// let unsealed = UnsealedMemfd::create("frames", 1 << 20)?;
/// unsealed.file().write_all_at(b"in place", 65_536)?;
/// let memfd = Memfd::from(unsealed.seal()?);
/// let region = Region::builder()
///     .chunk(Chunk::from(memfd.clone()).range(65_536..1 << 20))
///     .chunk(Chunk::from(memfd).range(0..65_536))
///     .require_zero_copy()
///     .build(&Pool::new()?)?;
/// assert_eq!(&region.as_slice()[..8], b"in place");
/// assert_eq!(region.close().faults, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Memfd {
    sealed: Arc<SealedMemfd>,
}

impl Memfd {
    /// Takes a descriptor, for example one received from another process.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::UnusableFile`] if it is not a memfd, or is not sealed against writing and shrinking:
    /// its bytes could then change under a `&[u8]`.
    ///
    /// ```
    /// # use pagestitch::source::{Memfd, UnsealedMemfd};
    /// # use pagestitch::{ErrorKind, Pool, Region};
    /// # use std::os::fd::OwnedFd;
    /// let unsealed = UnsealedMemfd::create("received", 4096)?;
    /// let received = OwnedFd::from(unsealed.file().try_clone()?);
    /// assert_eq!(Memfd::from_fd(received.try_clone()?).unwrap_err().kind(), ErrorKind::UnusableFile);
    ///
    /// let sealed = unsealed.seal()?;                              // by the sender
    /// let region = Region::builder().chunk(Memfd::from_fd(received)?).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice().len(), 4096);
    /// # drop(sealed);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_fd(fd: std::os::fd::OwnedFd) -> Result<Self, Error> {
        let sealed = SealedMemfd::try_from(fd);
        sealed.map(Self::from).map_err(|error| Error::of_descriptor("cannot use the descriptor", error))
    }

    pub(crate) fn sealed(&self) -> &SealedMemfd {
        &self.sealed
    }

    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.sealed).addr()
    }
}

impl From<SealedMemfd> for Memfd {
    fn from(sealed: SealedMemfd) -> Self {
        Self { sealed: Arc::new(sealed) }
    }
}

impl Source for Memfd {
    fn size(&self) -> u64 {
        self.sealed.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.sealed.as_ref().as_ref();
        let wanted = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)?.get(..into.len()));
        into.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("sealed memfd")
    }

    fn direct(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl fmt::Debug for Memfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.name(), self.size())
    }
}
