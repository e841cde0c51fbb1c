//! The pages of a region that were written since the last question.
//!
//! The kernel keeps the record: each page arrives write-protected, and the first write removes the
//! marker (`UFFD_FEATURE_WP_ASYNC`). A scan returns the pages without a marker and sets it again. A
//! store beside a scan is found by it or by the next one, because it faults again if the marker is back.
//! A system call that takes frames first and writes to them after the scan leaves no record: our own
//! calls run [`beside_scans`](WrittenPages::beside_scans). Pages arrive by a copy only, because a move
//! and the zero page have no marker.
//!
//! A scan ends the record for all uses. What the scan of one use finds is kept for the others.
//!
//! A discard (`MADV_DONTNEED`) is a change too, once a written page was reported: the page has the
//! bytes of its source again. The kernel has no marker of an absent page, so this table remembers the
//! reported pages. One that is found absent is reported again. One that was filled again arrives
//! without a marker, which counts as written. Absent pages are looked for only where a discard is
//! possible, because that takes nearly as long as the scan for written pages.

use crate::error::BuildOption;
use crate::space::discards::{DiscardNotice, Discards};
use crate::space::page_table::{PageState, PageTable};
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::page_scan::PageScan;
use pagestitch_kernel::{AddressRange, Errno, Page, PageSize, Span};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A use of the record of written pages. Each use finds each written page once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordFor {
    /// The caller asks which pages have changed.
    Changes,
    /// Written pages go to their sources. A page that was discarded has the bytes of its source, which
    /// is no change.
    WriteBack,
}

impl RecordFor {
    /// The option that asks for the record.
    pub(crate) const fn option(self) -> BuildOption {
        match self {
            Self::Changes => BuildOption::TrackChanges,
            Self::WriteBack => BuildOption::WriteBack,
        }
    }
}

/// The uses of a region's record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RecordUses {
    changes: bool,
    write_back: bool,
}

impl RecordUses {
    pub(crate) const fn add(&mut self, used_for: RecordFor) {
        match used_for {
            RecordFor::Changes => self.changes = true,
            RecordFor::WriteBack => self.write_back = true,
        }
    }

    pub(crate) const fn has(self, used_for: RecordFor) -> bool {
        match used_for {
            RecordFor::Changes => self.changes,
            RecordFor::WriteBack => self.write_back,
        }
    }

    /// True if there is a use.
    pub(crate) const fn any(self) -> bool {
        self.changes || self.write_back
    }

    /// The option that asks for the record, for errors about it.
    pub(crate) const fn option(self) -> Option<BuildOption> {
        match self {
            Self { write_back: true, .. } => Some(RecordFor::WriteBack.option()),
            Self { changes: true, .. } => Some(RecordFor::Changes.option()),
            Self { changes: false, write_back: false } => None,
        }
    }
}

/// Finds the written pages of a region.
#[derive(Debug)]
pub(crate) struct WrittenPages {
    pub(crate) uses: RecordUses,
    /// Told by the readers of events.
    pub(crate) notice: DiscardNotice,
    scan: PageScan,
    /// A bit for each page that was reported, and may have other bytes than its sources since.
    reported: AtomicTable,
    /// Locked by [`take`](Self::take), so that each change has one finder.
    turn: Mutex<Turn>,
    /// By use: pages for the next call of [`take`](Self::take). A lock of its own, because a scan takes a
    /// millisecond for each GiB, and a write beside it does not wait.
    returned: [Mutex<Returned>; 2],
    scans: Scans,
}

#[derive(Debug, Default)]
struct Turn {
    /// Covers all pages with a bit in `reported`.
    bounds: Option<Span>,
}

/// Pages that a caller has returned, or that the scan of another use has found, which may ask seldom, or never.
///
/// Invariant: spans that neither overlap nor touch, each by its first page with its end.
#[derive(Debug, Default)]
struct Returned(BTreeMap<usize, usize>);

impl Returned {
    fn add(&mut self, spans: &[Span]) {
        for span in spans.iter().filter(|span| !span.is_empty()) {
            let (mut first, mut end) = (span.first.0, span.end().0);
            while let Some((&known, &last)) =
                self.0.range(..=end).next_back().filter(|(_, last)| **last >= first)
            {
                self.0.remove(&known);
                (first, end) = (first.min(known), end.max(last));
            }
            self.0.insert(first, end);
        }
    }

    /// Takes the pages of a span.
    fn take(&mut self, span: Span) -> Vec<Span> {
        let mut taken = Vec::new();
        let (first, end) = (span.first.0, span.end().0);
        while let Some((&known, &last)) = self.0.range(..end).next_back().filter(|(_, last)| **last > first) {
            self.0.remove(&known);
            taken.push(gap(Page(known.max(first)), Page(last.min(end))));
            self.add(&[gap(Page(known), Page(first)), gap(Page(end), Page(last))]);
        }
        taken
    }
}

/// The number of scans that have begun, and of those that have ended: odd during a scan.
#[derive(Debug, Default)]
struct Scans(AtomicU64);

impl Scans {
    /// Begins a scan, which ends with the guard.
    fn begin(&self) -> Scan<'_> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Scan(self)
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// A scan that goes on.
struct Scan<'s>(&'s Scans);

impl Drop for Scan<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl WrittenPages {
    /// For a region of `pages` pages.
    pub(super) fn new(pages: NonZeroUsize, uses: RecordUses) -> Result<Self, Errno> {
        let words = pages.get().div_ceil(WORD_PAGES);
        let reported = AtomicTable::new(NonZeroUsize::new(words).expect("a region has pages"))?;
        let (notice, scan) = (DiscardNotice::default(), PageScan::open()?);
        let (turn, returned, scans) = Default::default();
        Ok(Self { uses, notice, scan, reported, turn, returned, scans })
    }

    /// True if a page that is filled arrives write-protected. A page that was reported as written and
    /// then discarded does not, because its bytes change by the fill.
    pub(crate) fn arrives_armed(&self, page: Page) -> bool {
        self.reported[page.0 / WORD_PAGES].load(Ordering::SeqCst) & bit(page) == 0
    }

    /// The leading pages of a span, at least one, that arrive alike: write-protected, or not.
    pub(crate) fn alike(&self, span: Span) -> Span {
        let armed = self.arrives_armed(span.first);
        let other = span.iter().position(|page| self.arrives_armed(page) != armed);
        span.prefix(other.unwrap_or(span.pages))
    }

    /// The pages of a span that were written since the last call for this use, ascending, as runs that do not
    /// touch. After an error, they are left for the next call. `range` has the addresses of all pages.
    pub(crate) fn take(
        &self,
        used_for: RecordFor,
        (range, size): (AddressRange, PageSize),
        span: Span,
        (pages, discards): (&PageTable, Discards),
    ) -> Result<Vec<Span>, Errno> {
        let at = Addresses { range, size };
        let mut turn = self.turn.lock();
        let (mut found, mut written) = (Vec::new(), Vec::new());
        let returned = self.returned(used_for).lock().take(span);
        for returned in returned {
            self.take_unless_poisoned(returned, pages, &mut turn, &mut found);
        }
        let may_be_discarded = discards == Discards::Seen || self.notice.is_possible();
        let looks = used_for == RecordFor::Changes && may_be_discarded;
        let discarded = if looks { self.take_discarded(&at, &turn, &mut found) } else { Ok(()) };
        let taken = discarded.and_then(|()| self.take_written(&at, span, pages, &mut turn, &mut written));
        // The scan has ended the kernel's record of these pages for each use.
        let others = USES.into_iter().filter(|other| *other != used_for);
        others.for_each(|other| self.give_back(other, &written));
        found.append(&mut written);
        let found = merged(found);
        if let Err(errno) = taken {
            self.give_back(used_for, &found);
            return Err(errno);
        }
        Ok(found)
    }

    fn returned(&self, used_for: RecordFor) -> &Mutex<Returned> {
        &self.returned[used_for as usize]
    }

    /// Calls `each` with the runs of a span's pages that the kernel has not mapped and that have no marker.
    pub(crate) fn absent(
        &self,
        (range, size): (AddressRange, PageSize),
        span: Span,
        mut each: impl FnMut(Span),
    ) -> Result<(), Errno> {
        let at = Addresses { range, size };
        self.scan.absent(at.range_of(span), |run| each(at.span_of(run)))
    }

    /// Runs a system call that takes the frames of a span and then writes to them. The markers end when it takes the
    /// frames: a scan before it writes returns the pages with their old bytes, and arms them for nothing. So the
    /// pages of a call beside a scan are returned for the next one.
    pub(crate) fn beside_scans<R>(&self, span: Span, write: impl FnOnce() -> R) -> R {
        let before = self.scans.count();
        let written = write();
        // A processor may let the load below overtake the write of the bytes. A scan in between would not be
        // counted, and the reader of the bytes after it would miss them.
        fence(Ordering::SeqCst);
        if before % 2 == 1 || self.scans.count() != before {
            USES.into_iter().for_each(|used_for| self.give_back(used_for, &[span]));
        }
        written
    }

    /// Returns pages whose bytes could not be saved, so that the next call for this use finds them again.
    pub(crate) fn give_back(&self, used_for: RecordFor, spans: &[Span]) {
        if self.uses.has(used_for) {
            self.returned(used_for).lock().add(spans);
        }
    }

    /// Finds the pages of a returned span, without those that were discarded since, and whose source has
    /// failed: such a page has no bytes to save. It is reported once it has those of its source.
    fn take_unless_poisoned(&self, span: Span, pages: &PageTable, turn: &mut Turn, found: &mut Vec<Span>) {
        if span.iter().all(|page| pages.state(page) != PageState::Poisoned) {
            return found.push(span);
        }
        self.set_reported(span, turn);
        found.extend(without_poisoned(span, pages));
    }

    fn set_reported(&self, span: Span, turn: &mut Turn) {
        if !self.uses.has(RecordFor::Changes) {
            return;
        }
        for (word, bits) in words(span) {
            self.reported[word].fetch_or(bits, Ordering::SeqCst);
        }
        turn.bounds = Some(turn.bounds.map_or(span, |bounds| covering(bounds, span)));
    }

    /// Finds reported pages that are absent, and removes their bits: from now on they have the bytes of
    /// their sources, until they are written.
    fn take_discarded(&self, at: &Addresses, turn: &Turn, found: &mut Vec<Span>) -> Result<(), Errno> {
        let mut rest = turn.bounds.unwrap_or(Page(0).span().prefix(0));
        while !rest.is_empty() {
            let window = rest.prefix(WINDOW_PAGES);
            rest = rest.without_prefix(WINDOW_PAGES);
            let Some(part) = self.with_bits(window) else { continue };
            self.scan.absent(at.range_of(part), |run| self.take_bits(at.span_of(run), found))?;
        }
        Ok(())
    }

    /// The smallest part of a span that holds all of its pages with a bit, in whole words.
    fn with_bits(&self, span: Span) -> Option<Span> {
        let used = |&(word, bits): &(usize, u64)| self.reported[word].load(Ordering::SeqCst) & bits != 0;
        let mut used = words(span).filter(used).map(|(word, _)| word);
        let first = used.next()?;
        let last = used.last().unwrap_or(first);
        let start = Page((first * WORD_PAGES).max(span.first.0));
        Some(gap(start, Page(((last + 1) * WORD_PAGES).min(span.end().0))))
    }

    /// Adds the pages of a span with a bit, without the bit.
    fn take_bits(&self, span: Span, found: &mut Vec<Span>) {
        for (word, bits) in words(span) {
            let mut taken = match self.reported[word].load(Ordering::SeqCst) & bits {
                0 => continue,
                _ => self.reported[word].fetch_and(!bits, Ordering::SeqCst) & bits,
            };
            while taken != 0 {
                found.push(Page(word * WORD_PAGES + taken.trailing_zeros() as usize).span());
                taken &= taken - 1;
            }
        }
    }

    /// Finds written pages, and arms them again.
    fn take_written(
        &self,
        at: &Addresses,
        span: Span,
        pages: &PageTable,
        turn: &mut Turn,
        found: &mut Vec<Span>,
    ) -> Result<(), Errno> {
        let _scan = self.scans.begin();
        self.scan.take_written(at.range_of(span), |run, in_memory| {
            let span = at.span_of(run);
            let from = found.len();
            if in_memory {
                found.push(span);
            } else {
                // A poison marker is no write.
                found.extend(without_poisoned(span, pages));
            }
            found[from..].iter().for_each(|span| self.set_reported(*span, turn));
        })
    }
}

/// The addresses of a region's pages.
struct Addresses {
    range: AddressRange,
    size: PageSize,
}

impl Addresses {
    fn range_of(&self, span: Span) -> AddressRange {
        let first = self.size.offset_of(span.first) as usize;
        self.range.without_prefix(first).prefix(self.size.bytes_of(span))
    }

    fn span_of(&self, range: AddressRange) -> Span {
        let first = self.size.page_at((range.start() - self.range.start()) as u64);
        Span { first, pages: range.bytes() / self.size.bytes() }
    }
}

/// The pages of a span that are not poisoned, in runs of one.
fn without_poisoned(span: Span, pages: &PageTable) -> impl Iterator<Item = Span> {
    span.iter().filter(|page| pages.state(*page) != PageState::Poisoned).map(Page::span)
}

/// Ascending runs that neither overlap nor touch.
fn merged(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable_by_key(|span| span.first);
    let mut runs: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match runs.last_mut() {
            Some(last) if span.first <= last.end() => *last = covering(*last, span),
            _ => runs.push(span),
        }
    }
    runs
}

/// The smallest span that holds both.
fn covering(one: Span, other: Span) -> Span {
    let first = one.first.min(other.first);
    gap(first, one.end().max(other.end()))
}

const fn gap(start: Page, end: Page) -> Span {
    Span { first: start, pages: end.0.saturating_sub(start.0) }
}

const fn bit(page: Page) -> u64 {
    1 << (page.0 % WORD_PAGES)
}

/// The words of a table that hold the bits of a span, with those bits.
fn words(span: Span) -> impl Iterator<Item = (usize, u64)> {
    let mut rest = span;
    std::iter::from_fn(move || {
        let (word, first) = (rest.first.0 / WORD_PAGES, rest.first.0 % WORD_PAGES);
        let now = rest.prefix(WORD_PAGES - first);
        rest = rest.without_prefix(now.pages);
        let ones = u64::MAX >> (WORD_PAGES - now.pages.max(1));
        (!now.is_empty()).then_some((word, ones << first))
    })
}

const USES: [RecordFor; 2] = [RecordFor::Changes, RecordFor::WriteBack];
/// The pages of a word.
const WORD_PAGES: usize = u64::BITS as usize;
/// The most pages in which one scan looks for absent ones: 128 MiB, so that it skips the parts of a
/// region in which nothing was written.
const WINDOW_PAGES: usize = 32_768;

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn span(first: usize, pages: usize) -> Span {
        Span { first: Page(first), pages }
    }

    #[test]
    fn runs_are_merged_where_they_touch_or_overlap() {
        let spans = vec![span(9, 1), span(1, 2), span(3, 1), span(8, 4), span(20, 1)];
        assert_eq!(merged(spans), [span(1, 3), span(8, 4), span(20, 1)]);
        assert_eq!(merged(Vec::new()), []);
    }

    fn changes() -> RecordUses {
        let mut uses = RecordUses::default();
        uses.add(RecordFor::Changes);
        uses
    }

    #[test]
    fn returned_pages_are_taken_by_the_span_that_holds_them() {
        let mut returned = Returned::default();
        returned.add(&[span(0, 10), span(20, 5)]);
        assert_eq!(returned.take(span(4, 3)), [span(4, 3)]);
        let left: Vec<_> = returned.0.clone().into_iter().collect();
        assert_eq!(left, [(0, 4), (7, 10), (20, 25)]);
        assert_eq!(merged(returned.take(span(0, 100))).len(), 3);
        assert!(returned.0.is_empty());
    }

    #[test]
    fn pages_that_are_returned_again_and_again_take_no_more_memory() {
        let mut returned = Returned::default();
        for round in 0..10_000 {
            returned.add(&[span(round % 7 * 10, 1)]);
        }
        returned.add(&[span(5, 3), span(9, 2), span(7, 2)]);
        assert_eq!(returned.0.len(), 7);
        assert_eq!(merged(returned.take(span(0, 15))), [span(0, 1), span(5, 6)]);
        assert_eq!(merged(returned.take(span(0, 100))).len(), 5);
    }

    #[test]
    fn the_pages_of_a_write_beside_a_scan_are_returned() {
        let written = WrittenPages::new(NonZeroUsize::new(200).unwrap(), changes()).unwrap();
        let returned = || written.returned(RecordFor::Changes).lock().take(span(0, 200));
        written.beside_scans(span(1, 2), || ());
        assert_eq!(returned(), [], "no scan goes on");
        written.beside_scans(span(1, 2), || drop(written.scans.begin()));
        assert_eq!(returned(), [span(1, 2)]);
        let (scan, turn) = (written.scans.begin(), written.turn.lock());
        written.beside_scans(span(3, 4), || ());
        // It waits neither for the scan nor for its turn; and it has written no byte.
        written.beside_scans(span(5, 0), || ());
        drop((scan, turn));
        assert_eq!(returned(), [span(3, 4)]);
    }

    #[test]
    fn a_scan_that_panics_has_ended() {
        let scans = Scans::default();
        let panics = || {
            let _scan = scans.begin();
            panic!("in a callback");
        };
        catch_unwind(AssertUnwindSafe(panics)).unwrap_err();
        assert_eq!(scans.count(), 2);
    }

    #[test]
    fn the_words_of_a_span_hold_its_bits() {
        let bits: Vec<_> = words(span(62, 67)).collect();
        assert_eq!(bits, [(0, 0b11 << 62), (1, u64::MAX), (2, 1)]);
        assert_eq!(words(span(5, 0)).count(), 0);
    }

    #[test]
    fn pages_arrive_alike_up_to_the_first_reported_one() {
        let written = WrittenPages::new(NonZeroUsize::new(200).unwrap(), changes()).unwrap();
        written.set_reported(span(70, 2), &mut Turn::default());
        assert_eq!(written.alike(span(0, 200)), span(0, 70));
        assert_eq!(written.alike(span(70, 130)), span(70, 2));
        assert_eq!(written.alike(span(72, 128)), span(72, 128));
        assert_eq!(written.with_bits(span(0, 200)), Some(span(64, 64)));
        let mut found = Vec::new();
        written.take_bits(span(71, 50), &mut found);
        assert_eq!(found, [span(71, 1)]);
        assert!(written.arrives_armed(Page(71)) && !written.arrives_armed(Page(70)));
    }
}
