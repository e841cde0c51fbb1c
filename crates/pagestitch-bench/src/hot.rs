//! Bytes in the processor's caches, which memory repeats from its start to its end, and touches of
//! its pages by several threads. With these bytes a fault costs little beside its machinery.

use crate::case::Sample;
use crate::systems::{HUGE_PAGE, PAGE};
use crate::team::{at_once, in_parts, parts};
use crate::threads::cpus;
use pagestitch::source::Memory;
use std::sync::Arc;

/// The repeated bytes: those of a huge page.
#[derive(Debug)]
pub(crate) struct Hot {
    bytes: Arc<[u8]>,
    /// The first word of each page, which a touch reads.
    words: Vec<u64>,
}

impl Hot {
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        let mut bytes = vec![0; HUGE_PAGE];
        fastrand::Rng::with_seed(seed).fill(&mut bytes);
        let words = bytes.chunks(PAGE).map(first_word).collect();
        Arc::new(Self { bytes: bytes.into(), words })
    }

    /// The bytes as the source of a chunk.
    pub(crate) fn memory(&self) -> Memory {
        Memory::from(Arc::clone(&self.bytes))
    }

    /// The bytes of a page.
    pub(crate) fn page(&self, page: usize) -> &[u8] {
        let start = page % self.words.len() * PAGE;
        &self.bytes[start..start + PAGE]
    }

    /// Checks all bytes of memory that begins with a first page.
    ///
    /// # Panics
    ///
    /// If a byte differs.
    pub(crate) fn check(&self, memory: &[u8]) {
        in_parts(parts(memory, cpus(), HUGE_PAGE).collect(), |part: &[u8]| {
            let equal = part.chunks(HUGE_PAGE).all(|block| *block == self.bytes[..block.len()]);
            assert!(equal, "the memory has other bytes than its source");
        });
    }
}

/// The first word of some bytes.
pub(crate) fn first_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("a page has a word"))
}

/// The pages that each thread touches, in their order.
#[derive(Debug)]
pub(crate) struct Touches {
    pub(crate) lists: Vec<Vec<usize>>,
    /// The CPUs of the threads; none if they are not pinned.
    cpus: Vec<usize>,
}

impl Touches {
    /// Each page is touched by some thread, at random.
    pub(crate) fn anywhere(pages: usize, threads: usize, seed: u64) -> Self {
        let mut order: Vec<usize> = (0..pages).collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut order);
        Self::of(parts(&order, threads, 1))
    }

    /// Each thread touches the pages of its own part, at random. A part has whole huge pages.
    pub(crate) fn in_own_parts(pages: usize, threads: usize, seed: u64) -> Self {
        let mut touches = Self::in_order(pages, threads);
        let mut random = fastrand::Rng::with_seed(seed);
        touches.lists.iter_mut().for_each(|list| random.shuffle(list));
        touches
    }

    /// As [`in_own_parts`](Self::in_own_parts), from the first page of the part to the last.
    pub(crate) fn in_order(pages: usize, threads: usize) -> Self {
        let order: Vec<usize> = (0..pages).collect();
        Self::of(parts(&order, threads, HUGE_PAGE / PAGE))
    }

    fn of<'a>(lists: impl Iterator<Item = &'a [usize]>) -> Self {
        Self { lists: lists.map(<[usize]>::to_vec).collect(), cpus: Vec::new() }
    }

    /// Pins thread `n` to CPU `n` of these, modulo their number.
    pub(crate) fn on(self, cpus: Vec<usize>) -> Self {
        Self { cpus, ..self }
    }

    /// Measures the threads, which read the first word of each page and check it.
    ///
    /// # Panics
    ///
    /// If a word differs from that of `hot`.
    pub(crate) fn read(&self, hot: &Hot, read: impl Fn(usize) -> u64 + Sync) -> Sample {
        let lists: Vec<&[usize]> = self.lists.iter().map(Vec::as_slice).collect();
        self.each(lists, |list| {
            let differs = |&page: &&usize| read(*page) != hot.words[page % hot.words.len()];
            assert_eq!(list.iter().filter(differs).count(), 0, "a page has other bytes than its source");
        })
    }

    /// Measures the threads, each of which works on the item of its list.
    pub(crate) fn each<P: Send>(&self, items: Vec<P>, work: impl Fn(P) + Sync) -> Sample {
        let pages = self.lists.iter().map(Vec::len).sum();
        at_once((pages, pages * PAGE), &self.cpus, items, work).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_touched_once_and_own_parts_do_not_overlap() {
        let pages = 5 * HUGE_PAGE / PAGE;
        for threads in [1, 2, 3, 8] {
            let all = |touches: &Touches| {
                let mut pages = touches.lists.concat();
                pages.sort_unstable();
                pages
            };
            let own = Touches::in_own_parts(pages, threads, 1);
            for touches in [&Touches::anywhere(pages, threads, 1), &own] {
                assert!(touches.lists.len() <= threads);
                assert_eq!(all(touches), (0..pages).collect::<Vec<_>>());
            }
            let ends = own.lists.iter().map(|list| (list.iter().min(), list.iter().max()));
            assert!(ends.collect::<Vec<_>>().windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }

    #[test]
    #[should_panic(expected = "the memory has other bytes")]
    fn a_wrong_byte_is_found() {
        let hot = Hot::new(1);
        let mut memory = hot.bytes.repeat(2);
        hot.check(&memory);
        memory[HUGE_PAGE + 12345] ^= 1;
        hot.check(&memory);
    }
}
