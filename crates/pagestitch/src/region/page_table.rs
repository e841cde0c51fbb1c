//! The page table: which pages somebody is filling. Four bits a page, and a page of it costs nothing until used.
//!
//! ```text
//!                      claim                       settle
//!        ┌─ Absent ───────────────▶ Filling ────────────────┬──▶ Present ───┐
//!        │    ▲                      │   │ another fault    └──▶ Poisoned ──┤
//!        │    │                      │   ▼                  ▲               │
//!        │    │                      │  Wanted ─────────────┘ and woken     │
//!        │    │                      ▼   ▼                                  │
//!        │    └─ claim dropped ── or settled as Forgotten: the page was     │
//!        │       let go under it (waiters woken: they fault again)          │
//!        └─────────────────────◀── forget (the page was let go) ────────────┘
//! ```
//!
//! `Wanted` is for the fault that comes between the kernel's fill and its settling: the page was filled and its
//! waiters woken, then let go and touched anew, and all that while the first claim stands. Who settles it wakes
//! again; a wake-up too many does no harm. `Forgotten` is for the letting go itself, if it is told while the claim stands:
//! nobody knows whether it came before the fill or after, and absent is always safe to say.
//!
//! The kernel's own page table is the truth about what is present; this one says who is at work, and remembers
//! what was done last. A [`Claim`] is the right to fill some pages. Nobody sleeps on a lost page: a claim that is
//! dropped unsettled, on whichever early exit, gives its pages back and wakes their waiters.

use pagestitch_kernel::sync::WaitingRoom;
use pagestitch_kernel::sync::atomic::{AtomicU64, Ordering};
use pagestitch_kernel::words::Words;
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;
use std::ops::Deref;

/// What was last done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing, or it was let go.
    Absent = 0,
    /// Somebody is filling it.
    Filling = 1,
    /// Somebody is filling it, and somebody else has taken a fault on it since.
    Wanted = 2,
    /// It was filled.
    Present = 3,
    /// It was poisoned.
    Poisoned = 4,
    /// Somebody is filling it, and it was let go since.
    Forgotten = 5,
}

/// Wakes the threads that wait for pages of a span, so that they try again.
pub(crate) trait Wake {
    fn wake(&self, span: Span);
}

/// The states of a region's pages.
#[derive(Debug)]
pub(crate) struct PageTable {
    words: Words,
    /// Where threads wait for a page that somebody else fills.
    settled: WaitingRoom,
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
        let words = NonZeroUsize::new(pages.get().div_ceil(PAGES_PER_WORD)).expect("at least one page");
        Ok(Self { words: Words::new(words)?, settled: WaitingRoom::new() })
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
                Err(State::Filling | State::Wanted | State::Forgotten | State::Absent) => {}
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
        let wanted = self.exchange(page, State::Filling, State::Wanted);
        matches!(wanted, Ok(()) | Err(State::Wanted | State::Forgotten))
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
    pub(crate) fn forget(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let aligned = rest.first.0.is_multiple_of(PAGES_PER_WORD);
            // A word of pages that nothing was done with is passed over at once: the span may be a tebibyte.
            if aligned && self.word(rest.first).0.load(Ordering::SeqCst) == 0 {
                rest = rest.without_prefix(PAGES_PER_WORD);
                continue;
            }
            for settled in [State::Present, State::Poisoned] {
                let _ = self.exchange(rest.first, settled, State::Absent);
            }
            for claimed in [State::Filling, State::Wanted] {
                let _ = self.exchange(rest.first, claimed, State::Forgotten);
            }
            rest = rest.without_prefix(1);
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
        .map(drop)
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
        let settled = self.exchange(page, State::Wanted, to);
        let settled = settled.or_else(|_| self.exchange(page, State::Forgotten, State::Absent));
        debug_assert!(settled.is_ok(), "{page:?} was claimed, and is {settled:?}");
        true
    }

    fn word(&self, page: Page) -> (&AtomicU64, u32) {
        let shift = (page.0 % PAGES_PER_WORD) as u32 * STATE_BITS;
        (&self.words.deref()[page.0 / PAGES_PER_WORD], shift)
    }
}

impl State {
    /// Whether somebody is filling it.
    pub(crate) const fn is_claimed(self) -> bool {
        matches!(self, Self::Filling | Self::Wanted | Self::Forgotten)
    }

    /// The state in every place of a word.
    const fn repeated(self) -> u64 {
        self as u64 * (u64::MAX / STATE_MASK)
    }

    const fn from_bits(bits: u64) -> Self {
        match bits & STATE_MASK {
            0 => Self::Absent,
            1 => Self::Filling,
            2 => Self::Wanted,
            3 => Self::Present,
            4 => Self::Poisoned,
            _ => Self::Forgotten,
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
        self.table.settled.tell();
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

const STATE_BITS: u32 = 4;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const PAGES_PER_WORD: usize = 16;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use parking_lot::Mutex;
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
        assert_eq!(table.state(Page(40)), State::Wanted);
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
        table.forget(Span { first: Page(0), pages: 200 });
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
                while !table.settled.is_occupied() {
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
