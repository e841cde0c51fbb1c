//! How much of a file the kernel maps at once: a page, or a huge page of hugetlbfs.
//!
//! `mmap(2)` rounds the length of a mapping of hugetlbfs up to the file's page, also with `MAP_FIXED`: one of 3 MiB replaces what
//! lies in the 4th. Hence the file says what a multiple is, and not the system's page size.

use crate::page::PageSize;
use nix::errno::Errno;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use std::os::fd::AsFd;

/// The pages that a descriptor's file is mapped in.
pub(crate) fn granule_of(file: &impl AsFd) -> Result<PageSize, Errno> {
    let statistics = fstatfs(file)?;
    if statistics.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(PageSize::system());
    }
    let bytes = usize::try_from(statistics.block_size()).ok();
    bytes.and_then(PageSize::new).ok_or(Errno::EINVAL)
}
