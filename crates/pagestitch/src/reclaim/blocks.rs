//! Blocks that sequential readers leave behind: they leave first, each as a whole.
//!
//! A block comes whole, as a huge page, only ahead of a sequential reader, which passes it once. So blocks
//! leave in the order in which they have come, before the pages of the policy, and do not displace these. As
//! many stay as readers may have ahead of them.

use crate::policy::PageKey;
use pagestitch_kernel::page::HUGE;
use std::collections::VecDeque;

/// The blocks in memory, by their first pages.
#[derive(Debug)]
pub(super) struct Blocks {
    queue: VecDeque<PageKey>,
    /// The blocks that stay while there are other pages.
    kept: usize,
}

impl Blocks {
    /// For a budget of `limit` pages.
    pub(super) fn new(limit: usize) -> Self {
        let kept = limit / KEPT_SHARE / BLOCK_PAGES;
        Self { queue: VecDeque::with_capacity(limit / BLOCK_PAGES * 2), kept }
    }

    /// Adds a block. False if there is no room, which takes more blocks than the budget.
    pub(super) fn add(&mut self, first: PageKey) -> bool {
        let has_room = self.queue.len() < self.queue.capacity();
        if has_room {
            self.queue.push_back(first);
        }
        has_room
    }

    /// The block that leaves next. `None`: pages of the policy leave before it.
    pub(super) fn victim(&mut self) -> Option<PageKey> {
        if self.queue.len() > self.kept { self.queue.pop_front() } else { None }
    }

    /// The block that leaves if there is nothing else.
    pub(super) fn last_resort(&mut self) -> Option<PageKey> {
        self.queue.pop_front()
    }

    /// Forgets blocks by their first pages.
    pub(super) fn forget(&mut self, is_gone: &dyn Fn(PageKey) -> bool) {
        self.queue.retain(|&first| !is_gone(first));
    }
}

/// The most pages ahead of the sequential readers of a region with a budget of `limit` pages.
pub(super) const fn ahead_max(limit: usize) -> usize {
    limit / KEPT_SHARE / 2
}

/// The pages of a block.
pub(super) const BLOCK_PAGES: usize = HUGE / 4096;
/// The blocks that stay have at most this share of a budget.
const KEPT_SHARE: usize = 8;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_in_their_order_and_some_stay() {
        let mut blocks = Blocks::new(32 * BLOCK_PAGES);
        assert!((0..10).all(|block| blocks.add(block * 512)));
        assert_eq!((blocks.victim(), blocks.victim()), (Some(0), Some(512)));
        blocks.forget(&|first| first == 1024);
        let rest: Vec<_> = std::iter::from_fn(|| blocks.victim()).collect();
        assert_eq!(rest, [1536, 2048, 2560]);
        assert_eq!(blocks.last_resort(), Some(3072));
    }

    #[test]
    fn a_small_budget_keeps_no_block() {
        let mut blocks = Blocks::new(1024);
        assert!(blocks.add(7));
        assert_eq!((blocks.victim(), blocks.victim()), (Some(7), None));
    }
}
