//! Swap: which pages of this process are swapped out, and whether this kernel can move such pages.

use crate::page::{AddressRange, PageSize};
use nix::fcntl::{OFlag, open};
use nix::libc::{self, c_void};
use nix::sys::stat::Mode;
use nix::sys::sysinfo::sysinfo;
use nix::sys::uio::pread;
use nix::sys::utsname::uname;

/// Sets the entries in `there` of the pages that are present or swapped out, according to
/// `/proc/self/pagemap`. Allocates nothing, so a signal handler may call it. Sets no entry if that
/// file cannot be read.
pub(crate) fn find(range: AddressRange, there: &mut [u8]) {
    let Ok(pagemap) = open(c"/proc/self/pagemap", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) else {
        return;
    };
    let page = range.bytes() / there.len();
    let mut first = range.start() / page;
    for there in there.chunks_mut(BATCH) {
        let mut entries = [0; BATCH * ENTRY];
        let wanted = &mut entries[..there.len() * ENTRY];
        if pread(&pagemap, wanted, (first * ENTRY) as i64) != Ok(wanted.len()) {
            return;
        }
        for (there, entry) in there.iter_mut().zip(wanted.chunks_exact(ENTRY)) {
            // Bit 63: present; bit 62: swapped out.
            *there |= u8::from(entry[ENTRY - 1] >> 6 != 0);
        }
        first += there.len();
    }
}

/// The place of a page, as far as the kernel tells: `/proc/self/pagemap` cannot be opened by a process without
/// descriptors, for example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    /// In memory.
    Present,
    /// Swapped out, or only marked as poisoned.
    Swapped,
    Missing,
    /// Swapped out or missing.
    Unknown,
}

impl There {
    /// Looks at the page at an address. A signal handler may do so.
    #[inline(never)] // a signal handler has a small stack
    pub(crate) fn of(address: usize) -> Self {
        let mut here = 0_u8;
        // SAFETY: the kernel writes one byte for the one page to `here`, and no byte of the page.
        #[expect(unsafe_code, reason = "mincore")]
        let asked =
            unsafe { libc::mincore(address as *mut c_void, PageSize::system().bytes(), &raw mut here) };
        if asked == 0 && here & 1 == 1 { Self::Present } else { entry(address) }
    }
}

/// The place of the page at an address, according to `/proc/self/pagemap`. Takes little stack, for signal handlers.
#[inline(never)]
fn entry(address: usize) -> There {
    let Ok(pagemap) = open(c"/proc/self/pagemap", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) else {
        return There::Unknown;
    };
    let mut entry = [0; ENTRY];
    let offset = address / PageSize::system().bytes() * ENTRY;
    if pread(&pagemap, &mut entry, offset as i64) != Ok(ENTRY) {
        return There::Unknown;
    }
    match entry[ENTRY - 1] >> 6 {
        0 => There::Missing,
        1 => There::Swapped,
        _ => There::Present,
    }
}

/// Checks that this process can tell swapped pages from missing ones, if there are any.
///
/// # Errors
///
/// The reason and the remedy, for a person.
pub(crate) fn tells_swapped_pages() -> Result<(), &'static str> {
    let here = 0_u8;
    if is_on() && entry((&raw const here).addr()) == There::Unknown {
        return Err(
            "swap is on, and /proc/self/pagemap, which tells swapped pages, cannot be read: mount /proc, keep the process dumpable, free a descriptor, or run swapoff -a",
        );
    }
    Ok(())
}

/// Checks that a page that may be swapped out can move (`UFFDIO_MOVE`). Before Linux 6.16 (and
/// 6.12.37), a move races with the swap cache, and the page may end up with other bytes.
///
/// # Errors
///
/// The reason and the remedy, for a person: swap is on, and this kernel has the race. Call this
/// again before each use, because swap may be switched on at any time.
pub fn moves_safely() -> Result<(), &'static str> {
    let racing = uname().map_or(true, |names| races(&names.release().to_string_lossy()));
    if racing && is_on() {
        return Err(
            "swap is on, and this kernel may lose a page that moves while it is swapped out: run swapoff -a, or use Linux 6.12.37 or 6.16",
        );
    }
    Ok(())
}

/// True if the system swaps to a device or file, or does not tell. Takes no descriptor, and needs no `/proc`.
///
/// ```
/// if let Err(reason) = pagestitch_kernel::swap::moves_safely() {
///     assert!(pagestitch_kernel::swap::is_on(), "{reason}");
/// }
/// ```
#[must_use]
pub fn is_on() -> bool {
    sysinfo().map_or(true, |system| system.swap_total() > 0)
}

/// True if a kernel of this release has the race, or the release does not tell its version.
fn races(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok);
    match (next(), next(), next()) {
        (Some(6), Some(12), Some(patch)) => patch < 37,
        (Some(major), Some(minor), _) => (major, minor) < (6, 16),
        _ => true,
    }
}

/// The bytes of an entry in `/proc/self/pagemap`.
const ENTRY: usize = 8;
/// The pages of one read. Their entries are on the stack.
const BATCH: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_with_the_move_race_are_recognised() {
        for release in
            ["6.8.0-60-generic", "6.12.36", "6.12.30+deb13-amd64", "6.15.9-arch1-1", "6.9", "?", ""]
        {
            assert!(races(release), "{release}");
        }
        for release in ["6.16.0", "6.12.37", "6.12.74+deb13-amd64", "6.18", "6.18.0-rc1", "7.0.1"] {
            assert!(!races(release), "{release}");
        }
    }
}
