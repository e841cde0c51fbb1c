//! The compared systems: regions, eager copies, and the data of all of them.

use crate::manual_page::ManualPage;
use crate::team::{in_parts, part_length, parts};
use crate::threads::cpus;
use pagestitch::source::{Memory, Pages};
use pagestitch::{Builder, Chunk, Readahead, Region, Server, Source};
use std::hint::black_box;
use std::sync::Arc;

/// Chunks of 64 KiB in heap buffers, in an order that depends on the seed alone.
pub(crate) struct Data {
    pub(crate) chunks: Vec<Memory>,
    plain: Vec<Arc<[u8]>>,
}

impl Data {
    pub(crate) fn new(bytes: usize, seed: u64) -> Arc<Self> {
        let mut plain: Vec<Arc<[u8]>> =
            (0..(bytes / CHUNK).max(1)).map(|index| vec![index as u8 | 1; CHUNK].into()).collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut plain);
        let chunks = plain.iter().map(|chunk| Memory::from(Arc::clone(chunk))).collect();
        Arc::new(Self { chunks, plain })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    pub(crate) fn pages(&self) -> usize {
        self.bytes() / PAGE
    }

    pub(crate) fn region(&self, readahead: Readahead, server: impl Into<Server>) -> Region {
        self.builder(readahead).build(server).expect("a region")
    }

    pub(crate) fn builder(&self, readahead: Readahead) -> Builder {
        let chunks = self.chunks.iter().map(|chunk| Chunk::from(chunk.clone()));
        Region::builder().chunks(chunks).readahead(readahead)
    }

    /// All bytes, copied at once by so many threads into huge pages.
    pub(crate) fn eager_huge(&self, threads: usize) -> Pages {
        self.copy_into(Pages::new(self.bytes()).expect("memory"), threads)
    }

    /// All bytes, copied at once by so many threads into pages of the base size.
    pub(crate) fn eager_small(&self, threads: usize) -> Pages {
        self.copy_into(Pages::without_huge_pages(self.bytes()).expect("memory"), threads)
    }

    fn copy_into(&self, mut pages: Pages, threads: usize) -> Pages {
        // No two threads write to the same huge page.
        let length = part_length(self.bytes(), threads, HUGE_PAGE);
        let parts = self.chunks.chunks(length / CHUNK).zip(pages.chunks_mut(length)).collect();
        in_parts(parts, |(chunks, into): (&[Memory], &mut [u8])| {
            for (chunk, into) in chunks.iter().zip(into.chunks_mut(CHUNK)) {
                chunk.read_at(0, into).expect("memory");
            }
        });
        pages
    }

    /// Checks all bytes of a copy.
    ///
    /// # Panics
    ///
    /// If a byte differs.
    pub(crate) fn check(&self, copy: &[u8]) {
        let length = part_length(self.bytes(), cpus(), CHUNK);
        let parts = self.plain.chunks(length / CHUNK).zip(copy.chunks(length)).collect();
        in_parts(parts, |(chunks, copy): (&[Arc<[u8]>], &[u8])| {
            let equal = chunks.iter().zip(copy.chunks(CHUNK)).all(|(chunk, copy)| **chunk == *copy);
            assert!(equal, "the copy has other bytes than its source");
        });
    }

    /// A region that the handler of the manual page serves.
    pub(crate) fn manual_page(&self, cpu: Option<usize>) -> ManualPage {
        ManualPage::new(self.plain.clone(), cpu)
    }

    /// As [`manual_page`](Self::manual_page), with at most so many pages in memory, first in, first out.
    pub(crate) fn bounded_manual_page(&self, cpu: usize, most: usize) -> ManualPage {
        ManualPage::bounded(self.plain.clone(), Some(cpu), most)
    }

    /// The bytes of a page.
    pub(crate) fn bytes_of_page(&self, page: usize) -> &[u8] {
        let offset = page * PAGE;
        &self.plain[offset / CHUNK][offset % CHUNK..][..PAGE]
    }

    /// The byte that a chunk repeats.
    pub(crate) fn byte_at(&self, offset: usize) -> u8 {
        self.plain[offset / CHUNK][0]
    }
}

/// Memory without a server: a read of a page maps the kernel's page of zeros.
pub(crate) fn zero_pages(pages: usize) -> Pages {
    Pages::without_huge_pages(pages * PAGE).expect("memory")
}

/// The sum of all words.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.as_chunks::<8>().0.iter();
    black_box(words.map(|word| u64::from_le_bytes(*word)).fold(0, u64::wrapping_add))
}

/// The sum of all words, by so many threads: a part of whole huge pages each.
pub(crate) fn sum_by(threads: usize, bytes: &[u8]) -> u64 {
    let parts = parts(bytes, threads, HUGE_PAGE).collect();
    in_parts(parts, sum).into_iter().fold(0, u64::wrapping_add)
}

/// Reads a byte of each page, in order.
pub(crate) fn touch_all(bytes: &[u8], offsets: &[usize]) -> u64 {
    black_box(offsets.iter().map(|&offset| u64::from(bytes[offset])).sum())
}

pub(crate) const CHUNK: usize = 64 << 10;
pub(crate) const PAGE: usize = 4096;
pub(crate) const HUGE_PAGE: usize = 2 << 20;
