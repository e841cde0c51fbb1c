//! The words of a mapped file, or of a shared region.

use super::trace::Pattern;
use crate::systems::PAGE;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::mman::{MapFlags, MmapAdvise, MsFlags, ProtFlags, madvise, mmap, msync, munmap};
use pagestitch::SharedRegion;
use pagestitch_kernel::StableView;
use std::fs::File;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::slice;

/// Memory with the pages of [`write_pages`](super::write_pages), which its owner keeps for `'r`.
pub(crate) struct Words<'r> {
    start: NonNull<u64>,
    pages: usize,
    /// True if the memory is a mapping of this value's.
    is_mapped: bool,
    owner: PhantomData<&'r ()>,
}

/// Advice for a mapping.
#[derive(Debug, Clone, Copy)]
pub(super) enum Advice {
    Normal,
    Random,
    Sequential,
}

impl<'r> Words<'r> {
    pub(crate) fn of(region: &'r SharedRegion) -> Self {
        Self::owned(region.as_ptr(), region.len())
    }

    /// The words of a view. No slice of it exists if they are written.
    pub(super) fn of_view(view: &'r StableView, bytes: usize) -> Self {
        Self::owned(view.as_ptr(), bytes)
    }

    const fn owned(start: NonNull<u8>, bytes: usize) -> Self {
        Self { start: start.cast(), pages: bytes / PAGE, is_mapped: false, owner: PhantomData }
    }
}

impl Words<'_> {
    pub(super) fn mapped(file: &File, protection: ProtFlags) -> Self {
        let bytes = file.metadata().expect("a file").len() as usize;
        let length = NonZeroUsize::new(bytes).expect("bytes");
        // SAFETY: a new mapping, where the kernel chooses.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) };
        let start = start.expect("a mapping").cast();
        Self { start, pages: bytes / PAGE, is_mapped: true, owner: PhantomData }
    }

    pub(super) const fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn advise(&self, advice: Advice) {
        let advice = match advice {
            Advice::Normal => MmapAdvise::MADV_NORMAL,
            Advice::Random => MmapAdvise::MADV_RANDOM,
            Advice::Sequential => MmapAdvise::MADV_SEQUENTIAL,
        };
        // SAFETY: the mapping is this value's, and the advice changes no byte.
        #[expect(unsafe_code, reason = "madvise")]
        let advised = unsafe { madvise(self.start.cast(), self.pages * PAGE, advice) };
        advised.expect("advice");
    }

    /// Reads a page: its first word, or all of its words for a sequential pattern. True if it has the
    /// bytes that were written.
    pub(super) fn are_right(&self, page: usize, pattern: Pattern) -> bool {
        let (words, expected) = (self.of_page(page), page as u64 + 1);
        match pattern {
            Pattern::Sequential => {
                words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)) == expected * WORDS as u64
            }
            _ => words[0] == expected,
        }
    }

    /// The word `word` of a page, which another thread may write meanwhile.
    pub(crate) fn word(&self, page: u32, word: usize) -> u64 {
        let place = self.place(page, word);
        // SAFETY: the word is inside of the memory, which lives as long as `self`.
        #[expect(unsafe_code, reason = "a read of mapped memory")]
        unsafe {
            place.read_volatile()
        }
    }

    /// Writes the word `word` of a page of writable memory. No other thread reads or writes this word.
    pub(crate) fn write(&self, page: u32, word: usize, value: u64) {
        let place = self.place(page, word);
        // SAFETY: the word is inside of the memory, which lives as long as `self`, and is writable.
        #[expect(unsafe_code, reason = "a write to mapped memory")]
        unsafe {
            place.write_volatile(value);
        }
    }

    fn place(&self, page: u32, word: usize) -> *mut u64 {
        assert!((page as usize) < self.pages && word < WORDS);
        self.start.as_ptr().wrapping_add(page as usize * WORDS + word)
    }

    /// Writes the written pages of a mapping to the disk.
    pub(super) fn sync(&self) {
        // SAFETY: the mapping is this value's, and the call changes no byte.
        #[expect(unsafe_code, reason = "msync")]
        let synced = unsafe { msync(self.start.cast(), self.pages * PAGE, MsFlags::MS_SYNC) };
        synced.expect("a disk that takes the pages");
    }

    fn of_page(&self, page: usize) -> &[u64] {
        assert!(page < self.pages);
        let start = self.start.as_ptr().cast_const().wrapping_add(page * WORDS);
        // SAFETY: the page is inside of the memory, which lives as long as `self`. No thread writes to the
        // memory of a reader, and no process to the file meanwhile, so a page that leaves comes back with the
        // same bytes.
        #[expect(unsafe_code, reason = "a slice of mapped memory")]
        unsafe {
            slice::from_raw_parts(start, WORDS)
        }
    }
}

// SAFETY: the memory is only read, or each word is written by one thread, which `write` demands.
#[expect(unsafe_code, reason = "a pointer to memory of several threads")]
unsafe impl Sync for Words<'_> {}

impl Drop for Words<'_> {
    fn drop(&mut self) {
        if self.is_mapped {
            // SAFETY: the mapping is this value's, and no reference to it exists.
            #[expect(unsafe_code, reason = "munmap")]
            let _ = unsafe { munmap(self.start.cast(), self.pages * PAGE) };
        }
    }
}

/// Drops the pages of a file from the page cache.
pub(super) fn forget_cached(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advice");
}

/// The words of a page.
const WORDS: usize = PAGE / 8;
