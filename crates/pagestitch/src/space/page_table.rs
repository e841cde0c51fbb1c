//! The page table: which pages somebody is filling. Four bits a page, and a page of it costs nothing until used.
//!
//! ```text
//!                      claim                       settle
//!        ┌─ Absent ───────────────▶ Filling ────────────────┬──▶ Present ───┐
//!        │    ▲                      │   │ another fault    └──▶ Poisoned ──┤
//!        │    │                      │   ▼                  ▲               │
//!        │    │                      │  Contended ──────────┘ and woken     │
//!        │    │                      ▼   ▼                                  │
//!        │    └─ claim dropped ── or settled as Invalidated: the page was   │
//!        │       let go under it (waiters woken: they fault again)          │
//!        └─────────────────────◀── invalidate (the page was let go) ────────┘
//! ```
//!
//! `Contended` is for the fault that comes between the kernel's fill and its settling: the page was filled and its
//! waiters woken, then let go and touched anew, and all that while the first claim stands. Who settles it wakes
//! again; a wake-up too many does no harm. `Invalidated` is for the letting go itself, if it is told while the claim stands:
//! nobody knows whether it came before the fill or after, and absent is always safe to say.
//!
//! The kernel's own page table is the truth about what is present; this one says who is at work, and remembers
//! what was done last. A [`Claim`] is the right to fill some pages. Nobody sleeps on a lost page: a claim that is
//! dropped unsettled, on whichever early exit, gives its pages back and wakes their waiters.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::EventCount;
use pagestitch_kernel::sync::atomic::{AtomicU64, Ordering};
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;
use std::ops::Deref;

/// What was last done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It was never filled, or was discarded.
    Absent = 0,
    /// Somebody is filling it.
    Filling = 1,
    /// Somebody is filling it, and somebody else has taken a fault on it since.
    Contended = 2,
    /// It was filled.
    Present = 3,
    /// It was poisoned.
    Poisoned = 4,
    /// Somebody is filling it, and it was let go since.
    Invalidated = 5,
}

/// Wakes the threads that wait for pages of a span, so that they try again.
pub(crate) trait Wake {
    fn wake(&self, span: Span);
}

/// The states of a region's pages.
#[derive(Debug)]
pub(crate) struct PageTable {
    /// First a bit for each [`BLOCK`] of pages, set where a word of its states may be other than 0; then the states.
    words: AtomicTable,
    blocks: usize,
    /// Where threads wait for a page that somebody else fills.
    settled: EventCount,
}

/// Why a page that was touched is not to be filled by who was told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unclaimed {
    /// Somebody else is filling it, and wakes its waiters when it is settled.
    Filling,
    /// It is there.
    Resident,
    /// It was poisoned.
    Poisoned,
}

impl PageTable {
    pub(crate) fn new(pages: NonZeroUsize) -> Result<Self, Errno> {
        let blocks = pages.get().div_ceil(BLOCK * u64::BITS as usize);
        let words =
            NonZeroUsize::new(blocks + pages.get().div_ceil(PAGES_PER_WORD)).expect("at least one page");
        Ok(Self { words: AtomicTable::new(words)?, blocks, settled: EventCount::new() })
    }

    pub(crate) fn state(&self, page: Page) -> State {
        let (word, shift) = self.word(page);
        State::from_bits(word.load(Ordering::SeqCst) >> shift)
    }

    /// Claims a page that is absent; says what it is otherwise.
    pub(crate) fn claim<'t>(&'t self, page: Page, waker: &'t dyn Wake) -> Result<Claim<'t>, State> {
        self.claim_from(page, State::Absent, waker)
    }

    /// Claims a page that was touched, whatever is known of it: the kernel says by `is_resident` whether it has it.
    pub(crate) fn claim_touched<'t>(
        &'t self,
        page: Page,
        waker: &'t dyn Wake,
        is_resident: impl Fn() -> bool,
    ) -> Result<Claim<'t>, Unclaimed> {
        loop {
            match self.claim(page, waker) {
                Ok(claim) => return Ok(claim),
                // Whoever fills it wakes everybody when it is settled; if that has just been, look again.
                Err(claimed) if claimed.is_claimed() && self.want(page) => return Err(Unclaimed::Filling),
                Err(State::Filling | State::Contended | State::Invalidated | State::Absent) => {}
                Err(State::Present) if is_resident() => return Err(Unclaimed::Resident),
                // It was filled, and the kernel has let go of it since, without having told us yet. Just to wake
                // would make the waiter fault for ever.
                Err(State::Present) => {
                    if let Ok(claim) = self.claim_from(page, State::Present, waker) {
                        return Ok(claim);
                    }
                }
                Err(State::Poisoned) => return Err(Unclaimed::Poisoned),
            }
        }
    }

    /// Has whoever fills the page wake its waiters once more when it is settled. False if nobody fills it any more.
    pub(crate) fn want(&self, page: Page) -> bool {
        let wanted = self.exchange(page, State::Filling, State::Contended);
        matches!(wanted, Ok(()) | Err(State::Contended | State::Invalidated))
    }

    /// Claims a page whose state is `from`: `Present`, when it turns out that the kernel has let it go since.
    pub(crate) fn claim_from<'t>(
        &'t self,
        page: Page,
        from: State,
        waker: &'t dyn Wake,
    ) -> Result<Claim<'t>, State> {
        self.exchange(page, from, State::Filling)?;
        Ok(Claim { table: self, waker, span: page.span() })
    }

    /// A claim that was [kept](Claim::keep).
    pub(crate) fn resume<'t>(&'t self, span: Span, waker: &'t dyn Wake) -> Claim<'t> {
        Claim { table: self, waker, span }
    }

    /// Claims the first page of `span` and those behind it that are absent too.
    pub(crate) fn claim_run<'t>(&'t self, span: Span, waker: &'t dyn Wake) -> Result<Claim<'t>, State> {
        let pages = self.exchange_run(span, State::Absent, State::Filling);
        let span = span.prefix(pages);
        if span.is_empty() { self.claim(span.first, waker) } else { Ok(Claim { table: self, waker, span }) }
    }

    /// Waits as long as somebody fills the page.
    pub(crate) fn wait_while_filling(&self, page: Page) {
        self.settled.wait_while(|| self.state(page).is_claimed());
    }

    /// Takes note that the kernel has let go of a span. Pages being filled will be absent when they have been.
    ///
    /// Takes time by what was done with pages of it, not by how many there are: who lets go of a tebibyte may do so again and again.
    pub(crate) fn invalidate(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let at = rest.first.0;
            let (used, bit) = self.used(rest.first);
            let pages =
                if at.is_multiple_of(BLOCKS) && rest.pages >= BLOCKS && used.load(Ordering::SeqCst) == 0 {
                    BLOCKS
                } else if at.is_multiple_of(BLOCK) && rest.pages >= BLOCK {
                    if used.load(Ordering::SeqCst) & bit != 0 {
                        self.forget_block(rest.first);
                    }
                    BLOCK
                } else {
                    let pages = rest.pages.min(PAGES_PER_WORD - at % PAGES_PER_WORD);
                    self.forget_in_word(rest.first, pages);
                    pages
                };
            rest = rest.without_prefix(pages);
        }
    }

    fn forget_block(&self, first: Page) {
        let (used, bit) = self.used(first);
        // First: a claim that is made from now on, and not seen below, sets it again.
        used.fetch_and(!bit, Ordering::SeqCst);
        let words = (0..BLOCK).step_by(PAGES_PER_WORD);
        let left = words.fold(0, |left, at| left | self.forget_in_word(Page(first.0 + at), PAGES_PER_WORD));
        if left != 0 {
            used.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// For pages of one word, from `first` on. The word as it is then.
    fn forget_in_word(&self, first: Page, pages: usize) -> u64 {
        let (word, shift) = self.word(first);
        let mask = (u64::MAX >> (u64::BITS - STATE_BITS * pages as u32)) << shift;
        let after = |bits: u64| bits & !mask | forgotten(bits) & mask;
        let changed = |bits: u64| Some(after(bits)).filter(|&after| after != bits);
        match word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, changed) {
            Ok(before) => after(before),
            Err(same) => same,
        }
    }

    /// The kernel does not have the page: it was let go, if it was filled.
    pub(crate) fn forget_present(&self, page: Page) {
        let _ = self.exchange(page, State::Present, State::Absent);
    }

    fn exchange(&self, page: Page, from: State, to: State) -> Result<(), State> {
        let (word, shift) = self.word(page);
        let mask = STATE_MASK << shift;
        word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |bits| {
            (State::from_bits(bits >> shift) == from).then_some(bits & !mask | (to as u64) << shift)
        })
        .map(|_| self.use_block(page))
        .map_err(|bits| State::from_bits(bits >> shift))
    }

    /// Changes the pages from the span's first on that are `from`, as far as they are; says how many. Sixteen at a time.
    fn exchange_run(&self, span: Span, from: State, to: State) -> usize {
        let mut done = 0;
        while done < span.pages {
            let page = Page(span.first.0 + done);
            let most = (PAGES_PER_WORD - page.0 % PAGES_PER_WORD).min(span.pages - done);
            let (word, shift) = self.word(page);
            let mut pages = 0;
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |bits| {
                let same = ((bits >> shift) ^ from.repeated()).trailing_zeros() / STATE_BITS;
                pages = most.min(same as usize);
                let mask = (u64::MAX >> (u64::BITS - STATE_BITS * pages.max(1) as u32)) << shift;
                (pages > 0).then_some(bits & !mask | to.repeated() << shift & mask)
            });
            if pages > 0 {
                self.use_block(page);
            }
            done += pages;
            if pages < most {
                break;
            }
        }
        done
    }

    /// Settles a claimed page; says whether somebody may have wanted it since.
    fn settle(&self, page: Page, to: State) -> bool {
        if self.exchange(page, State::Filling, to).is_ok() {
            return false;
        }
        let settled = self.exchange(page, State::Contended, to);
        let settled = settled.or_else(|_| self.exchange(page, State::Invalidated, State::Absent));
        debug_assert!(settled.is_ok(), "{page:?} was claimed, and is {settled:?}");
        true
    }

    fn word(&self, page: Page) -> (&AtomicU64, u32) {
        let shift = (page.0 % PAGES_PER_WORD) as u32 * STATE_BITS;
        (&self.words.deref()[self.blocks + page.0 / PAGES_PER_WORD], shift)
    }

    /// Where it says whether a page's block is used.
    fn used(&self, page: Page) -> (&AtomicU64, u64) {
        (&self.words.deref()[page.0 / BLOCKS], 1 << (page.0 / BLOCK % u64::BITS as usize))
    }

    /// After a state has changed: before it, somebody who forgets the block could take that back.
    fn use_block(&self, page: Page) {
        let (used, bit) = self.used(page);
        if used.load(Ordering::SeqCst) & bit == 0 {
            used.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

impl State {
    /// Whether somebody is filling it.
    pub(crate) const fn is_claimed(self) -> bool {
        matches!(self, Self::Filling | Self::Contended | Self::Invalidated)
    }

    /// The state in every place of a word.
    const fn repeated(self) -> u64 {
        self as u64 * (u64::MAX / STATE_MASK)
    }

    const fn from_bits(bits: u64) -> Self {
        match bits & STATE_MASK {
            0 => Self::Absent,
            1 => Self::Filling,
            2 => Self::Contended,
            3 => Self::Present,
            4 => Self::Poisoned,
            _ => Self::Invalidated,
        }
    }
}

/// The right to fill some pages, and the duty to settle them. What is not settled is given back when it is dropped.
#[must_use = "dropping a claim gives its pages back"]
pub(crate) struct Claim<'t> {
    table: &'t PageTable,
    waker: &'t dyn Wake,
    span: Span,
}

impl Claim<'_> {
    /// The pages that are still to be settled.
    pub(crate) const fn span(&self) -> Span {
        self.span
    }

    /// Claims the rest of `block`, which holds this claim, if all of it is absent; claims no more otherwise.
    pub(crate) fn grow(&mut self, block: Span) {
        let before = block.prefix(self.span.first.0 - block.first.0);
        let after = block.without_prefix(before.pages + self.span.pages);
        let Some(mut before) = self.beside(before) else { return };
        let Some(mut after) = self.beside(after) else { return };
        // They are this claim's now, and have nothing to give back.
        (before.span.pages, after.span.pages) = (0, 0);
        self.span = block;
    }

    /// A claim of all of a span. On an early return, the dropped claim gives back what it has.
    fn beside(&self, span: Span) -> Option<Self> {
        let (table, waker) = (self.table, self.waker);
        let pages = table.exchange_run(span, State::Absent, State::Filling);
        let claim = Self { table, waker, span: span.prefix(pages) };
        (pages == span.pages).then_some(claim)
    }

    /// Keeps its pages claimed until it is [resumed](PageTable::resume).
    pub(crate) fn keep(mut self) -> Span {
        let span = self.span;
        self.span.pages = 0;
        span
    }

    /// Gives its pages back, and wakes only those whose faults have met it. Whoever it was for is to be served or woken later.
    pub(crate) fn give_back_asleep(mut self) {
        self.settle(self.span.pages, State::Absent);
    }

    /// Splits the first `pages` of them off.
    pub(crate) fn split_off(&mut self, pages: usize) -> Self {
        let first = Self { table: self.table, waker: self.waker, span: self.span.prefix(pages) };
        self.span = self.span.without_prefix(pages);
        first
    }

    /// Settles the first `pages` of them.
    pub(crate) fn settle(&mut self, pages: usize, to: State) {
        let mut rest = self.span.prefix(pages);
        loop {
            rest = rest.without_prefix(self.table.exchange_run(rest, State::Filling, to));
            if rest.is_empty() {
                break;
            }
            if self.table.settle(rest.first, to) {
                self.waker.wake(rest.first.span());
            }
            rest = rest.without_prefix(1);
        }
        self.table.settled.notify_all();
        self.span = self.span.without_prefix(pages);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.span.is_empty() {
            let span = self.span;
            self.settle(span.pages, State::Absent);
            self.waker.wake(span);
        }
    }
}

/// What the states of a word are when all of its pages are let go: absent, or forgotten by whoever fills them.
const fn forgotten(bits: u64) -> u64 {
    let ones = u64::MAX / STATE_MASK;
    let (low, middle, high) = (bits & ones, bits >> 1 & ones, bits >> 2 & ones);
    // Filling is 1, Contended 2, Invalidated 5.
    let claimed = (low ^ middle) & !high | low & high;
    claimed * State::Invalidated as u64
}

/// Pages that are passed over at once where nothing was done with any of them, and blocks of them that a word tells of.
const BLOCK: usize = 1024;
const BLOCKS: usize = BLOCK * u64::BITS as usize;
const STATE_BITS: u32 = 4;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const PAGES_PER_WORD: usize = 16;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use proptest::prelude::*;
    use std::thread;

    #[derive(Default)]
    struct Woken(Mutex<Vec<Span>>);

    impl Wake for Woken {
        fn wake(&self, span: Span) {
            self.0.lock().push(span);
        }
    }

    fn table(pages: usize) -> PageTable {
        PageTable::new(NonZeroUsize::new(pages).unwrap()).unwrap()
    }

    /// Miri needs minutes for more.
    const PAGES: usize = if cfg!(miri) { 2_000 } else { 200_000 };

    proptest! {
        /// As page by page; and what was forgotten is forgotten again after it has been claimed anew.
        #[test]
        fn a_span_is_forgotten_as_its_pages_are(
            states in prop::collection::vec((0usize..PAGES, 0usize..6), 0..50), cut in (0usize..PAGES, 0usize..PAGES),
        ) {
            let (table, woken) = (table(PAGES), Woken::default());
            let span = Span { first: Page(cut.0.min(cut.1)), pages: cut.0.abs_diff(cut.1) };
            let all = [
                State::Absent, State::Filling, State::Contended, State::Present, State::Poisoned, State::Invalidated,
            ];
            for _ in 0..2 {
                for &(page, state) in &states {
                    let _ = table.exchange(Page(page), State::Absent, all[state]);
                }
                let before: Vec<_> = states.iter().map(|&(page, _)| table.state(Page(page))).collect();
                table.invalidate(span);
                for (&(page, _), before) in states.iter().zip(before) {
                    let after = match before {
                        before if !span.contains(Page(page)) => before,
                        State::Absent | State::Present | State::Poisoned => State::Absent,
                        State::Filling | State::Contended | State::Invalidated => State::Invalidated,
                    };
                    prop_assert_eq!(table.state(Page(page)), after, "page {}", page);
                }
            }
            prop_assert!(woken.0.lock().is_empty());
        }
    }

    #[test]
    fn a_page_is_claimed_by_one() {
        let (table, woken) = (table(100), Woken::default());
        let mut claim = table.claim(Page(40), &woken).ok().unwrap();
        assert_eq!(table.claim(Page(40), &woken).err(), Some(State::Filling));
        assert_eq!(table.state(Page(39)), State::Absent);
        claim.settle(1, State::Present);
        drop(claim);
        assert_eq!(table.claim(Page(40), &woken).err(), Some(State::Present));
        assert!(woken.0.lock().is_empty(), "settling leaves waking to the kernel's fill");
    }

    #[test]
    fn a_fault_on_a_page_being_filled_is_woken_when_it_is_settled() {
        let (table, woken) = (table(100), Woken::default());
        let mut claim = table.claim(Page(40), &woken).ok().unwrap();
        assert!(table.want(Page(40)) && table.want(Page(40)));
        assert_eq!(table.state(Page(40)), State::Contended);
        claim.settle(1, State::Present);
        assert_eq!(*woken.0.lock(), [Page(40).span()]);
        assert!(!table.want(Page(40)), "it was settled: look again");
    }

    #[test]
    fn a_dropped_claim_gives_back_and_wakes_what_was_not_settled() {
        let (table, woken) = (table(100), Woken::default());
        let mut claim = table.claim_run(Span { first: Page(30), pages: 10 }, &woken).ok().unwrap();
        claim.settle(4, State::Present);
        drop(claim);
        assert_eq!(*woken.0.lock(), [Span { first: Page(34), pages: 6 }]);
        assert_eq!((table.state(Page(33)), table.state(Page(34))), (State::Present, State::Absent));
    }

    #[test]
    fn a_run_ends_before_what_is_not_absent() {
        let (table, woken) = (table(100), Woken::default());
        table.claim(Page(35), &woken).ok().unwrap().settle(1, State::Poisoned);
        let claim = table.claim_run(Span { first: Page(30), pages: 10 }, &woken).ok().unwrap();
        assert_eq!(claim.span(), Span { first: Page(30), pages: 5 });
    }

    #[test]
    fn forgetting_makes_settled_pages_absent_and_claimed_ones_when_they_are_settled() {
        let (table, woken) = (table(200), Woken::default());
        table.claim_run(Span { first: Page(10), pages: 50 }, &woken).ok().unwrap().settle(50, State::Present);
        let claim = table.claim(Page(70), &woken).ok().unwrap();
        table.invalidate(Span { first: Page(0), pages: 200 });
        assert!((0..70).all(|page| table.state(Page(page)) == State::Absent));
        assert!(table.state(Page(70)).is_claimed() && table.want(Page(70)));
        let mut claim = claim;
        claim.settle(1, State::Present);
        assert_eq!(table.state(Page(70)), State::Absent, "it may have been let go after it was filled");
        assert_eq!(*woken.0.lock(), [Page(70).span()]);
    }

    #[test]
    fn who_waits_for_a_page_goes_on_when_it_is_settled_or_given_back() {
        for settle in [true, false] {
            let (table, woken) = (table(1), Woken::default());
            thread::scope(|scope| {
                let mut claim = table.claim(Page(0), &woken).ok().unwrap();
                let waiter = scope.spawn(|| table.wait_while_filling(Page(0)));
                while !table.settled.has_waiters() {
                    thread::yield_now();
                }
                if settle {
                    claim.settle(1, State::Present);
                }
                drop(claim);
                waiter.join().unwrap();
            });
        }
    }

    #[test]
    fn many_threads_claim_each_page_once() {
        let pages = if cfg!(miri) { 50 } else { 10_000 };
        let (table, woken) = (table(pages), Woken::default());
        let claimed: usize = thread::scope(|scope| {
            let claim_all = || {
                let mut count = 0;
                for page in 0..pages {
                    if let Ok(mut claim) = table.claim(Page(page), &woken) {
                        claim.settle(1, State::Present);
                        count += 1;
                    }
                }
                count
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(claim_all)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(claimed, pages);
    }
}
