//! Faults: threads touch and discard pages, workers fill them, a caller populates. One page's
//! source fails. Each model runs with discards that the kernel reports, and with discards that are seen
//! when a page is touched.

use super::kernel::{Answer, Content, Found, Kernel};
use crate::space::Discards;
use crate::space::page_table::{Claim, PageState, PageTable, Unclaimed, Wake};
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::{Page, Span};
use shuttle::thread;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// A region: its page table, and the kernel's side of its pages.
pub(super) struct Region {
    pub(super) table: PageTable,
    pub(super) kernel: Kernel,
    /// The page whose source fails.
    failing: Option<Page>,
    /// Whether the source prefers to read all pages at once.
    is_one_unit: bool,
    discards: Discards,
}

impl Region {
    pub(super) fn new(pages: usize, failing: Option<Page>) -> Arc<Self> {
        Arc::new(Self::with_unit(pages, failing, false))
    }

    /// The region, before it is shared, with discards of this kind.
    fn of(discards: Discards, region: Arc<Self>) -> Arc<Self> {
        let mut region = Arc::into_inner(region).expect("it is not shared");
        region.discards = discards;
        if discards == Discards::Seen {
            region.kernel.do_not_tell();
        }
        Arc::new(region)
    }

    fn with_unit(pages: usize, failing: Option<Page>, is_one_unit: bool) -> Self {
        let table = PageTable::new(NonZeroUsize::new(pages).unwrap()).unwrap();
        Self { table, kernel: Kernel::new(pages), failing, is_one_unit, discards: Discards::Told }
    }

    /// The loop of a worker: handles discards first, then faults.
    fn work(&self) {
        while let Some(events) = self.kernel.read() {
            events.removed.into_iter().for_each(|page| self.table.invalidate(page.span()));
            events.faults.into_iter().for_each(|page| self.serve(page));
        }
    }

    pub(super) fn serve(&self, page: Page) {
        let unit = if self.is_one_unit { BOTH } else { page.span() };
        let claim = self.table.claim_touched(page, unit, &self.kernel, || self.kernel.is_resident(page));
        match claim {
            Ok(claim) => {
                if !self.fill(claim) {
                    // Let the thread that changes the map proceed.
                    thread::yield_now();
                }
            }
            Err(Unclaimed::Filling) => {}
            Err(Unclaimed::Resident) => self.kernel.wake(page.span()),
            Err(Unclaimed::Poisoned) if self.lacks_marker(page) => self.kernel.wake(page.span()),
            Err(Unclaimed::Poisoned) => {
                if self.poison(page) == Answer::Changing {
                    self.kernel.wake(page.span());
                    thread::yield_now();
                }
            }
        }
    }

    /// Fills a claim page by page. False if the map is changing; the rest of the claim is dropped.
    fn fill(&self, mut claim: Claim<'_>) -> bool {
        while !claim.span().is_empty() {
            let page = claim.span().first;
            let (answer, state) = match self.failing {
                Some(failing) if failing == page => (self.poison(page), PageState::Poisoned),
                _ => (self.kernel.copy(page, Content::Bytes), PageState::Present),
            };
            match answer {
                Answer::Changing => return false,
                Answer::AlreadyThere => self.kernel.wake(page.span()),
                Answer::Done => {}
            }
            claim.settle(1, state);
        }
        true
    }

    fn poison(&self, page: Page) -> Answer {
        let answer = self.kernel.poison(page);
        if answer != Answer::Changing {
            self.kernel.wake(page.span());
        }
        answer
    }

    fn lacks_marker(&self, page: Page) -> bool {
        let is_gone = self.discards == Discards::Seen && self.kernel.is_missing(page);
        if is_gone {
            self.table.unpoison(page);
        }
        is_gone
    }

    /// Fills the absent pages, and again the pages that the kernel lacks afterwards.
    fn populate(&self, span: Span) {
        self.populate_once(span);
        let missing = |page: &Page| !self.kernel.is_resident(*page);
        let missing: Vec<_> = span.iter().filter(missing).collect();
        missing.iter().for_each(|page| self.table.mark_absent(*page));
        if !missing.is_empty() {
            self.populate_once(span);
        }
    }

    fn populate_once(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            match self.table.claim_run(rest, &self.kernel) {
                Ok(claim) => {
                    let claimed = claim.span();
                    if self.fill(claim) {
                        rest = rest.without_prefix(claimed.pages);
                    } else {
                        thread::yield_now();
                    }
                }
                Err(PageState::Present | PageState::Poisoned) => rest = rest.without_prefix(1),
                Err(PageState::Absent) => {}
                Err(PageState::Filling | PageState::Contended | PageState::Invalidated) => {
                    self.table.wait_while_filling(rest.first);
                }
            }
        }
    }

    fn expect(&self, page: Page) {
        let wanted = if self.failing == Some(page) { Found::Signal } else { Found::Bytes };
        assert_eq!(self.kernel.touch(page), wanted, "{page:?}");
    }
}

/// Runs threads besides `workers`, and checks that no page is claimed after they end.
fn run<const N: usize>(region: &Arc<Region>, workers: usize, bodies: [fn(&Region); N]) {
    let spawn = |body: fn(&Region)| {
        let region = Arc::clone(region);
        thread::spawn(move || body(&region))
    };
    let workers: Vec<_> = (0..workers).map(|_| spawn(Region::work)).collect();
    let others = bodies.map(spawn);
    others.into_iter().for_each(|thread| thread.join().unwrap());
    region.kernel.stop();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

/// Explores a model with each kind of discards.
fn explore_both(name: &str, body: impl Fn(Discards) + Send + Sync + 'static) {
    let body = Arc::new(body);
    for discards in [Discards::Told, Discards::Seen] {
        let body = Arc::clone(&body);
        explore(&format!("{name} ({discards:?})"), move || body(discards));
    }
}

pub(super) const BOTH: Span = Span { first: Page(0), pages: 2 };

#[test]
fn one_worker_fills_a_page_that_is_discarded() {
    explore_both("a discarded page", |discards| {
        run(
            &Region::of(discards, Region::new(1, None)),
            1,
            [|region| region.expect(Page(0)), |region| region.kernel.remove(Page(0))],
        );
    });
}

#[test]
fn two_workers_fill_a_page_that_two_threads_touch_and_one_discards() {
    explore_both("two workers, and a discarded page", |discards| {
        let touches = |region: &Region| region.expect(Page(0));
        run(
            &Region::of(discards, Region::new(1, None)),
            2,
            [touches, touches, |region| {
                region.kernel.remove(Page(0));
                region.expect(Page(0));
            }],
        );
    });
}

#[test]
fn a_page_that_another_process_maps_wakes_its_waiters() {
    explore_both("a page that appears", |discards| {
        let touches = |region: &Region| region.expect(Page(0));
        run(
            &Region::of(discards, Region::new(1, None)),
            2,
            [touches, touches, |region| {
                region.kernel.appear(Page(0));
                region.kernel.remove(Page(0));
                region.kernel.appear(Page(0));
            }],
        );
    });
}

#[test]
fn populate_runs_beside_faults_and_discards() {
    explore_both("populate, faults and discards", |discards| {
        run(
            &Region::of(discards, Region::new(2, None)),
            2,
            [
                |region| region.populate(BOTH),
                |region| {
                    region.expect(Page(1));
                    region.expect(Page(0));
                },
                |region| {
                    region.kernel.remove(Page(1));
                    region.expect(Page(1));
                },
            ],
        );
    });
}

#[test]
fn faults_on_pages_of_one_unit_and_a_discard() {
    explore_both("faults on one unit", |discards| {
        run(
            &Region::of(discards, Arc::new(Region::with_unit(2, None, true))),
            2,
            [
                |region| region.expect(Page(1)),
                |region| region.expect(Page(0)),
                |region| {
                    region.kernel.remove(Page(0));
                    region.expect(Page(1));
                },
            ],
        );
    });
}

/// A prefetch and a fault want the unit: one of them claims all of it, so that it is read once.
#[test]
fn a_unit_in_one_word_is_claimed_whole() {
    explore("claims of one unit", || {
        let region = Arc::new(Region::with_unit(2, None, true));
        let prefetch = Arc::clone(&region);
        let prefetch =
            thread::spawn(move || prefetch.table.claim_run(BOTH, &prefetch.kernel).map(Claim::keep).ok());
        let touch = |page| region.table.claim_touched(page, BOTH, &region.kernel, || false);
        let touched = touch(Page(1)).map(Claim::keep).ok();
        let prefetched = prefetch.join().unwrap();
        assert!(touched.xor(prefetched) == Some(BOTH), "{touched:?}, {prefetched:?}");
    });
}

#[test]
fn a_discarded_page_is_present_after_populate() {
    explore_both("discard, and populate", |discards| {
        run(
            &Region::of(discards, Region::new(2, None)),
            2,
            [
                |region| {
                    region.populate(BOTH);
                    region.kernel.remove(Page(1));
                    region.populate(BOTH);
                    // No other thread discards pages.
                    assert!(region.kernel.is_resident(Page(0)) && region.kernel.is_resident(Page(1)));
                },
                |region| region.expect(Page(1)),
            ],
        );
    });
}

#[test]
fn touching_a_page_whose_source_fails_is_a_signal_also_after_discards() {
    explore_both("a poisoned page", |discards| {
        run(
            &Region::of(discards, Region::new(2, Some(Page(1)))),
            2,
            [
                |region| region.expect(Page(1)),
                |region| region.populate(BOTH),
                |region| {
                    region.expect(Page(1));
                    region.kernel.remove(Page(1));
                    region.expect(Page(1));
                    region.expect(Page(0));
                },
            ],
        );
    });
}

/// A worker that finds the page poisoned, though its marker was discarded since, cannot poison it while
/// another page is discarded.
#[test]
fn touching_a_poisoned_page_is_a_signal_while_pages_are_discarded() {
    explore_both("a poisoned page, and two discards", |discards| {
        run(
            &Region::of(discards, Region::new(2, Some(Page(1)))),
            2,
            [
                |region| {
                    region.expect(Page(1));
                    region.kernel.remove(Page(1));
                    region.expect(Page(1));
                },
                |region| region.kernel.remove(Page(0)),
            ],
        );
    });
}
