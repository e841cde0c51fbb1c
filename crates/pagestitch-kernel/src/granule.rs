//! The granule of a file: the unit in which the kernel maps it. A page, or a huge page of
//! hugetlbfs.
//!
//! `mmap(2)` rounds the length of a hugetlbfs mapping up to the file's huge page, also with
//! `MAP_FIXED`: a mapping of 3 MiB replaces the 4th MiB too. So the file decides the unit, not the
//! system's page size.

use crate::errno::Errno;
use crate::page::PageSize;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, HUGETLBFS_MAGIC, Statfs, TMPFS_MAGIC,
    fstatfs,
};
use std::os::fd::AsFd;

/// The granule of the file behind a descriptor.
pub(crate) fn granule_of(file: &impl AsFd) -> Result<PageSize, Errno> {
    granule_in(&fstatfs(file).map_err(Errno::of)?)
}

/// The granule of files in a file system.
pub(crate) fn granule_in(statistics: &Statfs) -> Result<PageSize, Errno> {
    if statistics.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(PageSize::system());
    }
    let bytes = usize::try_from(statistics.block_size()).ok();
    bytes.and_then(PageSize::new).ok_or(Errno::EINVAL)
}

/// True if a file system maps all of its files. Others may refuse each: sysfs, FUSE with direct I/O,
/// 9p without a cache, an overlay of these.
pub(crate) fn maps_all_files(statistics: &Statfs) -> bool {
    [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC, TMPFS_MAGIC, HUGETLBFS_MAGIC]
        .contains(&statistics.filesystem_type())
}

/// A constant of its own, because the C library's is missing with musl.
const XFS_SUPER_MAGIC: FsType = FsType(0x5846_5342);
