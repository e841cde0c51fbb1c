//! Which pages of this process were written, and which are absent: `PAGEMAP_SCAN`, since Linux 6.7.
//!
//! ```text
//!   registered with WP_ASYNC    |a|a|W| |W|W|a|     armed, written, absent
//!   take_written                    W   W W         a run for each of the two, and all are armed again
//!   afterwards                  |a|a|a| |a|a|a|
//! ```
//!
//! A page is armed by its write-protect marker. A write removes the marker, without a message. So a
//! page that was never armed counts as written. See `Documentation/admin-guide/mm/pagemap.rst`.

use abi::{CHECK_WPASYNC, PRESENT, PageRegion, PmScanArg, SWAPPED, WP_MATCHING, WRITTEN, pagemap_scan};

use crate::errno::Errno;
use crate::page::AddressRange;
use std::fs::File;
use std::os::fd::AsRawFd;

/// The most runs of one call. A call with more walks to the end, but returns an outdated `walk_end`
/// (seen on Linux 6.18).
const RUNS: usize = 512;

/// Scans the pages of the process that has opened it.
#[derive(Debug)]
pub struct PageScan {
    pagemap: File,
}

impl PageScan {
    /// Opens `/proc/self/pagemap`.
    ///
    /// # Errors
    ///
    /// The errno of `open(2)`: `ENOENT` without `/proc`, `EMFILE`.
    pub fn open() -> Result<Self, Errno> {
        File::open("/proc/self/pagemap").map(|pagemap| Self { pagemap }).map_err(Errno::of)
    }

    /// Calls `each` with every run of pages that were written since they were armed, and arms them
    /// again, in one walk. `in_memory` is false for a run of pages that are swapped out or poisoned.
    ///
    /// A store that this call misses is found by the next one. A write to a frame that was pinned before
    /// the call, and that ends after it, leaves no record: `process_vm_writev(2)`, for example. The bytes
    /// of a run are read after the call: they include all stores that it reports. A page that is absent
    /// is neither reported nor armed.
    ///
    /// # Errors
    ///
    /// `EPERM` if a mapping of the range is not registered with
    /// [`WRITE_PROTECT_ASYNC`](crate::Features::WRITE_PROTECT_ASYNC); `ENOTTY` before Linux 6.7. The
    /// runs before the error were given to `each`, and are armed.
    #[doc(alias = "PM_SCAN_WP_MATCHING")]
    pub fn take_written(
        &self,
        range: AddressRange,
        mut each: impl FnMut(AddressRange, bool),
    ) -> Result<(), Errno> {
        // The kernel counts an absent page of a populated page table as written (Linux 6.18), and would
        // put a marker there, on which poison markers fail. So the page has to be present or swapped out.
        let request = PmScanArg {
            flags: WP_MATCHING | CHECK_WPASYNC,
            category_mask: WRITTEN,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: WRITTEN | PRESENT,
            ..PmScanArg::default()
        };
        self.scan(range, request, |run, categories| each(run, categories & PRESENT != 0))
    }

    /// Calls `each` with every run of pages that are neither present, swapped out nor poisoned, in order.
    /// Addresses without a mapping are in no run.
    ///
    /// # Errors
    ///
    /// `ENOTTY` before Linux 6.7.
    pub fn absent(&self, range: AddressRange, mut each: impl FnMut(AddressRange)) -> Result<(), Errno> {
        // The few pages that are absent, because the kernel takes four times as long to report all others.
        let neither = PRESENT | SWAPPED;
        let request =
            PmScanArg { category_inverted: neither, category_mask: neither, ..PmScanArg::default() };
        self.scan(range, request, |run, _| each(run))
    }

    fn scan(
        &self,
        range: AddressRange,
        mut request: PmScanArg,
        mut each: impl FnMut(AddressRange, u64),
    ) -> Result<(), Errno> {
        let mut runs = [PageRegion::default(); RUNS];
        let (mut next, end) = (range.start() as u64, range.end() as u64);
        while next < end {
            request.size = size_of::<PmScanArg>() as u64;
            (request.start, request.end, request.walk_end) = (next, end, 0);
            (request.vec, request.vec_len) = (runs.as_mut_ptr() as u64, RUNS as u64);
            // SAFETY: the kernel writes at most `vec_len` entries to `runs`, and the `walk_end` field
            // of `request`. It arms pages of registered memory, and changes no byte of them.
            #[expect(unsafe_code, reason = "an ioctl")]
            let found = unsafe { pagemap_scan(self.pagemap.as_raw_fd(), &raw mut request) };
            let found = usize::try_from(found.map_err(Errno::of)?).unwrap_or(0).min(RUNS);
            for run in &runs[..found] {
                let start = (run.start - range.start() as u64) as usize;
                let bytes = (run.end - run.start) as usize;
                each(range.without_prefix(start).prefix(bytes), run.categories);
            }
            // With room left, the walk has come to the end, whatever `walk_end` says.
            next = if found < RUNS { end } else { request.walk_end };
        }
        Ok(())
    }
}

mod abi {
    //! The structures of the call, as `include/uapi/linux/fs.h` defines them.

    use nix::ioctl_readwrite;
    use std::mem::offset_of;

    /// `struct page_region`
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub(super) struct PageRegion {
        pub(super) start: u64,
        pub(super) end: u64,
        pub(super) categories: u64,
    }

    /// `struct pm_scan_arg`
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct PmScanArg {
        pub(super) size: u64,
        pub(super) flags: u64,
        pub(super) start: u64,
        pub(super) end: u64,
        pub(super) walk_end: u64,
        pub(super) vec: u64,
        pub(super) vec_len: u64,
        pub(super) max_pages: u64,
        pub(super) category_inverted: u64,
        pub(super) category_mask: u64,
        pub(super) category_anyof_mask: u64,
        pub(super) return_mask: u64,
    }

    // `PAGEMAP_SCAN`
    ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);

    /// `PM_SCAN_WP_MATCHING`
    pub(super) const WP_MATCHING: u64 = 1 << 0;
    /// `PM_SCAN_CHECK_WPASYNC`
    pub(super) const CHECK_WPASYNC: u64 = 1 << 1;
    /// `PAGE_IS_WRITTEN`
    pub(super) const WRITTEN: u64 = 1 << 1;
    /// `PAGE_IS_PRESENT`
    pub(super) const PRESENT: u64 = 1 << 3;
    /// `PAGE_IS_SWAPPED`
    pub(super) const SWAPPED: u64 = 1 << 4;

    const _: () = assert!(size_of::<PageRegion>() == 24);
    const _: () = assert!(size_of::<PmScanArg>() == 96);
    const _: () = assert!(offset_of!(PmScanArg, walk_end) == 32);
    const _: () = assert!(offset_of!(PmScanArg, vec_len) == 48);
    const _: () = assert!(offset_of!(PmScanArg, return_mask) == 88);
}
