//! The kernel's own readahead: the bytes of a file that it reads at once around a touched page, and ahead of
//! a thread that touches pages in their order.

use nix::libc::{major, minor};
use std::fs;
use std::sync::Mutex;

/// The page cache of a file, as far as reads ahead of a touch depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileCache {
    device: u64,
    is_in_memory: bool,
    shows_residency: bool,
}

impl FileCache {
    pub(crate) const fn new(device: u64, is_in_memory: bool, shows_residency: bool) -> Self {
        Self { device, is_in_memory, shows_residency }
    }

    /// The window of the kernel's readahead, in bytes. Where the kernel does not tell it: 8 MiB, because a window
    /// that is too large only costs time.
    ///
    /// A touch of a mapped page has the kernel read from half a window before the page to half a window behind it,
    /// and touches in their order up to two windows ahead. The windows of a file are twice as long if its descriptor
    /// was advised so (`POSIX_FADV_SEQUENTIAL`).
    #[must_use]
    pub fn window(&self) -> usize {
        window(self.device)
    }

    /// True if the file is in tmpfs or hugetlbfs, as memfds are: its pages are the only copy of its
    /// bytes, and a read of a hole allocates one.
    #[must_use]
    pub const fn is_in_memory(&self) -> bool {
        self.is_in_memory
    }

    /// True if the kernel tells this process which pages are in memory (`mincore(2)`). It calls all pages of a
    /// file resident that the process neither owns nor may write.
    #[must_use]
    pub const fn shows_residency(&self) -> bool {
        self.shows_residency
    }
}

/// The window for the files of a device, which is the `st_dev` of a file.
fn window(device: u64) -> usize {
    static LAST: Mutex<Option<(u64, usize)>> = Mutex::new(None);
    // Another thread may hold the lock at a fork, so that a child must not wait for it.
    let Ok(mut last) = LAST.try_lock() else { return read_window(device) };
    match *last {
        Some((known, window)) if known == device => window,
        _ => last.insert((device, read_window(device))).1,
    }
}

fn read_window(device: u64) -> usize {
    let number = format!("{}:{}", major(device), minor(device));
    // A partition has the window of its disk, in whose folder its own one lies. A network file system has
    // numbers of its own. Those of btrfs and overlayfs are not in sysfs.
    let places = [
        format!("/sys/class/bdi/{number}/read_ahead_kb"),
        format!("/sys/dev/block/{number}/../bdi/read_ahead_kb"),
    ];
    let told = places.iter().find_map(|place| fs::read_to_string(place).ok());
    told.and_then(|kib| kib.trim().parse::<usize>().ok()).map_or(LARGE, |kib| kib.saturating_mul(1024))
}

/// Some virtual machines have windows of 8 MiB; the kernel's default is 128 KiB.
const LARGE: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_a_folder_in_sysfs_has_a_large_window() {
        // No device has the major number 0 and this minor number, and no file system either.
        assert_eq!(window(nix::libc::makedev(0, 999_999)), LARGE);
        assert_eq!(window(nix::libc::makedev(0, 999_998)), LARGE);
    }
}
