//! Out of core with the least machinery: the touching thread fills its page in the bare SIGBUS handler, and
//! pages leave in the order in which they have come, one by one, by moves into an arena of a batch. The arena is
//! emptied with one call.
//!
//! ```text
//!   region   |■|■| |■|■|        the oldest 256 pages, in the order of their addresses
//!                 │ UFFDIO_MOVE, a page at a time; a written page goes to the store from here
//!                 ▼
//!   arena    |■|■|■| | |        one madvise(2) when the batch is there
//! ```

use super::bus::{self, Fills};
use crate::systems::{Data, PAGE};
use nix::sys::signal::SigSet;
use pagestitch::Support;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{
    Access, AddressRange, Evictable, Features, Outcome, Page, PageSize, Span, StableView, Uffd, View, swap,
};
use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The bytes of the pages.
pub(crate) trait Store: Send {
    fn page(&self, page: usize) -> &[u8];

    /// Takes the bytes of a written page.
    fn take(&mut self, page: usize, bytes: &[u8]);
}

/// Memory with a bound.
pub(crate) struct Bounded<S> {
    view: StableView,
    uffd: Uffd,
    state: Mutex<State<S>>,
}

/// The pages that are in memory, and the arena.
struct State<S> {
    store: S,
    /// The pages in memory, in the order in which they have come.
    resident: VecDeque<usize>,
    /// The number of pages at which a batch leaves.
    most: usize,
    /// True for a page that differs from the store. Empty if no thread writes.
    dirty: Vec<bool>,
    region: Evictable,
    arena: Evictable,
    in_arena: StableView,
    moves: Uffd,
}

/// The reason why this kernel moves no pages, if it does not.
pub(crate) fn moves_no_pages() -> Option<&'static str> {
    if !Support::current().has(Features::MOVE) {
        return Some("this kernel cannot move pages: use Linux 6.8 or newer");
    }
    swap::moves_safely().err()
}

impl<S: Store> Bounded<S> {
    /// Memory of so many pages, at most `most` of which are filled. `writes`: threads write to it, too.
    pub(crate) fn new(store: S, pages: usize, most: usize, writes: bool) -> Self {
        let (protection, modes, access) = match writes {
            true => (Features::WRITE_PROTECT, RegisterMode::WRITE_PROTECT, Access::Writable),
            false => (Features::NONE, RegisterMode::MISSING, Access::LogicallyReadOnly),
        };
        let (region, view, uffd) = reserve(pages, access, Features::SIGBUS | protection, modes);
        let only_moves = Features::MOVE | Features::SIGBUS;
        let (arena, in_arena, moves) =
            reserve(BATCH, Access::LogicallyReadOnly, only_moves, RegisterMode::MISSING);
        let resident = VecDeque::with_capacity(most);
        let dirty = if writes { vec![false; pages] } else { Vec::new() };
        let state = State { store, resident, most, dirty, region, arena, in_arena, moves };
        Self { view, uffd, state: Mutex::new(state) }
    }

    /// Runs `work`, whose threads fill the pages that they touch, one at a time.
    pub(crate) fn serve<T>(&self, work: impl FnOnce() -> T) -> T {
        bus::serve(self, SigSet::empty(), work)
    }

    pub(crate) const fn view(&self) -> &StableView {
        &self.view
    }

    /// Has all pages leave, and returns the store.
    pub(crate) fn into_store(self) -> S {
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        while !state.resident.is_empty() {
            state.evict();
        }
        state.store
    }
}

impl<S: Store> Fills for Bounded<S> {
    fn addresses(&self) -> Range<usize> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let range = state.region.reservation().range();
        range.start()..range.end()
    }

    fn fill_at(&self, address: usize) -> bool {
        // No touch happens below this lock, so no handler interrupts another one.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let page = state.region.reservation().page_at(address);
        page.inspect(|&page| state.serve(&self.uffd, page)).is_some()
    }
}

impl<S: Store> State<S> {
    /// Fills a page; or lets a write to it happen, if it is filled.
    fn serve(&mut self, uffd: &Uffd, page: Page) {
        let range = self.region.reservation().addresses(page.span());
        let bytes = self.store.page(page.0);
        let filled =
            if self.dirty.is_empty() { uffd.copy(range, bytes) } else { uffd.copy_protected(range, bytes) };
        match filled {
            Outcome::Done => {
                self.resident.push_back(page.0);
                if self.resident.len() >= self.most {
                    self.evict();
                }
            }
            Outcome::AlreadyThere if !self.dirty.is_empty() => {
                self.dirty[page.0] = true;
                assert_eq!(uffd.unprotect(range), Outcome::Done, "the write of a filled page");
            }
            outcome => panic!("the kernel does not copy a page: {outcome:?}"),
        }
    }

    /// Has the oldest pages leave.
    fn evict(&mut self) {
        let leaving = self.resident.len().min(BATCH);
        let mut batch = [0; BATCH];
        batch.iter_mut().zip(self.resident.drain(..leaving)).for_each(|(place, page)| *place = page);
        let batch = &mut batch[..leaving];
        // Neighbours share a page table.
        batch.sort_unstable();
        for (slot, &page) in batch.iter().enumerate() {
            let (from, into) = (self.region.reservation(), self.arena.reservation());
            let (from, into) = (from.addresses(Page(page).span()), into.addresses(Page(slot).span()));
            assert_eq!(self.take_in(into, from), Outcome::Done, "a move");
            if self.dirty.get(page) == Some(&true) {
                self.store.take(page, &self.in_arena.as_slice()[slot * PAGE..][..PAGE]);
                self.dirty[page] = false;
            }
        }
        self.arena.discard(Span { first: Page(0), pages: leaving }).expect("an arena to empty");
    }

    fn take_in(&self, into: AddressRange, from: AddressRange) -> Outcome {
        // SAFETY: the reservation owns the page. The thread that evicts is the only one that touches, so no
        // load of its bytes happens meanwhile. A later one finds the bytes of the store, which are the same.
        #[expect(unsafe_code, reason = "takes a page away")]
        unsafe {
            self.moves.move_pages(into, from)
        }
    }
}

/// Registered memory without huge pages, whose pages may leave.
pub(super) fn reserve(
    pages: usize,
    access: Access,
    features: Features,
    modes: RegisterMode,
) -> (Evictable, StableView, Uffd) {
    let page = PageSize::new(PAGE).expect("a power of two");
    let pages = NonZeroUsize::new(pages).expect("some pages");
    let (reservation, view) = View::reserve(pages, page, access).expect("addresses");
    let uffd = Uffd::open(features).expect("a userfaultfd");
    uffd.register(&reservation, RegisterMode::MISSING | modes).expect("registering");
    reservation.use_small_pages();
    // SAFETY: a page that leaves comes back with the bytes of its file or store, which takes those of a written page.
    // The arena's bytes are read between a move and its end only.
    #[expect(unsafe_code, reason = "the promise that Evictable asks for")]
    let evictable = unsafe { Evictable::new(reservation) };
    (evictable, view.into_stable().expect("the view has no mapped pages"), uffd)
}

impl Store for &Data {
    fn page(&self, page: usize) -> &[u8] {
        self.bytes_of_page(page)
    }

    fn take(&mut self, _page: usize, _bytes: &[u8]) {
        unreachable!("no thread writes")
    }
}

impl Store for Vec<u8> {
    fn page(&self, page: usize) -> &[u8] {
        &self[page * PAGE..][..PAGE]
    }

    fn take(&mut self, page: usize, bytes: &[u8]) {
        self[page * PAGE..][..PAGE].copy_from_slice(bytes);
    }
}

/// The pages that leave at once.
const BATCH: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_leave_the_prototype_come_back_with_their_bytes() {
        if let Some(reason) = moves_no_pages() {
            println!("SKIPPED pages_that_leave_the_prototype_come_back_with_their_bytes: {reason}");
            return;
        }
        let data = Data::new(4 << 20, 1);
        let memory = Bounded::new(&*data, data.pages(), 600, false);
        memory.serve(|| {
            for _ in 0..2 {
                data.check(memory.view().as_slice());
            }
        });
        let state = memory.state.into_inner().unwrap();
        let resident = |page: &usize| state.region.reservation().is_resident(Page(*page)).unwrap();
        assert_eq!((0..data.pages()).filter(resident).count(), state.resident.len());
        assert!(state.resident.len() < 600 && state.resident.len() >= 600 - BATCH);
    }
}
