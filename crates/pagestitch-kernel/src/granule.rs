//! The granule of a file: the unit in which the kernel maps it. A page, or a huge page of
//! hugetlbfs.
//!
//! `mmap(2)` rounds the length of a hugetlbfs mapping up to the file's huge page, also with
//! `MAP_FIXED`: a mapping of 3 MiB replaces the 4th MiB too. So the file decides the unit, not the
//! system's page size.

use crate::errno::Errno;
use crate::page::PageSize;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use std::os::fd::AsFd;

/// The granule of the file behind a descriptor.
pub(crate) fn granule_of(file: &impl AsFd) -> Result<PageSize, Errno> {
    let statistics = fstatfs(file).map_err(Errno::of)?;
    if statistics.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(PageSize::system());
    }
    let bytes = usize::try_from(statistics.block_size()).ok();
    bytes.and_then(PageSize::new).ok_or(Errno::EINVAL)
}
