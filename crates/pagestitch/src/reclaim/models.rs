//! Model of pages that leave, wait in slots, and come back or are dropped, and of a region that ends meanwhile, in many
//! orders of the threads.

use crate::reclaim::places::{Place, Places};
use crate::reclaim::slots::{Ends, Slots};
use crate::space::page_table::{PageState, PageTable, Wake};
use pagestitch_kernel::gate::Gate;
use pagestitch_kernel::sync::Mutex;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::{Page, Span};
use shuttle::thread;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Two pages, two slots, and the kernel's entries: the number of a page and one more, or 0.
struct Bounded {
    pages: PageTable,
    places: Places,
    slots: Slots,
    ends: Mutex<Ends>,
    region: [AtomicUsize; 2],
    arena: [AtomicUsize; 2],
    /// The pages of memory in use.
    frames: AtomicUsize,
    /// Closed when the region ends.
    gate: Gate,
    /// The pages of memory in the region.
    resident: AtomicUsize,
}

impl Wake for Bounded {
    fn wake(&self, _: Span) {}
}

impl Bounded {
    /// Both pages are resident.
    fn new() -> Arc<Self> {
        let two = NonZeroUsize::new(2).unwrap();
        let bounded = Self {
            pages: PageTable::new(two).unwrap(),
            places: Places::new(2).unwrap(),
            slots: Slots::new(two).unwrap(),
            ends: Mutex::new(Ends::default()),
            region: [AtomicUsize::new(1), AtomicUsize::new(2)],
            arena: [AtomicUsize::new(0), AtomicUsize::new(0)],
            frames: AtomicUsize::new(2),
            gate: Gate::new(),
            resident: AtomicUsize::new(2),
        };
        bounded.pages.mark_present(Span { first: Page(0), pages: 2 });
        for page in [Page(0), Page(1)] {
            bounded.places.set(page, Place::Resident);
        }
        Arc::new(bounded)
    }

    /// As `Share::move_out`, for one page.
    fn move_out(&self, page: Page) {
        let (slot, taken) = self.slots.take(&mut self.ends.lock().unwrap(), 1);
        if taken == 0 {
            return;
        }
        let Some(_inside) = self.gate.enter() else { return self.slots.skip(slot) };
        let Ok(mut claim) = self.pages.claim_present(page.span(), self) else { return self.slots.skip(slot) };
        let frame = self.region[page.0].swap(0, Ordering::SeqCst);
        assert_eq!(frame, page.0 + 1, "a page that is present in the table is resident");
        assert_eq!(self.arena[slot].swap(frame, Ordering::SeqCst), 0, "a taken slot is empty");
        self.slots.fill(slot, page.0 as u64);
        self.places.set(page, Place::Slot(slot as u32));
        self.resident.fetch_sub(1, Ordering::SeqCst);
        claim.settle(1, PageState::Absent);
    }

    /// As `State::empty`.
    fn empty(&self) {
        self.empty_up_to(1);
    }

    fn empty_up_to(&self, most: usize) {
        let run = self.slots.begin_empty(&mut self.ends.lock().unwrap(), most, |_| {});
        let Some(run) = run else { return };
        let freed = run.slots().filter(|&slot| self.arena[slot].swap(0, Ordering::SeqCst) > 0).count();
        assert_eq!(freed, run.frames, "a slot that is emptied has the frame that it is said to have");
        self.slots.finish_empty(run);
        self.frames.fetch_sub(freed, Ordering::SeqCst);
    }

    /// As a journey: the page comes back, or is filled.
    fn touch(&self, page: Page) {
        let Some(_inside) = self.gate.enter() else { return };
        let Ok(mut claim) = self.pages.claim(page, self) else { return };
        let place = self.places.get(page);
        match place {
            Place::Slot(slot) if self.slots.begin_return(slot as usize, page.0 as u64).is_some() => {
                let frame = self.arena[slot as usize].swap(0, Ordering::SeqCst);
                assert_eq!(frame, page.0 + 1, "the slot has the frame of the page");
                self.slots.returned(slot as usize);
            }
            _ => {
                self.frames.fetch_add(1, Ordering::SeqCst);
            }
        }
        assert_eq!(self.region[page.0].swap(page.0 + 1, Ordering::SeqCst), 0, "the page was missing");
        self.places.set(page, Place::Resident);
        self.resident.fetch_add(1, Ordering::SeqCst);
        claim.settle(1, PageState::Present);
    }

    /// As the drop of a region, and that of its `Membership`.
    fn drop_region(&self) {
        self.gate.close();
        self.frames.fetch_sub(self.resident.load(Ordering::SeqCst), Ordering::SeqCst);
        let unmapped = self.region.iter().filter(|at| at.swap(0, Ordering::SeqCst) > 0).count();
        assert_eq!(unmapped, self.resident.load(Ordering::SeqCst), "no page comes or leaves any more");
    }

    /// At rest: the counted frames are those that exist, and each page can be had.
    fn check(&self) {
        let in_use =
            |frames: &[AtomicUsize]| frames.iter().filter(|at| at.load(Ordering::SeqCst) > 0).count();
        assert_eq!(self.frames.load(Ordering::SeqCst), in_use(&self.region) + in_use(&self.arena));
        assert_eq!(self.slots.full(), in_use(&self.arena));
        if self.gate.is_closed() {
            (0..2).for_each(|_| self.empty_up_to(2));
            return assert_eq!((self.frames.load(Ordering::SeqCst), in_use(&self.arena)), (0, 0));
        }
        for page in [Page(0), Page(1)] {
            self.touch(page);
            assert_eq!(self.region[page.0].load(Ordering::SeqCst), page.0 + 1);
        }
    }
}

/// Runs the threads of a model.
fn run(threads: &[fn(&Bounded)]) {
    let bounded = Bounded::new();
    let start = |thread: &fn(&Bounded)| {
        let (bounded, run) = (Arc::clone(&bounded), *thread);
        thread::spawn(move || run(&bounded))
    };
    let threads: Vec<_> = threads.iter().map(start).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    bounded.check();
}

#[test]
fn a_page_that_leaves_is_neither_lost_nor_counted_twice_while_threads_touch_it() {
    explore("pages that leave and are touched", || {
        run(&[
            |bounded| [Page(0), Page(1), Page(0)].into_iter().for_each(|page| bounded.move_out(page)),
            |bounded| [Page(0), Page(0)].into_iter().for_each(|page| bounded.touch(page)),
            |bounded| (0..3).for_each(|_| bounded.empty()),
        ]);
    });
}

#[test]
fn two_evictors_and_two_emptying_threads_share_the_ring() {
    explore("two evictors", || {
        let evict = |bounded: &Bounded| {
            [Page(0), Page(1)].into_iter().for_each(|page| bounded.move_out(page));
            bounded.empty();
            bounded.touch(Page(1));
        };
        run(&[evict, evict, |bounded| bounded.touch(Page(0))]);
    });
}

/// The frames of its pages that wait in slots are left, and are freed like others.
#[test]
fn an_evictor_and_a_drop_of_its_region_count_each_page_once() {
    explore("an evictor beside a drop", || {
        run(&[
            |bounded| [Page(0), Page(1)].into_iter().for_each(|page| bounded.move_out(page)),
            |bounded| [Page(0), Page(0)].into_iter().for_each(|page| bounded.touch(page)),
            Bounded::drop_region,
            Bounded::empty,
        ]);
    });
}
