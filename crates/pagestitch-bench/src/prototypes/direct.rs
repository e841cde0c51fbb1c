//! A file in less memory than its size, with the least machinery: each touching thread reads its page into a
//! buffer on its stack, and copies it from there, in the bare SIGBUS handler. Pages leave in the order in which they
//! have come, in batches that are dropped with one call each.

use super::bus::{self, Fills};
use super::evict::reserve;
use crate::systems::PAGE;
use nix::sys::signal::SigSet;
use pagestitch_kernel::arena::{Discards, Runs};
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, Evictable, Features, Outcome, Page, StableView, Uffd};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Memory with a bound, whose pages `R` reads.
pub(crate) struct BoundedFile<R> {
    view: StableView,
    uffd: Uffd,
    region: Evictable,
    discards: Discards,
    read: R,
    /// The number of pages at which a batch leaves.
    most: usize,
    /// The number of pages that leave at once.
    batch: usize,
    filled: Mutex<Filled>,
}

/// The filled pages.
#[derive(Default)]
struct Filled {
    /// Those in memory, in the order in which they have come.
    resident: VecDeque<usize>,
    /// The number of all.
    count: u64,
}

/// Memory for a page, as a disk takes it for reads around the page cache.
#[repr(align(4096))]
pub(crate) struct Block(pub(crate) [u8; PAGE]);

impl<R: Fn(usize, &mut Block) + Sync> BoundedFile<R> {
    /// Memory of so many pages, at most `most` of which are filled, for so many threads.
    pub(crate) fn new(read: R, pages: usize, most: usize, threads: usize) -> Self {
        let (region, view, uffd) = reserve(pages, Access::ReadOnly, Features::SIGBUS, RegisterMode::MISSING);
        // The pages of a batch are missing for the other threads while they leave.
        let batch = if threads > 1 { BATCH / 4 } else { BATCH };
        let filled = Mutex::new(Filled { resident: VecDeque::with_capacity(most), count: 0 });
        Self { view, uffd, region, discards: Discards::new(), read, most, batch, filled }
    }

    /// Runs `work`, whose threads fill the pages that they touch.
    pub(crate) fn serve<T>(&self, work: impl FnOnce() -> T) -> T {
        bus::serve(self, SigSet::empty(), work)
    }

    pub(crate) const fn view(&self) -> &StableView {
        &self.view
    }

    /// The number of pages that were filled.
    pub(crate) fn fills(&self) -> u64 {
        self.filled.lock().unwrap_or_else(PoisonError::into_inner).count
    }

    /// Notes a filled page. Returns the number of pages that leave, and puts them into `leaving`.
    fn note(&self, page: usize, leaving: &mut [usize; BATCH]) -> usize {
        let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        filled.count += 1;
        filled.resident.push_back(page);
        if filled.resident.len() < self.most {
            return 0;
        }
        leaving.iter_mut().zip(filled.resident.drain(..self.batch)).for_each(|(place, page)| *place = page);
        self.batch
    }

    /// Drops pages.
    fn discard(&self, leaving: &mut [usize]) {
        // Neighbours share a page table.
        leaving.sort_unstable();
        let mut runs = Runs::<BATCH>::of(&self.region);
        leaving.iter().for_each(|&page| runs.push(Page(page).span()));
        assert_eq!(self.discards.discard(&runs, 0), leaving.len(), "pages that leave");
    }
}

impl<R: Fn(usize, &mut Block) + Sync> Fills for BoundedFile<R> {
    fn addresses(&self) -> Range<usize> {
        let range = self.region.reservation().range();
        range.start()..range.end()
    }

    fn fill_at(&self, address: usize) -> bool {
        let Some(page) = self.region.reservation().page_at(address) else { return false };
        let range = self.region.reservation().addresses(page.span());
        let mut block = Block([0; PAGE]);
        (self.read)(page.0, &mut block);
        loop {
            match self.uffd.copy(range, &block.0) {
                Outcome::Done => break,
                // Another thread has filled it meanwhile.
                Outcome::AlreadyThere => return true,
                Outcome::Changing => {}
                outcome => panic!("the kernel does not copy a page: {outcome:?}"),
            }
        }
        let mut leaving = [0; BATCH];
        match self.note(page.0, &mut leaving) {
            0 => {}
            count => self.discard(&mut leaving[..count]),
        }
        true
    }
}

/// The most pages that leave at once.
const BATCH: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::team::in_parts;

    #[test]
    fn several_threads_read_more_pages_than_memory_holds() {
        if pagestitch::Support::current().features().is_err() {
            println!("SKIPPED several_threads_read_more_pages_than_memory_holds: no userfaultfd");
            return;
        }
        let read = |page: usize, block: &mut Block| block.0 = [page as u8; PAGE];
        let memory = BoundedFile::new(read, 4096, 600, 4);
        let is_right = |page: usize| memory.view().as_slice()[page * PAGE + 17] == page as u8;
        let right = memory
            .serve(|| in_parts(vec![1, 3, 5, 7], |step| (0..4096).all(|page| is_right(page * step % 4096))));
        assert_eq!(right, [true; 4]);
        let is_resident = |page: &usize| memory.region.reservation().is_resident(Page(*page)).unwrap();
        let resident = (0..4096).filter(is_resident).count();
        assert!(resident < 600 && resident == memory.filled.lock().unwrap().resident.len(), "{resident}");
        assert!(memory.fills() >= 4096);
    }
}
