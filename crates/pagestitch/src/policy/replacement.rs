//! Which pages leave first when memory is short.
//!
//! The kernel does not tell which pages are read. So a page that is chosen waits on a standby list for a
//! while, and a touch brings it back: that is the only sign of use that a policy gets.
//!
//! ```text
//!   admit ──▶ the policy ──victim──▶ standby list ──dropped──▶ gone
//!               ▲                        │
//!               └──── admit (returned) ──┘
//! ```

use std::collections::VecDeque;
use std::fmt;

/// A page of a region, as the policy sees it: a number.
pub(crate) type PageKey = u64;

/// Decides which page leaves next. Each page is admitted once until it is chosen. A policy allocates
/// nothing after its creation, because a signal handler may call it.
pub(crate) trait Replacement: fmt::Debug + Send {
    /// A page has come: from its source, or back from the standby list (`returned`).
    fn admit(&mut self, page: PageKey, returned: bool);

    /// The page that leaves next; `None` if there is none.
    fn victim(&mut self) -> Option<PageKey>;

    /// A page was not touched while it was on the standby list, and is gone.
    fn dropped(&mut self, page: PageKey);

    /// Forgets the pages of a region that ends.
    fn forget(&mut self, is_gone: &dyn Fn(PageKey) -> bool);
}

/// Pages leave in the order in which they have come.
#[derive(Debug)]
pub(crate) struct Fifo {
    queue: VecDeque<PageKey>,
}

impl Fifo {
    /// Room for so many pages.
    pub(crate) fn new(pages: usize) -> Self {
        Self { queue: VecDeque::with_capacity(pages) }
    }
}

impl Replacement for Fifo {
    fn admit(&mut self, page: PageKey, _returned: bool) {
        push(&mut self.queue, page);
    }

    fn victim(&mut self) -> Option<PageKey> {
        self.queue.pop_front()
    }

    fn dropped(&mut self, _page: PageKey) {}

    fn forget(&mut self, is_gone: &dyn Fn(PageKey) -> bool) {
        self.queue.retain(|&page| !is_gone(page));
    }
}

/// Appends a page. A full queue drops it: the page then stays in memory until its region ends. That takes
/// more pages than the budget has room for.
fn push(queue: &mut VecDeque<PageKey>, page: PageKey) {
    if queue.len() < queue.capacity() {
        queue.push_back(page);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn fifo_gives_pages_in_their_order_and_forgets_a_region() {
        let mut fifo = Fifo::new(8);
        (1..=6).for_each(|page| fifo.admit(page, false));
        assert_eq!((fifo.victim(), fifo.victim()), (Some(1), Some(2)));
        fifo.admit(1, true);
        fifo.forget(&|page| page % 2 == 0);
        assert_eq!(
            [fifo.victim(), fifo.victim(), fifo.victim(), fifo.victim()],
            [Some(3), Some(5), Some(1), None]
        );
    }

    #[test]
    fn a_full_queue_grows_no_further() {
        let mut fifo = Fifo::new(4);
        let room = fifo.queue.capacity();
        (0..100).for_each(|page| fifo.admit(page, false));
        assert_eq!((fifo.queue.len(), fifo.queue.capacity()), (room, room));
    }
}
