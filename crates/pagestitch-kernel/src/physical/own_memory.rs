//! Private memory of this process as physical memory: pinned, its frames looked up in
//! `/proc/self/pagemap`.
//!
//! The well-known recipe locks the pages instead, which is wrong: `mlock(2)` keeps a page in memory
//! but not in its frame. The kernel's compaction moves the page, and a second view then shows a
//! frame of foreign memory. A long-term pin holds a page in its frame. The registered buffers of an
//! io_uring are such a pin, and any process may have one.

use super::pin::Pin;
use super::refusal::{CAP_SYS_ADMIN, DEV_MEM, PhysicalError, Refusal, has_capability};
use super::{Caching, Physical, open, refusal};
use crate::access::Access;
use crate::errno::Errno;
use crate::page::PageSize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

impl Physical {
    /// Memory of this process, also private memory, as ranges of frames in order. It can then be
    /// shown a second time at another address, without a copy. The pages are pinned as long as one
    /// of the ranges lives.
    ///
    /// Needs `/dev/mem` on a kernel that lets it show System RAM, `CAP_SYS_RAWIO`, `CAP_SYS_ADMIN`
    /// (for frame numbers), and an io_uring.
    ///
    /// # Errors
    ///
    /// [`PhysicalError`], as of [`dev_mem`](Self::dev_mem); pages that cannot be pinned.
    ///
    /// # Safety
    ///
    /// - As long as one of the ranges lives, the memory stays mapped where it is (no `munmap`, no
    ///   `MADV_DONTNEED`), no `&mut [u8]` to it exists, and no `&[u8]` if it is written to.
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub unsafe fn own_memory(
        start: NonNull<u8>,
        bytes: usize,
        access: Access,
    ) -> Result<Vec<Self>, PhysicalError> {
        let name = format!("own memory at {:#x}", start.addr());
        let refuse = |refusal| PhysicalError { name: name.clone(), refusal };
        let page = PageSize::system().bytes();
        if bytes == 0 || start.addr().get() % page != 0 || bytes % page != 0 {
            return Err(refuse(Refusal::NotWholePages));
        }
        refusal::before_dev_mem(&name)?;
        if !has_capability(CAP_SYS_ADMIN) {
            return Err(refuse(Refusal::NoCapability("CAP_SYS_ADMIN")));
        }
        let pin = Arc::new(Pin::new(start, bytes).map_err(|errno| refuse(Refusal::NoPin(errno)))?);
        let look = || frames(start, bytes / page).map_err(|errno| refuse(Refusal::Other(errno)));
        let frames = look()?;
        let file = open(Path::new(DEV_MEM), access, Caching::Cached);
        let file = Arc::new(file.map_err(|errno| refusal::of_open(&name, Path::new(DEV_MEM), errno))?);
        let ranges = runs(&frames).map(|(first, pages)| {
            let range = first * page as u64..(first + pages) * page as u64;
            let name = format!("own memory at physical {:#x}..{:#x}", range.start, range.end);
            Self::tried(Arc::clone(&file), range, access, name, Some(Arc::clone(&pin)))
        });
        let ranges = ranges.collect::<Result<Vec<_>, _>>()?;
        // The pages are pinned. The second look reports a kernel that has moved one all the same.
        let moved = look()?.iter().zip(&frames).position(|(now, then)| now != then);
        moved.map_or(Ok(ranges), |moved| Err(refuse(Refusal::Moved(moved))))
    }
}

/// The frames of `pages` pages, in order.
fn frames(start: NonNull<u8>, pages: usize) -> Result<Vec<u64>, Errno> {
    let pagemap = File::open("/proc/self/pagemap").map_err(Errno::of)?;
    let mut entries = vec![0u8; pages * ENTRY];
    let first = start.addr().get() / PageSize::system().bytes();
    pagemap.read_exact_at(&mut entries, (first * ENTRY) as u64).map_err(Errno::of)?;
    let frame = |entry: &[u8]| {
        let entry = u64::from_ne_bytes(entry.try_into().expect("the size of an entry"));
        // The kernel shows a frame of 0 to a process without the right to see it.
        (entry & PRESENT != 0 && entry & FRAME != 0).then_some(entry & FRAME).ok_or(Errno::EPERM)
    };
    entries.chunks_exact(ENTRY).map(frame).collect()
}

/// Runs of consecutive frames: the first frame, and the number of frames.
fn runs(frames: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    frames.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run.len() as u64))
}

/// The size of an entry of the page map, in bytes, and its bits. See
/// `Documentation/admin-guide/mm/pagemap.rst` of the kernel.
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_frames_are_one_run() {
        let found: Vec<_> = runs(&[7, 8, 9, 3, 20, 21]).collect();
        assert_eq!(found, [(7, 3), (3, 1), (20, 2)]);
    }
}
