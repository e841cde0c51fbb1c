//! Donated pages: the kernel moves them into the region, so that no byte is copied.

use super::Source;
use crate::error::FailureReason;
use pagestitch_kernel::Errno;
use pagestitch_kernel::pages::Donated;
use std::io;

/// A page moves if its bytes have the same offset within a page in the donation and in the region;
/// other bytes are copied.
impl Source for Donated {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Self::read_at(self, offset, into).map_err(|errno| match errno {
            Errno::ENODATA => gone(),
            errno => errno.into(),
        })
    }

    fn name(&self) -> String {
        String::from("donated pages")
    }
}

/// The error for a donated page that has moved into a region and is read a second time.
pub(crate) fn gone() -> io::Error {
    FailureReason::Discarded
        .error("its pages moved into a region and were discarded there (MADV_DONTNEED): the bytes are gone")
}
