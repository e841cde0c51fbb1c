//! The written pages of a region in a budget: which pages are dirty, and which are on their way to their
//! sources.
//!
//! ```text
//!              touched by a read: COPY, write-protected
//!   absent ─────────────────────────────────────────────▶ clean ──────MOVE──────▶ standby list ──▶ gone
//!      │                                                   │  ▲  ◀─COPY, protected─┘  ▲
//!      │                       first write: a fault removes│  │flush:                 │ written
//!      │                       the write protection        ▼  │written                │
//!      └─────────────────────────────────────────────────▶ dirty ──────MOVE──────▶ modified list
//!              touched by a write: COPY                         ◀──────MOVE────────┘
//!                                                                a touch, or an error of the source
//! ```
//!
//! The kernel tells the first write to a page (`UFFDIO_WRITEPROTECT`), and waits for the answer. So the
//! bit of a page is set before a byte of it changes, and a page whose bit is not set has the bytes of its
//! source. A page that leaves is looked at after its `UFFDIO_MOVE`, which ends all writes: a page without
//! the bit is clean. A record that the kernel keeps alone (`UFFD_FEATURE_WP_ASYNC`) would not do, because a
//! move drops its marker, and a write between a look at the marker and the move would be lost.
//!
//! A page becomes clean only by a move, because a move fails while a device has the page pinned: such a
//! page can change without a fault.
//!
//! An application that asks for changes is told of each page that is dirty, or was so since its last question.
//! A dirty page is told again and again, because its further writes are no faults.
//!
//! Two writes of one page must not overtake each other. So a page whose bytes are being written keeps its
//! place: it does not leave its region, and no other thread writes it.

use crate::space::ChangedPages;
use pagestitch_kernel::arena::{Arena, ArenaError};
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use pagestitch_kernel::sync::{EventCount, Mutex};
use pagestitch_kernel::{Errno, Page, Span};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The written pages of a region.
#[derive(Debug)]
pub(super) struct DirtyPages {
    /// Pages that may have other bytes than their sources.
    ///
    /// Invariant: only the thread with the claim of a page clears its bit. It is set before the page can
    /// be written.
    dirty: Bits,
    /// The number of set bits in `dirty`.
    count: DirtyCount,
    /// Pages whose bytes a thread is writing to their sources.
    ///
    /// Invariant: set with the claim of the page, by the thread that clears it.
    pub(super) writing: Bits,
    /// Pages that were dirty, and are no longer, since the application has last asked for changes. `None` in a
    /// region that it does not ask.
    cleaned: Option<Bits>,
    /// Chunks, by their numbers, whose sources have bytes that are not synced.
    pub(super) unsynced: Bits,
    /// The pages of a flush, while it copies them. Locked by each flush.
    pub(super) snapshots: Mutex<Arena>,
    pub(super) backoff: Backoff,
    /// True from the last flush on.
    is_ending: AtomicBool,
}

impl DirtyPages {
    /// For a region of `pages` pages and `chunks` chunks, of which a flush copies `at_once` pages at once.
    pub(super) fn new(
        pages: usize,
        chunks: usize,
        at_once: usize,
        tracks_changes: bool,
        count: DirtyCount,
    ) -> Result<Self, ArenaError> {
        let bits = |len| Bits::new(len).map_err(ArenaError::Refused);
        let at_once = NonZeroUsize::new(at_once).expect("a flush copies pages");
        Ok(Self {
            dirty: bits(pages)?,
            count,
            writing: bits(pages)?,
            cleaned: tracks_changes.then(|| bits(pages)).transpose()?,
            unsynced: bits(chunks)?,
            snapshots: Mutex::new(Arena::new(at_once)?),
            backoff: Backoff::new(),
            is_ending: AtomicBool::new(false),
        })
    }

    pub(super) fn is_dirty(&self, page: Page) -> bool {
        self.dirty.get(page.0)
    }

    /// A page may be written from now on, or could not be written back.
    pub(super) fn mark(&self, page: Page) {
        if !self.dirty.set(page.0) {
            self.count.add();
        }
    }

    /// The caller has the claim of the page, and no thread can write to it. Returns whether it was dirty.
    pub(super) fn unmark(&self, page: Page) -> bool {
        if let Some(cleaned) = self.cleaned.as_ref().filter(|_| self.is_dirty(page)) {
            // Before the other mark ends, because a page with neither has not changed.
            cleaned.set(page.0);
        }
        let was_dirty = self.dirty.clear(page.0);
        if was_dirty {
            self.count.sub();
        }
        was_dirty
    }

    /// The bytes of a page are written to its source from now on, if it is dirty. The caller has the claim of
    /// the page, and no thread can write to it. Returns whether it was dirty.
    pub(super) fn begin_writing(&self, page: Page) -> bool {
        let is_dirty = self.is_dirty(page);
        if is_dirty {
            // Before the other mark ends, because a flush must not find the page without one of them.
            self.writing.set(page.0);
            self.unmark(page);
        }
        is_dirty
    }

    /// The last flush begins, and the region ends after it. Signal handlers leave dirty pages alone from now on.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }

    /// The first page of a span that is dirty, or is being written back.
    pub(super) fn first_unwritten(&self, span: Span) -> Option<Page> {
        let (first, end) = (span.first.0, span.end().0);
        // Once more, because a page whose source has failed is dirty again.
        let marks = [&self.dirty, &self.writing, &self.dirty];
        let found = marks.map(|mark| mark.first_in(first, end));
        found.into_iter().flatten().min().map(Page)
    }

    /// The record of changes, if the region keeps one.
    pub(super) fn changed_pages(&self) -> Option<&dyn ChangedPages> {
        self.cleaned.as_ref().map(|_| self as &dyn ChangedPages)
    }
}

impl ChangedPages for DirtyPages {
    fn take(&self) -> Vec<Span> {
        let Some(cleaned) = &self.cleaned else { return Vec::new() };
        let mut runs: Vec<Span> = Vec::new();
        for word in 0..cleaned.words() {
            // In this order, because a page that is cleaned in between is found by the second look.
            let dirty = self.dirty.word(word);
            for run in runs_of(word, dirty | cleaned.take_word(word)) {
                match runs.last_mut().filter(|last| last.end() == run.first) {
                    Some(last) => last.pages += run.pages,
                    None => runs.push(run),
                }
            }
        }
        runs
    }

    fn give_back(&self, spans: &[Span]) {
        let Some(cleaned) = &self.cleaned else { return };
        for page in spans.iter().flat_map(|span| span.iter()) {
            cleaned.set(page.0);
        }
    }
}

/// The number of dirty pages of a region, which is a part of the number of its budget.
#[derive(Debug)]
pub(super) struct DirtyCount {
    /// The number of the region.
    own: AtomicUsize,
    /// That of all regions of the budget.
    all: Arc<AtomicUsize>,
}

impl DirtyCount {
    #[inline(always)] // a signal handler has a small stack
    fn add(&self) {
        self.own.fetch_add(1, Ordering::Relaxed);
        self.all.fetch_add(1, Ordering::Relaxed);
    }

    #[inline(always)]
    fn sub(&self) {
        self.own.fetch_sub(1, Ordering::Relaxed);
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for DirtyCount {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// The runs of set bits in a word.
fn runs_of(word: usize, mut bits: u64) -> impl Iterator<Item = Span> {
    std::iter::from_fn(move || {
        let first = bits.trailing_zeros();
        let pages = bits.checked_shr(first)?.trailing_ones();
        bits &= u64::MAX.checked_shl(first + pages).unwrap_or(0);
        Some(Span { first: Page(word * WORD + first as usize), pages: pages as usize })
    })
}

/// A bit for each of many things. Memory is taken only where bits are touched.
#[derive(Debug)]
pub(super) struct Bits(AtomicTable);

impl Bits {
    pub(super) fn new(len: usize) -> Result<Self, Errno> {
        let words = NonZeroUsize::new(len.div_ceil(WORD).max(1)).expect("at least one");
        AtomicTable::new(words).map(Self)
    }

    pub(super) fn get(&self, at: usize) -> bool {
        self.0[at / WORD].load(Ordering::SeqCst) & bit(at) != 0
    }

    /// Sets a bit, and returns it as it was.
    pub(super) fn set(&self, at: usize) -> bool {
        self.get(at) || self.0[at / WORD].fetch_or(bit(at), Ordering::SeqCst) & bit(at) != 0
    }

    /// Clears a bit, and returns it as it was.
    pub(super) fn clear(&self, at: usize) -> bool {
        self.get(at) && self.0[at / WORD].fetch_and(!bit(at), Ordering::SeqCst) & bit(at) != 0
    }

    /// The number of words.
    fn words(&self) -> usize {
        self.0.len()
    }

    fn word(&self, word: usize) -> u64 {
        self.0[word].load(Ordering::SeqCst)
    }

    /// Clears the bits of a word, and returns them as they were.
    fn take_word(&self, word: usize) -> u64 {
        match self.word(word) {
            0 => 0,
            _ => self.0[word].swap(0, Ordering::SeqCst),
        }
    }

    /// The first set bit from `first` on, before `end`.
    fn first_in(&self, first: usize, end: usize) -> Option<usize> {
        let mut at = first;
        while at < end {
            let word = self.0[at / WORD].load(Ordering::SeqCst) & (u64::MAX << (at % WORD));
            if word != 0 {
                return Some(at / WORD * WORD + word.trailing_zeros() as usize).filter(|&found| found < end);
            }
            at = (at / WORD + 1) * WORD;
        }
        None
    }
}

/// The bits of a word.
const WORD: usize = u64::BITS as usize;

const fn bit(at: usize) -> u64 {
    1 << (at % WORD)
}

/// The time for which dirty pages stay after their source has failed.
#[derive(Debug)]
pub(super) struct Backoff {
    began: Instant,
    /// The number of failures since the last success.
    failures: AtomicUsize,
    /// The end of the pause, in milliseconds since the begin.
    until: AtomicU64,
}

impl Backoff {
    fn new() -> Self {
        Self { began: Instant::now(), failures: AtomicUsize::new(0), until: AtomicU64::new(0) }
    }

    /// True while a write would fail again.
    pub(super) fn pauses(&self) -> bool {
        self.has_failed() && self.elapsed() < self.until.load(Ordering::Relaxed)
    }

    /// True if the last write has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failures.load(Ordering::SeqCst) > 0
    }

    /// A write has failed. True for the first failure since a success.
    pub(super) fn failed(&self) -> bool {
        let before = self.failures.fetch_add(1, Ordering::SeqCst);
        let pause = (FIRST_PAUSE * (1 << before.min(16))).min(LONGEST_PAUSE);
        self.until.store(self.elapsed() + pause.as_millis() as u64, Ordering::Relaxed);
        before == 0
    }

    /// A write has succeeded. True if the last one had failed.
    pub(super) fn succeeded(&self) -> bool {
        self.has_failed() && self.failures.swap(0, Ordering::SeqCst) > 0
    }

    fn elapsed(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }
}

/// The write-backs of a budget, so that a thread without room can wait for one.
#[derive(Debug, Default)]
pub(super) struct Writes {
    /// The number of threads that write.
    running: AtomicUsize,
    /// The number of runs that they have written, or could not write.
    steps: AtomicUsize,
    /// Notified at each step.
    ends: EventCount,
    /// The number of regions whose last write has failed.
    failing: AtomicUsize,
    /// The number of regions whose pages are written back.
    pub(super) regions: AtomicUsize,
    /// The number of dirty pages in all regions.
    dirty: Arc<AtomicUsize>,
}

impl Writes {
    /// A count for a further region, which has no dirty page yet.
    pub(super) fn count_of_region(&self) -> DirtyCount {
        DirtyCount { own: AtomicUsize::new(0), all: Arc::clone(&self.dirty) }
    }

    /// The number of dirty pages in regions.
    pub(super) fn dirty_pages(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self) {
        self.running.fetch_add(1, Ordering::SeqCst);
    }

    /// Some pages are not on their way any more.
    pub(super) fn pages_done(&self) {
        self.steps.fetch_add(1, Ordering::SeqCst);
        self.ends.notify_all();
    }

    pub(super) fn end(&self) {
        self.running.fetch_sub(1, Ordering::SeqCst);
        self.pages_done();
    }

    /// The write of a region with this backoff has failed. True for the first failure since a success.
    pub(super) fn failed(&self, backoff: &Backoff) -> bool {
        // Counted before the failure is known, because a success of another thread takes it back at once.
        self.failing.fetch_add(1, Ordering::SeqCst);
        let is_first = backoff.failed();
        self.failing.fetch_sub(usize::from(!is_first), Ordering::SeqCst);
        is_first
    }

    /// The write of a region with this backoff has succeeded, or the region ends.
    pub(super) fn succeeded(&self, backoff: &Backoff) {
        if backoff.succeeded() {
            self.failing.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The number of regions whose last write has failed.
    pub(super) fn failing(&self) -> usize {
        self.failing.load(Ordering::SeqCst)
    }

    /// The number of steps so far.
    pub(super) fn steps(&self) -> usize {
        self.steps.load(Ordering::SeqCst)
    }

    /// Waits until there are more steps than `steps`. Returns at once if no thread writes.
    pub(super) fn wait_for_next(&self, steps: usize) {
        let is_running = || self.running.load(Ordering::SeqCst) > 0;
        self.ends.wait_while(|| is_running() && self.steps() == steps);
    }

    /// Waits as long as a page is being written.
    pub(super) fn wait_while(&self, is_writing: impl Fn() -> bool) {
        self.ends.wait_while(is_writing);
    }
}

/// The pause after the first failure of a source. Each further failure doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn the_first_set_bit_is_found_inside_of_a_range() {
        let bits = Bits::new(300).unwrap();
        assert!([70, 200, 299].into_iter().all(|at| !bits.set(at)) && bits.set(70));
        let found = [(0, 300), (71, 300), (71, 200), (201, 300), (0, 70)];
        let found = found.map(|(first, end)| bits.first_in(first, end));
        assert_eq!(found, [Some(70), Some(200), None, Some(299), None]);
        assert!(bits.clear(70) && !bits.clear(70) && !bits.get(70));
    }

    #[test]
    fn a_source_that_fails_has_a_pause_until_it_succeeds() {
        let backoff = Backoff::new();
        assert!(!backoff.pauses() && backoff.failed() && !backoff.failed());
        assert!(backoff.pauses() && backoff.succeeded() && !backoff.pauses() && !backoff.succeeded());
    }

    #[test]
    fn a_region_whose_writes_fail_and_succeed_at_once_is_counted_once() {
        let (writes, backoff) = (Writes::default(), Backoff::new());
        thread::scope(|scope| {
            let fails = scope.spawn(|| (0..200_000).for_each(|_| _ = writes.failed(&backoff)));
            while !fails.is_finished() {
                writes.succeeded(&backoff);
                assert!(writes.failing() <= 2, "{} regions", writes.failing());
            }
        });
        writes.succeeded(&backoff);
        assert_eq!(writes.failing(), 0);
    }
}
