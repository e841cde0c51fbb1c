//! Which pages leave first when memory is short.
//!
//! The kernel does not tell which pages are read. So a page that is chosen waits on a standby list for a
//! while, and a touch brings it back: that is the only sign of use that a policy gets. A kernel that protects
//! pages of a userfaultfd against reads (proposed, and not in Linux 6.18) would give another one, for
//! `admit(page, true)`.
//!
//! ```text
//!   admit ──▶ the policy ──victim──▶ standby list ──dropped──▶ gone
//!               ▲          │             │                       ▲
//!               │          └────────── dropped ──────────────────┘
//!               └──── admit (returned) ──┘
//! ```

use std::collections::VecDeque;
use std::fmt;

/// A page of a region, as the policy sees it: a number.
pub(crate) type PageKey = u64;

/// The order in which pages of a [`Budget`](crate::Budget) leave: see
/// [`with_replacement`](crate::Budget::with_replacement). Whole blocks that a sequential reader has left behind leave
/// before all others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Replacement {
    /// Pages that were touched once leave before those that were touched again while they were on the standby
    /// list, or soon after. See Yang and others, *FIFO queues are all you need for cache eviction*, SOSP 2023.
    #[default]
    S3Fifo,
    /// Pages leave in the order in which they have come. The measure for other orders, and the right one if no
    /// page is used more than others.
    Fifo,
}

impl Replacement {
    /// With room for so many pages.
    pub(crate) fn policy(self, pages: usize) -> Box<dyn ReplacementPolicy> {
        match self {
            Self::S3Fifo => Box::new(S3Fifo::new(pages)),
            Self::Fifo => Box::new(Fifo::new(pages)),
        }
    }
}

/// Decides which page leaves next. Each page is admitted once until it is chosen. A policy allocates
/// nothing after its creation, because a signal handler may call it.
pub(crate) trait ReplacementPolicy: fmt::Debug + Send {
    /// A page has come: from its source, or back from the standby list (`returned`).
    fn admit(&mut self, page: PageKey, returned: bool);

    /// The page that leaves next; `None` if there is none.
    fn victim(&mut self) -> Option<PageKey>;

    /// A page is gone: it was not touched while it was on the standby list, or has not passed through it.
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

impl ReplacementPolicy for Fifo {
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

/// Two queues: a page that comes for the first time passes through a small one, and is soon gone unless it
/// is touched again. So a scan does not displace the pages in use (S3-FIFO, with the standby list in the
/// place of reference bits).
///
/// ```text
///   first time ──▶ small (a tenth) ──victim──▶ standby ──dropped──▶ ghosts: their names only
///                                              │   ▲                   │
///                       returned ──────────────┘   └── victim ── main ◀┘ comes again soon
///                           └─────────────────────────────────────▶
/// ```
#[derive(Debug)]
pub(crate) struct S3Fifo {
    small: VecDeque<PageKey>,
    main: VecDeque<PageKey>,
    ghosts: Ghosts,
}

impl S3Fifo {
    /// Room for so many pages.
    pub(crate) fn new(pages: usize) -> Self {
        let queue = || VecDeque::with_capacity(pages);
        Self { small: queue(), main: queue(), ghosts: Ghosts::new(pages) }
    }
}

impl ReplacementPolicy for S3Fifo {
    fn admit(&mut self, page: PageKey, returned: bool) {
        let is_used_again = returned || self.ghosts.take(page);
        push(if is_used_again { &mut self.main } else { &mut self.small }, page);
    }

    fn victim(&mut self) -> Option<PageKey> {
        let all = self.small.len() + self.main.len();
        match self.small.len() * SMALL_SHARE >= all {
            true => self.small.pop_front().or_else(|| self.main.pop_front()),
            false => self.main.pop_front().or_else(|| self.small.pop_front()),
        }
    }

    fn dropped(&mut self, page: PageKey) {
        self.ghosts.add(page);
    }

    fn forget(&mut self, is_gone: &dyn Fn(PageKey) -> bool) {
        [&mut self.small, &mut self.main].into_iter().for_each(|queue| queue.retain(|&page| !is_gone(page)));
    }
}

/// The names of pages that were dropped a while ago. A later page may take the place of an earlier one.
#[derive(Debug)]
struct Ghosts {
    /// A key and one more, or 0.
    names: Vec<PageKey>,
}

impl Ghosts {
    fn new(pages: usize) -> Self {
        Self { names: vec![0; pages.next_power_of_two()] }
    }

    fn add(&mut self, page: PageKey) {
        *self.place(page) = page + 1;
    }

    /// True if the page is there. It is not there afterwards.
    fn take(&mut self, page: PageKey) -> bool {
        let place = self.place(page);
        let is_here = *place == page + 1;
        if is_here {
            *place = 0;
        }
        is_here
    }

    fn place(&mut self, page: PageKey) -> &mut PageKey {
        let mixed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let places = self.names.len();
        &mut self.names[mixed as usize % places]
    }
}

/// The small queue has at least this share of the pages, if there are as many.
const SMALL_SHARE: usize = 10;

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
    use std::collections::HashSet;

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
    fn a_page_that_returns_outlives_pages_that_come_once() {
        let mut policy = S3Fifo::new(64);
        (0..10).for_each(|page| policy.admit(page, false));
        assert_eq!(policy.victim(), Some(0));
        policy.admit(0, true);
        policy.dropped(77);
        policy.admit(77, false);
        (10..30).for_each(|page| policy.admit(page, false));
        let order: Vec<_> = std::iter::from_fn(|| policy.victim()).collect();
        assert_eq!(order.len(), 31);
        let at = |page| order.iter().position(|&other| other == page).unwrap();
        assert!(at(0) > 15 && at(77) > 15, "{order:?}");
        policy.admit(5, false);
        policy.admit(6, true);
        policy.forget(&|page| page < 7);
        assert_eq!(policy.victim(), None);
    }

    /// A cache of some pages, of which the last ones wait in standby, as a budget has it.
    struct Cache {
        policy: Box<dyn ReplacementPolicy>,
        resident: HashSet<PageKey>,
        standby: VecDeque<PageKey>,
        returned: usize,
    }

    impl Cache {
        fn new(policy: impl ReplacementPolicy + 'static) -> Self {
            Self { policy: Box::new(policy), resident: HashSet::new(), standby: VecDeque::new(), returned: 0 }
        }

        /// True if the touch of a page needs no read.
        fn touch(&mut self, page: PageKey) -> bool {
            if self.resident.contains(&page) {
                return true;
            }
            let waits = self.standby.iter().position(|&other| other == page);
            let returned = waits.and_then(|at| self.standby.remove(at)).is_some();
            self.returned += usize::from(returned);
            self.resident.insert(page);
            self.policy.admit(page, returned);
            if self.resident.len() > 875 {
                let victim = self.policy.victim().unwrap();
                self.resident.remove(&victim);
                self.standby.push_back(victim);
            }
            if self.standby.len() > 125 {
                let dropped = self.standby.pop_front().unwrap();
                self.policy.dropped(dropped);
            }
            returned
        }
    }

    /// Pages of which few are touched most of the time (Zipf), beside a scan that touches each page once.
    fn scanned(step: u64) -> PageKey {
        let random =
            (step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (step >> 3).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let part = (random.wrapping_mul(0x94d0_49bb_1331_11eb) >> 11) as f64 / (1u64 << 53) as f64;
        match step % 4 {
            0 => 1_000_000 + step,
            _ => 8000f64.powf(part) as PageKey,
        }
    }

    #[test]
    fn a_scan_displaces_fewer_pages_in_use_than_with_fifo() {
        let (mut fifo, mut s3) = (Cache::new(Fifo::new(2000)), Cache::new(S3Fifo::new(2000)));
        let steps = if cfg!(miri) { 3_000 } else { 60_000 };
        let hits = |cache: &mut Cache| (0..steps).filter(|&step| cache.touch(scanned(step))).count();
        let (with_fifo, with_s3) = (hits(&mut fifo), hits(&mut s3));
        assert!(
            with_s3 as f64 > with_fifo as f64 * 1.02 || cfg!(miri),
            "{with_s3} hits, {with_fifo} with FIFO"
        );
        assert!(s3.returned < steps as usize / 10, "{} of {steps} touches are soft faults", s3.returned);
    }

    #[test]
    fn a_full_queue_grows_no_further() {
        let mut fifo = Fifo::new(4);
        let room = fifo.queue.capacity();
        (0..100).for_each(|page| fifo.admit(page, false));
        assert_eq!((fifo.queue.len(), fifo.queue.capacity()), (room, room));
    }
}
