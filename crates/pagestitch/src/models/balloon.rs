//! Balloons: the owner of adopted memory discards a page while workers fill it. The owner runs on
//! as soon as its event is read, so only zeros may be installed in the page from then on.

use super::kernel::{Answer, Content, Found, Kernel};
use crate::space::page_table::{Claim, PageState, PageTable, Unclaimed, Wake};
use crate::space::target::Foreign;
use pagestitch_kernel::Page;
use pagestitch_kernel::sync::model::explore;
use shuttle::thread;
use std::num::NonZeroUsize;
use std::sync::Arc;

struct Owned {
    table: PageTable,
    adopted: Foreign,
    kernel: Kernel,
}

impl Owned {
    fn work(&self) {
        while self.kernel.wait_for_event() {
            let events = {
                let _alone = self.adopted.change();
                let events = self.kernel.read_now();
                for page in &events.removed {
                    self.adopted.note_discard(page.span());
                    self.table.invalidate(page.span());
                }
                events
            };
            events.faults.into_iter().for_each(|page| self.serve(page));
        }
    }

    fn serve(&self, page: Page) {
        match self.table.claim_touched(page, page.span(), &self.kernel, || self.kernel.is_resident(page)) {
            Ok(claim) => self.fill(claim),
            Err(Unclaimed::Filling | Unclaimed::Poisoned) => {}
            Err(Unclaimed::Resident) => self.kernel.wake(page.span()),
        }
    }

    /// The steps of `fill` and `install`: chooses the page's bytes, then checks that they are still
    /// right.
    fn fill(&self, mut claim: Claim<'_>) {
        let page = claim.span().first;
        let (_, removed) = self.adopted.discarded_prefix(page.span());
        let content = if removed { Content::Zeros } else { Content::Bytes };
        let held = self.adopted.hold();
        if self.table.state(page) == PageState::Invalidated {
            return;
        }
        match self.kernel.copy(page, content) {
            Answer::Changing => {
                drop((held, claim));
                return thread::yield_now();
            }
            Answer::AlreadyThere => self.kernel.wake(page.span()),
            Answer::Done => {}
        }
        claim.settle(1, PageState::Present);
    }
}

#[test]
fn a_discarded_page_is_zeros_from_then_on() {
    explore("a balloon", || {
        let table = PageTable::new(NonZeroUsize::MIN).unwrap();
        let owned = Arc::new(Owned { table, adopted: Foreign::of_pages(1), kernel: Kernel::new(1) });
        let spawn = |body: fn(&Owned)| {
            let owned = Arc::clone(&owned);
            thread::spawn(move || body(&owned))
        };
        let workers = [spawn(Owned::work), spawn(Owned::work)];
        let owners = [
            spawn(|owned| {
                // Another processor of the guest: once it has seen zeros, it sees zeros.
                let mut gone = false;
                for _ in 0..2 {
                    let found = owned.kernel.touch(Page(0));
                    assert!(found == Found::Discarded || found == Found::Bytes && !gone, "{found:?}");
                    gone = found == Found::Discarded;
                }
            }),
            spawn(|owned| {
                owned.kernel.remove(Page(0));
                assert_eq!(owned.kernel.touch(Page(0)), Found::Discarded);
            }),
        ];
        owners.into_iter().for_each(|thread| thread.join().unwrap());
        owned.kernel.stop();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}
