//! Model of a page that is written while it leaves, comes back and is flushed, in many orders of the threads.

use crate::reclaim::dirty::Bits;
use crate::reclaim::places::{Place, Places};
use crate::reclaim::slots::{Ends, Frame, Slots};
use crate::space::page_table::{Claim, PageState, PageTable, Wake};
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::sync::{Mutex, yield_now};
use pagestitch_kernel::{Page, Span};
use shuttle::thread;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// One page and two slots. A value is one byte of the page; a frame is the value and one more, or 0.
struct Written {
    pages: PageTable,
    places: Places,
    slots: Slots,
    ends: Mutex<Ends>,
    dirty: Bits,
    writing: Bits,
    /// The kernel's entry: a frame, and whether it is write-protected.
    region: AtomicUsize,
    arena: [AtomicUsize; 2],
    source: AtomicUsize,
    /// The next write to the source fails.
    failing: AtomicUsize,
}

const PAGE: Page = Page(0);
const PROTECTED: usize = 1 << 16;

impl Wake for Written {
    fn wake(&self, _: Span) {}
}

impl Written {
    fn new() -> Arc<Self> {
        let two = NonZeroUsize::new(2).unwrap();
        Arc::new(Self {
            pages: PageTable::new(NonZeroUsize::MIN).unwrap(),
            places: Places::new(1).unwrap(),
            slots: Slots::new(two).unwrap(),
            ends: Mutex::new(Ends::default()),
            dirty: Bits::new(1).unwrap(),
            writing: Bits::new(1).unwrap(),
            region: AtomicUsize::new(0),
            arena: [AtomicUsize::new(0), AtomicUsize::new(0)],
            source: AtomicUsize::new(0),
            failing: AtomicUsize::new(0),
        })
    }

    /// A thread of the application writes a value.
    fn write(&self, value: usize) {
        loop {
            match self.region.load(Ordering::SeqCst) {
                0 => self.touch(true),
                entry if entry & PROTECTED != 0 => self.let_write(),
                entry => {
                    let written =
                        self.region.compare_exchange(entry, value + 1, Ordering::SeqCst, Ordering::SeqCst);
                    if written.is_ok() {
                        return;
                    }
                }
            }
            yield_now();
        }
    }

    fn read(&self) -> usize {
        loop {
            match self.region.load(Ordering::SeqCst) {
                0 => self.touch(false),
                entry => return (entry & !PROTECTED) - 1,
            }
            yield_now();
        }
    }

    fn install(&self, frame: usize) {
        assert_eq!(self.region.swap(frame, Ordering::SeqCst), 0, "the page was missing");
        self.places.set(PAGE, Place::Resident);
    }

    /// As a journey: the page comes back, or is filled.
    fn touch(&self, writes: bool) {
        let Ok(mut claim) = self.pages.claim(PAGE, self) else { return };
        let place = self.places.get(PAGE);
        let is_back = matches!(place, Place::Slot(slot) if self.bring_back(slot as usize, writes));
        if !is_back {
            if writes {
                self.dirty.set(0);
            }
            let frame = self.source.load(Ordering::SeqCst) + 1;
            self.install(if self.dirty.get(0) { frame } else { frame | PROTECTED });
        }
        claim.settle(1, PageState::Present);
    }

    /// As `Share::bring_back`.
    fn bring_back(&self, slot: usize, writes: bool) -> bool {
        let Some(frame) = self.slots.begin_return(slot, 0) else { return false };
        if writes || frame == Frame::Modified {
            self.dirty.set(0);
        }
        if self.dirty.get(0) {
            let moved = self.arena[slot].swap(0, Ordering::SeqCst);
            assert!(moved > 0, "the slot has the frame of the page");
            self.install(moved);
            self.slots.returned(slot);
        } else {
            self.install(self.arena[slot].load(Ordering::SeqCst) | PROTECTED);
            self.slots.abandon(slot);
        }
        true
    }

    /// As `let_write`.
    fn let_write(&self) {
        let Ok(mut claim) = self.pages.claim_present(PAGE.span(), self) else { return };
        self.dirty.set(0);
        self.region.fetch_and(!PROTECTED, Ordering::SeqCst);
        claim.settle(1, PageState::Present);
    }

    /// As `Share::move_out` and `Share::write_batch`.
    fn evict(&self) {
        let Some((mut claim, slot, is_dirty)) = self.move_out() else { return };
        let value = self.value_in(slot);
        claim.settle(1, PageState::Absent);
        if is_dirty {
            match self.write_back(value) {
                true => {
                    self.slots.written(slot, 0);
                }
                false => self.put_back(slot),
            }
            self.writing.clear(0);
        }
    }

    /// As `Share::write_moved`: the file gets the bytes of the slot before another thread can claim the page.
    fn evict_in_handler(&self) {
        let Some((mut claim, slot, is_dirty)) = self.move_out() else { return };
        let is_refused = is_dirty && !self.write_back(self.value_in(slot));
        if is_dirty && !is_refused {
            assert!(self.slots.written(slot, 0), "no other thread brings a claimed page back");
            self.writing.clear(0);
        }
        claim.settle(1, PageState::Absent);
        if is_refused {
            self.put_back(slot);
            self.writing.clear(0);
        }
    }

    /// Moves the page to a slot, and marks it as being written if it is dirty, which the last value tells. It is
    /// claimed still. `None` if it stays.
    fn move_out(&self) -> Option<(Claim<'_>, usize, bool)> {
        let (slot, taken) = self.slots.take(&mut self.ends.lock().unwrap(), 1);
        if taken == 0 {
            return None;
        }
        let Ok(mut claim) = self.pages.claim_present(PAGE.span(), self) else {
            self.slots.skip(slot);
            return None;
        };
        if self.writing.get(0) {
            self.slots.skip(slot);
            claim.settle(1, PageState::Present);
            return None;
        }
        let frame = self.region.swap(0, Ordering::SeqCst) & !PROTECTED;
        assert_eq!(self.arena[slot].swap(frame, Ordering::SeqCst), 0, "a taken slot is empty");
        let is_dirty = self.dirty.get(0);
        if is_dirty {
            self.begin_writing();
            self.slots.fill_dirty(slot, 0);
        } else {
            self.slots.fill(slot, 0);
        }
        self.places.set(PAGE, Place::Slot(slot as u32));
        Some((claim, slot, is_dirty))
    }

    /// The value of the page in a slot, while the page is claimed.
    fn value_in(&self, slot: usize) -> usize {
        self.arena[slot].load(Ordering::SeqCst) - 1
    }

    /// As `DirtyPages::begin_writing`.
    fn begin_writing(&self) {
        self.writing.set(0);
        self.dirty.clear(0);
    }

    /// As `DirtyPages::first_unwritten`.
    fn is_unwritten(&self) -> bool {
        [&self.dirty, &self.writing, &self.dirty].iter().any(|mark| mark.get(0))
    }

    fn write_back(&self, value: usize) -> bool {
        let fails = self.failing.swap(0, Ordering::SeqCst) > 0;
        if !fails {
            self.source.store(value, Ordering::SeqCst);
        }
        !fails
    }

    /// As `Share::put_back`.
    fn put_back(&self, slot: usize) {
        while self.slots.is_modified(slot, 0) {
            if let Ok(mut claim) = self.pages.claim(PAGE, self) {
                let is_back = self.bring_back(slot, true);
                claim.settle(1, if is_back { PageState::Present } else { PageState::Absent });
            }
            yield_now();
        }
    }

    /// As `State::empty`.
    fn empty(&self) {
        let run = self.slots.begin_empty(&mut self.ends.lock().unwrap(), 1, |_| {});
        let Some(run) = run else { return };
        let freed = run.slots().filter(|&slot| self.arena[slot].swap(0, Ordering::SeqCst) > 0).count();
        assert_eq!(freed, run.frames, "a slot that is emptied has the frame that it is said to have");
        self.slots.finish_empty(run);
    }

    /// As `Share::flush`, once.
    fn flush(&self) {
        let Ok(mut claim) = self.pages.claim_present(PAGE.span(), self) else { return };
        if self.writing.get(0) || !self.dirty.get(0) {
            return claim.settle(1, PageState::Present);
        }
        let frame = self.region.swap(0, Ordering::SeqCst) & !PROTECTED;
        self.region.store(frame | PROTECTED, Ordering::SeqCst);
        self.begin_writing();
        claim.settle(1, PageState::Present);
        if !self.write_back(frame - 1) {
            self.dirty.set(0);
        }
        self.writing.clear(0);
    }
}

/// Runs a writer of two values beside other threads.
fn run(failing: bool, others: &[fn(&Written)]) {
    let written = Written::new();
    written.failing.store(usize::from(failing), Ordering::SeqCst);
    let start = |other: &fn(&Written)| {
        let (written, run) = (Arc::clone(&written), *other);
        thread::spawn(move || run(&written))
    };
    let others: Vec<_> = others.iter().map(start).collect();
    for value in [1, 2] {
        written.write(value);
        assert_eq!(written.read(), value, "the write is lost");
    }
    others.into_iter().for_each(|other| other.join().unwrap());
    (0..3).for_each(|_| written.empty());
    assert_eq!(written.read(), 2, "the last write is lost");
    written.failing.store(0, Ordering::SeqCst);
    written.flush();
    assert_eq!(written.source.load(Ordering::SeqCst), 2, "a clean page has the bytes of its source");
}

#[test]
fn a_page_that_leaves_while_it_is_written_loses_no_write() {
    explore("a page that leaves while it is written", || {
        run(false, &[|page| (0..2).for_each(|_| page.evict()), |page| (0..2).for_each(|_| page.empty())]);
    });
}

#[test]
fn a_flush_beside_an_evictor_loses_no_write() {
    explore("a flush beside an evictor", || {
        run(
            false,
            &[
                |page| (0..2).for_each(|_| page.flush()),
                |page| {
                    (0..2).for_each(|_| page.evict());
                    page.empty();
                },
            ],
        );
    });
}

#[test]
fn a_failed_write_back_loses_no_write() {
    explore("a failed write-back", || {
        run(true, &[|page| (0..2).for_each(|_| page.evict()), |page| page.flush()]);
    });
}

#[test]
fn a_handler_that_writes_pages_loses_no_write() {
    for fails in [false, true] {
        explore("a handler that writes pages", move || {
            run(
                fails,
                &[
                    |page| (0..2).for_each(|_| page.evict_in_handler()),
                    |page| {
                        page.flush();
                        page.evict();
                        page.empty();
                    },
                ],
            );
        });
    }
}

type Eviction = fn(&Written);
/// Each way in which a page leaves, with and without a failure.
const EVICTIONS: [(bool, Eviction); 4] = [
    (false, Written::evict),
    (true, Written::evict),
    (false, Written::evict_in_handler),
    (true, Written::evict_in_handler),
];

#[test]
fn a_flush_finds_a_written_page_until_it_is_in_its_source() {
    for (fails, evict) in EVICTIONS {
        explore("a flush that looks for a page", move || {
            let written = Written::new();
            written.write(1);
            written.failing.store(usize::from(fails), Ordering::SeqCst);
            let evicts = Arc::clone(&written);
            let evictor = thread::spawn(move || evict(&evicts));
            let is_unwritten = written.is_unwritten();
            assert!(is_unwritten || written.source.load(Ordering::SeqCst) == 1, "the flush misses the page");
            evictor.join().unwrap();
        });
    }
}
