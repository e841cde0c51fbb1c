//! Pages that were given up: moved in, so that nothing is copied.

use super::Source;
use pagestitch_kernel::pages::Donated;
use std::io;

/// A page that lies at the same place in the donation and in the region moves; the rest is copied.
impl Source for Donated {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Self::read_at(self, offset, into).map_err(|errno| match errno {
            nix::errno::Errno::ENODATA => gone(),
            errno => errno.into(),
        })
    }

    fn name(&self) -> String {
        String::from("donated pages")
    }
}

/// What became of a page that has moved once, and is wanted again.
pub(crate) fn gone() -> io::Error {
    io::Error::other(
        "its pages moved into a region once, and were let go there (MADV_DONTNEED): the bytes are gone",
    )
}
