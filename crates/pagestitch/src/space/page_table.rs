//! The page table: the state of each page, and the claims of threads that fill pages. Four bits a
//! page; the kernel backs a page of the table only when it is first used.
//!
//! ```text
//!                      claim                       settle
//!        ┌─ Absent ───────────────▶ Filling ────────────────┬──▶ Present ───┐
//!        │    ▲                      │   │ another fault    └──▶ Poisoned ──┤
//!        │    │                      │   ▼                  ▲               │
//!        │    │                      │  Contended ──────────┘ and woken     │
//!        │    │                      ▼   ▼                                  │
//!        │    └─ claim dropped ── or settled while Invalidated: the page    │
//!        │       was discarded meanwhile (waiters woken: they fault again)  │
//!        └─────────────────────◀── invalidate (the page was discarded) ─────┘
//! ```
//!
//! `Contended`: a fault arrives while the claim stands. The page may have been filled and its
//! waiters woken, then discarded and touched anew, before the claim was settled. Settling therefore
//! wakes the page's waiters again; a surplus wake-up is harmless.
//!
//! `Invalidated`: a discard is reported while the claim stands. It may have happened before the
//! fill or after it, and absent is the safe state for both, so the page becomes absent when it is
//! settled.
//!
//! The kernel's own page table decides which pages are present. This table records which pages are
//! being filled, and the last known state of the others.

use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::cache::{LINE, prefetch};
use pagestitch_kernel::sync::EventCount;
use pagestitch_kernel::sync::atomic::{AtomicU64, Ordering};
use pagestitch_kernel::{Errno, Page, Span};
use std::mem;
use std::num::NonZeroUsize;
use std::ops::Deref;

/// The state of a page: the last thing done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageState {
    /// It was never filled, or was discarded.
    Absent = 0,
    /// A thread has a claim on it.
    Filling = 1,
    /// A thread has a claim on it, and a fault on it has arrived since.
    Contended = 2,
    /// It was filled.
    Present = 3,
    /// It was poisoned.
    Poisoned = 4,
    /// A thread has a claim on it, and a discard of it has been reported since.
    Invalidated = 5,
}

/// Wakes the threads that wait in faults on pages of a span, so that they fault again.
pub(crate) trait Wake {
    fn wake(&self, span: Span);
}

/// The states of a region's pages.
///
/// It is created all absent, with the region. A serving thread claims absent pages, fills them, and
/// settles each as present or poisoned; a discard makes pages absent again. All of this is
/// lock-free: each step is one atomic exchange in a word of 16 states. Only [`wait_while_filling`]
/// blocks. The table outlives the region in the handles to its metrics.
///
/// Sixteen pages share a word because a page then takes 4 bits, and one exchange claims or settles sixteen
/// neighbours. Threads that fault on pages of one word repeat some exchanges. A word for each page would
/// not end that: the words would still share a cache line, and the kernel has one lock for 512 pages.
///
/// ```text
///   words:  | used bits: 1 per BLOCK of pages |  states: 16 pages per word, 4 bits each    |
///           0                                 blocks                                        end
/// ```
///
/// [`wait_while_filling`]: Self::wait_while_filling
#[derive(Debug)]
pub(crate) struct PageTable {
    /// First the used bits, then the states.
    ///
    /// Invariant: the used bit of a [`BLOCK`] of pages is set if a state in it is not absent,
    /// except between a state's change and the store of the bit that follows.
    ///
    /// Invariant: a state that [is claimed](PageState::is_claimed) belongs to exactly one
    /// [`Claim`], or to a span that was [kept](Claim::keep) and not yet [resumed](Self::resume).
    words: AtomicTable,
    /// The number of words that hold used bits.
    blocks: usize,
    /// Notified after pages are settled, for threads that wait for another thread's claim.
    settled: EventCount,
}

/// The reason why a faulting page could not be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unclaimed {
    /// Another thread has a claim on it, and wakes its waiters when it settles the page.
    Filling,
    /// The kernel has it.
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

    /// Prefetches the table, if it is small.
    pub(crate) fn prefetch(&self) {
        prefetch(self);
        if self.words.len() <= FEW_WORDS {
            prefetch(&self.words[..]);
        }
    }

    /// Prefetches the state of a page.
    #[inline]
    pub(crate) fn prefetch_state(&self, page: Page) {
        prefetch(self.word(page).0);
    }

    pub(crate) fn state(&self, page: Page) -> PageState {
        let (word, shift) = self.word(page);
        PageState::from_bits(word.load(Ordering::SeqCst) >> shift)
    }

    /// Calls `each` with the present pages of a span. Parts without a page take little time.
    pub(crate) fn each_present(&self, span: Span, mut each: impl FnMut(Page)) {
        let mut page = span.first;
        while page < span.end() {
            let (word, shift) = self.word(page);
            if word.load(Ordering::SeqCst) >> shift == 0 {
                page = Page((page.0 / PAGES_PER_WORD + 1) * PAGES_PER_WORD);
                continue;
            }
            if self.state(page) == PageState::Present {
                each(page);
            }
            page = Page(page.0 + 1);
        }
    }

    /// Claims a page that is absent; returns its state otherwise.
    pub(crate) fn claim<'t>(&'t self, page: Page, waker: &'t dyn Wake) -> Result<Claim<'t>, PageState> {
        self.claim_from(page, PageState::Absent, waker)
    }

    /// Claims the page of a fault, also if the table has it as present and the kernel, by
    /// `is_resident`, does not have it. The absent pages of `unit`, which holds the page, are claimed
    /// with it, as far as they lie around it without a gap.
    pub(crate) fn claim_touched<'t>(
        &'t self,
        page: Page,
        unit: Span,
        waker: &'t dyn Wake,
        is_resident: impl Fn() -> bool,
    ) -> Result<Claim<'t>, Unclaimed> {
        loop {
            match self.claim_unit(page, unit, waker) {
                Ok(claim) => return Ok(claim),
                // The claiming thread wakes all waiters when it settles the page. If it has just
                // done so, `request_wake` is false: look again.
                Err(claimed) if claimed.is_claimed() && self.request_wake(page) => {
                    return Err(Unclaimed::Filling);
                }
                Err(
                    PageState::Filling | PageState::Contended | PageState::Invalidated | PageState::Absent,
                ) => {}
                Err(PageState::Present) if is_resident() => return Err(Unclaimed::Resident),
                // The page was filled, and its discard has not been reported yet. Only waking the
                // faulting thread would make it fault forever.
                Err(PageState::Present) => {
                    if let Ok(claim) = self.claim_from(page, PageState::Present, waker) {
                        return Ok(claim);
                    }
                }
                Err(PageState::Poisoned) => return Err(Unclaimed::Poisoned),
            }
        }
    }

    /// Claims an absent page and the absent pages around it in its unit; returns its state otherwise.
    ///
    /// The claim begins at the unit's first page, as the claim of a prefetch does: two threads that
    /// want the unit meet at its first word, and one of them gets all of it. From the page outwards,
    /// each would get a part, and the unit would be read twice.
    #[inline]
    fn claim_unit<'t>(&'t self, page: Page, unit: Span, waker: &'t dyn Wake) -> Result<Claim<'t>, PageState> {
        if unit.pages > 1 {
            let mut claim = self.claim_run(unit, waker);
            if claim.as_ref().is_ok_and(|claim| claim.span.contains(page)) {
                return claim;
            }
            // A page between is not absent.
            claim.iter_mut().for_each(Claim::release_without_wake);
        }
        let mut claim = self.claim(page, waker)?;
        claim.grow_within(unit);
        Ok(claim)
    }

    /// The first page of a span that is not present; reads 16 states at a time.
    pub(crate) fn first_missing(&self, span: Span) -> Option<Page> {
        let mut rest = span;
        while !rest.is_empty() {
            let most = (PAGES_PER_WORD - rest.first.0 % PAGES_PER_WORD).min(rest.pages);
            let (word, shift) = self.word(rest.first);
            let others = (word.load(Ordering::SeqCst) >> shift) ^ PageState::Present.repeated();
            let present = (others.trailing_zeros() / STATE_BITS) as usize;
            if present < most {
                return Some(Page(rest.first.0 + present));
            }
            rest = rest.without_prefix(most);
        }
        None
    }

    /// Makes the claiming thread wake the page's waiters once more when it settles the page. False
    /// if no thread has a claim on it any more.
    pub(crate) fn request_wake(&self, page: Page) -> bool {
        let wanted = self.exchange(page, PageState::Filling, PageState::Contended);
        matches!(wanted, Ok(()) | Err(PageState::Contended | PageState::Invalidated))
    }

    /// Claims a page whose state is `from`. `Present` is right if the kernel does not have the
    /// page.
    pub(crate) fn claim_from<'t>(
        &'t self,
        page: Page,
        from: PageState,
        waker: &'t dyn Wake,
    ) -> Result<Claim<'t>, PageState> {
        self.exchange(page, from, PageState::Filling)?;
        Ok(Claim { table: self, waker, span: page.span() })
    }

    /// Claims the first page of a span and those that follow it, as far as they are present, to take
    /// them away. The error is the state of the first page.
    pub(crate) fn claim_present<'t>(
        &'t self,
        span: Span,
        waker: &'t dyn Wake,
    ) -> Result<Claim<'t>, PageState> {
        let pages = self.exchange_run(span, PageState::Present, PageState::Filling);
        let span = span.prefix(pages);
        match span.is_empty() {
            true => self.claim_from(span.first, PageState::Present, waker),
            false => Ok(Claim { table: self, waker, span }),
        }
    }

    /// Continues a claim that was [kept](Claim::keep).
    pub(crate) fn resume<'t>(&'t self, span: Span, waker: &'t dyn Wake) -> Claim<'t> {
        Claim { table: self, waker, span }
    }

    /// Claims the first page of `span`, and the absent pages that follow it without a gap.
    pub(crate) fn claim_run<'t>(&'t self, span: Span, waker: &'t dyn Wake) -> Result<Claim<'t>, PageState> {
        let pages = self.exchange_run(span, PageState::Absent, PageState::Filling);
        let span = span.prefix(pages);
        if span.is_empty() { self.claim(span.first, waker) } else { Ok(Claim { table: self, waker, span }) }
    }

    /// Blocks as long as a thread has a claim on the page.
    pub(crate) fn wait_while_filling(&self, page: Page) {
        self.settled.wait_while(|| self.state(page).is_claimed());
    }

    /// Records that a span was discarded. A claimed page becomes absent when its claim is settled.
    ///
    /// The cost depends on the used blocks of the span, not on its length, because an owner may
    /// discard a tebibyte again and again.
    pub(crate) fn invalidate(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let at = rest.first.0;
            let (used, bit) = self.used(rest.first);
            let pages = if at % BLOCKS == 0 && rest.pages >= BLOCKS && used.load(Ordering::SeqCst) == 0 {
                BLOCKS
            } else if at % BLOCK == 0 && rest.pages >= BLOCK {
                if used.load(Ordering::SeqCst) & bit != 0 {
                    self.invalidate_block(rest.first);
                }
                BLOCK
            } else {
                let pages = rest.pages.min(PAGES_PER_WORD - at % PAGES_PER_WORD);
                self.invalidate_in_word(rest.first, pages);
                pages
            };
            rest = rest.without_prefix(pages);
        }
    }

    fn invalidate_block(&self, first: Page) {
        let (used, bit) = self.used(first);
        // The bit is cleared first: a claim that comes later, and that the loop below misses, sets
        // it again.
        used.fetch_and(!bit, Ordering::SeqCst);
        let words = (0..BLOCK).step_by(PAGES_PER_WORD);
        let left =
            words.fold(0, |left, at| left | self.invalidate_in_word(Page(first.0 + at), PAGES_PER_WORD));
        if left != 0 {
            used.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Invalidates pages of one word, from `first` on. Returns the word after the change.
    fn invalidate_in_word(&self, first: Page, pages: usize) -> u64 {
        let (word, shift) = self.word(first);
        let mask = (u64::MAX >> (u64::BITS - STATE_BITS * pages as u32)) << shift;
        let after = |bits: u64| bits & !mask | invalidated(bits) & mask;
        let changed = |bits: u64| Some(after(bits)).filter(|&after| after != bits);
        match word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, changed) {
            Ok(before) => after(before),
            Err(same) => same,
        }
    }

    /// Makes absent pages present, before a thread can touch them.
    pub(crate) fn mark_present(&self, span: Span) {
        self.exchange_run(span, PageState::Absent, PageState::Present);
    }

    /// Makes a present page absent, because the kernel does not have it.
    pub(crate) fn mark_absent(&self, page: Page) {
        let _ = self.exchange(page, PageState::Present, PageState::Absent);
    }

    /// Makes a poisoned page absent, because its marker was discarded.
    pub(crate) fn unpoison(&self, page: Page) {
        let _ = self.exchange(page, PageState::Poisoned, PageState::Absent);
    }

    fn exchange(&self, page: Page, from: PageState, to: PageState) -> Result<(), PageState> {
        let (word, shift) = self.word(page);
        let mask = STATE_MASK << shift;
        word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |bits| {
            (PageState::from_bits(bits >> shift) == from).then_some(bits & !mask | (to as u64) << shift)
        })
        .map(|_| self.use_block(page))
        .map_err(|bits| PageState::from_bits(bits >> shift))
    }

    /// Changes the leading pages of the span whose state is `from` to `to`, 16 at a time. Returns
    /// their number.
    fn exchange_run(&self, span: Span, from: PageState, to: PageState) -> usize {
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

    /// Settles a claimed page. True if a fault on it may have arrived since, so that its waiters
    /// must be woken.
    fn settle(&self, page: Page, to: PageState) -> bool {
        if self.exchange(page, PageState::Filling, to).is_ok() {
            return false;
        }
        let settled = self.exchange(page, PageState::Contended, to);
        let settled = settled.or_else(|_| self.exchange(page, PageState::Invalidated, PageState::Absent));
        debug_assert!(settled.is_ok(), "{page:?} was claimed, and is {settled:?}");
        true
    }

    fn word(&self, page: Page) -> (&AtomicU64, u32) {
        let shift = (page.0 % PAGES_PER_WORD) as u32 * STATE_BITS;
        (&self.words.deref()[self.blocks + page.0 / PAGES_PER_WORD], shift)
    }

    /// The word and the bit that tell whether a page's block is used.
    fn used(&self, page: Page) -> (&AtomicU64, u64) {
        (&self.words.deref()[page.0 / BLOCKS], 1 << (page.0 / BLOCK % u64::BITS as usize))
    }

    /// Sets the used bit of a page's block. Called after the state changes: before it, a concurrent
    /// `invalidate` could clear the bit again.
    fn use_block(&self, page: Page) {
        let (used, bit) = self.used(page);
        if used.load(Ordering::SeqCst) & bit == 0 {
            used.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

impl PageState {
    /// True if a thread has a claim on the page.
    pub(crate) const fn is_claimed(self) -> bool {
        matches!(self, Self::Filling | Self::Contended | Self::Invalidated)
    }

    /// A word with this state for all of its 16 pages.
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

/// The exclusive right to fill some pages, and the duty to settle them.
///
/// A claim starts at one absent page, or at a run of them; [`grow`](Self::grow) extends it to a
/// block. [`settle`](Self::settle) takes pages off its front as they are installed. An asynchronous
/// fetch [keeps](Self::keep) the pages claimed, and the reply [resumes](PageTable::resume) the
/// claim. Dropping a claim, on any early exit, makes its unsettled pages absent and wakes their
/// waiters, so that no thread sleeps on a lost page.
#[must_use = "dropping a claim makes its pages absent"]
pub(crate) struct Claim<'t> {
    table: &'t PageTable,
    waker: &'t dyn Wake,
    /// Invariant: the states of these pages are claimed, by this claim alone.
    span: Span,
}

impl Claim<'_> {
    /// The pages that are not settled yet.
    pub(crate) const fn span(&self) -> Span {
        self.span
    }

    /// Claims the rest of `block`, which shares a page with this claim, if all of the rest is absent;
    /// claims no more otherwise.
    pub(crate) fn grow(&mut self, block: Span) {
        let (own, first, end) = (self.span, self.span.first.0, self.span.end().0);
        if own.is_empty() || block.end().0 <= first || end <= block.first.0 {
            return;
        }
        let before = block.prefix(first.saturating_sub(block.first.0));
        let after = block.without_prefix(end - block.first.0);
        let Some(mut before) = self.claim_all(before) else { return };
        let Some(mut after) = self.claim_all(after) else { return };
        let pages = before.span.pages + own.pages + after.span.pages;
        self.span = Span { first: Page(first - before.span.pages), pages };
        // This claim has their pages now, so their drops must not make any page absent.
        (before.span.pages, after.span.pages) = (0, 0);
    }

    /// Claims the absent pages of a span, which holds this claim, as far as they continue the
    /// claim.
    #[inline]
    pub(crate) fn grow_within(&mut self, span: Span) {
        if span.pages > 1 {
            self.grow_to_neighbours(span);
        }
    }

    fn grow_to_neighbours(&mut self, span: Span) {
        let own = self.span;
        let after = span.without_prefix(own.end().0.saturating_sub(span.first.0));
        let after = self.table.exchange_run(after, PageState::Absent, PageState::Filling);
        let before = span.prefix(own.first.0.saturating_sub(span.first.0));
        let absent =
            |page: &Page| self.table.exchange_run(page.span(), PageState::Absent, PageState::Filling) == 1;
        let before = before.iter().rev().take_while(absent).count();
        self.span = Span { first: Page(own.first.0 - before), pages: before + own.pages + after };
    }

    /// Claims all pages of a span, or none: a claim of a part is dropped.
    fn claim_all(&self, span: Span) -> Option<Self> {
        let (table, waker) = (self.table, self.waker);
        let pages = table.exchange_run(span, PageState::Absent, PageState::Filling);
        let claim = Self { table, waker, span: span.prefix(pages) };
        (pages == span.pages).then_some(claim)
    }

    /// Gives back all of its pages but one, and wakes their waiters.
    pub(crate) fn shrink_to(&mut self, page: Page) {
        drop(self.split_off(page.0 - self.span.first.0));
        let page = self.split_off(1);
        drop(mem::replace(self, page));
    }

    /// Gives back its pages outside of a span, and wakes their waiters. False if there are none.
    pub(crate) fn shrink_within(&mut self, span: Span) -> bool {
        let before = span.first.0.saturating_sub(self.span.first.0).min(self.span.pages);
        drop(self.split_off(before));
        let after = self.span.end().0.saturating_sub(span.end().0).min(self.span.pages);
        let inside = self.split_off(self.span.pages - after);
        drop(mem::replace(self, inside));
        before + after > 0
    }

    /// Keeps its pages claimed until it is [resumed](PageTable::resume).
    pub(crate) fn keep(mut self) -> Span {
        let span = self.span;
        self.span.pages = 0;
        span
    }

    /// Makes the pages absent, and wakes only the threads whose faults arrived during the claim.
    /// The caller must serve or wake the thread for which the claim was made.
    pub(crate) fn release_without_wake(&mut self) {
        self.settle(self.span.pages, PageState::Absent);
    }

    /// Splits off the first `pages` pages as a claim of their own.
    pub(crate) fn split_off(&mut self, pages: usize) -> Self {
        let first = Self { table: self.table, waker: self.waker, span: self.span.prefix(pages) };
        self.span = self.span.without_prefix(pages);
        first
    }

    /// Settles the first `pages` pages as `to`.
    pub(crate) fn settle(&mut self, pages: usize, to: PageState) {
        let mut rest = self.span.prefix(pages);
        loop {
            rest = rest.without_prefix(self.table.exchange_run(rest, PageState::Filling, to));
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
            self.settle(span.pages, PageState::Absent);
            self.waker.wake(span);
        }
    }
}

/// The states of a word after all of its pages are discarded: claimed pages are invalidated, and
/// all others absent.
const fn invalidated(bits: u64) -> u64 {
    let ones = u64::MAX / STATE_MASK;
    let (low, middle, high) = (bits & ones, bits >> 1 & ones, bits >> 2 & ones);
    // Filling is 1, Contended 2, Invalidated 5.
    let claimed = (low ^ middle) & !high | low & high;
    claimed * PageState::Invalidated as u64
}

/// Pages per used bit, and pages per word of used bits. `invalidate` skips such a group at once if
/// it is unused.
const BLOCK: usize = 1024;
const BLOCKS: usize = BLOCK * u64::BITS as usize;
const STATE_BITS: u32 = 4;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const PAGES_PER_WORD: usize = 16;
/// A table of so many words takes four cache lines.
const FEW_WORDS: usize = 4 * LINE / size_of::<u64>();

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

    /// Fewer under Miri, which needs minutes for more.
    const PAGES: usize = if cfg!(miri) { 2_000 } else { 200_000 };

    #[test]
    fn a_claim_grows_as_far_as_pages_are_absent_and_shrinks_to_one() {
        let (table, woken) = (table(100), Woken::default());
        let span = |first, pages| Span { first: Page(first), pages };
        let other = table.claim_run(span(35, 1), &woken).unwrap();
        let mut claim = table.claim_run(span(20, 1), &woken).unwrap();
        claim.grow_within(span(16, 32));
        assert_eq!(claim.span(), span(16, 19), "up to the other claim");
        drop(other);
        claim.grow_within(span(30, 10));
        assert_eq!(claim.span(), span(16, 24));
        let other = table.claim_run(span(5, 1), &woken).unwrap();
        claim.grow(span(5, 34));
        claim.grow(span(50, 9));
        assert_eq!(claim.span(), span(16, 24), "neither a part of a block, nor a block elsewhere");
        let _ = other.keep();
        claim.grow(span(30, 13));
        assert_eq!(claim.span(), span(16, 27), "a block that begins inside the claim");
        claim.grow_within(span(20, 2));
        claim.shrink_to(Page(17));
        assert_eq!(claim.span(), span(17, 1));
        for page in [15, 16, 18, 42, 43] {
            assert_eq!(table.state(Page(page)), PageState::Absent, "page {page}");
        }
        drop(claim);
        assert_eq!(*woken.0.lock(), [span(35, 1), span(16, 1), span(18, 25), span(17, 1)]);
    }

    proptest! {
        /// A span is invalidated as its pages one by one would be, also after they are claimed
        /// anew.
        #[test]
        fn invalidating_a_span_is_invalidating_each_page(
            states in prop::collection::vec((0usize..PAGES, 0usize..6), 0..50), cut in (0usize..PAGES, 0usize..PAGES),
        ) {
            let (table, woken) = (table(PAGES), Woken::default());
            let span = Span { first: Page(cut.0.min(cut.1)), pages: cut.0.abs_diff(cut.1) };
            let all = [
                PageState::Absent, PageState::Filling, PageState::Contended, PageState::Present, PageState::Poisoned, PageState::Invalidated,
            ];
            for _ in 0..2 {
                for &(page, state) in &states {
                    let _ = table.exchange(Page(page), PageState::Absent, all[state]);
                }
                let before: Vec<_> = states.iter().map(|&(page, _)| table.state(Page(page))).collect();
                table.invalidate(span);
                for (&(page, _), before) in states.iter().zip(before) {
                    let after = match before {
                        before if !span.contains(Page(page)) => before,
                        PageState::Absent | PageState::Present | PageState::Poisoned => PageState::Absent,
                        PageState::Filling | PageState::Contended | PageState::Invalidated => PageState::Invalidated,
                    };
                    prop_assert_eq!(table.state(Page(page)), after, "page {}", page);
                }
            }
            prop_assert!(woken.0.lock().is_empty());
        }
    }

    #[test]
    fn the_first_missing_page_is_the_first_that_is_not_present() {
        let (table, woken) = (table(200), Woken::default());
        let span = |first, pages| Span { first: Page(first), pages };
        let fill = |span| table.claim_run(span, &woken).unwrap().settle(span.pages, PageState::Present);
        fill(span(3, 90));
        fill(span(94, 50));
        table.claim(Page(144), &woken).unwrap().settle(1, PageState::Poisoned);
        for (within, missing) in [
            (span(0, 200), Some(0)),
            (span(3, 90), None),
            (span(3, 91), Some(93)),
            (span(94, 50), None),
            (span(100, 100), Some(144)),
            (span(95, 0), None),
        ] {
            assert_eq!(table.first_missing(within), missing.map(Page), "in {within:?}");
        }
    }

    #[test]
    fn a_claimed_page_cannot_be_claimed_again() {
        let (table, woken) = (table(100), Woken::default());
        let mut claim = table.claim(Page(40), &woken).ok().unwrap();
        assert_eq!(table.claim(Page(40), &woken).err(), Some(PageState::Filling));
        assert_eq!(table.state(Page(39)), PageState::Absent);
        claim.settle(1, PageState::Present);
        drop(claim);
        assert_eq!(table.claim(Page(40), &woken).err(), Some(PageState::Present));
        assert!(woken.0.lock().is_empty(), "settling leaves waking to the kernel's fill");
    }

    #[test]
    fn a_fault_on_a_page_being_filled_is_woken_when_it_is_settled() {
        let (table, woken) = (table(100), Woken::default());
        let mut claim = table.claim(Page(40), &woken).ok().unwrap();
        assert!(table.request_wake(Page(40)) && table.request_wake(Page(40)));
        assert_eq!(table.state(Page(40)), PageState::Contended);
        claim.settle(1, PageState::Present);
        assert_eq!(*woken.0.lock(), [Page(40).span()]);
        assert!(!table.request_wake(Page(40)), "a settled page has no claim");
    }

    #[test]
    fn a_dropped_claim_makes_unsettled_pages_absent_and_wakes_them() {
        let (table, woken) = (table(100), Woken::default());
        let mut claim = table.claim_run(Span { first: Page(30), pages: 10 }, &woken).ok().unwrap();
        claim.settle(4, PageState::Present);
        drop(claim);
        assert_eq!(*woken.0.lock(), [Span { first: Page(34), pages: 6 }]);
        assert_eq!((table.state(Page(33)), table.state(Page(34))), (PageState::Present, PageState::Absent));
    }

    #[test]
    fn a_claimed_run_ends_before_a_page_that_is_not_absent() {
        let (table, woken) = (table(100), Woken::default());
        table.claim(Page(35), &woken).ok().unwrap().settle(1, PageState::Poisoned);
        let claim = table.claim_run(Span { first: Page(30), pages: 10 }, &woken).ok().unwrap();
        assert_eq!(claim.span(), Span { first: Page(30), pages: 5 });
    }

    #[test]
    fn invalidating_makes_settled_pages_absent_at_once_and_claimed_pages_when_settled() {
        let (table, woken) = (table(200), Woken::default());
        table
            .claim_run(Span { first: Page(10), pages: 50 }, &woken)
            .ok()
            .unwrap()
            .settle(50, PageState::Present);
        let claim = table.claim(Page(70), &woken).ok().unwrap();
        table.invalidate(Span { first: Page(0), pages: 200 });
        assert!((0..70).all(|page| table.state(Page(page)) == PageState::Absent));
        assert!(table.state(Page(70)).is_claimed() && table.request_wake(Page(70)));
        let mut claim = claim;
        claim.settle(1, PageState::Present);
        assert_eq!(table.state(Page(70)), PageState::Absent, "the discard may have come after the fill");
        assert_eq!(*woken.0.lock(), [Page(70).span()]);
    }

    #[test]
    fn a_waiter_for_a_page_returns_when_it_is_settled_or_given_back() {
        for settle in [true, false] {
            let (table, woken) = (table(1), Woken::default());
            thread::scope(|scope| {
                let mut claim = table.claim(Page(0), &woken).ok().unwrap();
                let waiter = scope.spawn(|| table.wait_while_filling(Page(0)));
                while !table.settled.has_waiters() {
                    thread::yield_now();
                }
                if settle {
                    claim.settle(1, PageState::Present);
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
                        claim.settle(1, PageState::Present);
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
